// Products of a few rows with a matrix that stays packed for a whole sequence, and the packing.
//
// On one AVX-512 machine such a loop alone made 115 GFLOP/s a core for 4 rows or more, where PyTorch's float32 product of
// large matrices made 90.
#pragma once

#include "native_call.h"

namespace tilewise {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int64_t HIGH = 6;  // rows of a product whose sums are held in registers, for 4 vectors of columns
#else
constexpr int64_t HIGH = 2;
#endif
constexpr int64_t ACROSS = 4;  // vectors of columns

inline Floats load_vector(const float* from) { return load<Floats>(from); }
inline Floats load_vector(const BFloat16* from) {
  return same_bits<Floats>(__builtin_convertvector(load<HalfWords>(from), Words) << 16);
}

// c [M, V vectors] (+)= a b: a's row i and column p at a[i * row + p * step], b's row p at b + p * ldb.
//
// Sums are begun anew after TERMS terms and added up apart, and what is there is added last: one sum over a whole row is
// rounded to its growing size each time, and Elman networks then erred more than twice as much as with PyTorch's product.
constexpr int64_t TERMS = 32;

template <int64_t M, int64_t V, typename W>
void multiply(int64_t depth, const float* a, int64_t row, int64_t step, const W* b, int64_t ldb, float* c, int64_t ldc,
              bool add) {
  do {
    Floats sums[M][V] = {};
    for (int64_t p = std::min(depth, TERMS); p > 0; --p, a += step, b += ldb) {
      Floats right[V];
      for (int64_t v = 0; v < V; ++v) right[v] = load_vector(b + v * LANES);
      for (int64_t i = 0; i < M; ++i) {
        const float left = a[i * row];
        for (int64_t v = 0; v < V; ++v) sums[i][v] += left * right[v];
      }
    }
    for (int64_t i = 0; i < M; ++i)
      for (int64_t v = 0; v < V; ++v) {
        float* to = c + i * ldc + v * LANES;
        store(to, add ? load<Floats>(to) + sums[i][v] : sums[i][v]);
      }
    add = true;
    depth -= TERMS;
  } while (depth > 0);
}

template <typename W>
using Multiply = void (*)(int64_t, const float*, int64_t, int64_t, const W*, int64_t, float*, int64_t, bool);

template <typename W, int64_t M>
Multiply<W> multiply_across(int64_t vectors) {
  switch (vectors) {
    case 1: return multiply<M, 1, W>;
    case 2: return multiply<M, 2, W>;
    case 3: return multiply<M, 3, W>;
    default: return multiply<M, 4, W>;
  }
}

// The loop for so many rows, at most HIGH, and so many vectors, at most ACROSS.
template <typename W>
Multiply<W> multiply_for(int64_t rows, int64_t vectors) {
  switch (rows) {
    case 1: return multiply_across<W, 1>(vectors);
    case 2: return multiply_across<W, 2>(vectors);
    case 3: return multiply_across<W, std::min<int64_t>(3, HIGH)>(vectors);
    case 4: return multiply_across<W, std::min<int64_t>(4, HIGH)>(vectors);
    case 5: return multiply_across<W, std::min<int64_t>(5, HIGH)>(vectors);
    default: return multiply_across<W, HIGH>(vectors);
  }
}

// Calls work(first, count) for runs of rows as equal as can be, none above `most`.
template <typename Work>
inline void runs(int64_t rows, int64_t most, const Work& work) {
  const int64_t n = (rows + most - 1) / most;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t first = rows * i / n;
    work(first, rows * (i + 1) / n - first);
  }
}

// Vectors of units that a product makes for all gates at once.
inline int64_t units_across(int64_t gates) { return std::max<int64_t>(1, ACROSS / gates); }

// What R is packed as: bfloat16 stays as it is, half the traffic; float16 is widened.
template <typename S>
using Packed = std::conditional_t<std::is_same_v<S, BFloat16>, BFloat16, float>;

// How the forward pass reads R: for each bundle of vectors of units its columns [d, units, gates, LANES], from row j of
// R[h, g] being unit j. Vectors first .. last - 1, in bundles as the worker that owns them has them.
template <typename S>
void pack_forward(const Rnn& c, int64_t head, int64_t first, int64_t last, Packed<S>* to) {
  const int64_t gates = c.gates(), bundle = units_across(gates), d = c.width, step = c.R.stride[3];
  for (int64_t v = first; v < last; v += bundle) {
    const int64_t n = std::min(bundle, last - v), ld = n * gates * LANES;
    Packed<S>* own = to + v * gates * LANES * d;
    for (int64_t u = 0; u < n; ++u)
      for (int64_t g = 0; g < gates; ++g) {
        const int64_t unit = (v + u) * LANES, rows = std::min(LANES, d - unit);
        const S* from = c.R.at<S>(head * c.R.stride[0] + g * c.R.stride[1] + unit * c.R.stride[2]);
        Packed<S>* columns = own + (u * gates + g) * LANES;
        if (std::is_same_v<S, float> && step == 1) {
          transpose(reinterpret_cast<const uint32_t*>(from), c.R.stride[2], rows, LANES, d,
                    reinterpret_cast<uint32_t*>(columns), ld);
          continue;
        }
        for (int64_t i = 0; i < LANES; ++i)
          for (int64_t k = 0; k < d; ++k)
            put(columns[k * ld + i], i < rows ? get(from[i * c.R.stride[2] + k * step]) : 0.f);
      }
  }
}

// How the backward pass reads it: for each bundle of up to ACROSS vectors of earlier units, rows [gates * padded, bundle].
template <typename S>
void pack_backward(const Rnn& c, int64_t head, int64_t first, int64_t last, Packed<S>* to) {
  const int64_t gates = c.gates(), d = c.width, padded = c.padded(), step = c.R.stride[3];
  for (int64_t v = first; v < last; v += ACROSS) {
    const int64_t ld = std::min(ACROSS, last - v) * LANES, unit = v * LANES, units = std::min(ld, d - unit);
    Packed<S>* own = to + unit * gates * padded;
    for (int64_t g = 0; g < gates; ++g)
      for (int64_t j = 0; j < padded; ++j, own += ld) {
        if (j < d) {
          const S* from = c.R.at<S>(head * c.R.stride[0] + g * c.R.stride[1] + j * c.R.stride[2]);
          copy_row(from + unit * step, step, units, own);
        }
        for (int64_t i = j < d ? units : 0; i < ld; ++i) put(own[i], 0.f);
      }
  }
}

}  // namespace tilewise
