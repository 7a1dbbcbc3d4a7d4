// Forward: strips of queries against chunks of keys with an online softmax.
//
// A strip is up to ROWS queries of one head. Tall query tiles are strips themselves and take several chunks at a
// time; of flat ones (queries routed alone) many are held together, and for each key tile those that chose it are
// gathered into a strip. The sum of weights and the outputs are divided once, at the end.
#pragma once

#include "native_keys.h"

namespace tilewise {

constexpr int64_t BATCH = 512;      // keys whose scores are held at a time: 256 KiB
constexpr int64_t GATHERED = 1024;  // queries of flat tiles that are held together

inline void put_weight(float& to, float x) { to = x; }
inline void put_weight(BFloat16& to, float x) { to.x = static_cast<uint16_t>((bits_of(x) + 0x8000u) >> 16); }

// Running state of one query: the largest score so far and the sum of weights.
struct Running {
  float top = -INF, sum = 0;
};

// Weights of n scores, scaled by `factor`; returns what the sums before them must be multiplied by.
template <typename T>
inline float weigh(const float* scores, T* weights, int64_t n, float factor, Running& state) {
  float top = -INF;
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < n; ++j) top = scores[j] > top ? scores[j] : top;
  top = std::max(state.top, top * factor);
  const float base = top == -INF ? 0.f : top;
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const float w = exp_of<std::is_same_v<T, BFloat16>>(scores[j] * factor - base);
    put_weight(weights[j], w);
    sum += w;
  }
  const float keep = exp_of<false>(state.top - base);
  state = {top, state.sum * keep + sum};
  return keep;
}

// What one thread works with.
template <typename T>
struct Bench {
  Buffer memory[7];
  Limits limits;
  std::vector<int64_t> rows, live;
  std::vector<Sight> sights;
  T* queries;
  float* scores;
  T* weights;
  float* parts;
  float* outs;
  Running* state;
  T* held;

  void lay(int64_t depth, int64_t values, int64_t kept_rows) {
    queries = memory[0].take<T>(ROWS * depth);
    scores = memory[1].take<float>(ROWS * BATCH);
    weights = std::is_same_v<T, float> ? reinterpret_cast<T*>(scores) : memory[2].take<T>(ROWS * BATCH);
    parts = memory[3].take<float>(ROWS * values);
    outs = memory[4].take<float>(kept_rows * values);
    state = memory[5].take<Running>(kept_rows);
    held = memory[6].take<T>(kept_rows * depth);
  }
};

template <typename S, typename T>
class Forward {
 public:
  static void run(const Call& c) {
    const KeyAxis axis(c);
    for (Span span : spans(c, axis.longest * (c.depth() + c.values()) * sizeof(T))) Forward(c, axis, span).run();
  }

 private:
  Forward(const Call& call, const KeyAxis& axis, Span span)
      : c_(call), flat_(call.keep && call.q_size < TALL), axis_(axis), span_(span),
        keys_(c_, axis.chunks, span, arena_, K_RIGHT | V_RIGHT) {
    arena_.settle();
    keys_.template fill<S>(c_, arena_, K_RIGHT | V_RIGHT);
  }

  void run() {
    constexpr bool tiles_unit = std::is_same_v<T, BFloat16>;
    const std::vector<Job> jobs = flat_ ? flat_jobs() : tall_jobs();
    for_each_job(jobs.size(), c_.threads, tiles_unit, [&](int64_t j) {
      thread_local Bench<T> bench;
      flat_ ? gather(jobs[j], bench) : attend(jobs[j], bench);
    });
  }

  struct Job {
    int64_t b, h, tile, start, end;  // places of the query axis; for flat jobs `tile` is the first of them
  };

  std::vector<Job> tall_jobs() const {
    std::vector<Job> jobs;
    for (int64_t head = span_.first * c_.group(); head < span_.last * c_.group(); ++head) {
      const int64_t b = head / c_.heads(), h = head % c_.heads();
      const Cut rows = cut(c_, c_.q_bounds, c_.keep ? c_.q_size : ROWS, c_.queries(), b, h);
      for (int64_t t = rows.count - 1; t >= 0; --t)  // under a causal mask the last are the heaviest
        for (int64_t at = rows.start(t); at < rows.start(t + 1); at += ROWS)
          jobs.push_back({b, h, t, at, std::min(at + ROWS, rows.start(t + 1))});
    }
    return jobs;
  }

  std::vector<Job> flat_jobs() const {
    const int64_t share = c_.batch() * c_.heads() * c_.queries() / (4 * c_.threads);
    const int64_t most = std::clamp(share, ROWS, GATHERED);
    std::vector<Job> jobs;
    for (int64_t head = span_.first * c_.group(); head < span_.last * c_.group(); ++head) {
      const int64_t b = head / c_.heads(), h = head % c_.heads();
      const Cut rows = cut(c_, c_.q_bounds, c_.q_size, c_.queries(), b, h);
      for (int64_t t = 0; t < rows.count;) {
        int64_t last = t + 1;
        while (last < rows.count && rows.start(last + 1) - rows.start(t) <= most) ++last;
        jobs.push_back({b, h, t, rows.start(t), rows.start(last)});
        t = last;
      }
    }
    return jobs;
  }

  int64_t q_token(const Job& job, int64_t place) const {
    return token(c_.q_order, c_.q_order ? c_.base(c_.q_order, job.b, job.h) : 0, place);
  }

  void load(const Job& job, T* to) const {
    const int64_t base = job.b * c_.q.stride[0] + job.h * c_.q.stride[1];
    for (int64_t i = job.start; i < job.end; ++i, to += keys_.depth) {
      copy_row(c_.q.at<S>(base + q_token(job, i) * c_.q.stride[2]), c_.q.stride[3], c_.depth(), to);
      for (int64_t d = c_.depth(); d < keys_.depth; ++d) put(to[d], 0.f);
    }
  }

  // Scores of the bench's strip against one chunk, ready for the softmax, into columns from `column` on.
  void score(const Job& job, Bench<T>& w, int64_t chunk, Sight sight, int64_t column, const Scoring& how) const {
    const int64_t kv = job.h / c_.group(), rows = w.limits.rows, padded_rows = round_up(rows, 16);
    const Chunk& at = how.chunks.list[chunk];
    const int64_t slot = keys_.begin(job.b, kv) + at.offset;
    float* scores = w.scores + column;
    product(padded_rows, at.padded, keys_.depth, w.queries, keys_.depth, keys_.k_right + slot * keys_.depth,
            at.padded, scores, BATCH, false);
    const Positions& keys = axis_.positions.at(job.b, kv);
    const int64_t bias = c_.bias ? c_.base(c_.bias, job.b, job.h) : 0;
    if (how.plain && sight == WHOLE) return;
    for (int64_t i = 0; i < rows; ++i, scores += BATCH) {
      if (!how.plain) how.finish_row(scores, at.padded, nullptr);
      if (c_.bias)
        how.add_bias(scores, bias + w.limits.tokens[i] * step(c_.bias, 2), keys.tokens.data() + at.offset, at.width);
      if (sight == PARTIAL) how.mask_row(scores, w.limits, i, keys, chunk, job.b, job.h);
    }
  }

  // Adds the chunks live[from..to) to the strip; row i of it is row rows[i] of state and outs.
  void add(const Job& job, Bench<T>& w, int64_t from, int64_t to, const Scoring& how) const {
    const int64_t rows = w.limits.rows, padded_rows = round_up(rows, 16), values = c_.values();
    int64_t columns = 0;
    for (int64_t i = from; i < to; ++i) {
      score(job, w, w.live[i], w.sights[i], columns, how);
      columns += how.chunks.list[w.live[i]].padded;
    }
    const float factor = how.plain ? how.scale : 1.f;
    float keep[ROWS];
    for (int64_t i = 0; i < rows; ++i)
      keep[i] = weigh(w.scores + i * BATCH, w.weights + i * BATCH, columns, factor, w.state[w.rows[i]]);
    const int64_t head = keys_.begin(job.b, job.h / c_.group());
    columns = 0;
    for (int64_t i = from; i < to; ++i) {
      const Chunk& at = how.chunks.list[w.live[i]];
      product(padded_rows, values, at.padded, w.weights + columns, BATCH,
              keys_.v_right + (head + at.offset) * values, values, w.parts, values, i > from);
      columns += at.padded;
    }
    for (int64_t i = 0; i < rows; ++i) {
      float* out = w.outs + w.rows[i] * values;
      const float* part = w.parts + i * values;
      for (int64_t d = 0; d < values; ++d) out[d] = out[d] * keep[i] + part[d];
    }
  }

  void begin(const Job& job, Bench<T>& w) const {
    const int64_t rows = job.end - job.start;
    w.lay(keys_.depth, c_.values(), flat_ ? std::max(rows, ROWS) : ROWS);
    std::fill(w.state, w.state + rows, Running{});
    std::memset(w.outs, 0, rows * c_.values() * sizeof(float));
  }

  void attend(const Job& job, Bench<T>& w) const {
    const int64_t kv = job.h / c_.group();
    const Scoring how(c_, axis_.chunks.at(job.b, kv));
    const Positions& keys = axis_.positions.at(job.b, kv);
    begin(job, w);
    const int64_t rows = job.end - job.start;
    load(job, w.queries);
    std::memset(static_cast<void*>(w.queries + rows * keys_.depth), 0,
                (round_up(rows, 16) - rows) * keys_.depth * sizeof(T));
    w.limits.clear(c_.axes());
    w.rows.resize(rows);
    const int64_t lo = c_.base(c_.lo, job.b, job.h), hi = c_.base(c_.hi, job.b, job.h);
    for (int64_t i = 0; i < rows; ++i) {
      w.limits.add(c_, lo, hi, q_token(job, job.start + i));
      w.rows[i] = i;
    }
    w.live.clear();
    w.sights.clear();
    const int64_t row = c_.keep ? c_.base(c_.keep, job.b, job.h) + job.tile * c_.keep.stride[2] : 0;
    const bool* kept = c_.keep ? c_.keep.at<bool>(row) : nullptr;
    const int64_t tiles = how.chunks.first.size() - 1;
    for (int64_t t = 0; t < tiles; ++t) {
      if (kept && !kept[t * c_.keep.stride[3]]) continue;
      for (int64_t i = how.chunks.first[t]; i < how.chunks.first[t + 1]; ++i)
        if (const Sight s = sight(c_, w.limits, keys, i); s != NONE) {
          w.live.push_back(i);
          w.sights.push_back(s);
        }
    }
    const int64_t live = w.live.size();
    for (int64_t from = 0, to; from < live; from = to) {
      int64_t columns = 0;
      for (to = from; to < live && columns + how.chunks.list[w.live[to]].padded <= BATCH; ++to)
        columns += how.chunks.list[w.live[to]].padded;
      add(job, w, from, to, how);
    }
    finish(job, w);
  }

  void gather(const Job& job, Bench<T>& w) const {
    const int64_t kv = job.h / c_.group();
    const Scoring how(c_, axis_.chunks.at(job.b, kv));
    begin(job, w);
    load(job, w.held);
    const Cut cuts = cut(c_, c_.q_bounds, c_.q_size, c_.queries(), job.b, job.h);
    const bool* kept = c_.keep.at<bool>(c_.base(c_.keep, job.b, job.h));
    const int64_t tiles = how.chunks.first.size() - 1;
    for (int64_t t = 0; t < tiles; ++t) {
      strip(w);
      for (int64_t q = job.tile; q < cuts.count && cuts.start(q) < job.end; ++q) {
        if (!kept[q * c_.keep.stride[2] + t * c_.keep.stride[3]]) continue;
        for (int64_t i = cuts.start(q); i < cuts.start(q + 1); ++i) {
          take(job, w, i);
          if (w.limits.rows == ROWS) add_tile(job, w, t, how);
        }
      }
      add_tile(job, w, t, how);
    }
    finish(job, w);
  }

  void strip(Bench<T>& w) const {
    w.limits.clear(c_.axes());
    w.rows.clear();
  }

  void take(const Job& job, Bench<T>& w, int64_t place) const {
    const int64_t own = place - job.start, at = w.limits.rows;
    std::memcpy(static_cast<void*>(w.queries + at * keys_.depth), w.held + own * keys_.depth, keys_.depth * sizeof(T));
    w.rows.push_back(own);
    w.limits.add(c_, c_.base(c_.lo, job.b, job.h), c_.base(c_.hi, job.b, job.h), q_token(job, place));
  }

  // The gathered strip against key tile t, chunk by chunk; then an empty strip.
  void add_tile(const Job& job, Bench<T>& w, int64_t t, const Scoring& how) const {
    const int64_t rows = w.limits.rows;
    if (rows) {
      std::memset(static_cast<void*>(w.queries + rows * keys_.depth), 0,
                  (round_up(rows, 16) - rows) * keys_.depth * sizeof(T));
      const Positions& keys = axis_.positions.at(job.b, job.h / c_.group());
      for (int64_t i = how.chunks.first[t]; i < how.chunks.first[t + 1]; ++i)
        if (const Sight s = sight(c_, w.limits, keys, i); s != NONE) {
          w.live.assign(1, i);
          w.sights.assign(1, s);
          add(job, w, 0, 1, how);
        }
    }
    strip(w);
  }

  void finish(const Job& job, Bench<T>& w) const {
    const int64_t values = c_.values();
    S* outs = c_.out.at<S>(job.b * c_.out.stride[0] + job.h * c_.out.stride[1]);
    float* lses = c_.lse.at<float>(job.b * c_.lse.stride[0] + job.h * c_.lse.stride[1]);
    for (int64_t i = 0; i < job.end - job.start; ++i) {
      const int64_t t = q_token(job, job.start + i);
      const Running& state = w.state[i];
      const bool empty = state.top == -INF && state.sum == 0;  // NaN scores have no largest either
      const float share = empty ? 0.f : 1.f / state.sum;
      S* out = outs + t * c_.out.stride[2];
      for (int64_t d = 0; d < values; ++d) put(out[d], w.outs[i * values + d] * share);
      lses[t * c_.lse.stride[2]] = empty ? -INF : state.top + std::log(state.sum);
    }
  }

  const Call& c_;
  const bool flat_;
  Arena arena_;
  const KeyAxis& axis_;
  const Span span_;
  PackedKeys<T> keys_;
};

}  // namespace tilewise
