// Forward: a block of channels goes through its sequence tile by tile.
#pragma once

#include "native_call.h"

namespace tilewise {

constexpr int64_t STEPS = 4;  // sequences up to this long are worked on token by token

// 2^(x y) for products <= 0, to about 1 unit in the last place: like `exp2_of`, but the product is not rounded where
// the machine fuses. Below 2^-125 the result is 0, so it is for -inf; NaN stays NaN.
inline Floats exp2_of_product(Floats x, Floats y) {
  constexpr float SHIFT = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const Floats shifted = x * y + SHIFT, r = x * y - (shifted - SHIFT);
  Floats p = 0.2402264689f + r * (0.0555032878f + r * (0.0096184890f + r * (0.0013399931f + r * 0.0001534581f)));
  p = 1.f + r * (0.6931472057f + r * p);
  const Words bits = same_bits<Words>(p) + (same_bits<Words>(shifted) << 23);
  return same_bits<Floats>(shifted < SHIFT - 125.f ? Words{} : bits);
}

// What one thread works with; rows of `wide` channels. States are padded to a multiple of 4 with ones that stay 0.
struct Bench {
  Buffer memory[3];
  int64_t wide, states;
  float *a, *h;                   // [states, wide]: A in powers of 2, and the states
  float *x, *delta, *moved, *y;   // [TILE, wide]; moved: delta x
  float *b, *c;                   // [TILE, states]
  float* d;                       // [wide]

  Bench(const Scan& call, int64_t width) : wide(width), states(round_up(call.states(), 4)) {
    a = memory[0].take<float>((2 * states + 1) * wide);
    h = a + states * wide, d = h + states * wide;
    x = memory[1].take<float>(4 * TILE * wide);
    delta = x + TILE * wide, moved = delta + TILE * wide, y = moved + TILE * wide;
    b = memory[2].take<float>(2 * TILE * states);
    c = b + TILE * states;
  }

  void begin(const Scan& call, const Lane& at) {
    load_states(call.a.at<float>(at.channel * call.a.stride[0]), call.a.stride, at.channels, call.states(), a, states, wide);
    for (int64_t i = 0; i < states * wide; ++i) a[i] *= LOG2E;
    load_states(states_of(call.state, at), call.state.stride + 1, at.channels, call.states(), h, states, wide);
    for (int64_t j = 0; j < wide; ++j)
      d[j] = call.d && j < at.channels ? *call.d.at<float>((at.channel + j) * call.d.stride[0]) : 0.f;
  }

  void read(const Scan& call, const Lane& at, int64_t t, int64_t n) {
    load_rows(call.x, at, t, n, x, wide);
    load_rows(call.delta, at, t, n, delta, wide);
    load_shared(call.b, at, t, n, b, states);
    for (int64_t i = 0; i < n * wide; ++i) moved[i] = delta[i] * x[i];
  }
};

// K states, from the s-th on, of the channels from the j-th on, over n tokens; what they give is added to y.
template <int K, bool gives>
inline void steps(const Bench& w, int64_t s, int64_t j, int64_t n) {
  Floats a[K], h[K];
  for (int k = 0; k < K; ++k) a[k] = load<Floats>(w.a + (s + k) * w.wide + j);
  for (int k = 0; k < K; ++k) h[k] = load<Floats>(w.h + (s + k) * w.wide + j);
  for (int64_t t = 0; t < n; ++t) {
    const Floats delta = load<Floats>(w.delta + t * w.wide + j), moved = load<Floats>(w.moved + t * w.wide + j);
    const float *b = w.b + t * w.states + s, *c = w.c + t * w.states + s;
    Floats y{};
    for (int k = 0; k < K; ++k) {
      h[k] = exp2_of_product(delta, a[k]) * h[k] + moved * b[k];
      if (gives) y += h[k] * c[k];
    }
    if (gives) store(w.y + t * w.wide + j, load<Floats>(w.y + t * w.wide + j) + y);
  }
  for (int k = 0; k < K; ++k) store(w.h + (s + k) * w.wide + j, h[k]);
}

// All states of all channels of the block.
template <bool gives>
inline void all_steps(const Bench& w, int64_t n) {
  for (int64_t j = 0; j < w.wide; j += LANES) {
    int64_t s = 0;
    for (; s + 8 <= w.states; s += 8) steps<8, gives>(w, s, j, n);
    if (s < w.states) steps<4, gives>(w, s, j, n);
  }
}

// A sequence of a block tile by tile.
inline void run_tiles(const Scan& c, const Lane& at, int64_t wide) {
  Bench w(c, wide);
  w.begin(c, at);
  for (int64_t t = at.start; t < at.end; t += TILE) {
    const int64_t n = std::min(TILE, at.end - t);
    w.read(c, at, t, n);
    load_shared(c.c, at, t, n, w.c, w.states);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < wide; ++j) w.y[i * wide + j] = w.d[j] * w.x[i * wide + j];
    all_steps<true>(w, n);
    store_rows(w.y, wide, c.out, at, t, n);
  }
  store_states(w.h, wide, at.channels, c.states(),
               c.after.at<float>(at.sequence * c.after.stride[0] + at.channel * c.after.stride[1]));
}

// The first n of a register, or all of it.
inline Floats load_some(const float* from, int64_t n) {
  if (n >= LANES) return load<Floats>(from);
  Floats to{};
  std::memcpy(&to, from, n * sizeof(float));
  return to;
}
inline void store_some(float* to, Floats x, int64_t n) {
  if (n >= LANES) return store(to, x);
  std::memcpy(to, &x, n * sizeof(float));
}

// The same token by token, for sequences so short that turning the states would cost more than the steps: registers hold
// states of one channel as they lie in memory, read once and written once.
inline void run_steps(const Scan& c, const Lane& at, int64_t wide) {
  const int64_t states = c.states(), padded = round_up(states, LANES);
  alignas(64) float x[BLOCK], delta[BLOCK], y[BLOCK];
  thread_local Buffer memory;
  float *b = memory.take<float>(2 * padded), *to_out = b + padded;
  float* const after = c.after.at<float>(at.sequence * c.after.stride[0] + at.channel * c.after.stride[1]);
  const float* before = states_of(c.state, at);
  int64_t ld = c.state.stride[1];
  for (int64_t t = at.start; t < at.end; ++t) {
    load_rows(c.x, at, t, 1, x, wide);
    load_rows(c.delta, at, t, 1, delta, wide);
    load_shared(c.b, at, t, 1, b, padded);
    load_shared(c.c, at, t, 1, to_out, padded);
    for (int64_t j = 0; j < at.channels; j += LANES) {
      Floats sums[LANES] = {};
      for (int64_t r = 0; r < std::min(LANES, at.channels - j); ++r) {
        const float* a = c.a.at<float>((at.channel + j + r) * c.a.stride[0]);
        const float step = LOG2E * delta[j + r], moved = delta[j + r] * x[j + r];
        for (int64_t s = 0; s < states; s += LANES) {
          const int64_t n = states - s;
          Floats h = moved * load<Floats>(b + s);
          if (before) h += exp2_of_product(step + Floats{}, load_some(a + s, n)) * load_some(before + (j + r) * ld + s, n);
          store_some(after + (j + r) * states + s, h, n);
          sums[r] += h * load<Floats>(to_out + s);
        }
      }
      store(y + j, sums_of(sums, std::make_index_sequence<LANES>()));
    }
    for (int64_t j = 0; j < at.channels && c.d; ++j) y[j] += x[j] * *c.d.at<float>((at.channel + j) * c.d.stride[0]);
    store_rows(y, wide, c.out, at, t, 1);
    before = after, ld = states;
  }
}

inline void run_forward(const Scan& c) {
  const Blocks blocks(c);
  const std::vector<Lane> all = blocks.lanes(c);
  const bool rows = c.a.stride[1] == 1 && (!c.state || c.state.stride[2] == 1);
  for_each_job(all.size(), c.threads, false, [&](int64_t job) {
    const FlushSubnormals flushed;
    const Lane& at = all[job];
    rows && 0 < at.length() && at.length() <= STEPS ? run_steps(c, at, blocks.wide) : run_tiles(c, at, blocks.wide);
  });
}

}  // namespace tilewise
