// One call of the scan as the native engine sees it, and tokens of it as float32 rows.
#pragma once

#include "../native.h"

namespace tilewise {

constexpr int64_t TILE = 64;  // tokens worked on at a time
constexpr int64_t STRIP = 32;  // rows of a triangular product: what lies above them is left out

// Field for field what native.py writes; every number is 64 bits wide.
struct Scan {
  Grid q, k, v, decay, beta, state, offsets, out, after;
  Grid d_out, d_after, d_q, d_k, d_v, d_decay, d_beta, d_state;
  int64_t threads, delta, channels;  // the delta rule; each channel of the keys decays by itself
  int64_t chunk;                     // tokens between two states that are kept for the backward pass; 0: as it fits
  double scale;

  int64_t heads() const { return k.size[1]; }
  int64_t group() const { return q.size[1] / k.size[1]; }
  int64_t depth() const { return k.size[3]; }
  int64_t values() const { return v.size[3]; }
  int64_t sequences() const { return offsets ? offsets.size[0] - 1 : q.size[0]; }
};

// The tokens of one sequence for one head of the state, and some columns of its values.
struct Lane {
  int64_t sequence, b, head, start, end, column, columns;

  int64_t length() const { return end - start; }
};

inline std::vector<Lane> lanes(const Scan& c, int64_t parts) {
  std::vector<Lane> all;
  const int64_t wide = round_up((c.values() + parts - 1) / parts, LANES);
  for (int64_t s = 0; s < c.sequences(); ++s) {
    const int64_t* at = c.offsets ? c.offsets.at<int64_t>() : nullptr;
    const int64_t start = at ? at[s * c.offsets.stride[0]] : 0;
    const int64_t end = at ? at[(s + 1) * c.offsets.stride[0]] : c.q.size[2];
    for (int64_t h = 0; h < c.heads(); ++h)
      for (int64_t column = 0; column < c.values(); column += wide)
        all.push_back({s, at ? 0 : s, h, start, end, column, std::min(wide, c.values() - column)});
  }
  return all;
}

template <typename T>
T* row(const Grid& x, int64_t b, int64_t h, int64_t t) {
  return x.at<T>(b * x.stride[0] + h * x.stride[1] + t * x.stride[2]);
}

// Tokens t .. t + n - 1 of x as rows of `ld` floats, times `factor`: columns from `column` on, zeros behind them and up
// to `rows` rows.
template <typename S>
void load_rows(const Grid& x, int64_t b, int64_t h, int64_t t, int64_t n, int64_t rows, int64_t column, int64_t columns,
               float factor, float* to, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i, to += ld) {
    int64_t d = 0;
    if (i < n) {
      const S* from = row<S>(x, b, h, t + i) + column * x.stride[3];
      copy_row(from, x.stride[3], columns, to);
      if (factor != 1.f)
        for (int64_t j = 0; j < columns; ++j) to[j] *= factor;
      d = columns;
    }
    for (; d < ld; ++d) to[d] = 0;
  }
}

template <typename S>
void store_rows(const float* from, int64_t ld, int64_t n, int64_t columns, float factor, const Grid& x, int64_t b,
                int64_t h, int64_t t, int64_t column) {
  for (int64_t i = 0; i < n; ++i, from += ld) {
    S* to = row<S>(x, b, h, t + i) + column * x.stride[3];
    for (int64_t j = 0; j < columns; ++j) put(to[j * x.stride[3]], factor * from[j]);
  }
}

}  // namespace tilewise
