// One call of tile attention as the native engine sees it: the operands, how both axes are cut, what may be seen.
#pragma once

#include "../native.h"

namespace tilewise {

constexpr int64_t ROWS = 128;    // queries in one strip: a product's rows
constexpr int64_t KEYS = 128;    // keys in one chunk: a product's columns
constexpr int64_t TALL = 32;     // query tiles at least this high are strips themselves
constexpr int64_t FAR = int64_t(1) << 61, HIDDEN = -(int64_t(1) << 62);  // as in tiles/visibility.py

// Field for field what native.py writes; every number is 64 bits wide.
struct Call {
  Grid q, k, v, lo, hi, pos, dense, keep, q_bounds, k_bounds, q_order, k_order, bias, out, lse;
  Grid d_out, d_lse, d_q, d_k, d_v, d_bias, pages, q_scale, k_scale, lists;
  int64_t q_size, k_size, threads;
  int64_t streamed;   // queries of a kv head up to which decoding goes by loops instead of products
  int64_t bias_rows;  // consecutive queries that share a row of the bias
  int64_t brief;      // nobody asked for the log-sum-exp: 1e-4 is enough for weights that are rounded to 8 bits
  double scale, softcap;
  double unified;    // one largest score for all partial softmaxes of decoding (FlashDecoding++); NaN for none

  // With `lists [batch, 1 | kv heads | heads, queries, *]` a query reads the keys that its list names, -1 being none, and
  // limits and positions are the same for heads that share a list.
  // With `pages [batch, *]`, k and v are pools [pages, kv heads, tokens of a page, depth], and entry j of a batch
  // entry's row says in which page its tokens j * tokens to (j + 1) * tokens - 1 lie.
  int64_t batch() const { return q.size[0]; }
  int64_t heads() const { return q.size[1]; }
  int64_t kv_heads() const { return k.size[1]; }
  int64_t group() const { return heads() / kv_heads(); }
  int64_t queries() const { return q.size[2]; }
  int64_t keys() const { return pos.size[2]; }
  int64_t depth() const { return q.size[3]; }
  int64_t values() const { return v.size[3]; }
  int64_t axes() const { return lo.size[3]; }
  int64_t base(const Grid& grid, int64_t b, int64_t h) const { return grid.base(b, h, heads(), group()); }

  // Offset of a token of x, which is k or v.
  int64_t row(const Grid& x, int64_t b, int64_t kv, int64_t t) const {
    if (!pages) return b * x.stride[0] + kv * x.stride[1] + t * x.stride[2];
    const int64_t page = pages.at<int64_t>(b * pages.stride[0])[t / x.size[2] * pages.stride[1]];
    return page * x.stride[0] + kv * x.stride[1] + t % x.size[2] * x.stride[2];
  }
};

// How one axis is cut for one (batch, head): tile t covers places [start(t), start(t + 1)).
struct Cut {
  const int64_t* bounds;  // null when all tiles are `size` long
  int64_t step, size, n, count;

  int64_t start(int64_t t) const { return bounds ? bounds[t * step] : std::min(t * size, n); }
};

inline Cut cut(const Call& c, const Grid& bounds, int64_t size, int64_t n, int64_t b, int64_t h) {
  if (!bounds) return {nullptr, 0, size, n, (n + size - 1) / size};
  return {bounds.at<int64_t>(c.base(bounds, b, h)), bounds.stride[2], size, n, bounds.size[2] - 1};
}

inline int64_t token(const Grid& order, int64_t base, int64_t place) {
  return order ? order.at<int64_t>(base)[place * order.stride[2]] : place;
}

// A run of keys of one tile, `padded` to a width that products like.
struct Chunk {
  int64_t tile, start, width, padded, offset;
};

inline int64_t padded_width(int64_t width) { return round_up(width, 16); }

struct Chunks {
  std::vector<Chunk> list;
  std::vector<int64_t> first;  // of each tile; one more at the end
  int64_t padded = 0;          // of all together

  Chunks(const Cut& cut, int64_t longest) {
    first.push_back(0);
    for (int64_t t = 0; t < cut.count; ++t) {
      const int64_t end = cut.start(t + 1);
      for (int64_t at = cut.start(t); at < end; at += longest) {
        const int64_t width = std::min(longest, end - at);
        list.push_back({t, at, width, padded_width(width), padded});
        padded += padded_width(width);
      }
      first.push_back(static_cast<int64_t>(list.size()));
    }
  }
};

// Positions of one kv head's keys in the order and padding of its chunks, and how far each chunk reaches.
struct Positions {
  std::vector<int64_t> pos;          // [axes][padded]
  std::vector<int64_t> low, high;    // [chunks][axes], hidden keys left out of `low`
  std::vector<uint8_t> hides, runs;  // per chunk: some slot is hidden; positions follow one another by 1
  std::vector<int64_t> tokens;       // [padded], the token in each slot; only where bias or grid ask for it

  void fill(const Call& c, int64_t b, int64_t kv, const Chunks& chunks) {
    const int64_t axes = c.axes(), h = kv * c.group(), count = chunks.list.size();
    const bool want_tokens = c.bias || c.dense || c.d_bias;
    pos.assign(axes * chunks.padded, HIDDEN);
    low.assign(count * axes, FAR);
    high.assign(count * axes, HIDDEN);
    hides.assign(count, 0);
    runs.assign(count, axes == 1);
    tokens.assign(want_tokens ? chunks.padded : 0, 0);
    const int64_t* from = c.pos.at<int64_t>(c.base(c.pos, b, h));
    const int64_t order = c.k_order ? c.base(c.k_order, b, h) : 0;
    for (int64_t i = 0; i < count; ++i) {
      const Chunk& chunk = chunks.list[i];
      hides[i] = chunk.width < chunk.padded;
      for (int64_t j = 0; j < chunk.width; ++j) {
        const int64_t t = token(c.k_order, order, chunk.start + j);
        if (want_tokens) tokens[chunk.offset + j] = t;
        for (int64_t a = 0; a < axes; ++a) {
          const int64_t p = from[t * c.pos.stride[2] + a * c.pos.stride[3]];
          pos[a * chunks.padded + chunk.offset + j] = p;
          if (p == HIDDEN) hides[i] = 1;
          if (p != HIDDEN) low[i * axes + a] = std::min(low[i * axes + a], p);
          high[i * axes + a] = std::max(high[i * axes + a], p);
          if (j && p != pos[chunk.offset] + j) runs[i] = 0;
        }
        if (pos[chunk.offset] == HIDDEN) runs[i] = 0;
      }
    }
  }
};

// What the queries of a strip may see, row by row and together.
struct Limits {
  std::vector<int64_t> lo, hi;                          // [axes][ROWS]
  std::vector<int64_t> lo_min, lo_max, hi_min, hi_max;  // [axes]
  std::vector<int64_t> tokens;                          // [ROWS]
  int64_t rows = 0;

  void clear(int64_t axes) {
    lo.resize(axes * ROWS);
    hi.resize(axes * ROWS);
    lo_min.assign(axes, FAR);
    lo_max.assign(axes, -FAR);
    hi_min.assign(axes, FAR);
    hi_max.assign(axes, -FAR);
    tokens.resize(ROWS);
    rows = 0;
  }

  void add(const Call& c, int64_t lo_base, int64_t hi_base, int64_t t) {
    for (int64_t a = 0; a < c.axes(); ++a) {
      const int64_t l = c.lo.at<int64_t>(lo_base)[t * c.lo.stride[2] + a * c.lo.stride[3]];
      const int64_t u = c.hi.at<int64_t>(hi_base)[t * c.hi.stride[2] + a * c.hi.stride[3]];
      lo[a * ROWS + rows] = l;
      hi[a * ROWS + rows] = u;
      lo_min[a] = std::min(lo_min[a], l);
      lo_max[a] = std::max(lo_max[a], l);
      hi_min[a] = std::min(hi_min[a], u);
      hi_max[a] = std::max(hi_max[a], u);
    }
    tokens[rows++] = t;
  }

  // Tokens first to last - 1 at once, in their own order.
  void add_run(const Call& c, int64_t lo_base, int64_t hi_base, int64_t first, int64_t last) {
    if (c.axes() != 1 || c.lo.stride[2] != 1 || c.hi.stride[2] != 1) {
      for (int64_t t = first; t < last; ++t) add(c, lo_base, hi_base, t);
      return;
    }
    const int64_t *l = c.lo.at<int64_t>(lo_base + first), *u = c.hi.at<int64_t>(hi_base + first);
    const int64_t n = last - first;
    int64_t low = lo_min[0], low_top = lo_max[0], high_bottom = hi_min[0], high = hi_max[0];
    for (int64_t i = 0; i < n; ++i) {
      lo[rows + i] = l[i];
      hi[rows + i] = u[i];
      tokens[rows + i] = first + i;
      low = std::min(low, l[i]);
      low_top = std::max(low_top, l[i]);
      high_bottom = std::min(high_bottom, u[i]);
      high = std::max(high, u[i]);
    }
    lo_min[0] = low;
    lo_max[0] = low_top;
    hi_min[0] = high_bottom;
    hi_max[0] = high;
    rows += n;
  }
};

enum Sight : uint8_t { NONE = 0, PARTIAL = 1, WHOLE = 2 };

// How much of a chunk the rows of `limits` see. NONE and WHOLE are certain.
inline Sight sight(const Call& c, const Limits& limits, const Positions& keys, int64_t chunk) {
  const int64_t axes = c.axes();
  bool whole = !keys.hides[chunk] && !c.dense;
  for (int64_t a = 0; a < axes; ++a) {
    const int64_t low = keys.low[chunk * axes + a], high = keys.high[chunk * axes + a];
    if (limits.hi_max[a] < low || limits.lo_min[a] > high) return NONE;
    whole = whole && limits.lo_max[a] <= low && high <= limits.hi_min[a];
  }
  return whole ? WHOLE : PARTIAL;
}

}  // namespace tilewise
