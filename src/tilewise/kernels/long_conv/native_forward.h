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

// Numbers of a column of a leaf, R registers, by those of a spectrum from `at` on; or by their conjugates.
template <bool conjugate>
ALWAYS_INLINE void multiply(Floats* re, Floats* im, const Spectrum& by, int64_t at) {
#pragma GCC unroll 4
  for (int k = 0; k < R; ++k) {
    const Floats hr = load<Floats>(by.re + at + k * LANES), hi = load<Floats>(by.im + at + k * LANES), xr = re[k];
    re[k] = conjugate ? xr * hr + im[k] * hi : xr * hr - im[k] * hi;
    im[k] = conjugate ? im[k] * hr - xr * hi : xr * hi + im[k] * hr;
  }
}

// Windows first .. last - 1 of a channel, counted through the rows of the batch, two at a time.
//
// Two rows in one transform share its rounding, so that of the smaller would drown in the larger's: it is
// scaled up by a power of 2. A row that holds an infinity or no number travels alone.
inline void run_windows(const Conv& c, const Fft& fft, const Counting& counting, int64_t channel, int64_t first, int64_t last) {
  thread_local Buffer memory;
  Rooms rooms(CHUNK);
  float* own = memory.take<float>(2 * c.length + GAP + Wave::room(c.length));
  const Wave waves[1] = {Wave::in(own + 2 * c.length + GAP, c.length)};
  const Spectrum kernel = spectrum(c, fft, counting, channel, waves[0], own);
  float* const rows[2] = {waves[0].re, waves[0].im};
  const int64_t count = c.windows();
  const bool half = c.alone() && 2 * c.n() <= c.length && !fft.levels.empty();
  const int64_t wide = half ? c.length / 2 : c.length;
  const auto read = [&](int64_t unit, float* to) {
    in_chunks(0, wide, [&](int64_t at, int64_t from, int64_t n) {
      window(c, unit / count, channel, unit % count * c.step - c.lead + from, n, to + at, rooms);
    });
  };
  const auto convolve = [&] {
    walk<1, 1>(fft, waves, half, half, counting, [&](int64_t at) {
      Leaf leaf;
      leaf.down(rows[0] + spot(at), rows[1] + spot(at), fft.leaf);
      for (int r = 0; r < 4; ++r) {
        Floats x[R], y[R];
        leaf.get(R * r, 1, R, x, y);
        inner<false>(x, y);
        multiply<false>(x, y, kernel, at + R * r * LANES);
        inner<true>(x, y);
        leaf.set(R * r, 1, R, x, y);
      }
      leaf.up(fft.leaf, rows[0] + spot(at), rows[1] + spot(at));
    });
  };
  const auto write = [&](int64_t unit, float* from, float scale) {
    const int64_t t = unit % count * c.step;
    in_chunks(c.lead, std::min(c.step, c.n() - t), [&](int64_t at, int64_t later, int64_t n) {
      float* z = from + at;
      if (scale != 1.f)
        for (int64_t i = 0; i < n; ++i) z[i] *= scale;
      finish(c, unit / count, channel, t + later, n, z, rooms);
    });
  };
  const auto alone = [&](int64_t unit) {
    read(unit, rows[0]);
    std::memset(rows[1], 0, spot(wide) * sizeof(float));
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
      for (int64_t i = 0; i < spot(wide); ++i) rows[small][i] *= scale;
    }
    convolve();
    if (sizes[small] == 0) std::memset(rows[small], 0, spot(c.length) * sizeof(float));
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
    thread_local Buffer memory;
    float* to = c.transform.at<float>(channel * c.transform.stride[0]);
    const Wave wave = Wave::in(memory.take<float>(Wave::room(c.length)), c.length);
    transform_kernel(c, fft, counting, channel, wave, {to, to + c.length});
  });
}

}  // namespace tilewise
