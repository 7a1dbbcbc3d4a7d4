// Backward: what the forward pass computed is computed again, for a channel at a time.
//
// With U and D the transforms of two windows of inputs and of outputs' gradients (a row each as real and
// imaginary part) and H that of the kernel: D conj(H) is the transform of the inputs' gradients, U H that of
// the convolution, which the gradient of gate_out needs, and the real part of what conj(U) D comes from is
// the sum of both rows' gradients of the kernel. Windows are added up in frequency, so the kernel's gradient
// costs one way up for all.
#pragma once

#include "native_forward.h"

namespace tilewise {

typedef double Doubles __attribute__((vector_size(LANES * 8)));

// What the gradients of a channel's rows are made in.
struct Gradients {
  const Conv& c;
  int64_t channel;
  float skip;
  double d_skip = 0;

  Gradients(const Conv& call, int64_t of) : c(call), channel(of), skip(at(call.skip, of)) {}

  // Gradients of the convolution's own outputs, times t .. t + n - 1.
  void outputs(int64_t b, int64_t t, int64_t n, float* to, Rooms& rooms) const {
    const float* d = row(c.d_out, b, channel, t, n, rooms.room[0]);
    if (!c.gate_out) {
      std::memcpy(to, d, n * sizeof(float));
      return;
    }
    const float* g = row(c.gate_out, b, channel, t, n, rooms.room[1]);
    for (int64_t i = 0; i < n; ++i) to[i] = d[i] * g[i];
  }

  // The gradient of gate_out, from the convolution's outputs.
  void gate_out(int64_t b, int64_t t, int64_t n, const float* z, Rooms& rooms) const {
    const float* d = row(c.d_out, b, channel, t, n, rooms.room[0]);
    float* to = place(c.d_gate_out, b, channel, t, rooms.room[3]);
    if (c.skip) {
      float* u = rooms.room[4];
      const float* x = row(c.x, b, channel, t, n, rooms.room[1]);
      const float* g = c.gate_in ? row(c.gate_in, b, channel, t, n, rooms.room[2]) : nullptr;
      if (g) {
        for (int64_t i = 0; i < n; ++i) u[i] = x[i] * g[i];
        x = u;
      }
      for (int64_t i = 0; i < n; ++i) to[i] = d[i] * (z[i] + skip * x[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = d[i] * z[i];
    }
    put_row(c.d_gate_out, b, channel, t, n, to);
  }

  // Gradients of x, gate_in, skip and before from those of everything that was read, d_all [lead + N] from
  // the first window's start on. d_all is changed.
  void inputs(int64_t b, float* d_all, Rooms& rooms) {
    const int64_t n = c.n(), lead = c.lead;
    if (c.d_before) {  // K - 1 of them, which is what is read before the first input
      copy_row(d_all, 1, lead, c.d_before.at<float>(b * c.d_before.stride[0] + channel * c.d_before.stride[1]));
    }
    float* d_u = d_all + lead;
    if (c.circular)
      for (int64_t i = 0; i < lead; ++i) d_u[n - lead + i] += d_all[i];
    const float* x = row(c.x, b, channel, 0, n, rooms.room[0]);
    if (c.skip) {
      float* d_z = rooms.room[4];
      outputs_whole(b, d_z, rooms);
      const float* g = c.gate_in ? row(c.gate_in, b, channel, 0, n, rooms.room[1]) : nullptr;
      for (int64_t i = 0; i < n; ++i) d_u[i] += skip * d_z[i];
      if (g)
        for (int64_t i = 0; i < n; ++i) d_z[i] *= g[i];
      Doubles sums{};
      int64_t i = 0;
      for (; i + LANES <= n; i += LANES) sums += __builtin_convertvector(load<Floats>(d_z + i) * load<Floats>(x + i), Doubles);
      for (; i < n; ++i) d_skip += d_z[i] * x[i];
      for (int64_t lane = 0; lane < LANES; ++lane) d_skip += sums[lane];
    }
    float* d_x = place(c.d_x, b, channel, 0, rooms.room[3]);
    if (c.gate_in) {
      const float* g = row(c.gate_in, b, channel, 0, n, rooms.room[1]);
      for (int64_t i = 0; i < n; ++i) d_x[i] = d_u[i] * g[i];
      put_row(c.d_x, b, channel, 0, n, d_x);
      float* d_g = place(c.d_gate_in, b, channel, 0, rooms.room[3]);
      for (int64_t i = 0; i < n; ++i) d_g[i] = d_u[i] * x[i];
      put_row(c.d_gate_in, b, channel, 0, n, d_g);
    } else {
      std::memcpy(d_x, d_u, n * sizeof(float));
      put_row(c.d_x, b, channel, 0, n, d_x);
    }
  }

  // The gradient of the whole kernel from that of the taps that can be reached.
  void kernel(const float* d_taps, float scale) const {
    float* to = c.d_kernel.at<float>(channel * c.d_kernel.stride[0]);
    for (int64_t k = 0; k < c.taps; ++k) to[k] = scale * d_taps[k];
    for (int64_t k = c.taps; k < c.size(); ++k) to[k] = c.circular ? to[k % c.taps] : 0.f;
  }

  void done() const {
    if (c.d_skip) *c.d_skip.at<float>(channel) = static_cast<float>(d_skip);
  }

 private:
  // `outputs` of all times, with rooms of its own: 0 holds x meanwhile.
  void outputs_whole(int64_t b, float* to, Rooms& rooms) const {
    const float* d = row(c.d_out, b, channel, 0, c.n(), rooms.room[2]);
    if (!c.gate_out) {
      std::memcpy(to, d, c.n() * sizeof(float));
      return;
    }
    const float* g = row(c.gate_out, b, channel, 0, c.n(), rooms.room[3]);
    for (int64_t i = 0; i < c.n(); ++i) to[i] = d[i] * g[i];
  }
};

// What a channel's transforms are worked on in: gradients D, inputs U, the kernel H and the sum of conj(U) D.
struct Spectra {
  Wave d, u, sum;
  Spectrum h;
  float* room;
  explicit Spectra(int64_t length) {
    thread_local Buffer memory;
    float* own = memory.take<float>(3 * Wave::room(length) + 2 * length + GAP);
    for (Wave* one : {&d, &u, &sum}) *one = Wave::in(own, length), own += Wave::room(length);
    room = own;
  }
};

// The leaf: both transforms, their products, and the way up of those that are wanted.
template <bool inputs, bool outputs>
inline void back_leaf(const Conv& c, const Fft& fft, const Spectra& w, int64_t at) {
  const int64_t own = spot(at);
  Leaf d, u;
  d.down(w.d.re + own, w.d.im + own, fft.leaf);
  if constexpr (inputs) u.down(w.u.re + own, w.u.im + own, fft.leaf);
  for (int r = 0; r < 4; ++r) {
    const int64_t column = R * r * LANES;
    Floats dr[R], di[R], ur[R], ui[R];
    d.get(R * r, 1, R, dr, di);
    inner<false>(dr, di);
    if constexpr (inputs) {
      u.get(R * r, 1, R, ur, ui);
      inner<false>(ur, ui);
      if (c.d_kernel) {
#pragma GCC unroll 4
        for (int k = 0; k < R; ++k) {
          float *re = w.sum.re + own + column + k * LANES, *im = w.sum.im + own + column + k * LANES;
          store(re, load<Floats>(re) + ur[k] * dr[k] + ui[k] * di[k]);
          store(im, load<Floats>(im) + ur[k] * di[k] - ui[k] * dr[k]);
        }
      }
    }
    if constexpr (outputs) {
      multiply<false>(ur, ui, w.h, at + column);
      inner<true>(ur, ui);
      u.set(R * r, 1, R, ur, ui);
    }
    multiply<true>(dr, di, w.h, at + column);
    inner<true>(dr, di);
    d.set(R * r, 1, R, dr, di);
  }
  if constexpr (outputs) u.up(fft.leaf, w.u.re + own, w.u.im + own);
  d.up(fft.leaf, w.d.re + own, w.d.im + own);
}

// How unlike two rows of a transform may be, before each travels alone: they share its rounding.
constexpr float UNLIKE = 4;

inline void back_windows(const Conv& c, const Fft& fft, const Counting& counting, int64_t channel) {
  thread_local Buffer memory;
  const int64_t n = c.n(), count = c.windows(), units = c.batch() * count, all = c.lead + count * c.step + c.length;
  Rooms rooms(n);
  Spectra w(c.length);
  Gradients gradients(c, channel);
  w.h = spectrum(c, fft, counting, channel, w.sum, w.room);
  if (c.d_kernel) w.sum.clear(c.length);
  const bool half = c.alone() && 2 * n <= c.length && !fft.levels.empty();
  const bool inputs = c.d_kernel || c.d_gate_out, outputs = bool(c.d_gate_out);
  const int64_t wide = half ? c.length / 2 : c.length;
  // Rows are added up of their windows, the two that a pair may touch.
  float* const sums = memory.take<float>(2 * all);

  const auto read = [&](int64_t unit, float* d, float* u) {
    const int64_t b = unit / count, t = unit % count * c.step, real = std::min(c.step, n - t);
    in_chunks(0, c.lead, [&](int64_t at, int64_t, int64_t size) { std::memset(d + at, 0, size * sizeof(float)); });
    in_chunks(c.lead, real, [&](int64_t at, int64_t from, int64_t size) {
      gradients.outputs(b, t + from, size, d + at, rooms);
    });
    in_chunks(c.lead + real, wide - c.lead - real, [&](int64_t at, int64_t, int64_t size) {
      std::memset(d + at, 0, size * sizeof(float));
    });
    if (!inputs) return;
    in_chunks(0, wide, [&](int64_t at, int64_t from, int64_t size) {
      window(c, b, channel, t - c.lead + from, size, u + at, rooms);
    });
  };
  const auto transform = [&] {
    const Wave waves[2] = {w.d, w.u};
    if (outputs) {
      walk<2, 2>(fft, waves, half, half, counting, [&](int64_t at) { back_leaf<true, true>(c, fft, w, at); });
    } else if (inputs) {
      walk<2, 1>(fft, waves, half, half, counting, [&](int64_t at) { back_leaf<true, false>(c, fft, w, at); });
    } else {
      walk<1, 1>(fft, waves, half, half, counting, [&](int64_t at) { back_leaf<false, false>(c, fft, w, at); });
    }
  };
  const auto write = [&](int64_t unit, float* d, float* z) {
    const int64_t b = unit / count, m = unit % count, t = m * c.step, real = std::min(c.step, n - t);
    if (outputs) {
      in_chunks(c.lead, real, [&](int64_t at, int64_t from, int64_t size) {
        gradients.gate_out(b, t + from, size, z + at, rooms);
      });
    }
    float* sum = sums + b % 2 * all;
    if (m == 0 && count > 1) std::memset(sum, 0, all * sizeof(float));
    in_chunks(0, count > 1 ? c.length : c.lead + n, [&](int64_t at, int64_t from, int64_t size) {
      if (count == 1) {
        std::memcpy(sum + from, d + at, size * sizeof(float));
      } else {
        for (int64_t j = 0; j < size; ++j) sum[t + from + j] += d[at + j];
      }
    });
    if (m == count - 1) gradients.inputs(b, sum, rooms);
  };
  const auto alone = [&](int64_t unit) {
    read(unit, w.d.re, w.u.re);
    std::memset(w.d.im, 0, spot(wide) * sizeof(float));
    std::memset(w.u.im, 0, spot(wide) * sizeof(float));
    transform();
    write(unit, w.d.re, w.u.re);
  };
  const auto alike = [&](const float* x, const float* y) {
    const float a = size_of(x, wide), b = size_of(y, wide);
    return std::isfinite(a + b) && a <= UNLIKE * b && b <= UNLIKE * a;
  };
  for (int64_t unit = 0; unit < units; unit += 2) {
    if (unit + 1 == units) {
      alone(unit);
      continue;
    }
    read(unit, w.d.re, w.u.re);
    read(unit + 1, w.d.im, w.u.im);
    if (!alike(w.d.re, w.d.im) || (inputs && !alike(w.u.re, w.u.im))) {
      alone(unit), alone(unit + 1);
      continue;
    }
    transform();
    write(unit, w.d.re, w.u.re);
    write(unit + 1, w.d.im, w.u.im);
  }
  if (c.d_kernel) {
    const bool short_kernel = 2 * c.taps <= c.length && !fft.levels.empty();
    const Wave waves[1] = {w.sum};
    walk<0, 1>(fft, waves, false, short_kernel, counting, [&](int64_t at) {
      const int64_t own = spot(at);
      Leaf leaf;
      const float* factors = counting.factors.empty() ? nullptr : counting.factors.data() + at;
      for (int r = 0; r < 4; ++r) {
        Floats x[R], y[R];
#pragma GCC unroll 4
        for (int k = 0; k < R; ++k) {
          const int64_t in = (R * r + k) * LANES;
          const Floats factor = factors ? load<Floats>(factors + in) : 1.f + Floats{};
          x[k] = factor * load<Floats>(w.sum.re + own + in), y[k] = factor * load<Floats>(w.sum.im + own + in);
        }
        inner<true>(x, y);
        leaf.set(R * r, 1, R, x, y);
      }
      leaf.up(fft.leaf, w.sum.re + own, w.sum.im + own);
    });
    in_chunks(0, c.taps, [&](int64_t at, int64_t from, int64_t size) {
      std::memcpy(sums + from, w.sum.re + at, size * sizeof(float));
    });
    gradients.kernel(sums, 1.f / static_cast<float>(c.length));
  }
  gradients.done();
}

// The same by sums over the taps: all three gradients are sums of products of two rows, one moved along the
// other.
inline void back_sums(const Conv& c, int64_t channel) {
  thread_local Buffer memory;
  const int64_t n = c.n(), taps = c.taps, behind = taps - 1, all = n + behind + LANES;
  Rooms rooms(n);
  float* own = memory.take<float>(5 * all + n + 2 * behind + 2 * LANES);
  float *forth = own, *back = forth + all, *read = back + all, *d_read = read + all, *sum = d_read + all, *d_z = sum + all;
  Gradients gradients(c, channel);
  load_taps(c, channel, forth);
  std::reverse_copy(forth, forth + taps, back);
  std::memset(sum, 0, taps * sizeof(float));
  std::memset(d_z, 0, (n + 2 * behind) * sizeof(float));
  for (int64_t b = 0; b < c.batch(); ++b) {
    window(c, b, channel, -behind, n + behind, read, rooms);
    gradients.outputs(b, 0, n, d_z + behind, rooms);
    if (c.d_gate_out) {
      slide(back, taps, read, n, d_read);
      gradients.gate_out(b, 0, n, d_read, rooms);
    }
    if (c.d_kernel) {  // of the reversed kernel
      slide(d_z + behind, n, read, taps, d_read);
      for (int64_t k = 0; k < taps; ++k) sum[k] += d_read[k];
    }
    slide(forth, taps, d_z, n + behind, d_read);
    gradients.inputs(b, c.lead ? d_read : d_read + behind, rooms);
  }
  if (c.d_kernel) {
    std::reverse(sum, sum + taps);
    gradients.kernel(sum, 1.f);
  }
  gradients.done();
}

inline void run_backward(const Conv& c) {
  if (!c.length) {
    return for_each_job(c.channels(), c.threads, false, [&](int64_t channel) {
      const FlushSubnormals flushed;
      back_sums(c, channel);
    });
  }
  const Fft fft(c.length);
  const Counting counting(c, fft);
  for_each_job(c.channels(), c.threads, false, [&](int64_t channel) {
    const FlushSubnormals flushed;
    back_windows(c, fft, counting, channel);
  });
}

}  // namespace tilewise
