// Backward: chunks of keys against strips of queries, weights computed again from the log-sum-exp.
//
// Blocks are held with keys down the rows, so what belongs to a query lies along a row and no block is transposed:
//
//     S' = K Q'    P' = exp(S' - lse)    dP' = V dO'    dS' = P' (dP' - delta)
//     dV += P' dO    dK += dS' Q    dQ' += K' dS'
//
// A job owns some keys of one kv head, and a dQ of its own when several jobs share a head, so that no two threads
// add to one place and the sums come in one order however many threads there are.
#pragma once

#include "native_keys.h"

namespace tilewise {

// A strip of queries in all the forms that products want, and where its dQ' is gathered.
template <typename T>
struct Strip {
  int64_t rows = 0, padded = 0;
  T *q_turned, *d_out_turned;   // right operands [depth, padded], [values, padded]
  T *q_rows, *d_out_rows;       // right operands [padded, depth], [padded, values]
  float *lse, *delta;           // [padded]; lse is +inf where a query saw nothing
  float* d_q;                   // [depth, padded]
  const Limits* limits;
};

template <typename T>
struct BackwardBench {
  Buffer memory[16];
  Limits limits;
  std::vector<int64_t> places;
};

template <typename S, typename T>
class Backward {
 public:
  static void run(const Call& c) {
    const KeyAxis axis(c);
    const int64_t width = c.depth() + c.values();
    const int64_t bytes = axis.longest * (width + c.depth()) * sizeof(T) +
                          c.group() * c.queries() * (2 * width * sizeof(T) + c.depth() * sizeof(float));
    for (Span span : spans(c, bytes)) Backward(c, axis, span).run();
  }

 private:
  Backward(const Call& call, const KeyAxis& axis, Span span)
      : c_(call), flat_(call.keep && call.q_size < TALL), depth_(product_depth<T>(call.depth())),
        values_(product_depth<T>(call.values())), axis_(axis), span_(span),
        keys_(c_, axis.chunks, span, arena_, FORMS) {
    cut_queries();
    plan_jobs();
    const int64_t rows = slots_.back();
    if (!flat_) {
      const int64_t sizes[] = {rows * depth_, rows * values_, rows * c_.depth(), rows * c_.values()};
      for (int f = 0; f < 4; ++f) at_[f] = arena_.announce<T>(sizes[f]);
    }
    at_[4] = arena_.announce<float>(2 * rows);
    at_[5] = arena_.announce<float>(parts_ * rows * c_.depth());
    arena_.settle();
    keys_.template fill<S>(c_, arena_, FORMS);
    lse_ = arena_.part<float>(at_[4]);
    delta_ = lse_ + rows;
    d_q_ = arena_.part<float>(at_[5]);
    if (!flat_) {
      q_turned_ = arena_.part<T>(at_[0]);
      d_out_turned_ = arena_.part<T>(at_[1]);
      q_rows_ = arena_.part<T>(at_[2]);
      d_out_rows_ = arena_.part<T>(at_[3]);
    }
  }

  void run() {
    constexpr bool tiles_unit = std::is_same_v<T, BFloat16>;
    for_each_job(strips_.size(), c_.threads, false, [&](int64_t i) { prepare(strips_[i]); });
    for (const std::vector<Job>& round : rounds_)
      for_each_job(round.size(), c_.threads, tiles_unit, [&](int64_t j) {
        thread_local BackwardBench<T> bench;
        run_job(round[j], bench);
      });
    for_each_job(strips_.size(), c_.threads, false, [&](int64_t i) { finish(strips_[i]); });
  }

  static constexpr int FORMS = K_LEFT | V_LEFT | K_TURNED;

  // Consecutive places of the query axis of one head. For flat tiles only a unit of preparation.
  struct Places {
    int64_t b, h, tile, start, rows, slot;
    Limits limits;
  };
  struct Job {
    int64_t b, kv, first, last, part;  // chunks of keys
  };

  void cut_queries() {
    slots_.push_back(0);
    int64_t slot = 0;
    for (int64_t head = span_.first * c_.group(); head < span_.last * c_.group(); ++head) {
      const int64_t b = head / c_.heads(), h = head % c_.heads();
      first_strip_.push_back(strips_.size());
      const Cut rows = cut(c_, flat_ ? Grid{} : c_.q_bounds, flat_ || !c_.keep ? ROWS : c_.q_size, c_.queries(), b, h);
      for (int64_t t = 0; t < rows.count; ++t)
        for (int64_t at = rows.start(t); at < rows.start(t + 1); at += ROWS) {
          const int64_t n = std::min(ROWS, rows.start(t + 1) - at);
          strips_.push_back({b, h, t, at, n, slot, {}});
          slot += flat_ ? n : round_up(n, 16);
        }
      slots_.push_back(slot);
    }
    first_strip_.push_back(strips_.size());
  }

  // Jobs that may add to the same gradient of the bias come in different rounds.
  void plan_jobs() {
    const bool by_batch = c_.d_bias && c_.d_bias.size[0] < c_.batch();
    const bool by_head = c_.d_bias && c_.d_bias.size[1] < c_.heads();
    const int64_t entries = (span_.last - 1) / c_.kv_heads() - span_.first / c_.kv_heads() + 1;
    const int64_t in_entry = std::min(c_.kv_heads(), span_.last - span_.first);
    const int64_t all = span_.last - span_.first;
    const int64_t at_once = by_batch && by_head ? 1 : by_batch ? in_entry : by_head ? entries : all;
    parts_ = std::clamp<int64_t>((2 * c_.threads + at_once - 1) / at_once, 1, c_.threads);
    if (c_.d_bias && c_.d_bias.size[3] < c_.keys()) parts_ = 1;
    rounds_.resize((by_batch ? c_.batch() : 1) * (by_head ? c_.kv_heads() : 1));
    for (int64_t head = span_.first; head < span_.last; ++head) {
      const int64_t b = head / c_.kv_heads(), kv = head % c_.kv_heads();
      std::vector<Job>& round = rounds_[(by_batch ? b : 0) * (by_head ? c_.kv_heads() : 1) + (by_head ? kv : 0)];
      const int64_t count = axis_.chunks.at(b, kv).list.size();
      for (int64_t part = 0; part < parts_; ++part) {
        const int64_t first = count * part / parts_, last = count * (part + 1) / parts_;
        if (first < last) round.push_back({b, kv, first, last, part});
      }
    }
  }

  int64_t q_token(int64_t b, int64_t h, int64_t place) const {
    return token(c_.q_order, c_.q_order ? c_.base(c_.q_order, b, h) : 0, place);
  }

  template <typename X>
  void load_row(const Grid& x, int64_t b, int64_t h, int64_t t, X* to, int64_t ld) const {
    copy_row(x.at<S>(b * x.stride[0] + h * x.stride[1] + t * x.stride[2]), x.stride[3], x.size[3], to);
    for (int64_t d = x.size[3]; d < ld; ++d) put(to[d], 0.f);
  }

  // Packs rows of q and d_out, [rows, depth] and [rows, values], into the strip's forms.
  void pack_strip(const Strip<T>& s, const T* q, const T* d_out) const {
    pack_transposed(q, depth_, s.rows, s.padded, c_.depth(), s.q_turned);
    pack_transposed(d_out, values_, s.rows, s.padded, c_.values(), s.d_out_turned);
    pack_rows_of(q, depth_, s, c_.depth(), s.q_rows);
    pack_rows_of(d_out, values_, s, c_.values(), s.d_out_rows);
  }
  void pack_rows_of(const T* from, int64_t ld, const Strip<T>& s, int64_t width, T* to) const {
    pack_rows(from, ld, s.rows, s.padded, width, to);
  }

  Strip<T> strip_of(const Places& p) const {
    const int64_t at = p.slot;
    return {p.rows, round_up(p.rows, 16), q_turned_ + at * depth_, d_out_turned_ + at * values_,
            q_rows_ + at * c_.depth(), d_out_rows_ + at * c_.values(), lse_ + at, delta_ + at,
            d_q_ + at * c_.depth(), &p.limits};
  }

  static float dot(const S* x, const S* y, int64_t n, int64_t x_step, int64_t y_step) {
    float sum = 0;
    if (x_step == 1 && y_step == 1) {
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) sum += get(x[i]) * get(y[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) sum += get(x[i * x_step]) * get(y[i * y_step]);
    }
    return sum;
  }

  void prepare(Places& p) {
    thread_local Buffer memory[2];
    T* q = memory[0].take<T>(ROWS * depth_);
    T* d_out = memory[1].take<T>(ROWS * values_);
    const int64_t padded = flat_ ? p.rows : round_up(p.rows, 16), slot = p.slot;
    const float* lses = c_.lse.at<float>(p.b * c_.lse.stride[0] + p.h * c_.lse.stride[1]);
    const float* d_lses = c_.d_lse.at<float>(p.b * c_.d_lse.stride[0] + p.h * c_.d_lse.stride[1]);
    const int64_t lo = c_.base(c_.lo, p.b, p.h), hi = c_.base(c_.hi, p.b, p.h);
    p.limits.clear(c_.axes());
    for (int64_t i = 0; i < p.rows; ++i) {
      const int64_t t = q_token(p.b, p.h, p.start + i);
      const float lse = lses[t * c_.lse.stride[2]];
      lse_[slot + i] = lse == -INF ? INF : lse;
      const S* out = c_.out.at<S>(p.b * c_.out.stride[0] + p.h * c_.out.stride[1] + t * c_.out.stride[2]);
      const S* d = c_.d_out.at<S>(p.b * c_.d_out.stride[0] + p.h * c_.d_out.stride[1] + t * c_.d_out.stride[2]);
      const float flow = dot(out, d, c_.values(), c_.out.stride[3], c_.d_out.stride[3]);
      delta_[slot + i] = flow - d_lses[t * c_.d_lse.stride[2]];
      if (flat_) continue;
      p.limits.add(c_, lo, hi, t);
      load_row(c_.q, p.b, p.h, t, q + i * depth_, depth_);
      load_row(c_.d_out, p.b, p.h, t, d_out + i * values_, values_);
    }
    std::fill(lse_ + slot + p.rows, lse_ + slot + padded, INF);
    std::fill(delta_ + slot + p.rows, delta_ + slot + padded, 0.f);
    const int64_t whole = slots_.back() * c_.depth();
    for (int64_t part = 0; part < parts_; ++part)
      std::memset(d_q_ + part * whole + slot * c_.depth(), 0, padded * c_.depth() * sizeof(float));
    if (!flat_) pack_strip(strip_of(p), q, d_out);
  }

  void run_job(const Job& job, BackwardBench<T>& w) const {
    const Chunks& chunks = axis_.chunks.at(job.b, job.kv);
    const Scoring how(c_, chunks);
    float* d_k = w.memory[0].template take<float>(KEYS * c_.depth());
    float* d_v = w.memory[1].template take<float>(KEYS * c_.values());
    for (int64_t i = job.first; i < job.last; ++i) {
      const Chunk& at = chunks.list[i];
      std::memset(d_k, 0, at.padded * c_.depth() * sizeof(float));
      std::memset(d_v, 0, at.padded * c_.values() * sizeof(float));
      for (int64_t g = 0; g < c_.group(); ++g) {
        const int64_t h = job.kv * c_.group() + g;
        flat_ ? gather(job, h, i, how, w, d_k, d_v) : attend(job, h, i, how, w, d_k, d_v);
      }
      store(c_.d_k, job, at, d_k, static_cast<float>(c_.scale));
      store(c_.d_v, job, at, d_v, 1.f);
    }
  }

  const bool* kept(int64_t b, int64_t h, int64_t tile) const {
    return c_.keep ? c_.keep.at<bool>(c_.base(c_.keep, b, h) + tile * c_.keep.stride[3]) : nullptr;
  }

  void attend(const Job& job, int64_t h, int64_t chunk, const Scoring& how, BackwardBench<T>& w, float* d_k,
              float* d_v) const {
    const int64_t head = job.b * c_.heads() + h - span_.first * c_.group(), whole = slots_.back() * c_.depth();
    const bool* keep = kept(job.b, h, how.chunks.list[chunk].tile);
    for (int64_t s = first_strip_[head]; s < first_strip_[head + 1]; ++s) {
      const Places& p = strips_[s];
      if (keep && !keep[p.tile * c_.keep.stride[2]]) continue;
      const Sight seen = sight(c_, p.limits, axis_.positions.at(job.b, job.kv), chunk);
      if (seen == NONE) continue;
      Strip<T> strip = strip_of(p);
      strip.d_q += job.part * whole;
      add(job, h, strip, chunk, seen, how, w, d_k, d_v);
    }
  }

  // Flat tiles: the queries whose tile kept this chunk's tile, ROWS at a time.
  void gather(const Job& job, int64_t h, int64_t chunk, const Scoring& how, BackwardBench<T>& w, float* d_k,
              float* d_v) const {
    const bool* keep = kept(job.b, h, how.chunks.list[chunk].tile);
    const Cut cuts = cut(c_, c_.q_bounds, c_.q_size, c_.queries(), job.b, h);
    w.places.clear();
    for (int64_t t = 0; t < cuts.count; ++t) {
      if (!keep[t * c_.keep.stride[2]]) continue;
      for (int64_t i = cuts.start(t); i < cuts.start(t + 1); ++i) {
        w.places.push_back(i);
        if (static_cast<int64_t>(w.places.size()) == ROWS) add_gathered(job, h, chunk, how, w, d_k, d_v);
      }
    }
    add_gathered(job, h, chunk, how, w, d_k, d_v);
  }

  void add_gathered(const Job& job, int64_t h, int64_t chunk, const Scoring& how, BackwardBench<T>& w, float* d_k,
                    float* d_v) const {
    const int64_t rows = w.places.size(), padded = round_up(rows, 16);
    const int64_t slot = slots_[job.b * c_.heads() + h - span_.first * c_.group()];
    const int64_t lo = c_.base(c_.lo, job.b, h), hi = c_.base(c_.hi, job.b, h);
    w.limits.clear(c_.axes());
    for (int64_t place : w.places) w.limits.add(c_, lo, hi, q_token(job.b, h, place));
    const Sight seen = rows ? sight(c_, w.limits, axis_.positions.at(job.b, job.kv), chunk) : NONE;
    if (seen != NONE) {
      T* q = w.memory[8].template take<T>(ROWS * depth_);
      T* d_out = w.memory[9].template take<T>(ROWS * values_);
      float* lse = w.memory[14].template take<float>(2 * ROWS);
      const Strip<T> strip{rows, padded, w.memory[10].template take<T>(ROWS * depth_),
                           w.memory[11].template take<T>(ROWS * values_), w.memory[12].template take<T>(ROWS * depth_),
                           w.memory[13].template take<T>(ROWS * values_), lse, lse + ROWS,
                           w.memory[15].template take<float>(ROWS * c_.depth()), &w.limits};
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t t = w.limits.tokens[i];
        load_row(c_.q, job.b, h, t, q + i * depth_, depth_);
        load_row(c_.d_out, job.b, h, t, d_out + i * values_, values_);
        strip.lse[i] = lse_[slot + w.places[i]];
        strip.delta[i] = delta_[slot + w.places[i]];
      }
      std::fill(strip.lse + rows, strip.lse + padded, INF);
      std::fill(strip.delta + rows, strip.delta + padded, 0.f);
      std::memset(strip.d_q, 0, c_.depth() * padded * sizeof(float));
      pack_strip(strip, q, d_out);
      add(job, h, strip, chunk, seen, how, w, d_k, d_v);
      float* all = d_q_ + (job.part * slots_.back() + slot) * c_.depth();
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t d = 0; d < c_.depth(); ++d)
          all[w.places[i] * c_.depth() + d] += strip.d_q[d * padded + i];
    }
    w.places.clear();
  }

  // One block: its shares of d_k, d_v [keys, *], of the strip's d_q and of the bias.
  void add(const Job& job, int64_t h, const Strip<T>& s, int64_t chunk, Sight seen, const Scoring& how,
           BackwardBench<T>& w, float* d_k, float* d_v) const {
    constexpr bool low = std::is_same_v<T, BFloat16>;
    const Chunk& at = how.chunks.list[chunk];
    const int64_t n = s.padded, slot = keys_.begin(job.b, job.kv) + at.offset;
    float* scores = w.memory[2].template take<float>(KEYS * ROWS);
    float* d_weights = w.memory[3].template take<float>(KEYS * ROWS);
    float* slope = c_.softcap != 0 ? w.memory[4].template take<float>(KEYS * ROWS) : nullptr;
    T* weights = low ? w.memory[5].template take<T>(KEYS * ROWS) : reinterpret_cast<T*>(scores);
    T* d_scores = low ? w.memory[6].template take<T>(KEYS * ROWS) : reinterpret_cast<T*>(d_weights);
    product(at.padded, n, depth_, keys_.k_left + slot * depth_, depth_, s.q_turned, n, scores, n, false);
    product(at.padded, n, values_, keys_.v_left + slot * values_, values_, s.d_out_turned, n, d_weights, n, false);
    const float factor = how.plain ? how.scale : 1.f;
    for (int64_t j = 0; j < at.padded; ++j) {
      float *score = scores + j * n, *d = d_weights + j * n, *bend = slope ? slope + j * n : nullptr;
      finish_scores(job, h, s, chunk, j, seen, how, score, bend);
      T *weight = weights + j * n, *d_score = d_scores + j * n;
      for (int64_t i = 0; i < n; ++i) {
        const float p = exp_of<low>(score[i] * factor - s.lse[i]);
        d[i] = p * (d[i] - s.delta[i]);
        put_plain(weight[i], p);
      }
      if (c_.d_bias && j < at.width) add_bias_gradient(job, h, s, chunk, j, d);
      if (bend)
        for (int64_t i = 0; i < n; ++i) d[i] *= bend[i];
      if constexpr (low)
        for (int64_t i = 0; i < n; ++i) put_plain(d_score[i], d[i]);
    }
    product(at.padded, c_.values(), n, weights, n, s.d_out_rows, c_.values(), d_v, c_.values(), true);
    product(at.padded, c_.depth(), n, d_scores, n, s.q_rows, c_.depth(), d_k, c_.depth(), true);
    const T* right = d_scores;
    if constexpr (low) {
      T* packed = w.memory[7].template take<T>(KEYS * ROWS);
      pack_rows(d_scores, n, at.padded, at.padded, n, packed);
      right = packed;
    }
    product(c_.depth(), n, at.padded, keys_.k_turned + slot * depth_, at.padded, right, n, s.d_q, n, true);
  }

  static void put_plain(float& to, float x) { to = x; }
  static void put_plain(BFloat16& to, float x) {  // as put, for numbers: a NaN stays one, its payload aside
    const uint32_t bits = bits_of(x);
    to.x = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }

  // Scale, cap, bias and mask for key j of a chunk, its scores against the strip's queries along the row.
  void finish_scores(const Job& job, int64_t h, const Strip<T>& s, int64_t chunk, int64_t j, Sight seen,
                     const Scoring& how, float* row, float* slope) const {
    const Chunk& at = how.chunks.list[chunk];
    const Positions& keys = axis_.positions.at(job.b, job.kv);
    const int64_t* tokens = s.limits->tokens.data();
    if (!how.plain) how.finish_row(row, s.padded, slope);
    if (c_.bias && j < at.width) {
      const int64_t from = c_.base(c_.bias, job.b, h) + keys.tokens[at.offset + j] * step(c_.bias, 3);
      for (int64_t i = 0; i < s.rows; ++i) row[i] += bias_at(c_.bias, from + tokens[i] * step(c_.bias, 2));
    }
    if (seen == WHOLE) return;
    for (int64_t a = 0; a < c_.axes(); ++a) {
      const int64_t pos = std::max(keys.pos[a * how.chunks.padded + at.offset + j], HIDDEN);
      const int64_t *lo = s.limits->lo.data() + a * ROWS, *hi = s.limits->hi.data() + a * ROWS;
      for (int64_t i = 0; i < s.padded; ++i)
        row[i] = (pos == HIDDEN) | (pos < lo[i]) | (pos > hi[i]) ? -INF : row[i];
    }
    if (!c_.dense || j >= at.width) return;
    const bool* see = c_.dense.at<bool>(c_.base(c_.dense, job.b, h) + keys.tokens[at.offset + j] * step(c_.dense, 3));
    for (int64_t i = 0; i < s.rows; ++i) row[i] = see[tokens[i] * step(c_.dense, 2)] ? row[i] : -INF;
  }

  void add_bias_gradient(const Job& job, int64_t h, const Strip<T>& s, int64_t chunk, int64_t j, const float* d) const {
    const Chunk& at = axis_.chunks.at(job.b, job.kv).list[chunk];
    const int64_t key = axis_.positions.at(job.b, job.kv).tokens[at.offset + j];
    float* to = c_.d_bias.at<float>(c_.base(c_.d_bias, job.b, h) + key * step(c_.d_bias, 3));
    for (int64_t i = 0; i < s.rows; ++i) to[s.limits->tokens[i] * step(c_.d_bias, 2)] += d[i];
  }

  // Rows of a chunk, [width, x.size[3]], to their tokens.
  void store(const Grid& x, const Job& job, const Chunk& at, const float* from, float factor) const {
    const int64_t n = x.size[3], base = job.b * x.stride[0] + job.kv * x.stride[1];
    const int64_t order = c_.k_order ? c_.base(c_.k_order, job.b, job.kv * c_.group()) : 0;
    for (int64_t j = 0; j < at.width; ++j) {
      S* to = x.at<S>(base + token(c_.k_order, order, at.start + j) * x.stride[2]);
      for (int64_t d = 0; d < n; ++d) put(to[d], from[j * n + d] * factor);
    }
  }

  // Sums the parts of a strip's d_q and writes them to their tokens.
  void finish(const Places& p) const {
    thread_local Buffer memory;
    const int64_t depth = c_.depth(), whole = slots_.back() * depth, padded = flat_ ? p.rows : round_up(p.rows, 16);
    float* sum = d_q_ + p.slot * depth;
    for (int64_t part = 1; part < parts_; ++part)
      for (int64_t i = 0; i < padded * depth; ++i) sum[i] += sum[part * whole + i];
    if (!flat_) {
      float* rows = memory.take<float>(ROWS * depth);
      transpose(sum, padded, depth, depth, padded, rows, depth);
      sum = rows;
    }
    for (int64_t i = 0; i < p.rows; ++i, sum += depth) {
      S* to = c_.d_q.at<S>(p.b * c_.d_q.stride[0] + p.h * c_.d_q.stride[1] +
                           q_token(p.b, p.h, p.start + i) * c_.d_q.stride[2]);
      for (int64_t d = 0; d < depth; ++d) put(to[d], sum[d] * static_cast<float>(c_.scale));
    }
  }

  const Call& c_;
  const bool flat_;
  const int64_t depth_, values_;  // of left operands: even in bfloat16
  Arena arena_;
  const KeyAxis& axis_;
  const Span span_;
  PackedKeys<T> keys_;
  std::vector<Places> strips_;
  std::vector<int64_t> first_strip_;  // of each (batch, head); one more at the end
  std::vector<int64_t> slots_;        // the same in slots of queries
  std::vector<std::vector<Job>> rounds_;
  int64_t parts_ = 1;
  int64_t at_[6] = {};
  T *q_turned_ = nullptr, *d_out_turned_ = nullptr, *q_rows_ = nullptr, *d_out_rows_ = nullptr;
  float *lse_ = nullptr, *delta_ = nullptr, *d_q_ = nullptr;
};

}  // namespace tilewise
