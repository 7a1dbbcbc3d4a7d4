// Forward: a channel's kernel is transformed once, then two windows at a time pass through it.
#pragma once

#include "native_call.h"

namespace tilewise {

// Outputs of a row from time t on, n of them, from the convolution's own.
inline void finish(const Conv& c, int64_t b, int64_t channel, int64_t t, int64_t n, const float* z, Rooms& rooms) {
  float* to = place(c.out, b, channel, t, rooms.room[3]);
  const float skip = at(c.skip, channel);
  if (c.skip) {
    const float* x = row(c.x, b, channel, t, n, rooms.room[0]);
    if (c.gate_in) {
      const float* g = row(c.gate_in, b, channel, t, n, rooms.room[1]);
      for (int64_t i = 0; i < n; ++i) to[i] = z[i] + skip * (x[i] * g[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = z[i] + skip * x[i];
    }
    z = to;
  }
  if (c.gate_out) {
    const float* g = row(c.gate_out, b, channel, t, n, rooms.room[2]);
    for (int64_t i = 0; i < n; ++i) to[i] = z[i] * g[i];
  } else if (z != to) {
    std::memcpy(to, z, n * sizeof(float));
  }
  put_row(c.out, b, channel, t, n, to);
}

inline void multiply(Floats* re, Floats* im, const Wave& by, int64_t at) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) {
    const Floats hr = load<Floats>(by.re + at + i * LANES), hi = load<Floats>(by.im + at + i * LANES), xr = re[i];
    re[i] = times(xr, hr, im[i], hi);
    im[i] = xr * hi + im[i] * hr;
  }
}

// Windows first .. last - 1 of a channel, counted through the rows of the batch, two at a time.
//
// Two rows in one transform share its rounding, so that of the smaller would drown in the larger's: it is scaled up by
// a power of 2. A row that holds an infinity or no number travels alone.
inline void run_windows(const Conv& c, const Fft& fft, const Counting& counting, int64_t channel, int64_t first, int64_t last) {
  thread_local Buffer memory;
  Rooms rooms(std::max(c.step, c.length));
  float* own = memory.take<float>(4 * c.length);
  const Wave kernel = kernel_wave(c, fft, counting, channel, own + 2 * c.length);
  const Wave waves[1] = {{own, own + c.length}};
  float* const rows[2] = {waves[0].re, waves[0].im};
  const int64_t count = c.windows();
  const bool half = c.alone() && 2 * c.n() <= c.length && !fft.levels.empty();
  const int64_t wide = half ? c.length / 2 : c.length;
  const auto read = [&](int64_t unit, float* to) {
    window(c, unit / count, channel, unit % count * c.step - c.lead, wide, to, rooms);
  };
  const auto convolve = [&] {
    walk<1, 1>(fft, waves, half, half, counting, [&](int64_t at) {
      Floats re[LANES], im[LANES];
      leaf_down(rows[0] + at, rows[1] + at, fft.leaf, re, im);
      multiply(re, im, kernel, at);
      leaf_up(re, im, fft.leaf, rows[0] + at, rows[1] + at);
    });
  };
  const auto write = [&](int64_t unit, float* from, float scale) {
    const int64_t t = unit % count * c.step, n = std::min(c.step, c.n() - t);
    float* z = from + c.lead;
    for (int64_t i = 0; i < n && scale != 1.f; ++i) z[i] *= scale;
    finish(c, unit / count, channel, t, n, z, rooms);
  };
  const auto alone = [&](int64_t unit) {
    read(unit, rows[0]);
    std::memset(rows[1], 0, wide * sizeof(float));
    convolve();
    write(unit, rows[0], 1.f);
  };
  for (int64_t unit = first; unit < last; unit += 2) {
    if (unit + 1 == last) {
      alone(unit);
      continue;
    }
    float sizes[2];
    for (int64_t i = 0; i < 2; ++i) read(unit + i, rows[i]), sizes[i] = size_of(rows[i], wide);
    if (!std::isfinite(sizes[0] + sizes[1])) {
      alone(unit), alone(unit + 1);
      continue;
    }
    const int64_t small = sizes[0] <= sizes[1] ? 0 : 1;
    float scale = 1.f;  // of nothing, any
    if (sizes[small] > 0 && sizes[1 - small] > 2 * sizes[small]) {
      scale = std::exp2(std::floor(std::min(100.f, std::log2(sizes[1 - small]) - std::log2(sizes[small]))));
      for (int64_t i = 0; i < wide; ++i) rows[small][i] *= scale;
    }
    convolve();
    if (sizes[small] == 0) std::memset(rows[small], 0, c.length * sizeof(float));
    for (int64_t i = 0; i < 2; ++i) write(unit + i, rows[i], i == small ? 1.f / scale : 1.f);
  }
}

// Rows first .. last - 1 of a channel by sums over the taps.
inline void run_sums(const Conv& c, int64_t channel, int64_t first, int64_t last) {
  thread_local Buffer memory;
  const int64_t n = c.n(), taps = c.taps;
  Rooms rooms(n);
  float *turned = memory.take<float>(2 * (taps + LANES) + 2 * n), *data = turned + taps + LANES, *z = data + taps + n + LANES;
  load_taps(c, channel, turned);
  std::reverse(turned, turned + taps);
  for (int64_t b = first; b < last; ++b) {
    window(c, b, channel, 1 - taps, taps - 1 + n, data, rooms);
    slide(turned, taps, data, n, z);
    finish(c, b, channel, 0, n, z, rooms);
  }
}

inline void run_forward(const Conv& c) {
  const int64_t units = c.batch() * (c.length ? c.windows() : 1);
  // Where there are few channels, the windows of one are shared out too, in pairs.
  int64_t parts = 1;
  while (c.channels() * parts < 2 * c.threads && 2 * parts < units) ++parts;
  const int64_t share = round_up((units + parts - 1) / parts, 2);
  const auto all = [&](const auto& work) {
    for_each_job(c.channels() * parts, c.threads, false, [&](int64_t job) {
      const FlushSubnormals flushed;
      const int64_t first = job % parts * share, last = std::min(units, first + share);
      if (first < last) work(job / parts, first, last);
    });
  };
  if (!c.length) return all([&](int64_t channel, int64_t first, int64_t last) { run_sums(c, channel, first, last); });
  const Fft fft(c.length);
  const Counting counting(c, fft);
  all([&](int64_t channel, int64_t first, int64_t last) { run_windows(c, fft, counting, channel, first, last); });
}

// Transforms of all kernels, to `transform` [C, 2, length].
inline void run_prepare(const Conv& c) {
  const Fft fft(c.length);
  const Counting counting(c, fft);
  for_each_job(c.channels(), c.threads, false, [&](int64_t channel) {
    const FlushSubnormals flushed;
    float* to = c.transform.at<float>(channel * c.transform.stride[0]);
    transform_kernel(c, fft, counting, channel, {to, to + c.length});
  });
}

}  // namespace tilewise
