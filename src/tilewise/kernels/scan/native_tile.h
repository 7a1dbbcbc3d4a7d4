// A tile of up to TILE tokens: its decays, and the scores of queries and earlier keys under them.
//
// Factors between two tokens are products of the steps' own factors, multiplied on from row to row: nothing is divided
// and nothing overflows. With one decay for a head they form a triangle that scores are multiplied with. With decays by
// channel, pairs in the two halves of a block are scored relative to the border between them by one product, for blocks
// of twice LANES tokens and more; within LANES tokens keys are decayed step by step.
#pragma once

#include "native_call.h"

namespace tilewise {

constexpr int64_t SCORES_LD = TILE + 16;  // no power of two

inline void scale_row(float* x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}
inline float dot(const float* x, const float* y, int64_t n) {  // n is a multiple of LANES
  Floats sum{};
  for (int64_t i = 0; i < n; i += LANES) sum += load<Floats>(x + i) * load<Floats>(y + i);
  return sum_of(sum);
}

// Rows of a triangular product, strip by strip: work(first row, columns up to the end of the strip).
template <typename Work>
void strips(int64_t rows, const Work& work) {
  for (int64_t r = 0; r < rows; r += STRIP) work(r, std::min(STRIP, rows - r), std::min(r + STRIP, rows));
}

// c [rows, n] += a b, where a [rows, rows] is 0 above its diagonal.
inline void lower_product(int64_t rows, int64_t n, const float* a, const float* b, int64_t ldb, float* c, int64_t ldc) {
  strips(rows, [&](int64_t r, int64_t high, int64_t wide) {
    product(high, n, wide, a + r * SCORES_LD, SCORES_LD, b, ldb, c + r * ldc, ldc, true);
  });
}

// c [rows, n] += a b, where a [rows, rows] is 0 below its diagonal.
inline void upper_product(int64_t rows, int64_t n, const float* a, const float* b, int64_t ldb, float* c, int64_t ldc) {
  for (int64_t r = 0; r < rows; r += STRIP)
    product(std::min(STRIP, rows - r), n, rows - r, a + r * SCORES_LD + r, SCORES_LD, b + r * ldb, ldb, c + r * ldc, ldc,
            true);
}

// Transposed: to [columns, rows], rows and columns multiples of LANES.
inline void turn(const float* from, int64_t ld, int64_t rows, int64_t columns, float* to, int64_t ld_to) {
  transpose(reinterpret_cast<const uint32_t*>(from), ld, rows, rows, columns, reinterpret_cast<uint32_t*>(to), ld_to);
}

class Tile {
 public:
  int64_t rows = 0;         // padded to a multiple of LANES
  int64_t depth, ld;        // of queries and keys, padded; ld is no power of two
  float *steps, *before, *after;  // factors: of each token; from the beginning to it; from it to the end
  bool channels, decays;

  Tile(const Scan& c)
      : depth(round_up(c.depth(), LANES)), ld(depth % 64 ? depth : depth + 16), channels(c.channels), decays(bool(c.decay)) {
    const int64_t each = TILE * (channels ? ld : 1);
    float* from = factors_.take<float>(3 * each);
    steps = from, before = from + each, after = from + 2 * each;
    if (!channels) return;
    moved_ = work_.take<float>(6 * TILE * ld + ld * SCORES_LD + ld);
    sums_ = moved_ + 6 * TILE * ld + ld * SCORES_LD;
  }

  // Reads the decays of tokens t .. t + n - 1.
  void read(const Scan& c, int64_t b, int64_t h, int64_t t, int64_t n) {
    rows = round_up(n, LANES);
    if (!decays) return;
    if (!channels) {
      float x = 1, y = 1;
      for (int64_t i = 0; i < rows; ++i) {
        steps[i] = i < n ? exp_of<false>(*row<float>(c.decay, b, h, t + i)) : 1.f;
        before[i] = x *= steps[i];
      }
      for (int64_t i = rows - 1; i >= 0; --i) {
        after[i] = y;
        y *= steps[i];
      }
      return;
    }
    for (int64_t i = 0; i < rows; ++i) {
      float* to = steps + i * ld;
      int64_t d = 0;
      if (i < n) {
        const float* from = row<float>(c.decay, b, h, t + i);
        for (; d < c.depth(); ++d) to[d] = from[d * c.decay.stride[3]];
        for (d = 0; d < c.depth(); ++d) to[d] = exp_of<false>(to[d]);
      }
      for (; d < ld; ++d) to[d] = 1;
    }
    multiply_on(0, rows, before);
    multiply_back(0, rows, after);
  }

  // Rows of x times the factors from the beginning of the tile to each token; or from each to the end.
  void decay_before(float* x, int64_t ldx, int64_t width) const { decay_rows(before, x, ldx, width); }
  void decay_after(float* x, int64_t ldx, int64_t width) const { decay_rows(after, x, ldx, width); }

  // Rows of `x [depth, width]` times the factors of the whole tile.
  void decay_state(float* x, int64_t ldx, int64_t width) const {
    if (!decays) return;
    for (int64_t d = 0; d < depth; ++d)
      scale_row(x + d * ldx, channels ? before[(rows - 1) * ld + d] : before[rows - 1], width);
  }

  // scores [rows, SCORES_LD] of q and earlier keys, and with themselves unless `strict`; 0 elsewhere. k [rows, ld],
  // turned [depth, SCORES_LD].
  void scores(const float* q, const float* k, const float* turned, bool strict, float* to) {
    if (channels) return scores_by_channel(q, k, turned, strict, to);
    strips(rows, [&](int64_t r, int64_t high, int64_t wide) {
      product(high, wide, depth, q + r * ld, ld, turned, SCORES_LD, to + r * SCORES_LD, SCORES_LD, false);
    });
    mask(strict, to);
  }

  // d_q and d_k [rows, ld] += what reaches them through scores, whose gradients `d_scores` are taken of all pairs and
  // changed; `made` are the scores times `sign`. `square` is memory for as many.
  void gradients(float* d_scores, const float* made, float sign, const float* q, const float* k, bool strict,
                 float* square, float* d_q, float* d_k, float* gate) {
    if (channels) return gradients_by_channel(d_scores, q, k, strict, square, d_q, d_k, gate);
    if (decays) gate_pairs(d_scores, made, sign, gate);
    mask(strict, d_scores);
    lower_product(rows, depth, d_scores, k, ld, d_q, ld);
    turn(d_scores, SCORES_LD, rows, rows, square, SCORES_LD);
    upper_product(rows, depth, square, q, ld, d_k, ld);
  }

  // Gradients of the log decays, `gate [rows, ld]` or `[rows]`, are sums over what passes a token: each is added up by
  // itself, since a difference of larger sums would lose what decays have made small.
  // Rows x that read the state before the tile pass all tokens up to their own.
  void gate_before(const float* x, const float* d_x, float* gate) {
    if (!decays) return;
    clear_sums();
    for (int64_t i = rows - 1; i >= 0; --i) {
      add_products(x + i * ld, d_x + i * ld);
      add_sums(gate, i);
    }
  }
  // Keys that the state after the tile has pass all tokens behind them.
  void gate_after(const float* x, const float* d_x, float* gate) {
    if (!decays) return;
    clear_sums();
    for (int64_t i = 0; i < rows; ++i) {
      add_sums(gate, i);
      add_products(x + i * ld, d_x + i * ld);
    }
  }
  // The state before the tile passes all of it; `totals [depth]` are products with what the state after is to become.
  void gate_through(float* totals, float* gate) {
    if (!decays) return;
    float sum = 0;
    for (int64_t d = 0; d < depth; ++d) {
      totals[d] *= channels ? before[(rows - 1) * ld + d] : before[rows - 1];
      sum += totals[d];
    }
    for (int64_t i = 0; i < rows; ++i) {
      if (!channels) gate[i] += sum;
      for (int64_t d = 0; d < depth && channels; ++d) gate[i * ld + d] += totals[d];
    }
  }
  int64_t gate_size() const { return channels ? TILE * ld : TILE; }

 private:
  // Factors of rows first .. last - 1 from the first of them on; or, each excluded, to the last.
  void multiply_on(int64_t first, int64_t last, float* to) const {
    std::memcpy(to + first * ld, steps + first * ld, ld * sizeof(float));
    for (int64_t i = first + 1; i < last; ++i)
      for (int64_t d = 0; d < ld; ++d) to[i * ld + d] = to[(i - 1) * ld + d] * steps[i * ld + d];
  }
  void multiply_back(int64_t first, int64_t last, float* to) const {
    for (int64_t d = 0; d < ld; ++d) to[(last - 1) * ld + d] = 1;
    for (int64_t i = last - 2; i >= first; --i)
      for (int64_t d = 0; d < ld; ++d) to[i * ld + d] = to[(i + 1) * ld + d] * steps[(i + 1) * ld + d];
  }

  void decay_rows(const float* factors, float* x, int64_t ldx, int64_t width) const {
    if (!decays) return;
    for (int64_t i = 0; i < rows; ++i) {
      if (!channels) {
        scale_row(x + i * ldx, factors[i], width);
      } else {
        for (int64_t d = 0; d < depth; ++d) x[i * ldx + d] *= factors[i * ld + d];
      }
    }
  }

  // Multiplies scores with the triangle of factors: row i is row i - 1 times the factor of token i.
  void mask(bool strict, float* to) const {
    alignas(64) float factors[TILE];
    for (int64_t i = 0; i < rows; ++i) {
      float* own = to + i * SCORES_LD;
      if (decays) {
        for (int64_t j = 0; j < rows; j += LANES) {
          if (j < i) store(factors + j, load<Floats>(factors + j) * steps[i]);
        }
        factors[i] = 1;
        for (int64_t j = 0; j < i; j += LANES) store(own + j, load<Floats>(own + j) * load<Floats>(factors + j));
      }
      const int64_t first = strict ? i : i + 1, end = round_up(i + 1, STRIP);
      for (int64_t j = first; j < end; ++j) own[j] = 0;
    }
  }

  // Calls work(first, middle, last) for blocks whose halves, of `smallest` tokens or more, are [first, middle) and
  // [middle, last).
  template <typename Work>
  void blocks(int64_t smallest, const Work& work) const {
    for (int64_t half = smallest; half < rows; half *= 2)
      for (int64_t first = 0; first + half < rows; first += 2 * half)
        work(first, first + half, std::min(first + 2 * half, rows));
  }

  // Both halves relative to the border between them: queries and keys, and by which factors.
  struct Halves {
    float *queries, *keys, *by_query, *by_key;
  };
  Halves halves(const float* q, const float* k, int64_t first, int64_t middle, int64_t last) const {
    float* at = moved_;
    const int64_t size = TILE * ld;
    const Halves made{at, at + size, at + 2 * size, at + 3 * size};
    multiply_on(middle, last, made.by_query);
    multiply_back(first, middle, made.by_key);
    for (int64_t i = middle * ld; i < last * ld; ++i) made.queries[i] = q[i] * made.by_query[i];
    for (int64_t i = first * ld; i < middle * ld; ++i) made.keys[i] = k[i] * made.by_key[i];
    return made;
  }

  void scores_by_channel(const float* q, const float* k, const float* turned, bool strict, float* to) {
    float* keys = moved_ + 6 * TILE * ld;  // [depth, SCORES_LD]
    blocks(LANES, [&](int64_t first, int64_t middle, int64_t last) {
      const Halves h = halves(q, k, first, middle, last);
      turn(h.keys + first * ld, ld, middle - first, depth, keys, SCORES_LD);
      product(last - middle, middle - first, depth, h.queries + middle * ld, ld, keys, SCORES_LD,
              to + middle * SCORES_LD + first, SCORES_LD, false);
    });
    Ints place;
    for (int64_t j = 0; j < LANES; ++j) place[j] = static_cast<int32_t>(j);
    for (int64_t r = 0; r < rows; r += LANES) {
      for (int64_t d = 0; d < depth; ++d) store(keys + d * LANES, load<Floats>(turned + d * SCORES_LD + r));
      for (int64_t i = 0; i < LANES; ++i) {
        const Ints earlier = place < static_cast<int32_t>(i);
        const float *step = steps + (r + i) * ld, *own = q + (r + i) * ld;
        Floats sums[4] = {};
        for (int64_t d = 0; d < depth; d += 4)
          for (int64_t u = 0; u < 4; ++u) {
            const Floats key = load<Floats>(keys + (d + u) * LANES), moved = earlier ? key * step[d + u] : key;
            store(keys + (d + u) * LANES, moved);
            sums[u] += own[d + u] * moved;
          }
        const Floats all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        const Ints seen = strict ? earlier : place <= static_cast<int32_t>(i);
        store(to + (r + i) * SCORES_LD + r, seen ? all : Floats{});
        // Later blocks of the same strip count as seen by products; nothing else writes them.
        for (int64_t j = r + LANES; j < round_up(r + 1, STRIP); ++j) to[(r + i) * SCORES_LD + j] = 0;
      }
    }
  }

  void clear_sums() {
    sum_ = 0;
    if (channels) std::memset(sums_, 0, ld * sizeof(float));
  }
  void add_products(const float* x, const float* y) {
    if (!channels) {
      sum_ += dot(x, y, depth);
    } else {
      for (int64_t d = 0; d < depth; ++d) sums_[d] += x[d] * y[d];
    }
  }
  void add_sums(float* gate, int64_t i) const {
    if (!channels) {
      gate[i] += sum_;
    } else {
      for (int64_t d = 0; d < depth; ++d) gate[i * ld + d] += sums_[d];
    }
  }

  // A pair of tokens passes the later one and all between: token s gets the sum over j < s <= i.
  void gate_pairs(const float* d_scores, const float* made, float sign, float* gate) const {
    alignas(64) float later[TILE] = {};
    for (int64_t s = rows - 1; s > 0; --s) {
      Floats sums{};
      for (int64_t j = 0; j < s; j += LANES) {
        const Floats own = load<Floats>(d_scores + s * SCORES_LD + j) * load<Floats>(made + s * SCORES_LD + j);
        store(later + j, load<Floats>(later + j) + own);
      }
      int64_t j = 0;
      for (; j + LANES <= s; j += LANES) sums += load<Floats>(later + j);
      float sum = sum_of(sums);
      for (; j < s; ++j) sum += later[j];
      gate[s] += sign * sum;
    }
  }

  void gradients_by_channel(const float* d_scores, const float* q, const float* k, bool strict, float* square, float* d_q,
                            float* d_k, float* gate) {
    float *d_queries = moved_ + 4 * TILE * ld, *d_keys = moved_ + 5 * TILE * ld;
    for (int64_t i = 0; i < rows && !strict; ++i) {
      const float own = d_scores[i * SCORES_LD + i];
      for (int64_t d = 0; d < depth; ++d) d_q[i * ld + d] += own * k[i * ld + d];
      for (int64_t d = 0; d < depth; ++d) d_k[i * ld + d] += own * q[i * ld + d];
    }
    blocks(1, [&](int64_t first, int64_t middle, int64_t last) {
      const Halves h = halves(q, k, first, middle, last);
      const int64_t high = last - middle, wide = middle - first;
      const float* own = d_scores + middle * SCORES_LD + first;
      float *to = d_queries + middle * ld, *back = d_keys + first * ld;
      if (wide >= LANES) {
        product(high, depth, wide, own, SCORES_LD, h.keys + first * ld, ld, to, ld, false);
        turn(own, SCORES_LD, high, wide, square, SCORES_LD);
        product(wide, depth, high, square, SCORES_LD, h.queries + middle * ld, ld, back, ld, false);
      } else {
        std::memset(to, 0, high * ld * sizeof(float));
        std::memset(back, 0, wide * ld * sizeof(float));
        for (int64_t i = 0; i < high; ++i)
          for (int64_t j = 0; j < wide; ++j) {
            const float weight = own[i * SCORES_LD + j];
            const float *key = h.keys + (first + j) * ld, *query = h.queries + (middle + i) * ld;
            for (int64_t d = 0; d < depth; ++d) to[i * ld + d] += weight * key[d];
            for (int64_t d = 0; d < depth; ++d) back[j * ld + d] += weight * query[d];
          }
      }
      clear_sums();
      for (int64_t i = last - 1; i >= middle; --i)
        for (int64_t d = 0; d < depth; ++d) {
          const float x = d_queries[i * ld + d] * h.by_query[i * ld + d];
          d_q[i * ld + d] += x;
          gate[i * ld + d] += sums_[d] += q[i * ld + d] * x;
        }
      clear_sums();
      for (int64_t j = first; j < middle; ++j)
        for (int64_t d = 0; d < depth; ++d) {
          const float x = d_keys[j * ld + d] * h.by_key[j * ld + d];
          d_k[j * ld + d] += x;
          gate[j * ld + d] += sums_[d];
          sums_[d] += k[j * ld + d] * x;
        }
    });
  }

  Buffer factors_, work_;
  float *moved_ = nullptr, *sums_ = nullptr;
  float sum_ = 0;
};

}  // namespace tilewise
