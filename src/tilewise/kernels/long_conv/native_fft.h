// Complex Fourier transforms for convolutions: in place, and never put in order.
//
// A transform goes from natural order to one of digits reversed (decimation in frequency), and back the same
// way, so a product of two in between needs no permutation. Passes of radix 4 split a block into quarters
// that are then finished one after the other, product and way back included, so most of the work happens in
// the nearest cache. The last LANES^2 numbers are a leaf: a DFT of LANES over registers, factors, a
// transpose, and another DFT over registers; only the transposes move numbers between lanes. Two real rows
// travel as the real and imaginary parts of one.
#pragma once

#include <map>

#include "../native.h"

namespace tilewise {

constexpr int64_t LEAF = LANES * LANES;
constexpr int64_t CHUNK = 1024, GAP = 16;  // see `spot`

// What works on registers by number has to see which they are.
#define ALWAYS_INLINE inline __attribute__((always_inline))

// exp(-2 pi i t / n) for t reduced modulo n, exact for any product.
inline void turn(int64_t t, int64_t n, float& re, float& im) {
  const double angle = -2.0 * M_PI * static_cast<double>(t % n) / static_cast<double>(n);
  re = static_cast<float>(std::cos(angle)), im = static_cast<float>(std::sin(angle));
}

// The frequency of a DFT of LANES that a register holds.
constexpr int64_t digit(int64_t place) { return LANES == 4 ? place : place / (LANES / 4) + 4 * (place % (LANES / 4)); }

// Tables of factors, made once for each size and kept.
//
// For a pass over n numbers: powers 1, 2, 3 (radix 4) or 1 (radix 2) of exp(-2 pi i j / n), n / radix each
// and a gap, real parts and then imaginary ones. For the leaf (n = LEAF): of register p and lane l, exp(-2 pi
// i l digit(p) / LEAF).
inline const float* factors(int64_t n, int64_t radix) {
  static std::mutex lock;
  static std::map<std::pair<int64_t, int64_t>, std::unique_ptr<float, Free>> made;
  const std::lock_guard<std::mutex> guard(lock);
  std::unique_ptr<float, Free>& own = made[{n, radix}];
  if (own) return own.get();
  const bool leaf = radix == LANES && n == LEAF;
  const int64_t q = n / radix, rows = leaf ? LANES : radix - 1, ld = leaf ? LANES : q + GAP;
  float* to = static_cast<float*>(std::aligned_alloc(64, round_up(2 * rows * ld * sizeof(float), 64)));
  if (to == nullptr) throw std::bad_alloc();
  own.reset(to);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < q; ++j)
      turn(leaf ? digit(r) * j : (r + 1) * j, n, to[2 * r * ld + j], to[(2 * r + 1) * ld + j]);
  return to;
}

// Passes of a transform of LEAF * 2^a numbers, the widest first.
struct Level {
  int64_t n, radix;
  const float* w;
};
struct Fft {
  int64_t length;
  std::vector<Level> levels;
  const float* leaf;

  explicit Fft(int64_t size) : length(size), leaf(factors(LEAF, LANES)) {
    int64_t n = size;
    int bits = 0;
    while (LEAF << bits < size) ++bits;
    if (LEAF << bits != size) throw std::runtime_error("a transform's length must be a power of 2 above its leaf's");
    if (bits % 2) levels.push_back({n, 2, factors(n, 2)}), n /= 2;
    for (; n > LEAF; n /= 4) levels.push_back({n, 4, factors(n, 4)});
  }

  // The frequency of every place of a transform.
  std::vector<int64_t> frequencies() const {
    std::vector<int64_t> order(length);
    number(0, 0, 0, 1, order);
    return order;
  }

 private:
  void number(size_t depth, int64_t at, int64_t residue, int64_t modulus, std::vector<int64_t>& order) const {
    if (depth == levels.size()) {  // lane p, register q
      for (int64_t q = 0; q < LANES; ++q)
        for (int64_t p = 0; p < LANES; ++p)
          order[at + q * LANES + p] = residue + modulus * (digit(p) + LANES * digit(q));
      return;
    }
    const Level& level = levels[depth];
    for (int64_t r = 0; r < level.radix; ++r)
      number(depth + 1, at + r * (level.n / level.radix), residue + r * modulus, modulus * level.radix, order);
  }
};

// ------------------------------------------------------------------------------------------- a leaf in
// registers
ALWAYS_INLINE Floats times(Floats x, Floats y, Floats z, Floats w) { return x * y - z * w; }  // x y - z w

// A butterfly of four: forward, or the reverse (times 4).
template <bool back>
ALWAYS_INLINE void quad(Floats* re, Floats* im, int a, int b, int c, int d) {
  const Floats sr = re[a] + re[c], si = im[a] + im[c], dr = re[a] - re[c], di = im[a] - im[c];
  const Floats tr = re[b] + re[d], ti = im[b] + im[d];
  const Floats er = re[b] - re[d], ei = im[b] - im[d];
  re[a] = sr + tr, im[a] = si + ti;
  re[c] = sr - tr, im[c] = si - ti;
  if constexpr (back) {
    re[b] = dr - ei, im[b] = di + er;
    re[d] = dr + ei, im[d] = di - er;
  } else {
    re[b] = dr + ei, im[b] = di - er;
    re[d] = dr - ei, im[d] = di + er;
  }
}

// exp(-2 pi i t / 16).
constexpr float COS16[10] = {1.f, 0.92387953251128674f, 0.70710678118654752f, 0.38268343236508977f, 0.f,
                             -0.38268343236508977f, -0.70710678118654752f, -0.92387953251128674f, -1.f,
                             -0.92387953251128674f};
constexpr float SIN16[10] = {0.f, -0.38268343236508977f, -0.70710678118654752f, -0.92387953251128674f, -1.f,
                             -0.92387953251128674f, -0.70710678118654752f, -0.38268343236508977f, 0.f,
                             0.38268343236508977f};

// The DFT of LANES numbers in as many registers takes two steps: four registers a column apart meet
// (`outer`), then those of a column (`inner`); register p ends up with frequency digit(p). The transpose has
// two such halves as well, so all of a leaf is done by fours of registers, each loaded once for a step of
// everything.
constexpr int R = LANES / 4;

template <int STEP, size_t... I>
ALWAYS_INLINE void swap_pair(Floats& x, Floats& y, std::index_sequence<I...>) {
  const Floats a = x, b = y;
  x = __builtin_shufflevector(a, b, (I & STEP ? LANES + I - STEP : I)...);
  y = __builtin_shufflevector(a, b, (I & STEP ? LANES + I : I + STEP)...);
}

// The outer half of a transpose, registers of column distance.
ALWAYS_INLINE void swap_outer(Floats* x) {
  constexpr auto lanes = std::make_index_sequence<LANES>();
  swap_pair<R>(x[0], x[1], lanes), swap_pair<R>(x[2], x[3], lanes);
  swap_pair<2 * R>(x[0], x[2], lanes), swap_pair<2 * R>(x[1], x[3], lanes);
}

// The inner half, of the registers of a column.
ALWAYS_INLINE void swap_inner(Floats* x) {
  constexpr auto lanes = std::make_index_sequence<LANES>();
  if constexpr (R == 4) {
    swap_pair<1>(x[0], x[1], lanes), swap_pair<1>(x[2], x[3], lanes);
    swap_pair<2>(x[0], x[2], lanes), swap_pair<2>(x[1], x[3], lanes);
  }
  if constexpr (R == 2) swap_pair<1>(x[0], x[1], lanes);
}

template <bool back>
ALWAYS_INLINE void inner(Floats* re, Floats* im) {
  if constexpr (R == 4) quad<back>(re, im, 0, 1, 2, 3);
  if constexpr (R == 2) {
    const Floats xr = re[0], xi = im[0];
    re[0] = xr + re[1], im[0] = xi + im[1];
    re[1] = xr - re[1], im[1] = xi - im[1];
  }
}

// Outputs 1, 2, 3 of column c times exp(-2 pi i c r / LANES), or its conjugate.
template <bool back>
ALWAYS_INLINE void turn_column(Floats* re, Floats* im, int c) {
#pragma GCC unroll 4
  for (int r = 1; r < 4; ++r) {
    const int t = 16 / LANES * c * r;
    const float wr = COS16[t], wi = back ? -SIN16[t] : SIN16[t];
    const Floats xr = re[r], xi = im[r];
    re[r] = xr * wr - xi * wi;
    im[r] = xr * wi + xi * wr;
  }
}

// A leaf on its way.
struct Leaf {
  alignas(64) float re[LEAF], im[LEAF];

  ALWAYS_INLINE void get(int first, int step, int count, Floats* x, Floats* y) const {
#pragma GCC unroll 4
    for (int k = 0; k < count; ++k) {
      x[k] = load<Floats>(re + (first + k * step) * LANES), y[k] = load<Floats>(im + (first + k * step) * LANES);
    }
  }
  ALWAYS_INLINE void set(int first, int step, int count, const Floats* x, const Floats* y) {
#pragma GCC unroll 4
    for (int k = 0; k < count; ++k) {
      store(re + (first + k * step) * LANES, x[k]), store(im + (first + k * step) * LANES, y[k]);
    }
  }

  // Down, but for the last half step, `middle`.
  void down(const float* from_re, const float* from_im, const float* w) {
#pragma GCC unroll 4
    for (int c = 0; c < R; ++c) {
      Floats x[4], y[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) x[k] = load<Floats>(from_re + (c + k * R) * LANES), y[k] = load<Floats>(from_im + (c + k * R) * LANES);
      quad<false>(x, y, 0, 1, 2, 3);
      if (c) turn_column<false>(x, y, c);
      set(c, R, 4, x, y);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      Floats x[R], y[R];
      get(R * r, 1, R, x, y);
      inner<false>(x, y);
#pragma GCC unroll 4
      for (int k = 0; k < R; ++k) {
        if (R * r + k == 0) continue;
        const Floats wr = load<Floats>(w + 2 * (R * r + k) * LANES), wi = load<Floats>(w + (2 * (R * r + k) + 1) * LANES), xr = x[k];
        x[k] = xr * wr - y[k] * wi;
        y[k] = xr * wi + y[k] * wr;
      }
      swap_inner(x), swap_inner(y);
      set(R * r, 1, R, x, y);
    }
#pragma GCC unroll 4
    for (int c = 0; c < R; ++c) {
      Floats x[4], y[4];
      get(c, R, 4, x, y);
      swap_outer(x), swap_outer(y);
      quad<false>(x, y, 0, 1, 2, 3);
      if (c) turn_column<false>(x, y, c);
      set(c, R, 4, x, y);
    }
  }

  // Up, but for the first half step.
  void up(const float* w, float* to_re, float* to_im) {
#pragma GCC unroll 4
    for (int c = 0; c < R; ++c) {
      Floats x[4], y[4];
      get(c, R, 4, x, y);
      if (c) turn_column<true>(x, y, c);
      quad<true>(x, y, 0, 1, 2, 3);
      swap_outer(x), swap_outer(y);
      set(c, R, 4, x, y);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      Floats x[R], y[R];
      get(R * r, 1, R, x, y);
      swap_inner(x), swap_inner(y);
#pragma GCC unroll 4
      for (int k = 0; k < R; ++k) {
        if (R * r + k == 0) continue;
        const Floats wr = load<Floats>(w + 2 * (R * r + k) * LANES), wi = load<Floats>(w + (2 * (R * r + k) + 1) * LANES), xr = x[k];
        x[k] = xr * wr + y[k] * wi;
        y[k] = y[k] * wr - xr * wi;
      }
      inner<true>(x, y);
      set(R * r, 1, R, x, y);
    }
#pragma GCC unroll 4
    for (int c = 0; c < R; ++c) {
      Floats x[4], y[4];
      get(c, R, 4, x, y);
      if (c) turn_column<true>(x, y, c);
      quad<true>(x, y, 0, 1, 2, 3);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) store(to_re + (c + k * R) * LANES, x[k]), store(to_im + (c + k * R) * LANES, y[k]);
    }
  }
};

// -------------------------------------------------------------------------------------------------------
// passes Where number i of a row that is transformed lies: behind every 1,024 there is a gap of a line, as
// numbers that are powers of 2 apart would all want the same few lines of the nearest cache (which took 2.7
// times as long).
inline int64_t spot(int64_t i) { return i + i / CHUNK * GAP; }

// Calls work(spot of first, first - from, count) for the parts of from .. from + n - 1 that lie together.
template <typename Work>
inline void in_chunks(int64_t from, int64_t n, const Work& work) {
  for (int64_t i = from; i < from + n;) {
    const int64_t count = std::min(from + n - i, CHUNK - i % CHUNK);
    work(spot(i), i - from, count);
    i += count;
  }
}

// One pass over n numbers, from place `at` on. `half`: the upper half is 0 going down, and not wanted coming
// up.
template <bool half>
inline void down4(float* re, float* im, int64_t at, const Level& level) {
  const int64_t q = level.n / 4, part = std::min(q, CHUNK), ld = q + GAP;
  for (int64_t from = 0; from < q; from += part) {
    const int64_t p0 = spot(at + from), p1 = spot(at + q + from), p2 = spot(at + 2 * q + from), p3 = spot(at + 3 * q + from);
    float *r0 = re + p0, *r1 = re + p1, *r2 = re + p2, *r3 = re + p3, *i0 = im + p0, *i1 = im + p1, *i2 = im + p2, *i3 = im + p3;
    const float* w = level.w + from;
    for (int64_t j = 0; j < part; j += LANES) {
      const Floats ar = load<Floats>(r0 + j), ai = load<Floats>(i0 + j), br = load<Floats>(r1 + j), bi = load<Floats>(i1 + j);
      const Floats zero{};
      const Floats cr = half ? zero : load<Floats>(r2 + j), ci = half ? zero : load<Floats>(i2 + j);
      const Floats dr = half ? zero : load<Floats>(r3 + j), di = half ? zero : load<Floats>(i3 + j);
      const Floats sr = half ? ar : ar + cr, si = half ? ai : ai + ci, mr = half ? ar : ar - cr, mi = half ? ai : ai - ci;
      const Floats tr = half ? br : br + dr, ti = half ? bi : bi + di, nr = half ? br : br - dr, ni = half ? bi : bi - di;
      store(r0 + j, sr + tr), store(i0 + j, si + ti);
      const Floats x1r = mr + ni, x1i = mi - nr, x2r = sr - tr, x2i = si - ti, x3r = mr - ni, x3i = mi + nr;
      const Floats w1r = load<Floats>(w + j), w1i = load<Floats>(w + ld + j), w2r = load<Floats>(w + 2 * ld + j),
                   w2i = load<Floats>(w + 3 * ld + j), w3r = load<Floats>(w + 4 * ld + j), w3i = load<Floats>(w + 5 * ld + j);
      store(r1 + j, times(x1r, w1r, x1i, w1i)), store(i1 + j, x1r * w1i + x1i * w1r);
      store(r2 + j, times(x2r, w2r, x2i, w2i)), store(i2 + j, x2r * w2i + x2i * w2r);
      store(r3 + j, times(x3r, w3r, x3i, w3i)), store(i3 + j, x3r * w3i + x3i * w3r);
    }
  }
}

template <bool half>
inline void up4(float* re, float* im, int64_t at, const Level& level) {
  const int64_t q = level.n / 4, part = std::min(q, CHUNK), ld = q + GAP;
  for (int64_t from = 0; from < q; from += part) {
    const int64_t p0 = spot(at + from), p1 = spot(at + q + from), p2 = spot(at + 2 * q + from), p3 = spot(at + 3 * q + from);
    float *r0 = re + p0, *r1 = re + p1, *r2 = re + p2, *r3 = re + p3, *i0 = im + p0, *i1 = im + p1, *i2 = im + p2, *i3 = im + p3;
    const float* w = level.w + from;
    for (int64_t j = 0; j < part; j += LANES) {
      const Floats w1r = load<Floats>(w + j), w1i = load<Floats>(w + ld + j), w2r = load<Floats>(w + 2 * ld + j),
                   w2i = load<Floats>(w + 3 * ld + j), w3r = load<Floats>(w + 4 * ld + j), w3i = load<Floats>(w + 5 * ld + j);
      const Floats y0r = load<Floats>(r0 + j), y0i = load<Floats>(i0 + j), y1r = load<Floats>(r1 + j), y1i = load<Floats>(i1 + j);
      const Floats y2r = load<Floats>(r2 + j), y2i = load<Floats>(i2 + j), y3r = load<Floats>(r3 + j), y3i = load<Floats>(i3 + j);
      const Floats t1r = y1r * w1r + y1i * w1i, t1i = times(y1i, w1r, y1r, w1i);
      const Floats t2r = y2r * w2r + y2i * w2i, t2i = times(y2i, w2r, y2r, w2i);
      const Floats t3r = y3r * w3r + y3i * w3i, t3i = times(y3i, w3r, y3r, w3i);
      const Floats sr = y0r + t2r, si = y0i + t2i, mr = y0r - t2r, mi = y0i - t2i;
      const Floats tr = t1r + t3r, ti = t1i + t3i, nr = t1r - t3r, ni = t1i - t3i;
      store(r0 + j, sr + tr), store(i0 + j, si + ti);
      store(r1 + j, mr - ni), store(i1 + j, mi + nr);
      if (half) continue;
      store(r2 + j, sr - tr), store(i2 + j, si - ti);
      store(r3 + j, mr + ni), store(i3 + j, mi - nr);
    }
  }
}

template <bool half>
inline void down2(float* re, float* im, int64_t at, const Level& level) {
  const int64_t q = level.n / 2, part = std::min(q, CHUNK), ld = q + GAP;
  for (int64_t from = 0; from < q; from += part) {
    const int64_t p0 = spot(at + from), p1 = spot(at + q + from);
    float *r0 = re + p0, *r1 = re + p1, *i0 = im + p0, *i1 = im + p1;
    const float* w = level.w + from;
    for (int64_t j = 0; j < part; j += LANES) {
      const Floats wr = load<Floats>(w + j), wi = load<Floats>(w + ld + j);
      Floats ar = load<Floats>(r0 + j), ai = load<Floats>(i0 + j), xr = ar, xi = ai;
      if constexpr (!half) {
        const Floats br = load<Floats>(r1 + j), bi = load<Floats>(i1 + j);
        xr = ar - br, xi = ai - bi;
        store(r0 + j, ar + br), store(i0 + j, ai + bi);
      }
      store(r1 + j, times(xr, wr, xi, wi)), store(i1 + j, xr * wi + xi * wr);
    }
  }
}

template <bool half>
inline void up2(float* re, float* im, int64_t at, const Level& level) {
  const int64_t q = level.n / 2, part = std::min(q, CHUNK), ld = q + GAP;
  for (int64_t from = 0; from < q; from += part) {
    const int64_t p0 = spot(at + from), p1 = spot(at + q + from);
    float *r0 = re + p0, *r1 = re + p1, *i0 = im + p0, *i1 = im + p1;
    const float* w = level.w + from;
    for (int64_t j = 0; j < part; j += LANES) {
      const Floats wr = load<Floats>(w + j), wi = load<Floats>(w + ld + j);
      const Floats ar = load<Floats>(r0 + j), ai = load<Floats>(i0 + j), yr = load<Floats>(r1 + j), yi = load<Floats>(i1 + j);
      const Floats tr = yr * wr + yi * wi, ti = times(yi, wr, yr, wi);
      store(r0 + j, ar + tr), store(i0 + j, ai + ti);
      if (half) continue;
      store(r1 + j, ar - tr), store(i1 + j, ai - ti);
    }
  }
}

// Real parts and imaginary ones of numbers that are transformed, each at its spot.
struct Wave {
  float *re, *im;

  // Floats that one of `length` takes, and one of so many at `from`; the two parts are no power of 2 apart.
  static int64_t room(int64_t length) { return 2 * part(length); }
  static Wave in(float* from, int64_t length) { return {from, from + part(length)}; }

  void clear(int64_t n) const {
    std::memset(re, 0, spot(n) * sizeof(float));
    std::memset(im, 0, spot(n) * sizeof(float));
  }

 private:
  static int64_t part(int64_t length) { return round_up(spot(length), CHUNK) + 20 * GAP; }
};

// Takes DOWN waves down to their leaves, calls leaf(place) there, and the first UP of them back up. The upper
// half of the waves is 0 (`half_down`) or not wanted (`half_up`). Blocks for which wanted(residue, modulus)
// is false, of frequencies that are `residue` modulo `modulus`, are left out and count as 0.
template <int DOWN, int UP, typename Wanted, typename Leaf>
void walk(const Fft& fft, const Wave* waves, bool half_down, bool half_up, const Wanted& wanted, const Leaf& leaf,
          size_t depth = 0, int64_t at = 0, int64_t residue = 0) {
  if (depth == fft.levels.size()) return leaf(at);
  const Level& level = fft.levels[depth];
  for (int i = 0; i < DOWN; ++i) {
    float *re = waves[i].re, *im = waves[i].im;
    if (level.radix == 4) half_down ? down4<true>(re, im, at, level) : down4<false>(re, im, at, level);
    else half_down ? down2<true>(re, im, at, level) : down2<false>(re, im, at, level);
  }
  const int64_t part = level.n / level.radix, modulus = fft.length / level.n;
  for (int64_t r = 0; r < level.radix; ++r) {
    const int64_t own = at + r * part;
    if (wanted(residue + r * modulus, modulus * level.radix)) {
      walk<DOWN, UP>(fft, waves, false, false, wanted, leaf, depth + 1, own, residue + r * modulus);
      continue;
    }
    for (int i = 0; i < UP; ++i) {
      in_chunks(own, part, [&](int64_t to, int64_t, int64_t count) {
        std::memset(waves[i].re + to, 0, count * sizeof(float));
        std::memset(waves[i].im + to, 0, count * sizeof(float));
      });
    }
  }
  for (int i = 0; i < UP; ++i) {
    float *re = waves[i].re, *im = waves[i].im;
    if (level.radix == 4) half_up ? up4<true>(re, im, at, level) : up4<false>(re, im, at, level);
    else half_up ? up2<true>(re, im, at, level) : up2<false>(re, im, at, level);
  }
}

}  // namespace tilewise
