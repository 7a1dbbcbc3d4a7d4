// The softmax of a few queries, some keys at a time: what decoding and lists of keys share.
#pragma once

#include "native_call.h"

namespace tilewise {

inline void put_weight(float& to, float x) { to = x; }
inline void put_weight(BFloat16& to, float x) { to.x = static_cast<uint16_t>((bits_of(x) + 0x8000u) >> 16); }

// Running state of one query: the largest score so far and the sum of weights.
struct Running {
  float top = -INF, sum = 0;
};

// Weights of n scores, scaled by `factor`; returns what the sums before them must be multiplied by.
template <typename T>
inline float weigh_row(const float* scores, T* weights, int64_t n, float factor, Running& state) {
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

}  // namespace tilewise
