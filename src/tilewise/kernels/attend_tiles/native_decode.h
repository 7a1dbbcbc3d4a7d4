// Decoding: a few queries against many keys, bound by the memory that keys and values are read from.
//
// Nothing is packed that can be read where it lies. All queries of a kv head (its group times the query positions)
// are one small operand. The live chunks of all heads together are split evenly, wherever one head ends and the
// next begins ("stream-K", LeanAttention), so ragged batches keep every thread busy; what the parts of a head give
// is merged by their log-sum-exp.
//
// Up to `streamed` queries go past every key and value once, in plain loops at the pace of the memory; more of them
// are a product, where one read serves them all. Which is faster from where on is measured by native.py.
//
// With a unified maximum (FlashDecoding++) no partial softmax looks for its own: sums need no rescaling and merge by
// addition. A piece whose scores stray too far from it is computed again the usual way.
#pragma once

#include "native_forward.h"
#include "native_running.h"

namespace tilewise {

constexpr int64_t FEW = 32;      // queries of a kv head that decode together
constexpr int64_t LINE = 256;    // keys in one chunk
constexpr int64_t MOST_STREAMED = 8;  // queries that loops can take
constexpr float STRAY = 60;      // e^60 times any number of keys, and e^-60, are far from float32's limits
constexpr int64_t PIECES = 4;    // parts of the work for each thread

// scores[r][j] = queries[r] . keys[j] for one key, in float32.
template <typename X>
inline float dot(const X* key, const float* query, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < n; ++d) sum += get(key[d]) * query[d];
  return sum;
}

// out += sum of weights[j] * rows[j] over `count` rows, four at a time.
template <typename X>
inline void add_rows(const X* const* rows, const float* weights, int64_t count, int64_t n, float* out) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    const X *a = rows[j], *b = rows[j + 1], *c = rows[j + 2], *d = rows[j + 3];
    const float p = weights[j], q = weights[j + 1], r = weights[j + 2], s = weights[j + 3];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] += (p * get(a[i]) + q * get(b[i])) + (r * get(c[i]) + s * get(d[i]));
  }
  for (; j < count; ++j)
    for (int64_t i = 0; i < n; ++i) out[i] += weights[j] * get(rows[j][i]);
}

// The same two in bfloat16, a register of pairs at a time, for lengths that are whole registers. Queries are split into
// those that meet even and odd numbers.
constexpr int64_t PAIRS = 2 * LANES;

inline void dots(const BFloat16* const* keys, int64_t count, const float* even, const float* odd, int64_t n,
                 float* scores) {
  for (int64_t j = 0; j < count; j += LANES) {
    Floats sums[LANES];
    for (int64_t i = 0; i < LANES; ++i) {
      const BFloat16* key = keys[std::min(j + i, count - 1)];
      Floats x = {}, y = {};
      for (int64_t d = 0; d < n; d += PAIRS) {
        const Words pairs = load<Words>(key + d);
        x += evens_of(pairs) * load<Floats>(even + d / 2);
        y += odds_of(pairs) * load<Floats>(odd + d / 2);
      }
      sums[i] = x + y;
    }
    store(scores + j, sums_of(sums, std::make_index_sequence<LANES>()));
  }
}

template <int64_t REGISTERS>
inline void add_pairs(const BFloat16* const* rows, const float* weights, int64_t count, int64_t from, float* out) {
  Floats even[REGISTERS] = {}, odd[REGISTERS] = {};
  for (int64_t j = 0; j < count; ++j)
    for (int64_t r = 0; r < REGISTERS; ++r) {
      const Words pairs = load<Words>(rows[j] + from + r * PAIRS);
      even[r] += evens_of(pairs) * weights[j];
      odd[r] += odds_of(pairs) * weights[j];
    }
  for (int64_t r = 0; r < REGISTERS; ++r)
    for (int64_t i = 0; i < LANES; ++i) {
      out[from + r * PAIRS + 2 * i] += even[r][i];
      out[from + r * PAIRS + 2 * i + 1] += odd[r][i];
    }
}

inline void add_rows_in_pairs(const BFloat16* const* rows, const float* weights, int64_t count, int64_t n, float* out) {
  int64_t from = 0;
  for (; from + 4 * PAIRS <= n; from += 4 * PAIRS) add_pairs<4>(rows, weights, count, from, out);
  for (; from + 2 * PAIRS <= n; from += 2 * PAIRS) add_pairs<2>(rows, weights, count, from, out);
  for (; from < n; from += PAIRS) add_pairs<1>(rows, weights, count, from, out);
}

inline std::atomic<int64_t>& recomputed_pieces() {
  static std::atomic<int64_t> count{0};
  return count;
}

// Softmax sums of the queries of a kv head, and whether they share the unified maximum.
struct HeadSums {
  Running state[FEW];
  float seen[FEW];  // the largest score
  bool unified;
  float base;

  HeadSums(bool one, float value) : unified(one), base(value) {
    std::fill(seen, seen + FEW, -INF);
    if (one) std::fill(state, state + FEW, Running{value, 0});
  }

  // Weights of n scores of query r; returns what earlier sums must be multiplied by.
  template <typename T>
  float weigh(int64_t r, const float* scores, T* weights, int64_t n, float factor) {
    if (!unified) return weigh_row(scores, weights, n, factor, state[r]);
    float top = -INF, sum = 0;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < n; ++j) top = scores[j] > top ? scores[j] : top;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) {
      const float w = exp_of<false>(scores[j] * factor - base);
      put_weight(weights[j], w);
      sum += w;
    }
    seen[r] = std::max(seen[r], top * factor);
    state[r].sum += sum;
    return 1;
  }

  // Whether the unified maximum was near enough for `rows` queries; rows that saw nothing are then told so.
  bool settle(int64_t rows) {
    for (int64_t r = 0; r < rows && unified; ++r) {
      if (seen[r] == -INF && state[r].sum == 0) state[r].top = -INF;
      else if (!(std::fabs(seen[r] - base) <= STRAY)) return false;
    }
    return true;
  }
};

inline bool decodes(const Call& c) { return !c.q_scale && c.group() * c.queries() <= FEW && c.keys() >= 1; }

template <typename S, typename T>
class Decode {
 public:
  static void run(const Call& c) { Decode(c).run(); }

 private:
  struct Piece {
    int64_t head, first, last, slot;  // of the head's live chunks
  };
  struct Live {
    int64_t chunk;
    Sight sight;
  };
  struct Reach {
    std::vector<int64_t> low, high;  // [chunks][axes]
    std::vector<uint8_t> hides;
  };

  explicit Decode(const Call& call)
      : c_(call), rows_(call.group() * call.queries()), padded_rows_(round_up(rows_, 16)),
        depth_(product_depth<T>(call.depth())),
        streamed_(rows_ <= std::min(call.streamed, MOST_STREAMED) && call.k.stride[3] == 1 && call.v.stride[3] == 1),
        chunks_(chunk_all(c_, k_size(), LINE)) {}

  int64_t heads() const { return c_.batch() * c_.kv_heads(); }
  // Without a map any cut will do; pages are not crossed, so that a chunk lies in one piece.
  int64_t k_size() const { return c_.keep ? c_.k_size : c_.pages ? std::min(LINE, c_.k.size[2]) : LINE; }
  int64_t head_of(int64_t kv, int64_t row) const { return kv * c_.group() + row / c_.queries(); }

  int64_t q_token(int64_t b, int64_t h, int64_t place) const {
    return token(c_.q_order, c_.q_order ? c_.base(c_.q_order, b, h) : 0, place);
  }

  void run() {
    find_reach();
    live_.resize(heads());
    for_each_job(heads(), heads() * chunks_.at(0, 0).list.size() > 4096 ? c_.threads : 1, false,
                 [&](int64_t head) { find_live(head); });
    cut_pieces();
    const int64_t width = c_.values() + 2;  // of a partial result: outputs, largest score, sum
    const int64_t at = arena_.announce<float>(slots_ * rows_ * width);
    arena_.settle();
    parts_ = arena_.part<float>(at);
    constexpr bool tiles_unit = std::is_same_v<T, BFloat16>;
    for_each_job(starts_.size() - 1, c_.threads, tiles_unit, [&](int64_t worker) {
      thread_local Bench bench;
      for (int64_t i = starts_[worker]; i < starts_[worker + 1]; ++i) attend(pieces_[i], bench);
    });
    for (int64_t head = 0; head < heads(); ++head) merge(head);
  }

  // How far the positions of each chunk reach, once for all heads that share them.
  void find_reach() {
    const bool same = shared_by_heads(c_.pos) && shared_by_heads(c_.k_order) && shared_by_heads(c_.k_bounds);
    reach_.heads = c_.kv_heads();
    reach_.entries.resize(same ? 1 : heads());
    for (int64_t i = 0; i < static_cast<int64_t>(reach_.entries.size()); ++i) {
      const int64_t b = i / c_.kv_heads(), kv = i % c_.kv_heads(), axes = c_.axes();
      const std::vector<Chunk>& list = chunks_.at(b, kv).list;
      const int64_t* pos = c_.pos.at<int64_t>(c_.base(c_.pos, b, kv * c_.group()));
      const int64_t order = c_.k_order ? c_.base(c_.k_order, b, kv * c_.group()) : 0;
      Reach& reach = reach_.entries[i];
      reach.low.resize(list.size() * axes);
      reach.high.resize(list.size() * axes);
      reach.hides.resize(list.size());
      for (size_t n = 0; n < list.size(); ++n)
        for (int64_t a = 0; a < axes; ++a) {
          int64_t low = FAR, high = HIDDEN, least = FAR;
          for (int64_t j = 0; j < list[n].width; ++j) {
            const int64_t t = token(c_.k_order, order, list[n].start + j);
            const int64_t p = pos[t * c_.pos.stride[2] + a * c_.pos.stride[3]];
            low = std::min(low, p == HIDDEN ? FAR : p);
            least = std::min(least, p);
            high = std::max(high, p);
          }
          reach.low[n * axes + a] = low;
          reach.high[n * axes + a] = high;
          reach.hides[n] = least == HIDDEN;
        }
    }
  }

  const bool* kept(int64_t b, int64_t h, int64_t row) const {
    const Cut cuts = cut(c_, c_.q_bounds, c_.q_size, c_.queries(), b, h);
    int64_t t = 0;
    while (cuts.start(t + 1) <= row % c_.queries()) ++t;
    return c_.keep.at<bool>(c_.base(c_.keep, b, h) + t * c_.keep.stride[2]);
  }

  void find_live(int64_t head) {
    const int64_t b = head / c_.kv_heads(), kv = head % c_.kv_heads(), axes = c_.axes();
    const Reach& reach = reach_.at(b, kv);
    Limits limits;
    limits.clear(axes);
    std::vector<const bool*> keeps;
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t h = head_of(kv, r);
      limits.add(c_, c_.base(c_.lo, b, h), c_.base(c_.hi, b, h), q_token(b, h, r % c_.queries()));
      if (c_.keep) keeps.push_back(kept(b, h, r));
    }
    const std::vector<Chunk>& list = chunks_.at(b, kv).list;
    for (int64_t i = 0; i < static_cast<int64_t>(list.size()); ++i) {
      int64_t keeping = 0;
      for (const bool* keep : keeps) keeping += keep[list[i].tile * c_.keep.stride[3]];
      if (c_.keep && !keeping) continue;
      const bool padded = !streamed_ && list[i].width < list[i].padded;
      bool none = false, whole = !padded && !reach.hides[i] && !c_.dense && (!c_.keep || keeping == rows_);
      for (int64_t a = 0; a < axes; ++a) {
        const int64_t low = reach.low[i * axes + a], high = reach.high[i * axes + a];
        none = none || limits.hi_max[a] < low || limits.lo_min[a] > high;
        whole = whole && limits.lo_max[a] <= low && high <= limits.hi_min[a];
      }
      if (!none) live_[head].push_back({i, whole ? WHOLE : PARTIAL});
    }
  }

  // Cuts the live chunks of all heads, laid end to end, into equal parts.
  void cut_pieces() {
    int64_t total = 0;
    for (const auto& head : live_) total += head.size();
    const int64_t workers = std::clamp<int64_t>(total / 2, 1, PIECES * c_.threads);
    starts_.push_back(0);
    slot_of_.push_back(0);
    int64_t done = 0, worker = 0;
    for (int64_t head = 0; head < heads(); ++head) {
      const int64_t count = live_[head].size();
      for (int64_t at = 0; at < count;) {
        const int64_t end = (worker + 1) * total / workers;
        const int64_t last = std::min(count, at + end - done);
        if (last > at) pieces_.push_back({head, at, last, slots_++});
        done += last - at;
        at = last;
        if (done == end) {
          starts_.push_back(pieces_.size());
          ++worker;
        }
      }
      slot_of_.push_back(slots_);
    }
  }

  struct Bench {
    Buffer memory[9];
    std::vector<int64_t> tokens;
    std::vector<const bool*> keeps;
  };

  float* part(int64_t slot) const { return parts_ + slot * rows_ * (c_.values() + 2); }

  void attend(const Piece& piece, Bench& w) const {
    const int64_t b = piece.head / c_.kv_heads(), kv = piece.head % c_.kv_heads(), values = c_.values();
    const Scoring how(c_, chunks_.at(b, kv));
    T* rows = w.memory[0].template take<T>(FEW * depth_);
    T* queries = w.memory[1].template take<T>(FEW * depth_);
    w.keeps.clear();
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t h = head_of(kv, r), t = q_token(b, h, r % c_.queries());
      copy_row(c_.q.at<S>(b * c_.q.stride[0] + h * c_.q.stride[1] + t * c_.q.stride[2]), c_.q.stride[3], c_.depth(),
               rows + r * depth_);
      for (int64_t d = c_.depth(); d < depth_; ++d) put(rows[r * depth_ + d], 0.f);
      if (c_.keep) w.keeps.push_back(kept(b, h, r));
    }
    if (streamed_) {
      float* wide = w.memory[2].template take<float>(MOST_STREAMED * c_.depth());
      for (int64_t r = 0; r < rows_; ++r)
        for (int64_t d = 0; d < c_.depth(); ++d) wide[r * c_.depth() + d] = get(rows[r * depth_ + d]);
    } else {
      pack_transposed(rows, depth_, rows_, padded_rows_, c_.depth(), queries);
    }
    float* outs = part(piece.slot);
    HeadSums sums(!std::isnan(c_.unified), static_cast<float>(c_.unified));
    pass(piece, b, kv, how, queries, w, sums, outs);
    if (!sums.settle(rows_)) {
      ++recomputed_pieces();
      sums = HeadSums(false, 0);
      pass(piece, b, kv, how, queries, w, sums, outs);
    }
    float* ends = outs + rows_ * values;
    for (int64_t r = 0; r < rows_; ++r) {
      ends[2 * r] = sums.state[r].top;
      ends[2 * r + 1] = sums.state[r].sum;
    }
  }

  void pass(const Piece& piece, int64_t b, int64_t kv, const Scoring& how, const T* queries, Bench& w, HeadSums& sums,
            float* outs) const {
    std::memset(outs, 0, rows_ * c_.values() * sizeof(float));
    for (int64_t i = piece.first; i < piece.last; ++i) {
      const Live& live = live_[piece.head][i];
      const Chunk* next = i + 1 < piece.last ? &how.chunks.list[live_[piece.head][i + 1].chunk] : nullptr;
      if (!streamed_) {
        add(b, kv, how, live, next, queries, w, sums, outs);
      } else if (rows_ == 1) {
        stream<true>(b, kv, how, live, next, w, sums, outs);
      } else {
        stream<false>(b, kv, how, live, next, w, sums, outs);
      }
    }
  }

  // Where the rows of a chunk of x lie.
  void find_rows(const Grid& x, int64_t b, int64_t kv, const Chunk& at, const S** rows) const {
    const int64_t order = c_.k_order ? c_.base(c_.k_order, b, kv * c_.group()) : 0;
    if (!c_.k_order && !c_.pages) {
      const S* first = x.at<S>(c_.row(x, b, kv, at.start));
      for (int64_t j = 0; j < at.width; ++j) rows[j] = first + j * x.stride[2];
      return;
    }
    for (int64_t j = 0; j < at.width; ++j) rows[j] = x.at<S>(c_.row(x, b, kv, token(c_.k_order, order, at.start + j)));
  }

  static void foresee(const S* row, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / sizeof(S)) __builtin_prefetch(row + i, 0, 2);
  }

  // Each row asks for the row that the next loop reads at that place: values while keys are read, and the next
  // chunk's keys while values are.
  template <bool single>
  void stream(int64_t b, int64_t kv, const Scoring& how, const Live& live, const Chunk* next, Bench& w, HeadSums& sums,
              float* outs) const {
    const Chunk& at = how.chunks.list[live.chunk];
    const int64_t values = c_.values(), depth = c_.depth();
    const float* queries = w.memory[2].template take<float>(MOST_STREAMED * depth);
    float* scores = w.memory[3].template take<float>(LINE * FEW);
    float* wide = w.memory[4].template take<float>(8 * std::max(depth, values));
    const S *keys[LINE], *own[LINE], *later[LINE];
    find_rows(c_.k, b, kv, at, keys);
    find_rows(c_.v, b, kv, at, own);
    if (next) find_rows(c_.k, b, kv, *next, later);
    constexpr bool may_pair = single && std::is_same_v<S, BFloat16>;
    const bool pairs = may_pair && depth % PAIRS == 0 && values % PAIRS == 0;
    if constexpr (may_pair)
      for (int64_t d = 0; d < depth / 2 && pairs; ++d) {
        wide[d] = queries[2 * d];
        wide[depth / 2 + d] = queries[2 * d + 1];
      }
    for (int64_t j = 0; j < at.width; ++j) {
      foresee(own[j], values);
      if constexpr (may_pair)
        if (pairs) {
          if (j % LANES == LANES - 1 || j + 1 == at.width)
            dots(keys + j / LANES * LANES, j % LANES + 1, wide, wide + depth / 2, depth, scores + j / LANES * LANES);
          continue;
        }
      if constexpr (single) {
        scores[j] = dot(keys[j], queries, depth);
      } else {
        copy_row(keys[j], 1, depth, wide);  // float32 once for all queries
        for (int64_t r = 0; r < rows_; ++r) scores[r * LINE + j] = dot(wide, queries + r * depth, depth);
      }
    }
    if (!how.plain || live.sight == PARTIAL) finish(b, kv, how, live, w, scores);
    for (int64_t r = 0; r < rows_; ++r) {
      float *row = scores + r * LINE, *out = outs + r * values;
      const float keep = sums.weigh(r, row, row, at.width, how.plain ? how.scale : 1.f);
      if (keep != 1.f)
        for (int64_t d = 0; d < values; ++d) out[d] *= keep;
    }
    constexpr int64_t TOGETHER = may_pair ? 64 : 8;
    for (int64_t j = 0; j < at.width; j += TOGETHER) {
      for (int64_t i = j; next && i < std::min(j + TOGETHER, next->width); ++i) foresee(later[i], depth);
      const int64_t count = std::min(TOGETHER, at.width - j);
      if constexpr (may_pair)
        if (pairs) {
          add_rows_in_pairs(own + j, scores + j, count, values, outs);
          continue;
        }
      if constexpr (single) {
        add_rows(own + j, scores + j, count, values, outs);
      } else {
        const float* lines[8];
        for (int64_t i = 0; i < count; ++i) {
          lines[i] = wide + i * values;
          copy_row(own[j + i], 1, values, wide + i * values);
        }
        for (int64_t r = 0; r < rows_; ++r) add_rows(lines, scores + r * LINE + j, count, values, outs + r * values);
      }
    }
  }

  // Asks for a chunk's rows before their use: products read many rows at once, which hardware does not foresee.
  void foresee(const Grid& x, int64_t b, int64_t kv, const Chunk& at) const {
    const S* rows[LINE];
    find_rows(x, b, kv, at, rows);
    for (int64_t j = 0; j < at.width; ++j) foresee(rows[j], x.size[3]);
  }

  // Whether the chunk's rows of x may be read where they lie, as a left or right operand of a product.
  bool in_place(const Grid& x, const Chunk& at) const {
    const bool together = !c_.pages || at.start % x.size[2] + at.width <= x.size[2];
    return together && std::is_same_v<S, T> && !c_.k_order && x.stride[3] == 1 && at.width == at.padded &&
           (std::is_same_v<T, float> || x.size[3] % 2 == 0) && x.stride[2] >= x.size[3];
  }

  void add(int64_t b, int64_t kv, const Scoring& how, const Live& live, const Chunk* next, const T* queries, Bench& w,
           HeadSums& sums, float* outs) const {
    const Chunk& at = how.chunks.list[live.chunk];
    const int64_t n = padded_rows_, values = c_.values(), width = product_depth<T>(values);
    float* turned = w.memory[2].template take<float>(LINE * FEW);
    float* scores = w.memory[3].template take<float>(LINE * FEW);
    T* weights = w.memory[4].template take<T>(LINE * FEW);
    float* parts = w.memory[5].template take<float>(FEW * values);
    const T* keys;
    int64_t ld = c_.k.stride[2];
    if (in_place(c_.k, at)) {
      keys = reinterpret_cast<const T*>(c_.k.at<S>(c_.row(c_.k, b, kv, at.start)));
    } else {
      keys = copy(c_.k, b, kv, at, w.memory[6].template take<T>(LINE * depth_), ld = depth_);
    }
    foresee(c_.v, b, kv, at);
    product(at.padded, n, depth_, keys, ld, queries, n, turned, n, false);
    transpose(turned, n, at.padded, at.padded, rows_, scores, LINE);
    if (!how.plain || live.sight == PARTIAL) finish(b, kv, how, live, w, scores);
    float keep[FEW];
    const float factor = how.plain ? how.scale : 1.f;
    for (int64_t r = 0; r < rows_; ++r)
      keep[r] = sums.weigh(r, scores + r * LINE, weights + r * LINE, at.padded, factor);
    if (next) foresee(c_.k, b, kv, *next);
    const T* right;
    ld = c_.v.stride[2];
    const bool lies = in_place(c_.v, at);
    const T* from = lies ? reinterpret_cast<const T*>(c_.v.at<S>(c_.row(c_.v, b, kv, at.start)))
                         : copy(c_.v, b, kv, at, w.memory[7].template take<T>(LINE * width), ld = width);
    if constexpr (std::is_same_v<T, BFloat16>) {
      T* packed = w.memory[8].template take<T>(LINE * values);
      pack_rows(from, ld, at.padded, at.padded, values, packed);
      right = packed;
      ld = values;
    } else {
      right = from;
    }
    product(rows_, values, at.padded, weights, LINE, right, ld, parts, values, false);
    for (int64_t r = 0; r < rows_; ++r) {
      float* out = outs + r * values;
      for (int64_t d = 0; d < values; ++d) out[d] = out[d] * keep[r] + parts[r * values + d];
    }
  }

  const T* copy(const Grid& x, int64_t b, int64_t kv, const Chunk& at, T* to, int64_t ld) const {
    chunk_rows<S>(c_, x, b, kv, at, to, ld);
    std::memset(static_cast<void*>(to + at.width * ld), 0, (at.padded - at.width) * ld * sizeof(T));
    return to;
  }

  // Scale, cap, bias, map and mask for the rows of one chunk.
  void finish(int64_t b, int64_t kv, const Scoring& how, const Live& live, Bench& w, float* scores) const {
    const Chunk& at = how.chunks.list[live.chunk];
    const int64_t order = c_.k_order ? c_.base(c_.k_order, b, kv * c_.group()) : 0;
    w.tokens.resize(at.width);
    for (int64_t j = 0; j < at.width; ++j) w.tokens[j] = token(c_.k_order, order, at.start + j);
    for (int64_t r = 0; r < rows_; ++r) {
      float* row = scores + r * LINE;
      const int64_t h = head_of(kv, r), t = q_token(b, h, r % c_.queries());
      if (!how.plain) how.finish_row(row, at.padded, nullptr);
      if (c_.bias) how.add_bias(row, c_.base(c_.bias, b, h) + t / c_.bias_rows * step(c_.bias, 2), w.tokens.data(), at.width);
      if (live.sight == WHOLE) continue;
      if (c_.keep && !w.keeps[r][at.tile * c_.keep.stride[3]]) std::fill(row, row + at.width, -INF);
      std::fill(row + at.width, row + at.padded, -INF);
      const int64_t* pos = c_.pos.at<int64_t>(c_.base(c_.pos, b, h));
      const int64_t* lows = c_.lo.at<int64_t>(c_.base(c_.lo, b, h) + t * c_.lo.stride[2]);
      const int64_t* highs = c_.hi.at<int64_t>(c_.base(c_.hi, b, h) + t * c_.hi.stride[2]);
      for (int64_t a = 0; a < c_.axes(); ++a) {
        const int64_t lo = std::max(lows[a * c_.lo.stride[3]], HIDDEN + 1), hi = highs[a * c_.hi.stride[3]];
        for (int64_t j = 0; j < at.width; ++j) {
          const int64_t p = pos[w.tokens[j] * c_.pos.stride[2] + a * c_.pos.stride[3]];
          row[j] = (p < lo) | (p > hi) ? -INF : row[j];
        }
      }
      if (!c_.dense) continue;
      const bool* seen = c_.dense.at<bool>(c_.base(c_.dense, b, h) + t * step(c_.dense, 2));
      for (int64_t j = 0; j < at.width; ++j) row[j] = seen[w.tokens[j] * step(c_.dense, 3)] ? row[j] : -INF;
    }
  }

  // Merges what the pieces of a head gave, and writes it.
  void merge(int64_t head) const {
    const int64_t b = head / c_.kv_heads(), kv = head % c_.kv_heads(), values = c_.values();
    std::vector<float> sum(values);
    for (int64_t r = 0; r < rows_; ++r) {
      float top = -INF, total = 0;
      bool empty = true;  // a sum that is NaN has no largest score, and is not empty
      for (int64_t s = slot_of_[head]; s < slot_of_[head + 1]; ++s) {
        const float* ends = part(s) + rows_ * values + 2 * r;
        top = std::max(top, ends[0]);
        empty = empty && ends[0] == -INF && ends[1] == 0;
      }
      std::fill(sum.begin(), sum.end(), 0.f);
      for (int64_t s = slot_of_[head]; s < slot_of_[head + 1] && !empty; ++s) {
        const float* ends = part(s) + rows_ * values + 2 * r;
        const float share = std::exp(ends[0] - top);
        if (ends[0] == -INF && ends[1] == 0) continue;
        total += share * ends[1];
        for (int64_t d = 0; d < values; ++d) sum[d] += share * part(s)[r * values + d];
      }
      const int64_t h = head_of(kv, r), t = q_token(b, h, r % c_.queries());
      S* out = c_.out.at<S>(b * c_.out.stride[0] + h * c_.out.stride[1] + t * c_.out.stride[2]);
      for (int64_t d = 0; d < values; ++d) put(out[d], empty ? 0.f : sum[d] / total);
      c_.lse.at<float>(b * c_.lse.stride[0] + h * c_.lse.stride[1])[t * c_.lse.stride[2]] =
          empty ? -INF : top + std::log(total);
    }
  }

  const Call& c_;
  const int64_t rows_, padded_rows_, depth_;
  const bool streamed_;
  PerHead<Chunks> chunks_;
  PerHead<Reach> reach_;
  Arena arena_;
  std::vector<std::vector<Live>> live_;
  std::vector<Piece> pieces_;
  std::vector<int64_t> starts_, slot_of_;  // first piece of each worker, first slot of each head; one more each
  int64_t slots_ = 0;
  float* parts_ = nullptr;
};

}  // namespace tilewise
