// Forward: R stays packed in the caches while the sequences of a block go through time together.
#pragma once

#include "native_cells.h"

namespace tilewise {

// Up to LANES numbers of any format as a vector, zeros behind them; and back.
template <typename S>
inline Floats load_units(const S* from, int64_t count) {
  if constexpr (!std::is_same_v<S, Half>) {
    if (count >= LANES) return load_vector(from);
  }
  alignas(64) float units[LANES] = {};
  copy_row(from, 1, std::min(count, LANES), units);
  return load<Floats>(units);
}

template <typename S>
inline void store_units(Floats x, S* to, int64_t count) {
  alignas(64) float units[LANES];
  store(units, x);
  if (count >= LANES) {
    for (int64_t i = 0; i < LANES; ++i) put(to[i], units[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) put(to[i], units[i]);
  }
}
inline void store_units(Floats x, float* to, int64_t count) {
  if (count >= LANES) return store(to, x);
  std::memcpy(to, &x, count * sizeof(float));
}

// Loads a part of a state [S, H, P, d], or zeros where there is none.
inline void load_state(const Grid& from, const Sequence& at, int64_t head, int64_t part, int64_t first, int64_t last,
                       float* to) {
  for (int64_t v = first; v < last; ++v) {
    Floats x{};
    if (from) {
      const float* row = from.at<float>(at.number * from.stride[0] + head * from.stride[1] + part * from.stride[2]);
      x = load_units(row + v * LANES, from.size[3] - v * LANES);
    }
    store(to + v * LANES, x);
  }
}

inline void store_state(Floats x, const Grid& to, const Sequence& at, int64_t head, int64_t part, int64_t v) {
  float* row = to.at<float>(at.number * to.stride[0] + head * to.stride[1] + part * to.stride[2]);
  store_units(x, row + v * LANES, to.size[3] - v * LANES);
}

// Where a token's rows lie, at the units of vector v.
template <typename T>
T* units_of(const Grid& x, int64_t b, int64_t head, int64_t t, int64_t v) {
  return x.at<T>(b * x.stride[0] + head * x.stride[1] + t * x.stride[2] + v * LANES);
}
inline float* kept_of(const Rnn& c, int64_t b, int64_t head, int64_t t, int64_t v) {
  return c.kept.at<float>(b * c.kept.stride[0] + t * c.kept.stride[1] + head * c.kept.stride[2] + v * LANES);
}

// What a team works with on the forward pass.
template <typename S>
struct ForwardBench {
  const Packed<S>* right;  // of all heads
  const float* bias;       // [H, gates, padded]
  float* h[2];             // [rows, ldh]: before and after the token
  float* parts;            // [rows, PARTS - 1, padded]
  int64_t ldh;
};

template <typename N, typename S>
class Forward {
 public:
  Forward(const Rnn& c, const Worker& worker, const Block& block, const ForwardBench<S>& bench)
      : c_(c), w_(worker), block_(block), bench_(bench), first_(worker.first(c.vectors())),
        last_(worker.last(c.vectors())), right_(bench.right + block.head * N::GATES * c.padded() * c.width),
        bias_(bench.bias + block.head * N::GATES * c.padded()), streams_(c.streams()) {}

  void run() {
    for (int64_t row = 0; row < block_.rows; ++row)
      for (int64_t p = 0; p < N::PARTS; ++p) {
        float* to = p ? part(row, p) : bench_.h[0] + row * bench_.ldh;
        load_state(c_.state, block_.sequence[row], block_.head, p, first_, last_, to);
        for (int64_t v = first_; v < last_ && !block_.sequence[row].length; ++v)
          store_state(load<Floats>(to + v * LANES), c_.after, block_.sequence[row], block_.head, p, v);
      }
    w_.wait();
    for (int64_t t = 0; t < block_.length(); ++t) {
      step(t, block_.live(t));
      w_.wait();
    }
    if (streams_) end_streams();
  }

 private:
  float* part(int64_t row, int64_t p) const {
    return bench_.parts + (row * (N::PARTS - 1) + p - 1) * c_.padded();
  }

  void step(int64_t t, int64_t live) {
    constexpr int64_t BUNDLE = std::max<int64_t>(1, ACROSS / N::GATES);
    alignas(64) float sums[HIGH * ACROSS * LANES];
    const float* before = bench_.h[t & 1];
    for (int64_t v = first_; v < last_; v += BUNDLE) {
      const int64_t units = std::min(BUNDLE, last_ - v), ld = units * N::GATES * LANES;
      const Packed<S>* right = right_ + v * N::GATES * LANES * c_.width;
      runs(live, HIGH, [&](int64_t first, int64_t count) {
        multiply_for<Packed<S>>(count, units * N::GATES)(c_.width, before + first * bench_.ldh, bench_.ldh, 1, right, ld,
                                                        sums, ld, false);
        for (int64_t i = 0; i < count; ++i)
          for (int64_t u = 0; u < units; ++u)
            unit(t, first + i, v + u, sums + i * ld + u * N::GATES * LANES);
      });
    }
  }

  void unit(int64_t t, int64_t row, int64_t v, const float* sums) {
    const Sequence& at = block_.sequence[row];
    const int64_t place = at.start + t, head = block_.head, count = c_.width - v * LANES;
    Floats s[N::PARTS];
    s[0] = load<Floats>(bench_.h[t & 1] + row * bench_.ldh + v * LANES);
    for (int64_t p = 1; p < N::PARTS; ++p) s[p] = load<Floats>(part(row, p) + v * LANES);
    S* out = units_of<S>(c_.out, at.b, head, place, v);
    if (c_.is_passed_over(at.b, place)) {
      store_units(Floats{}, out, count);
      for (int64_t k = 0; k <= N::KEPT && c_.kept; ++k)
        store(kept_of(c_, at.b, head, place, v) + k * c_.kept_width(), Floats{});
    } else {
      Floats x[N::GATES], r[N::GATES], keep[N::KEPT + 1];
      const S* from = units_of<const S>(c_.wx, at.b, head, place, v);
      for (int64_t g = 0; g < N::GATES; ++g) {
        x[g] = load_units(from + g * c_.wx.stride[3], count);
        r[g] = load<Floats>(sums + g * LANES) + load<Floats>(bias_ + g * c_.padded() + v * LANES);
        __builtin_prefetch(from + g * c_.wx.stride[3] + c_.wx.stride[2]);
      }
      const Floats h = s[0];
      N::forward(x, r, s, keep);
      store_units(s[0], out, count);
      for (int64_t p = 1; p < N::PARTS; ++p) store(part(row, p) + v * LANES, s[p]);
      if (c_.kept) {
        float* to = kept_of(c_, at.b, head, place, v);
        keep[N::KEPT] = h;
        for (int64_t k = 0; k <= N::KEPT; ++k, to += c_.kept_width()) {
          if (streams_) stream(to, keep[k]);
          else store(to, keep[k]);
        }
      }
    }
    store(bench_.h[(t + 1) & 1] + row * bench_.ldh + v * LANES, s[0]);
    if (t + 1 == at.length)
      for (int64_t p = 0; p < N::PARTS; ++p) store_state(s[p], c_.after, at, head, p, v);
  }

  const Rnn& c_;
  const Worker& w_;
  const Block& block_;
  const ForwardBench<S>& bench_;
  int64_t first_, last_;
  const Packed<S>* right_;
  const float* bias_;
  const bool streams_;
};

template <typename N, typename S>
void run_forward(const Rnn& c) {
  const std::vector<Sequence> all = sequences(c);
  const int64_t heads = c.heads(), padded = c.padded(), ldh = padded + LANES, matrix = N::GATES * padded * c.width;
  const int64_t teams = std::max<int64_t>(1, c.threads / c.team);
  Arena arena;
  const int64_t at_right = arena.announce<Packed<S>>(heads * matrix);
  const int64_t at_bias = arena.announce<float>(heads * N::GATES * padded);
  const int64_t at_h = arena.announce<float>(teams * 2 * c.rows * ldh);
  const int64_t at_parts = arena.announce<float>(teams * c.rows * N::PARTS * padded);
  arena.settle();
  Packed<S>* right = arena.part<Packed<S>>(at_right);
  float* bias = arena.part<float>(at_bias);
  std::atomic<int64_t> packed{0}, next{0};
  const auto pack = [&](const Worker& worker) {
    for (int64_t job = packed++; job < heads * worker.team; job = packed++) {
      const int64_t head = job / worker.team;
      Worker owner = worker;
      owner.member = job % worker.team;
      pack_forward<S>(c, head, owner.first(c.vectors()), owner.last(c.vectors()), right + head * matrix);
      for (int64_t g = 0; g < N::GATES && !owner.member; ++g)
        for (int64_t v = 0; v < c.vectors(); ++v) {
          const Floats x = !c.bias ? Floats{} : load_units(units_of<const S>(c.bias, head, g, 0, v), c.width - v * LANES);
          store(bias + (head * N::GATES + g) * padded + v * LANES, x);
        }
    }
  };
  const auto work = [&](const Worker& worker) {
    const FlushSubnormals flush;
    float* h = arena.part<float>(at_h) + worker.group * 2 * c.rows * ldh;
    const ForwardBench<S> bench{right, bias, {h, h + c.rows * ldh},
                                arena.part<float>(at_parts) + worker.group * c.rows * N::PARTS * padded, ldh};
    for_own_jobs(worker, heads * c.parts, next, [&](int64_t job) {
      for (int64_t number = job % c.parts; number < c.blocks(); number += c.parts) {
        const Block block = block_of(c, all, job / c.parts, number);
        Forward<N, S>(c, worker, block, bench).run();
      }
    });
  };
  in_teams(c.threads, c.team, pack, work);
}

}  // namespace tilewise
