// Forward: strips of queries against chunks of keys with an online softmax.
//
// A strip is up to ROWS queries of one head. Tall query tiles are strips themselves; of flat ones (queries routed
// alone) many are held together, and for each key tile those that chose it are gathered into a strip. Scores are made
// block by block, so small that the softmax finds them in the nearest cache; the weights of several chunks meet the
// values in one product. Outputs are divided by the sum of weights once, at the end.
#pragma once

#include "native_keys.h"
#include "native_softmax.h"

namespace tilewise {

constexpr int64_t BATCH = 256;            // keys whose weights are held at a time
constexpr int64_t BATCH_LD = BATCH + 32;  // no power of two (see BLOCK_LD)
constexpr int64_t GATHERED = 1024;        // queries of flat tiles that are held together

// What one thread works with; queries are in format Q.
template <typename T, typename Q>
struct Bench {
  Buffer memory[9];
  Limits limits;
  std::vector<int64_t> rows, live;
  std::vector<Sight> sights;
  Q* queries;
  float* scores;
  T* weights;
  float* parts;
  float* outs;
  Q* held;
  Sums sums;
  float scales[ROWS], factors[ROWS];  // of each row of the strip: of its products, of its scores in the softmax
  float* fresh;  // sums of a block

  void lay(int64_t depth, int64_t values, int64_t kept_rows) {
    queries = memory[0].take<Q>(ROWS * depth);
    scores = memory[1].take<float>(BLOCK * BLOCK_LD);
    weights = memory[2].take<T>(ROWS * BATCH_LD);
    parts = memory[3].take<float>(ROWS * values);
    outs = memory[4].take<float>(kept_rows * values);
    held = memory[5].take<Q>(kept_rows * depth);
    sums.lanes = memory[6].take<float>(kept_rows * LANES);
    sums.bases = memory[7].take<float>(kept_rows);
    fresh = memory[8].take<float>(BLOCK * LANES);
    std::memset(outs, 0, kept_rows * values * sizeof(float));
    sums.clear(kept_rows);
  }
};

// S: the format that tensors are stored in; T: that of the products with values; Q: that of the queries in products,
// either T or integers without sign.
template <typename S, typename T, typename Q = T>
class Forward {
  static constexpr bool INTEGERS = std::is_same_v<Q, uint8_t>;
  using K = std::conditional_t<INTEGERS, int8_t, T>;
  using Bench = tilewise::Bench<T, Q>;

 public:
  static void run(const Call& c) {
    const KeyAxis axis(c);
    for (Span span : spans(c, axis.longest * (c.depth() * sizeof(K) + c.values() * sizeof(T))))
      Forward(c, axis, span).run();
  }

 private:
  Forward(const Call& call, const KeyAxis& axis, Span span)
      : c_(call), flat_(call.keep && call.q_size < TALL), axis_(axis), span_(span),
        keys_(c_, axis.chunks, span, arena_, K_RIGHT | V_RIGHT) {
    arena_.settle();
    keys_.template fill<S>(c_, arena_, K_RIGHT | V_RIGHT);
  }

  void run() {
    constexpr bool tiles_unit = INTEGERS || std::is_same_v<T, BFloat16>;
    const std::vector<Job> jobs = flat_ ? flat_jobs() : tall_jobs();
    for_each_job(jobs.size(), c_.threads, tiles_unit, [&](int64_t j) {
      thread_local Bench bench;
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

  void load(const Job& job, Q* to) const {
    const int64_t base = job.b * c_.q.stride[0] + job.h * c_.q.stride[1];
    if constexpr (INTEGERS) {
      for (int64_t i = job.start; i < job.end; ++i, to += keys_.depth) {
        const int8_t* from = c_.q.at<int8_t>(base + q_token(job, i) * c_.q.stride[2]);
        for (int64_t d = 0; d < c_.depth(); ++d) to[d] = static_cast<uint8_t>(from[d * c_.q.stride[3]]) ^ 0x80u;
        std::memset(to + c_.depth(), 0, keys_.depth - c_.depth());
      }
    } else {
      load_floats(job, base, to);
    }
  }

  void load_floats(const Job& job, int64_t base, T* to) const {
    const bool dense = c_.q.stride[3] == 1 && c_.q.stride[2] == c_.depth() && c_.depth() == keys_.depth;
    if (std::is_same_v<S, T> && !c_.q_order && dense) {
      std::memcpy(static_cast<void*>(to), c_.q.at<S>(base + job.start * keys_.depth),
                  (job.end - job.start) * keys_.depth * sizeof(T));
      return;
    }
    for (int64_t i = job.start; i < job.end; ++i, to += keys_.depth) {
      copy_row(c_.q.at<S>(base + q_token(job, i) * c_.q.stride[2]), c_.q.stride[3], c_.depth(), to);
      for (int64_t d = c_.depth(); d < keys_.depth; ++d) put(to[d], 0.f);
    }
  }

  // What the scores of a query that stands at a place are multiplied by before all else.
  float scale_of(const Job& job, int64_t place) const {
    if constexpr (!INTEGERS) return 1;
    const int64_t base = job.b * c_.q_scale.stride[0] + job.h * c_.q_scale.stride[1];
    return *c_.q_scale.at<float>(base + q_token(job, place) * c_.q_scale.stride[2]);
  }

  // Integer scores of the bench's block as floats, in place.
  void widen(Bench& w, int64_t count, int64_t slot, int64_t width) const {
    IntRow row{reinterpret_cast<const int32_t*>(w.scores), keys_.factors + slot, keys_.shifts + slot};
    for (int64_t i = 0; i < count; ++i, row = row.next())
      for (int64_t j = 0; j < width; j += LANES) store(w.scores + i * BLOCK_LD + j, row(j));
  }

  // Scores of `count` queries of the bench's strip, from `first` on, against one chunk, ready for the softmax. Returns
  // whether they are still integers.
  bool score(const Job& job, Bench& w, int64_t first, int64_t count, int64_t chunk, Sight sight,
             const Scoring& how) const {
    const int64_t kv = job.h / c_.group();
    const Chunk& at = how.chunks.list[chunk];
    const int64_t slot = keys_.begin(job.b, kv) + at.offset;
    float* scores = w.scores;
    std::conditional_t<INTEGERS, int32_t, float>* products;
    if constexpr (INTEGERS) products = reinterpret_cast<int32_t*>(scores);
    else products = scores;
    product(round_up(count, 16), at.padded, keys_.depth, w.queries + first * keys_.depth, keys_.depth,
            keys_.k_right + slot * keys_.depth, at.padded, products, BLOCK_LD, false);
    if (how.plain && sight == WHOLE) return INTEGERS;
    if constexpr (INTEGERS) widen(w, count, slot, at.padded);
    const Positions& keys = axis_.positions.at(job.b, kv);
    const int64_t bias = c_.bias ? c_.base(c_.bias, job.b, job.h) : 0;
    for (int64_t i = first; i < first + count; ++i, scores += BLOCK_LD) {
      if (!how.plain) {
        for (int64_t j = 0; INTEGERS && j < at.padded; ++j) scores[j] *= w.scales[i];
        how.finish_row(scores, at.padded, nullptr);
      }
      if (c_.bias) {
        const int64_t row = bias + w.limits.tokens[i] / c_.bias_rows * step(c_.bias, 2);
        how.add_bias(scores, row, keys.tokens.data() + at.offset, at.width);
      }
      if (sight == PARTIAL) how.mask_row(scores, w.limits, i, keys, chunk, job.b, job.h);
    }
    return false;
  }

  // Weights of the bench's scores into columns from `column` on; those before are of the same batch.
  void weigh_block(Bench& w, int64_t first, int64_t count, int64_t column, int64_t slot, int64_t width,
                   bool integers) const {
    const int64_t* rows = w.rows.data() + first;
    const float* factors = w.factors + first;
    T* weights = w.weights + first * BATCH_LD;
    const auto done = [&] {
      const auto run = [&]<bool brief>() {
        const auto from = [&](auto row) {
          return weigh<brief>(row, count, width, factors, w.sums.bases, rows, weights + column, BATCH_LD, w.fresh);
        };
        if constexpr (INTEGERS)
          if (integers)
            return from(IntRow{reinterpret_cast<int32_t*>(w.scores), keys_.factors + slot, keys_.shifts + slot});
        return from(FloatRow{w.scores});
      };
      if constexpr (std::is_same_v<T, BFloat16>) return c_.brief ? run.template operator()<true>() : run.template operator()<false>();
      return run.template operator()<false>();
    };
    if (w.sums.bases[*rows] == NO_BASE || !done()) {
      if (integers) widen(w, count, slot, width);
      integers = false;
      for (int64_t i = 0; i < count; ++i) {
        const float* row = w.scores + i * BLOCK_LD;
        float top = -INF;
#pragma omp simd reduction(max : top)
        for (int64_t j = 0; j < width; ++j) top = row[j] * factors[i] > top ? row[j] * factors[i] : top;
        raise(w, rows[i], top, weights + i * BATCH_LD, column);
      }
      done();
    }
    for (int64_t i = 0; i < count; ++i) w.sums.add(rows[i], w.fresh + i * LANES);
  }

  // Makes room for scores up to `top` in all that there is of a query: sums, outputs, and weights of this batch.
  void raise(Bench& w, int64_t row, float top, T* weights, int64_t columns) const {
    const float keep = w.sums.raise(row, top);
    if (keep == 1) return;
    for (int64_t d = 0; d < c_.values(); ++d) w.outs[row * c_.values() + d] *= keep;
    for (int64_t j = 0; j < columns; ++j) put(weights[j], get(weights[j]) * keep);
  }

  // Adds the chunks live[from..to) to the strip; row i of it is row rows[i] of sums and outs.
  void add(const Job& job, Bench& w, int64_t from, int64_t to, const Scoring& how) const {
    const int64_t rows = w.limits.rows, padded_rows = round_up(rows, 16), values = c_.values();
    const int64_t head = keys_.begin(job.b, job.h / c_.group());
    for (int64_t i = 0; i < rows; ++i) w.factors[i] = (how.plain ? how.scale * w.scales[i] : 1.f) * LOG2E;
    int64_t columns = 0;
    for (int64_t i = from; i < to; ++i) {
      const int64_t width = how.chunks.list[w.live[i]].padded, slot = head + how.chunks.list[w.live[i]].offset;
      for (int64_t first = 0; first < rows; first += BLOCK) {
        const int64_t count = std::min(BLOCK, rows - first);
        const bool integers = score(job, w, first, count, w.live[i], w.sights[i], how);
        weigh_block(w, first, count, columns, slot, width, integers);
      }
      columns += width;
    }
    float* outs = flat_ ? w.parts : w.outs;
    columns = 0;
    for (int64_t i = from; i < to;) {  // chunks that lie side by side go together
      const Chunk& at = how.chunks.list[w.live[i]];
      int64_t width = 0;
      for (; i < to && how.chunks.list[w.live[i]].offset == at.offset + width; ++i)
        width += how.chunks.list[w.live[i]].padded;
      product(padded_rows, values, width, w.weights + columns, BATCH_LD, keys_.v_right + (head + at.offset) * values,
              values, outs, values, !flat_ || columns > 0);
      columns += width;
    }
    if (!flat_) return;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t d = 0; d < values; ++d) w.outs[w.rows[i] * values + d] += outs[i * values + d];
  }

  // Adds all live chunks of the bench to its strip.
  void add_all(const Job& job, Bench& w, const Scoring& how) const {
    const int64_t live = w.live.size();
    for (int64_t from = 0, to; from < live; from = to) {
      int64_t columns = 0;
      for (to = from; to < live && columns + how.chunks.list[w.live[to]].padded <= BATCH; ++to)
        columns += how.chunks.list[w.live[to]].padded;
      add(job, w, from, to, how);
    }
  }

  void begin(const Job& job, Bench& w) const {
    w.lay(keys_.depth, c_.values(), flat_ ? std::max(job.end - job.start, ROWS) : ROWS);
  }

  void attend(const Job& job, Bench& w) const {
    const int64_t kv = job.h / c_.group();
    const Scoring how(c_, axis_.chunks.at(job.b, kv));
    const Positions& keys = axis_.positions.at(job.b, kv);
    begin(job, w);
    const int64_t rows = job.end - job.start;
    load(job, w.queries);
    std::memset(static_cast<void*>(w.queries + rows * keys_.depth), 0,
                (round_up(rows, 16) - rows) * keys_.depth * sizeof(Q));
    w.limits.clear(c_.axes());
    w.rows.resize(rows);
    const int64_t lo = c_.base(c_.lo, job.b, job.h), hi = c_.base(c_.hi, job.b, job.h);
    if (!c_.q_order) w.limits.add_run(c_, lo, hi, job.start, job.end);
    for (int64_t i = 0; i < rows; ++i) {
      if (c_.q_order) w.limits.add(c_, lo, hi, q_token(job, job.start + i));
      w.rows[i] = i;
      w.scales[i] = scale_of(job, job.start + i);
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
    add_all(job, w, how);
    finish(job, w);
  }

  void gather(const Job& job, Bench& w) const {
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

  void strip(Bench& w) const {
    w.limits.clear(c_.axes());
    w.rows.clear();
  }

  void take(const Job& job, Bench& w, int64_t place) const {
    const int64_t own = place - job.start, at = w.limits.rows;
    std::memcpy(static_cast<void*>(w.queries + at * keys_.depth), w.held + own * keys_.depth, keys_.depth * sizeof(Q));
    w.rows.push_back(own);
    w.scales[at] = scale_of(job, place);
    w.limits.add(c_, c_.base(c_.lo, job.b, job.h), c_.base(c_.hi, job.b, job.h), q_token(job, place));
  }

  // The gathered strip against key tile t, chunk by chunk; then an empty strip.
  void add_tile(const Job& job, Bench& w, int64_t t, const Scoring& how) const {
    const int64_t rows = w.limits.rows;
    if (rows) {
      std::memset(static_cast<void*>(w.queries + rows * keys_.depth), 0,
                  (round_up(rows, 16) - rows) * keys_.depth * sizeof(Q));
      const Positions& keys = axis_.positions.at(job.b, job.h / c_.group());
      w.live.clear();
      w.sights.clear();
      for (int64_t i = how.chunks.first[t]; i < how.chunks.first[t + 1]; ++i)
        if (const Sight s = sight(c_, w.limits, keys, i); s != NONE) {
          w.live.push_back(i);
          w.sights.push_back(s);
        }
      add_all(job, w, how);
    }
    strip(w);
  }

  void finish(const Job& job, Bench& w) const {
    const int64_t values = c_.values();
    S* outs = c_.out.at<S>(job.b * c_.out.stride[0] + job.h * c_.out.stride[1]);
    float* lses = c_.lse.at<float>(job.b * c_.lse.stride[0] + job.h * c_.lse.stride[1]);
    for (int64_t i = 0; i < job.end - job.start; ++i) {
      const int64_t t = q_token(job, job.start + i);
      const float total = w.sums.total(i);
      const bool empty = w.sums.empty(i, total);
      const float share = empty ? 0.f : 1.f / total;
      S* out = outs + t * c_.out.stride[2];
      for (int64_t d = 0; d < values; ++d) put(out[d], w.outs[i * values + d] * share);
      lses[t * c_.lse.stride[2]] = empty ? -INF : w.sums.lse(i, total);
    }
  }

  const Call& c_;
  const bool flat_;
  Arena arena_;
  const KeyAxis& axis_;
  const Span span_;
  PackedKeys<T, K> keys_;
};

}  // namespace tilewise
