// All rows of a call, over threads.
#pragma once

#include "native_butterflies.h"

namespace tilewise {

constexpr int64_t FLOAT64 = 7;            // beside the kinds of native.h
constexpr int64_t AT_ONCE = 1 << 15;      // numbers for which another thread is worth its start
constexpr int64_t COLUMNS = 1 << 12;      // of a long row that a thread takes at a time

// Field for field what native.py writes; every number is 64 bits wide.
struct Walsh {
  const void* x;
  void* out;
  int64_t x_kind, out_kind, rows, n, stride;
  double scale;
  int64_t threads;

  int levels() const {
    int levels = 0;
    while (n >> (levels + 1)) ++levels;
    return levels;
  }
};

inline double get(double x) { return x; }
inline void put(double& to, double x) { to = x; }

// One row from a format S to a format T by way of F. Rows in other formats pass through memory of the thread's own.
template <typename S, typename T, typename F>
inline void one_row(const S* from, T* to, int levels, F scale) {
  const int64_t n = int64_t(1) << levels;
  if constexpr (std::is_same_v<S, F> && std::is_same_v<T, F>) {
    whole_row<F>(from, to, levels, scale);
  } else {
    thread_local Buffer memory;
    F* wide;
    if constexpr (std::is_same_v<T, F>) {
      wide = to;
    } else {
      wide = memory.take<F>(n);
    }
    if constexpr (std::is_same_v<S, F>) {
      whole_row<F>(from, wide, levels, scale);
    } else {
      for (int64_t i = 0; i < n; ++i) wide[i] = get(from[i]);
      whole_row<F>(wide, wide, levels, scale);
    }
    if constexpr (!std::is_same_v<T, F>)
      for (int64_t i = 0; i < n; ++i) put(to[i], wide[i]);
  }
}

// Rows of one format longer than there are threads for: parts of a row on all of them, then its columns.
template <typename F>
void long_rows(const Walsh& c, int levels) {
  const int last = last_levels<F>(levels);
  const int64_t parts = int64_t(1) << last, part = c.n / parts, pieces = std::max<int64_t>(1, part / COLUMNS);
  for (int64_t row = 0; row < c.rows; ++row) {
    const F* from = static_cast<const F*>(c.x) + row * c.stride;
    F* to = static_cast<F*>(c.out) + row * c.n;
    for_each_job(parts, c.threads, false, [&](int64_t i) {
      whole_row<F>(from + i * part, to + i * part, levels - last, static_cast<F>(c.scale));
    });
    for_each_job(pieces, c.threads, false, [&](int64_t i) {
      across_parts<F>(last, to, part, i * (part / pieces), (i + 1) * (part / pieces));
    });
  }
}

template <typename S, typename T, typename F>
void all_rows(const Walsh& c) {
  const int levels = c.levels();
  if constexpr (std::is_same_v<S, F> && std::is_same_v<T, F>) {
    if (c.rows < c.threads && c.n >= 2 * AT_ONCE) return long_rows<F>(c, levels);
  }
  const int64_t together = std::clamp<int64_t>(AT_ONCE / c.n, 1, std::max<int64_t>(1, (c.rows + 7) / 8));
  const int64_t jobs = (c.rows + together - 1) / together;
  const int64_t threads = c.rows * c.n < AT_ONCE ? 1 : c.threads;
  for_each_job(jobs, threads, false, [&](int64_t job) {
    for (int64_t row = job * together; row < std::min(c.rows, (job + 1) * together); ++row)
      one_row<S, T, F>(static_cast<const S*>(c.x) + row * c.stride, static_cast<T*>(c.out) + row * c.n, levels,
                       static_cast<F>(c.scale));
  });
}

inline void run_walsh(const Walsh& c) {
  switch (c.x_kind) {
    case FLOAT64: return all_rows<double, double, double>(c);
    case FLOAT32: return all_rows<float, float, float>(c);
    case FLOAT16: return c.out_kind == FLOAT32 ? all_rows<Half, float, float>(c) : all_rows<Half, Half, float>(c);
    default:
      return c.out_kind == FLOAT32 ? all_rows<BFloat16, float, float>(c) : all_rows<BFloat16, BFloat16, float>(c);
  }
}

}  // namespace tilewise
