// Sums and differences in registers: the transform of one row of 2^levels numbers, as contiguous float or double.
#pragma once

#include "../native.h"

namespace tilewise {

// Registers' worth of parts that are worked on together; the sums of 16 need half of AVX-512's registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int64_t PARTS = 16;
#else
constexpr int64_t PARTS = 8;
#endif

template <typename F>
struct Register {
  static constexpr int64_t lanes = LANES * 4 / sizeof(F);
  typedef F Type __attribute__((vector_size(LANES * 4)));
};
template <typename F>
using Lanes = typename Register<F>::Type;

constexpr int log2_of(int64_t n) { return n > 1 ? 1 + log2_of(n / 2) : 0; }

// Levels made in one go from memory to memory.
template <typename F>
constexpr int FIRST_LEVELS = log2_of(Register<F>::lanes * PARTS);

// One level inside a register: lane i and its partner i ^ STEP become their sum and their difference.
template <typename F, int64_t STEP, size_t... I>
inline Lanes<F> level_within(Lanes<F> x, std::index_sequence<I...>) {
  const Lanes<F> sign = {(I & STEP ? F(-1) : F(1))...};
  return __builtin_shufflevector(x, x, (I ^ STEP)...) + sign * x;
}

// All levels inside a register whose step is below TOP.
template <typename F, int64_t TOP, int64_t STEP = 1>
inline Lanes<F> within(Lanes<F> x) {
  if constexpr (STEP < TOP) {
    constexpr auto lanes = std::make_index_sequence<Register<F>::lanes>();
    return within<F, TOP, 2 * STEP>(level_within<F, STEP>(x, lanes));
  } else {
    return x;
  }
}

// All levels across N registers.
template <typename F, int64_t N, int64_t STEP = 1>
inline void across(Lanes<F>* x) {
  if constexpr (STEP < N) {
#pragma GCC unroll 16
    for (int64_t k = 0; k < N / 2; ++k) {
      const int64_t i = k / STEP * 2 * STEP + k % STEP;
      const Lanes<F> first = x[i], second = x[i + STEP];
      x[i] = first + second;
      x[i + STEP] = first - second;
    }
    across<F, N, 2 * STEP>(x);
  }
}

// The transform of N registers' worth of numbers, `to` may be `from`.
template <typename F, int64_t N>
inline void in_registers(const F* from, F* to, F scale) {
  constexpr int64_t lanes = Register<F>::lanes;
  Lanes<F> x[N];
#pragma GCC unroll 16
  for (int64_t i = 0; i < N; ++i) x[i] = within<F, lanes>(load<Lanes<F>>(from + i * lanes));
  across<F, N>(x);
#pragma GCC unroll 16
  for (int64_t i = 0; i < N; ++i) {
    x[i] *= scale;
    std::memcpy(to + i * lanes, &x[i], sizeof(x[i]));
  }
}

// All levels across N parts, `apart` numbers from one to the next, for their columns start .. end - 1.
template <typename F, int64_t N>
inline void across_parts(F* to, int64_t apart, int64_t start, int64_t end) {
  constexpr int64_t lanes = Register<F>::lanes;
  for (int64_t j = start; j < end; j += lanes) {
    Lanes<F> x[N];
#pragma GCC unroll 16
    for (int64_t i = 0; i < N; ++i) x[i] = load<Lanes<F>>(to + i * apart + j);
    across<F, N>(x);
#pragma GCC unroll 16
    for (int64_t i = 0; i < N; ++i) std::memcpy(to + i * apart + j, &x[i], sizeof(x[i]));
  }
}

// The same for 2^levels parts.
template <typename F>
inline void across_parts(int levels, F* to, int64_t apart, int64_t start, int64_t end) {
  switch (levels) {
    case 1: return across_parts<F, 2>(to, apart, start, end);
    case 2: return across_parts<F, 4>(to, apart, start, end);
    case 3: return across_parts<F, 8>(to, apart, start, end);
    default: return across_parts<F, PARTS>(to, apart, start, end);
  }
}

// Levels that are made last, and together, of a row of 2^levels numbers: all passes but the first as equal as can be.
template <typename F>
inline int last_levels(int levels) {
  constexpr int most = log2_of(PARTS);
  const int left = levels - FIRST_LEVELS<F>, passes = (left + most - 1) / most;
  return (left + passes - 1) / passes;
}

// Rows shorter than a register, one number after the other.
template <typename F>
inline void short_row(const F* from, F* to, int64_t n, F scale) {
  for (int64_t i = 0; i < n; ++i) to[i] = scale * from[i];
  for (int64_t step = 1; step < n; step *= 2)
    for (int64_t i = 0; i < n; ++i) {
      if (i & step) continue;
      const F first = to[i], second = to[i + step];
      to[i] = first + second;
      to[i + step] = first - second;
    }
}

// A whole row: its parts one after the other, so that each is done in the cache that holds it, then across them.
template <typename F>
void whole_row(const F* from, F* to, int levels, F scale) {
  constexpr int64_t lanes = Register<F>::lanes;
  if (levels > FIRST_LEVELS<F>) {
    const int last = last_levels<F>(levels);
    const int64_t part = int64_t(1) << (levels - last);
    for (int64_t i = 0; i < int64_t(1) << last; ++i)
      whole_row<F>(from + i * part, to + i * part, levels - last, scale);
    return across_parts<F>(last, to, part, 0, part);
  }
  const int64_t n = int64_t(1) << levels;
  if (n < lanes) return short_row<F>(from, to, n, scale);
  switch (n / lanes) {
    case 1: return in_registers<F, 1>(from, to, scale);
    case 2: return in_registers<F, 2>(from, to, scale);
    case 4: return in_registers<F, 4>(from, to, scale);
    case 8: return in_registers<F, 8>(from, to, scale);
    default: return in_registers<F, PARTS>(from, to, scale);
  }
}

}  // namespace tilewise
