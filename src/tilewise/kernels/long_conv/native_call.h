// One call of the long convolution as the native engine sees it, its rows as float32, and kernels'
// transforms.
#pragma once

#include "native_fft.h"

namespace tilewise {

// Field for field what native.py writes; every number is 64 bits wide.
struct Conv {
  Grid x, kernel, gate_in, gate_out, skip, before, transform, kept, out;
  Grid d_out, d_x, d_kernel, d_gate_in, d_gate_out, d_skip, d_before;
  int64_t length, lead, step, taps, circular, cut, threads;

  int64_t batch() const { return x.size[0]; }
  int64_t channels() const { return x.size[1]; }
  int64_t n() const { return x.size[2]; }
  int64_t size() const { return kernel.size[1]; }
  int64_t windows() const { return (n() + step - 1) / step; }
  bool preparing() const { return !out && !d_out; }  // a transform that is yet to be made
  bool alone() const { return lead == 0 && windows() == 1; }  // one window, nothing before it
};

template <typename Work>
void by_kind(const Grid& x, const Work& work) {
  switch (x.kind) {
    case FLOAT32: return work(float());
    case FLOAT16: return work(Half());
    default: return work(BFloat16());
  }
}

// Numbers t .. t + n - 1 of a row of `[B, C, N]` as floats: where they lie, or in `room`.
inline const float* row(const Grid& x, int64_t b, int64_t channel, int64_t t, int64_t n, float* room) {
  const int64_t at = b * x.stride[0] + channel * x.stride[1] + t * x.stride[2];
  if (x.kind == FLOAT32 && x.stride[2] == 1) return x.at<float>(at);
  by_kind(x, [&]<typename S>(S) { copy_row(x.at<S>(at), x.stride[2], n, room); });
  return room;
}

// Where n floats of an output row go: there, or to `room`, from which `put_row` takes them.
inline float* place(const Grid& x, int64_t b, int64_t channel, int64_t t, float* room) {
  return x.kind == FLOAT32 ? x.at<float>(b * x.stride[0] + channel * x.stride[1] + t) : room;
}
inline void put_row(const Grid& x, int64_t b, int64_t channel, int64_t t, int64_t n, const float* from) {
  if (x.kind == FLOAT32) return;
  by_kind(x, [&]<typename S>(S) { copy_row(from, 1, n, x.at<S>(b * x.stride[0] + channel * x.stride[1] + t)); });
}

inline float at(const Grid& x, int64_t channel) { return x ? *x.at<float>(channel * x.stride[0]) : 0.f; }

// What a thread converts rows in.
struct Rooms {
  static constexpr int64_t COUNT = 5;
  float* room[COUNT];
  explicit Rooms(int64_t n) {
    thread_local Buffer memory;
    float* all = memory.take<float>(COUNT * round_up(n, LANES));
    for (int64_t i = 0; i < COUNT; ++i) room[i] = all + i * round_up(n, LANES);
  }
};

// Gated inputs of a row, times t .. t + n - 1, 0 <= t and t + n <= N.
inline void gated(const Conv& c, int64_t b, int64_t channel, int64_t t, int64_t n, float* to, Rooms& rooms) {
  const float* x = row(c.x, b, channel, t, n, rooms.room[0]);
  if (!c.gate_in) {
    std::memcpy(to, x, n * sizeof(float));
    return;
  }
  const float* g = row(c.gate_in, b, channel, t, n, rooms.room[1]);
  for (int64_t i = 0; i < n; ++i) to[i] = x[i] * g[i];
}

// What a window covers, from time t on: what was before, or the end of a circular row, then the row, then 0
// up to n.
inline void window(const Conv& c, int64_t b, int64_t channel, int64_t t, int64_t n, float* to, Rooms& rooms) {
  int64_t done = 0;
  if (t < 0) {
    done = std::min(n, -t);
    if (c.circular) {
      gated(c, b, channel, t + c.n(), done, to, rooms);
    } else if (c.before) {  // K - 1 of them, the last one at time -1
      copy_row(c.before.at<float>(b * c.before.stride[0] + channel * c.before.stride[1] + (c.size() - 1 + t) * c.before.stride[2]),
               c.before.stride[2], done, to);
    } else {
      std::memset(to, 0, done * sizeof(float));
    }
  }
  const int64_t real = std::clamp<int64_t>(c.n() - (t + done), 0, n - done);
  if (real) gated(c, b, channel, t + done, real, to + done, rooms);
  std::memset(to + done + real, 0, (n - done - real) * sizeof(float));
}

// The taps of a channel that can be reached, those of a circular kernel beyond N added to the first.
inline void load_taps(const Conv& c, int64_t channel, float* to) {
  const float* from = c.kernel.at<float>(channel * c.kernel.stride[0]);
  copy_row(from, c.kernel.stride[1], c.taps, to);
  for (int64_t k = 0; c.circular && c.size() > c.taps && k < c.taps; ++k) {
    double sum = 0;
    for (int64_t j = k; j < c.size(); j += c.taps) sum += from[j * c.kernel.stride[1]];
    to[k] = static_cast<float>(sum);
  }
}

// Which frequencies count.
struct Counting {
  const Conv& call;
  std::vector<uint8_t> rows;   // of each class
  std::vector<float> factors;  // 1 or 0 of every place of a transform; empty where all count, and where none is asked for

  Counting(const Conv& c, const Fft& fft) : call(c) {
    const int64_t count = c.kept ? c.kept.size[0] : 0;
    for (int64_t r = 0; r < count; ++r) rows.push_back(*c.kept.at<uint8_t>(r * c.kept.stride[0]));
    if (!count || (c.transform && !c.preparing())) return;  // it was made without those that do not count
    const std::vector<int64_t> order = fft.frequencies();
    for (int64_t f : order) factors.push_back(rows[f % count] && std::min(f, fft.length - f) <= c.cut ? 1.f : 0.f);
  }

  // Whether any class that counts has frequencies that are `residue` modulo `modulus`.
  bool operator()(int64_t residue, int64_t modulus) const {
    const int64_t count = rows.size();
    if (!count) return true;
    if (modulus >= count) return rows[residue % count];
    for (int64_t r = residue; r < count; r += modulus)
      if (rows[r]) return true;
    return false;
  }
};

// The transform of a kernel divided by its length, so that a way down and up again changes nothing; places
// lie together.
struct Spectrum {
  float *re, *im;
};

inline void transform_kernel(const Conv& c, const Fft& fft, const Counting& counting, int64_t channel, Wave wave, Spectrum to) {
  const bool half = 2 * c.taps <= fft.length && !fft.levels.empty();
  wave.clear(fft.length / (half ? 2 : 1));
  load_taps(c, channel, to.re);
  in_chunks(0, c.taps, [&](int64_t at, int64_t from, int64_t count) {
    std::memcpy(wave.re + at, to.re + from, count * sizeof(float));
  });
  const float scale = 1.f / static_cast<float>(fft.length);
  walk<1, 0>(fft, &wave, half, false, counting, [&](int64_t at) {
    Leaf leaf;
    leaf.down(wave.re + spot(at), wave.im + spot(at), fft.leaf);
    const float* factors = counting.factors.empty() ? nullptr : counting.factors.data() + at;
    for (int r = 0; r < 4; ++r) {
      Floats x[R], y[R];
      leaf.get(R * r, 1, R, x, y);
      inner<false>(x, y);
#pragma GCC unroll 4
      for (int k = 0; k < R; ++k) {
        const int64_t own = (R * r + k) * LANES;
        const Floats factor = factors ? scale * load<Floats>(factors + own) : scale + Floats{};
        store(to.re + at + own, factor * x[k]), store(to.im + at + own, factor * y[k]);
      }
    }
  });
}

// The transform that was prepared, or one made now in `room`, through `wave`.
inline Spectrum spectrum(const Conv& c, const Fft& fft, const Counting& counting, int64_t channel, Wave wave, float* room) {
  if (c.transform) {
    float* own = c.transform.at<float>(channel * c.transform.stride[0]);
    return {own, own + fft.length};
  }
  const Spectrum made{room, room + fft.length + GAP};
  transform_kernel(c, fft, counting, channel, wave, made);
  return made;
}

// The largest size of the first n numbers of a wave's row, a multiple of LANES; not finite where one of them
// is not.
inline float size_of(const float* x, int64_t n) {
  Floats top{}, wrong{};
  in_chunks(0, n, [&](int64_t at, int64_t, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
      const Floats own = load<Floats>(x + at + i), size = own < 0.f ? -own : own;
      top = size > top ? size : top;
      wrong += own * 0.f;
    }
  });
  return largest_of(top) + sum_of(wrong);
}

// to [n] = sums over j < count of filter[j] data[i + j]; data goes on for n + count - 1 numbers. Filters are
// taken a few at a time, so that no sum of many small numbers is a single chain.
inline void slide(const float* filter, int64_t count, const float* data, int64_t n, float* to) {
  constexpr int64_t AT_ONCE = 128, WIDE = 4;
  std::memset(to, 0, n * sizeof(float));
  for (int64_t from = 0; from < count; from += AT_ONCE) {
    const int64_t end = std::min(count, from + AT_ONCE);
    int64_t i = 0;
    for (; i + WIDE * LANES <= n; i += WIDE * LANES) {
      Floats sums[WIDE] = {};
      for (int64_t j = from; j < end; ++j)
        for (int64_t k = 0; k < WIDE; ++k) sums[k] += filter[j] * load<Floats>(data + i + j + k * LANES);
      for (int64_t k = 0; k < WIDE; ++k) store(to + i + k * LANES, load<Floats>(to + i + k * LANES) + sums[k]);
    }
    for (; i + LANES <= n; i += LANES) {
      Floats sum{};
      for (int64_t j = from; j < end; ++j) sum += filter[j] * load<Floats>(data + i + j);
      store(to + i, load<Floats>(to + i) + sum);
    }
    for (; i < n; ++i) {
      Floats sum{};
      int64_t j = from;
      for (; j + LANES <= end; j += LANES) sum += load<Floats>(filter + j) * load<Floats>(data + i + j);
      float rest = sum_of(sum);
      for (; j < end; ++j) rest += filter[j] * data[i + j];
      to[i] += rest;
    }
  }
}

}  // namespace tilewise
