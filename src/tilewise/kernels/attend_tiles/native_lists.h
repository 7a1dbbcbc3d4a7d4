// Lists: every query reads keys of its own choice.
//
// Bound by what it takes to reach rows that lie anywhere: they are asked for some keys ahead, and read where they lie,
// once for all heads that share them. One thread has a query from its first key to its last, so that its rounding
// depends on no other query's list.
#pragma once

#include "native_keys.h"
#include "native_running.h"

namespace tilewise {

constexpr int64_t GATHERED = 256;  // keys between two looks at the largest score
constexpr int64_t AHEAD = 16;      // keys ahead of which rows are asked for
constexpr int64_t QUERIES = 16;    // of one job: the next job's lists are much like this one's
constexpr int64_t PANEL = 4;       // registers of an output that are added to at once

inline Floats widen(const float* from) { return load<Floats>(from); }
inline Floats widen(const BFloat16* from) {
  return same_bits<Floats>(__builtin_convertvector(load<HalfWords>(from), Words) << 16);
}

template <typename X>
inline void foresee_row(const X* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(X))) __builtin_prefetch(row + i, 0, 3);
}

// scores[r][j] = queries[r] . keys[j] for R queries `depth` apart, depth being whole registers.
template <int64_t R, typename X>
inline void score_rows(const X* const* keys, int64_t n, const float* queries, int64_t depth, float* scores) {
  constexpr int64_t SIDE = 4;  // keys that share the loading of a query
  for (int64_t j = 0; j < n; j += LANES) {
    Floats sums[R][LANES];
    for (int64_t i = 0; i < LANES; i += SIDE) {
      const X* at[SIDE];
      for (int64_t s = 0; s < SIDE; ++s) {
        at[s] = keys[std::min(j + i + s, n - 1)];
        foresee_row(keys[std::min(j + i + s + AHEAD, n - 1)], depth);
      }
      Floats own[SIDE][R] = {};
      for (int64_t d = 0; d < depth; d += LANES) {
        Floats x[SIDE];
        for (int64_t s = 0; s < SIDE; ++s) x[s] = widen(at[s] + d);
        for (int64_t r = 0; r < R; ++r) {
          const Floats q = load<Floats>(queries + r * depth + d);
          for (int64_t s = 0; s < SIDE; ++s) own[s][r] += x[s] * q;
        }
      }
      for (int64_t s = 0; s < SIDE; ++s)
        for (int64_t r = 0; r < R; ++r) sums[r][i + s] = own[s][r];
    }
    for (int64_t r = 0; r < R; ++r)
      store(scores + r * GATHERED + j, sums_of(sums[r], std::make_index_sequence<LANES>()));
  }
}

// outs[r] += sum over j of weights[r][j] * rows[j], for P registers from number `from` on.
template <int64_t R, int64_t P, typename X>
inline void add_panel(const X* const* rows, int64_t n, const float* weights, int64_t from, int64_t width, float* outs) {
  Floats sums[R][P];
  for (int64_t r = 0; r < R; ++r)
    for (int64_t p = 0; p < P; ++p) sums[r][p] = load<Floats>(outs + r * width + from + p * LANES);
  for (int64_t j = 0; j < n; ++j) {
    foresee_row(rows[std::min(j + AHEAD, n - 1)] + from, P * LANES);
    for (int64_t p = 0; p < P; ++p) {
      const Floats x = widen(rows[j] + from + p * LANES);
      for (int64_t r = 0; r < R; ++r) sums[r][p] += x * weights[r * GATHERED + j];
    }
  }
  for (int64_t r = 0; r < R; ++r)
    for (int64_t p = 0; p < P; ++p) store(outs + r * width + from + p * LANES, sums[r][p]);
}

template <int64_t R, typename X>
inline void add_weighted(const X* const* rows, int64_t n, const float* weights, int64_t width, float* outs) {
  int64_t from = 0;
  for (; from + PANEL * LANES <= width; from += PANEL * LANES) add_panel<R, PANEL>(rows, n, weights, from, width, outs);
  for (; from < width; from += LANES) add_panel<R, 1>(rows, n, weights, from, width, outs);
}

template <typename S>
class Listed {
 public:
  static void run(const Call& c) { Listed(c).run(); }

 private:
  struct Bench {
    Buffer memory[8];
  };

  explicit Listed(const Call& call)
      : c_(call), how_(call, none_), units_(std::max(call.lists.size[1], call.kv_heads())),
        share_(call.heads() / units_), depth_(round_up(call.depth(), LANES)), values_(round_up(call.values(), LANES)),
        k_lies_(lies(call.k)), v_lies_(lies(call.v)) {}

  // Whether rows can be read where they lie; elsewhere they are copied together first.
  static bool lies(const Grid& x) {
    return !std::is_same_v<S, Half> && x.stride[3] == 1 && x.size[3] % LANES == 0;
  }

  void run() const {
    const int64_t strips = (c_.queries() + QUERIES - 1) / QUERIES;
    for_each_job(c_.batch() * units_ * strips, c_.threads, false, [&](int64_t job) {
      thread_local Bench bench;
      const int64_t b = job / strips / units_, unit = job / strips % units_, first = job % strips * QUERIES;
      for (int64_t i = first; i < std::min(first + QUERIES, c_.queries()); ++i) attend(b, unit, i, bench);
    });
  }

  int64_t base(const Grid& grid, int64_t b, int64_t list) const {
    return (grid.size[0] == 1 ? 0 : b * grid.stride[0]) + (grid.size[1] == 1 ? 0 : list * grid.stride[1]);
  }

  // The tokens that a query reads: those of its list that it may see. Returns their number.
  template <typename I>
  int64_t find(const I* list, int64_t b, int64_t g, int64_t i, int64_t* tokens) const {
    const int64_t by = c_.lists.stride[3], length = c_.lists.size[3], keys = c_.keys();
    int64_t n = 0;
    for (int64_t j = 0; j < length; ++j) {
      const int64_t t = list[j * by];
      if (t >= keys) throw std::invalid_argument("lists must name keys 0 to " + std::to_string(keys - 1) + ", or -1 for none, got " + std::to_string(t));
      tokens[n] = t;
      n += t >= 0;
    }
    for (int64_t a = 0; a < c_.axes(); ++a) {
      const int64_t* pos = c_.pos.at<int64_t>(base(c_.pos, b, g) + a * c_.pos.stride[3]);
      const int64_t lo = c_.lo.at<int64_t>(base(c_.lo, b, g))[i * c_.lo.stride[2] + a * c_.lo.stride[3]];
      const int64_t hi = c_.hi.at<int64_t>(base(c_.hi, b, g))[i * c_.hi.stride[2] + a * c_.hi.stride[3]];
      int64_t kept = 0;
      for (int64_t j = 0; j < n; ++j) {
        const int64_t t = tokens[j], p = pos[t * c_.pos.stride[2]];
        tokens[kept] = t;
        kept += (p >= std::max(lo, HIDDEN + 1)) & (p <= hi);
      }
      n = kept;
    }
    return n;
  }

  void attend(int64_t b, int64_t unit, int64_t i, Bench& w) const {
    const int64_t g = unit * c_.lists.size[1] / units_;
    int64_t* tokens = w.memory[0].template take<int64_t>(c_.lists.size[3] + 1);
    const int64_t at = base(c_.lists, b, g) + i * c_.lists.stride[2];
    const int64_t n = c_.lists.kind == INT32 ? find(c_.lists.at<int32_t>(at), b, g, i, tokens)
                                             : find(c_.lists.at<int64_t>(at), b, g, i, tokens);
    int64_t h = unit * share_;
    const int64_t last = h + share_;
    for (; h + 4 <= last; h += 4) heads<4>(b, h, i, tokens, n, w);
    for (; h + 2 <= last; h += 2) heads<2>(b, h, i, tokens, n, w);
    for (; h < last; ++h) heads<1>(b, h, i, tokens, n, w);
  }

  // R query heads from h on, of one kv head, over the same keys.
  template <int64_t R>
  void heads(int64_t b, int64_t h, int64_t i, const int64_t* tokens, int64_t n, Bench& w) const {
    const int64_t kv = h / c_.group();
    float* queries = w.memory[1].template take<float>(R * depth_);
    float* outs = w.memory[2].template take<float>(R * values_);
    float* scores = w.memory[3].template take<float>(R * GATHERED);
    for (int64_t r = 0; r < R; ++r) {
      copy_row(c_.q.at<S>(b * c_.q.stride[0] + (h + r) * c_.q.stride[1] + i * c_.q.stride[2]), c_.q.stride[3],
               c_.depth(), queries + r * depth_);
      std::fill(queries + r * depth_ + c_.depth(), queries + (r + 1) * depth_, 0.f);
    }
    std::memset(outs, 0, R * values_ * sizeof(float));
    Running state[R];
    for (int64_t at = 0; at < n; at += GATHERED) {
      const int64_t width = std::min(GATHERED, n - at);
      score<R>(b, kv, tokens + at, width, queries, scores, w);
      for (int64_t r = 0; r < R; ++r) {
        float *row = scores + r * GATHERED, *out = outs + r * values_;
        if (!how_.plain) finish(row, b, h + r, i, tokens + at, width);
        const float keep = weigh_row(row, row, width, how_.plain ? how_.scale : 1.f, state[r]);
        if (keep != 1.f)
          for (int64_t d = 0; d < values_; ++d) out[d] *= keep;
      }
      add<R>(b, kv, tokens + at, width, scores, outs, w);
    }
    for (int64_t r = 0; r < R; ++r) write(b, h + r, i, state[r], outs + r * values_);
  }

  template <int64_t R>
  void score(int64_t b, int64_t kv, const int64_t* tokens, int64_t n, const float* queries, float* scores,
             Bench& w) const {
    const S* rows[GATHERED];
    const S* first = c_.k.at<S>(b * c_.k.stride[0] + kv * c_.k.stride[1]);
    for (int64_t j = 0; j < n; ++j) rows[j] = first + tokens[j] * c_.k.stride[2];
    if constexpr (!std::is_same_v<S, Half>)
      if (k_lies_) return score_rows<R>(rows, n, queries, depth_, scores);
    score_rows<R>(together(c_.k, rows, n, depth_, w), n, queries, depth_, scores);
  }

  template <int64_t R>
  void add(int64_t b, int64_t kv, const int64_t* tokens, int64_t n, const float* weights, float* outs, Bench& w) const {
    const S* rows[GATHERED];
    const S* first = c_.v.at<S>(b * c_.v.stride[0] + kv * c_.v.stride[1]);
    for (int64_t j = 0; j < n; ++j) rows[j] = first + tokens[j] * c_.v.stride[2];
    if constexpr (!std::is_same_v<S, Half>)
      if (v_lies_) return add_weighted<R>(rows, n, weights, values_, outs);
    add_weighted<R>(together(c_.v, rows, n, values_, w), n, weights, values_, outs);
  }

  // Copies of rows in float32, `width` long with zeros behind.
  static const float* const* together(const Grid& x, const S* const* rows, int64_t n, int64_t width, Bench& w) {
    float* copies = w.memory[4].template take<float>(GATHERED * width);
    const float** at = w.memory[5].template take<const float*>(GATHERED);
    for (int64_t j = 0; j < n; ++j) {
      float* to = copies + j * width;
      copy_row(rows[j], x.stride[3], x.size[3], to);
      std::fill(to + x.size[3], to + width, 0.f);
      at[j] = to;
    }
    return at;
  }

  void finish(float* row, int64_t b, int64_t h, int64_t i, const int64_t* tokens, int64_t n) const {
    how_.finish_row(row, n, nullptr);
    if (!c_.bias) return;
    how_.add_bias(row, c_.base(c_.bias, b, h) + i / c_.bias_rows * step(c_.bias, 2), tokens, n);
  }

  void write(int64_t b, int64_t h, int64_t i, const Running& state, const float* sum) const {
    const bool empty = state.top == -INF && state.sum == 0;  // a sum that is NaN has no largest score, and is not empty
    S* out = c_.out.at<S>(b * c_.out.stride[0] + h * c_.out.stride[1] + i * c_.out.stride[2]);
    for (int64_t d = 0; d < c_.values(); ++d) put(out[d], empty ? 0.f : sum[d] / state.sum);
    c_.lse.at<float>(b * c_.lse.stride[0] + h * c_.lse.stride[1])[i * c_.lse.stride[2]] =
        empty ? -INF : state.top + std::log(state.sum);
  }

  const Call& c_;
  const Chunks none_{{nullptr, 0, 1, 0, 0}, 1};
  const Scoring how_;
  const int64_t units_, share_, depth_, values_;
  const bool k_lies_, v_lies_;
};

}  // namespace tilewise
