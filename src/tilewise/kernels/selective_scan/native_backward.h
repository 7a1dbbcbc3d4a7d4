// Backward: tile by tile from the last, after a forward pass that keeps the states before every tile. The states within
// a tile, and their factors, are computed again, for a few states at a time, and stay in the nearest cache.
#pragma once

#include "native_forward.h"

namespace tilewise {

// Sums that blocks or sequences add up to, each part by itself, so that no two threads write to one place.
struct Parts {
  float *b, *c;  // [blocks of a group, batch, groups, N, S]
  float *a, *d;  // [Q, channels, S] and [Q, channels]
  int64_t block_size, n, states;

  Parts(const Scan& call, const Blocks& blocks)
      : block_size(call.b.size[0] * call.groups() * call.b.size[2] * call.states()), n(call.b.size[2]),
        states(call.states()) {
    b = memory_[0].take<float>(blocks.per_group * block_size);
    c = memory_[1].take<float>(blocks.per_group * block_size);
    a = memory_[2].take<float>(call.sequences() * call.channels() * states);
    d = memory_[3].take<float>(call.sequences() * call.channels());
  }
  int64_t at(const Scan& call, int64_t batch, int64_t group, int64_t t) const {
    return ((batch * call.groups() + group) * n + t) * states;
  }

 private:
  Buffer memory_[4];
};

template <int64_t K>
class Backward {
 public:
  Backward(const Scan& call, const Lane& lane, int64_t wide, Parts& parts)
      : c_(call), at_(lane), parts_(parts), w_(call, wide), wide_(wide), states_(w_.states), size_(states_ * wide) {
    d_h_ = own_.take<float>((2 * size_ + wide) + 3 * TILE * wide + 2 * TILE * states_ * LANES);
    d_a_ = d_h_ + size_, d_d_ = d_a_ + size_;
    d_out_ = d_d_ + wide, d_in_ = d_out_ + TILE * wide, gate_ = d_in_ + TILE * wide;
    d_b_ = gate_ + TILE * wide, d_c_ = d_b_ + TILE * states_ * LANES;
  }

  void run() {
    w_.begin(c_, at_);
    const int64_t tiles = (at_.length() + TILE - 1) / TILE;
    float* kept = kept_.take<float>(tiles * size_);
    for (int64_t i = 0; i < tiles; ++i) {
      std::memcpy(kept + i * size_, w_.h, size_ * sizeof(float));
      if (i + 1 == tiles) break;
      w_.read(c_, at_, token(i), TILE);
      all_steps<false>(w_, TILE);
    }
    std::memset(d_a_, 0, (size_ + wide_) * sizeof(float));  // and d_d_
    load_states(states_of(c_.d_after, at_), c_.d_after.stride + 1, at_.channels, c_.states(), d_h_, states_, wide_);
    for (int64_t i = tiles - 1; i >= 0; --i) tile(i, kept + i * size_);
    const int64_t first = at_.sequence * c_.channels() + at_.channel;
    store_states(d_a_, wide_, at_.channels, c_.states(), parts_.a + first * c_.states());
    if (c_.d) std::memcpy(parts_.d + first, d_d_, at_.channels * sizeof(float));
    if (c_.d_state)
      store_states(d_h_, wide_, at_.channels, c_.states(), c_.d_state.at<float>(first * c_.states()));
  }

 private:
  int64_t token(int64_t tile) const { return at_.start + tile * TILE; }

  void tile(int64_t i, const float* before) {
    const int64_t t = token(i), n = std::min(TILE, at_.end - t);
    w_.read(c_, at_, t, n);
    load_shared(c_.c, at_, t, n, w_.c, states_);
    load_rows(c_.d_out, at_, t, n, d_out_, wide_);
    std::memset(d_in_, 0, 2 * TILE * wide_ * sizeof(float));  // and gate_
    for (int64_t j = 0; j < wide_; j += LANES)
      for (int64_t s = 0; s < states_; s += K) {
        replay(before, s, j, n);
        reverse(s, j, n);
      }
    for (int64_t r = 0; r < n; ++r)
      for (int64_t j = 0; j < wide_; ++j) {
        const int64_t at = r * wide_ + j;
        const float in = d_in_[at], out = d_out_[at], x = w_.x[at];
        d_d_[j] += out * x;
        d_in_[at] = w_.delta[at] * in + w_.d[j] * out;
        gate_[at] = x * in + gate_[at] * (1 / LOG2E);  // A was in powers of 2
      }
    store_rows(d_in_, wide_, c_.d_x, at_, t, n);
    store_rows(gate_, wide_, c_.d_delta, at_, t, n);
    const int64_t to = at_.block * parts_.block_size + parts_.at(c_, at_.b, at_.group, t);
    sum_shared(d_b_, n, parts_.b + to);
    sum_shared(d_c_, n, parts_.c + to);
  }

  // The tile's states after each token, from those before it, and the factors.
  void replay(const float* before, int64_t s, int64_t j, int64_t n) {
    Floats a[K];
    for (int k = 0; k < K; ++k) a[k] = load<Floats>(w_.a + (s + k) * wide_ + j);
    for (int k = 0; k < K; ++k) h_[0][k] = load<Floats>(before + (s + k) * wide_ + j);
    for (int64_t t = 0; t < n; ++t) {
      const Floats delta = load<Floats>(w_.delta + t * wide_ + j), moved = load<Floats>(w_.moved + t * wide_ + j);
      const float* b = w_.b + t * states_ + s;
      for (int k = 0; k < K; ++k) {
        const Floats factor = exp2_of_product(delta, a[k]);
        factors_[t][k] = factor;
        h_[t + 1][k] = factor * h_[t][k] + moved * b[k];
      }
    }
  }

  void reverse(int64_t s, int64_t j, int64_t n) {
    Floats a[K], d_h[K], d_a[K];
    for (int k = 0; k < K; ++k) a[k] = load<Floats>(w_.a + (s + k) * wide_ + j);
    for (int k = 0; k < K; ++k) d_h[k] = load<Floats>(d_h_ + (s + k) * wide_ + j);
    for (int k = 0; k < K; ++k) d_a[k] = load<Floats>(d_a_ + (s + k) * wide_ + j);
    for (int64_t t = n - 1; t >= 0; --t) {
      const int64_t at = t * wide_ + j;
      const Floats delta = load<Floats>(w_.delta + at), moved = load<Floats>(w_.moved + at);
      const Floats d_out = load<Floats>(d_out_ + at);
      const float *b = w_.b + t * states_ + s, *c = w_.c + t * states_ + s;
      float *to_b = d_b_ + (t * states_ + s) * LANES, *to_c = d_c_ + (t * states_ + s) * LANES;
      Floats d_in = load<Floats>(d_in_ + at), gate = load<Floats>(gate_ + at);
      for (int k = 0; k < K; ++k) {
        d_h[k] += d_out * c[k];
        Floats d_b = d_h[k] * moved, d_c = d_out * h_[t + 1][k];
        if (j) d_b += load<Floats>(to_b + k * LANES), d_c += load<Floats>(to_c + k * LANES);
        store(to_b + k * LANES, d_b);
        store(to_c + k * LANES, d_c);
        d_in += d_h[k] * b[k];
        d_h[k] *= factors_[t][k];
        const Floats through = d_h[k] * h_[t][k];
        gate += through * a[k];
        d_a[k] += through * delta;
      }
      store(d_in_ + at, d_in);
      store(gate_ + at, gate);
    }
    for (int k = 0; k < K; ++k) store(d_h_ + (s + k) * wide_ + j, d_h[k]);
    for (int k = 0; k < K; ++k) store(d_a_ + (s + k) * wide_ + j, d_a[k]);
  }

  // Adds up the lanes of `from [n, states, LANES]`, to [n, S].
  void sum_shared(float* from, int64_t n, float* to) {
    float* sums = w_.y;  // not needed here
    for (int64_t i = 0; i < n * states_; i += LANES) {
      Floats rows[LANES];
      for (int64_t r = 0; r < LANES; ++r) rows[r] = load<Floats>(from + (i + r) * LANES);
      store(sums + i, sums_of(rows, std::make_index_sequence<LANES>()));
    }
    for (int64_t i = 0; i < n; ++i) std::memcpy(to + i * c_.states(), sums + i * states_, c_.states() * sizeof(float));
  }

  const Scan& c_;
  const Lane at_;
  Parts& parts_;
  Bench w_;
  const int64_t wide_, states_, size_;
  Buffer own_, kept_;
  float *d_h_, *d_a_, *d_d_, *d_out_, *d_in_, *gate_, *d_b_, *d_c_;
  Floats factors_[TILE][K], h_[TILE + 1][K];
};

// The sums over blocks, for some tokens of a sequence, to a gradient of B or C.
inline void add_blocks(const Scan& c, const Parts& parts, const float* from, const Lane& at, int64_t blocks,
                       const Grid& to) {
  const int64_t states = c.states();
  std::vector<float> sums((at.end - at.start) * states);
  for (int64_t block = 0; block < blocks; ++block) {
    const float* part = from + block * parts.block_size + parts.at(c, at.b, at.group, at.start);
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += part[i];
  }
  by_format(to, [&]<typename S>(S) {
    for (int64_t t = at.start; t < at.end; ++t)
      copy_row(sums.data() + (t - at.start) * states, 1, states,
               to.at<S>(at.b * to.stride[0] + at.group * to.stride[1] + t * to.stride[2]));
  });
}

// The sum over sequences of `[Q, count]`.
inline void add_sequences(const float* from, int64_t sequences, int64_t count, const Grid& to) {
  for (int64_t i = 0; i < count; ++i) to.at<float>()[i] = 0;
  for (int64_t s = 0; s < sequences; ++s)
    for (int64_t i = 0; i < count; ++i) to.at<float>()[i] += from[s * count + i];
}

inline void run_backward(const Scan& c) {
  constexpr int64_t TOKENS = 1024;
  const Blocks blocks(c);
  const std::vector<Lane> all = blocks.lanes(c);
  Parts parts(c, blocks);
  for_each_job(all.size(), c.threads, false, [&](int64_t job) {
    const FlushSubnormals flushed;
    Backward<4>(c, all[job], blocks.wide, parts).run();
  });
  std::vector<Lane> pieces;
  for (const Lane& at : all)
    for (int64_t t = at.start; t < at.end && at.block == 0; t += TOKENS) {
      pieces.push_back(at);
      pieces.back().start = t, pieces.back().end = std::min(t + TOKENS, at.end);
    }
  for_each_job(pieces.size(), c.threads, false, [&](int64_t job) {
    add_blocks(c, parts, parts.b, pieces[job], blocks.per_group, c.d_b);
    add_blocks(c, parts, parts.c, pieces[job], blocks.per_group, c.d_c);
  });
  add_sequences(parts.a, c.sequences(), c.channels() * c.states(), c.d_a);
  if (c.d) add_sequences(parts.d, c.sequences(), c.channels(), c.d_d);
}

}  // namespace tilewise
