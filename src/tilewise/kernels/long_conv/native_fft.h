// Complex Fourier transforms for convolutions: in place, and never put in order.
//
// A transform goes from natural order to one of digits reversed (decimation in frequency), and back the same way, so a
// product of two in between needs no permutation. Passes of radix 4 split a block into quarters that are then finished
// one after the other, product and way back included, so most of the work happens in the nearest cache. The last
// LANES^2 numbers are a leaf: a DFT of LANES over registers, factors, a transpose, and another DFT over registers; only
// the transposes move numbers between lanes. Two real rows travel as the real and imaginary parts of one.
#pragma once

#include <map>

#include "../native.h"

namespace tilewise {

constexpr int64_t LEAF = LANES * LANES;

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
// For a pass over n numbers: powers 1, 2, 3 (radix 4) or 1 (radix 2) of exp(-2 pi i j / n), n / radix each, real parts
// and then imaginary ones. For the leaf (n = LEAF): of register p and lane l, exp(-2 pi i l digit(p) / LEAF).
inline const float* factors(int64_t n, int64_t radix) {
  static std::mutex lock;
  static std::map<std::pair<int64_t, int64_t>, std::unique_ptr<float, Free>> made;
  const std::lock_guard<std::mutex> guard(lock);
  std::unique_ptr<float, Free>& own = made[{n, radix}];
  if (own) return own.get();
  const bool leaf = radix == LANES && n == LEAF;
  const int64_t q = n / radix, rows = leaf ? LANES : radix - 1;
  float* to = static_cast<float*>(std::aligned_alloc(64, round_up(2 * rows * q * sizeof(float), 64)));
  if (to == nullptr) throw std::bad_alloc();
  own.reset(to);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < q; ++j)
      turn(leaf ? digit(r) * j : (r + 1) * j, n, to[2 * r * q + j], to[(2 * r + 1) * q + j]);
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

// ------------------------------------------------------------------------------------------- a leaf in registers
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

// The DFT of LANES numbers in as many registers, and the reverse (times LANES): register p holds frequency digit(p).
template <bool back>
ALWAYS_INLINE void dft_of_registers(Floats* re, Floats* im) {
  constexpr int R = LANES / 4, STEP = 16 / LANES;
  const auto finish = [&] {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      if constexpr (R == 4) quad<back>(re, im, 4 * r, 4 * r + 1, 4 * r + 2, 4 * r + 3);
      if constexpr (R == 2) {
        const Floats xr = re[2 * r], xi = im[2 * r];
        re[2 * r] = xr + re[2 * r + 1], im[2 * r] = xi + im[2 * r + 1];
        re[2 * r + 1] = xr - re[2 * r + 1], im[2 * r + 1] = xi - im[2 * r + 1];
      }
    }
  };
  const auto turned = [&] {
#pragma GCC unroll 4
    for (int c = 1; c < R; ++c) {
#pragma GCC unroll 4
      for (int r = 1; r < 4; ++r) {  // column c of the first step, output r: where the second step finds it
        const float wr = COS16[STEP * c * r], wi = back ? -SIN16[STEP * c * r] : SIN16[STEP * c * r];
        const int at = R * r + c;
        const Floats xr = re[at], xi = im[at];
        re[at] = times(xr, wr + Floats{}, xi, wi + Floats{});
        im[at] = xr * wi + xi * wr;
      }
    }
  };
  const auto columns = [&] {
#pragma GCC unroll 4
    for (int c = 0; c < R; ++c) quad<back>(re, im, c, c + R, c + 2 * R, c + 3 * R);
  };
  // Column c of four leaves output r in register c + R r.
  if constexpr (back) {
    finish();
    turned();
    columns();
  } else {
    columns();
    turned();
    finish();
  }
}

template <int64_t STEP, size_t... I>
ALWAYS_INLINE void swap_floats(Floats* rows, std::index_sequence<I...> lanes) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < LANES; ++i) {
    if (i & STEP) continue;
    const Floats x = rows[i], y = rows[i + STEP];
    rows[i] = __builtin_shufflevector(x, y, (I & STEP ? LANES + I - STEP : I)...);
    rows[i + STEP] = __builtin_shufflevector(x, y, (I & STEP ? LANES + I : I + STEP)...);
  }
  if constexpr (STEP > 1) swap_floats<STEP / 2>(rows, lanes);
}
ALWAYS_INLINE void turn_square(Floats* rows) { swap_floats<LANES / 2>(rows, std::make_index_sequence<LANES>()); }

// A leaf to its transform: register q and lane p of the result are at place q LANES + p.
inline void leaf_down(const float* from_re, const float* from_im, const float* w, Floats* re, Floats* im) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) re[i] = load<Floats>(from_re + i * LANES), im[i] = load<Floats>(from_im + i * LANES);
  dft_of_registers<false>(re, im);
#pragma GCC unroll 16
  for (int i = 1; i < LANES; ++i) {
    const Floats wr = load<Floats>(w + 2 * i * LANES), wi = load<Floats>(w + (2 * i + 1) * LANES), xr = re[i];
    re[i] = times(xr, wr, im[i], wi);
    im[i] = xr * wi + im[i] * wr;
  }
  turn_square(re);
  turn_square(im);
  dft_of_registers<false>(re, im);
}

inline void leaf_up(Floats* re, Floats* im, const float* w, float* to_re, float* to_im) {
  dft_of_registers<true>(re, im);
  turn_square(re);
  turn_square(im);
#pragma GCC unroll 16
  for (int i = 1; i < LANES; ++i) {
    const Floats wr = load<Floats>(w + 2 * i * LANES), wi = load<Floats>(w + (2 * i + 1) * LANES), xr = re[i];
    re[i] = xr * wr + im[i] * wi;
    im[i] = times(im[i], wr, xr, wi);
  }
  dft_of_registers<true>(re, im);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) store(to_re + i * LANES, re[i]), store(to_im + i * LANES, im[i]);
}

// ------------------------------------------------------------------------------------------------------- passes
// One pass over n numbers. `half`: the upper half is 0 going down, and not wanted coming up.
template <bool half>
inline void down4(float* re, float* im, const Level& level) {
  const int64_t q = level.n / 4;
  const float* w = level.w;
  float *r1 = re + q, *r2 = r1 + q, *r3 = r2 + q, *i1 = im + q, *i2 = i1 + q, *i3 = i2 + q;
  for (int64_t j = 0; j < q; j += LANES) {
    const Floats ar = load<Floats>(re + j), ai = load<Floats>(im + j), br = load<Floats>(r1 + j), bi = load<Floats>(i1 + j);
    const Floats zero{};
    const Floats cr = half ? zero : load<Floats>(r2 + j), ci = half ? zero : load<Floats>(i2 + j);
    const Floats dr = half ? zero : load<Floats>(r3 + j), di = half ? zero : load<Floats>(i3 + j);
    const Floats sr = half ? ar : ar + cr, si = half ? ai : ai + ci, mr = half ? ar : ar - cr, mi = half ? ai : ai - ci;
    const Floats tr = half ? br : br + dr, ti = half ? bi : bi + di, nr = half ? br : br - dr, ni = half ? bi : bi - di;
    store(re + j, sr + tr), store(im + j, si + ti);
    const Floats x1r = mr + ni, x1i = mi - nr, x2r = sr - tr, x2i = si - ti, x3r = mr - ni, x3i = mi + nr;
    const Floats w1r = load<Floats>(w + j), w1i = load<Floats>(w + q + j), w2r = load<Floats>(w + 2 * q + j),
                 w2i = load<Floats>(w + 3 * q + j), w3r = load<Floats>(w + 4 * q + j), w3i = load<Floats>(w + 5 * q + j);
    store(r1 + j, times(x1r, w1r, x1i, w1i)), store(i1 + j, x1r * w1i + x1i * w1r);
    store(r2 + j, times(x2r, w2r, x2i, w2i)), store(i2 + j, x2r * w2i + x2i * w2r);
    store(r3 + j, times(x3r, w3r, x3i, w3i)), store(i3 + j, x3r * w3i + x3i * w3r);
  }
}

template <bool half>
inline void up4(float* re, float* im, const Level& level) {
  const int64_t q = level.n / 4;
  const float* w = level.w;
  float *r1 = re + q, *r2 = r1 + q, *r3 = r2 + q, *i1 = im + q, *i2 = i1 + q, *i3 = i2 + q;
  for (int64_t j = 0; j < q; j += LANES) {
    const Floats w1r = load<Floats>(w + j), w1i = load<Floats>(w + q + j), w2r = load<Floats>(w + 2 * q + j),
                 w2i = load<Floats>(w + 3 * q + j), w3r = load<Floats>(w + 4 * q + j), w3i = load<Floats>(w + 5 * q + j);
    const Floats y0r = load<Floats>(re + j), y0i = load<Floats>(im + j), y1r = load<Floats>(r1 + j), y1i = load<Floats>(i1 + j);
    const Floats y2r = load<Floats>(r2 + j), y2i = load<Floats>(i2 + j), y3r = load<Floats>(r3 + j), y3i = load<Floats>(i3 + j);
    const Floats t1r = y1r * w1r + y1i * w1i, t1i = times(y1i, w1r, y1r, w1i);
    const Floats t2r = y2r * w2r + y2i * w2i, t2i = times(y2i, w2r, y2r, w2i);
    const Floats t3r = y3r * w3r + y3i * w3i, t3i = times(y3i, w3r, y3r, w3i);
    const Floats sr = y0r + t2r, si = y0i + t2i, mr = y0r - t2r, mi = y0i - t2i;
    const Floats tr = t1r + t3r, ti = t1i + t3i, nr = t1r - t3r, ni = t1i - t3i;
    store(re + j, sr + tr), store(im + j, si + ti);
    store(r1 + j, mr - ni), store(i1 + j, mi + nr);
    if (half) continue;
    store(r2 + j, sr - tr), store(i2 + j, si - ti);
    store(r3 + j, mr + ni), store(i3 + j, mi - nr);
  }
}

template <bool half>
inline void down2(float* re, float* im, const Level& level) {
  const int64_t q = level.n / 2;
  const float* w = level.w;
  for (int64_t j = 0; j < q; j += LANES) {
    const Floats wr = load<Floats>(w + j), wi = load<Floats>(w + q + j);
    Floats ar = load<Floats>(re + j), ai = load<Floats>(im + j), xr = ar, xi = ai;
    if constexpr (!half) {
      const Floats br = load<Floats>(re + q + j), bi = load<Floats>(im + q + j);
      xr = ar - br, xi = ai - bi;
      store(re + j, ar + br), store(im + j, ai + bi);
    }
    store(re + q + j, times(xr, wr, xi, wi)), store(im + q + j, xr * wi + xi * wr);
  }
}

template <bool half>
inline void up2(float* re, float* im, const Level& level) {
  const int64_t q = level.n / 2;
  const float* w = level.w;
  for (int64_t j = 0; j < q; j += LANES) {
    const Floats wr = load<Floats>(w + j), wi = load<Floats>(w + q + j);
    const Floats ar = load<Floats>(re + j), ai = load<Floats>(im + j), yr = load<Floats>(re + q + j), yi = load<Floats>(im + q + j);
    const Floats tr = yr * wr + yi * wi, ti = times(yi, wr, yr, wi);
    store(re + j, ar + tr), store(im + j, ai + ti);
    if (half) continue;
    store(re + q + j, ar - tr), store(im + q + j, ai - ti);
  }
}

// Real parts and imaginary ones of numbers that are transformed.
struct Wave {
  float *re, *im;
};

// Takes DOWN waves down to their leaves, calls leaf(place) there, and the first UP of them back up. The upper half of
// the waves is 0 (`half_down`) or not wanted (`half_up`). Blocks for which wanted(residue, modulus) is false, of
// frequencies that are `residue` modulo `modulus`, are left out and count as 0.
template <int DOWN, int UP, typename Wanted, typename Leaf>
void walk(const Fft& fft, const Wave* waves, bool half_down, bool half_up, const Wanted& wanted, const Leaf& leaf,
          size_t depth = 0, int64_t at = 0, int64_t residue = 0) {
  if (depth == fft.levels.size()) return leaf(at);
  const Level& level = fft.levels[depth];
  for (int i = 0; i < DOWN; ++i) {
    float *re = waves[i].re + at, *im = waves[i].im + at;
    if (level.radix == 4) half_down ? down4<true>(re, im, level) : down4<false>(re, im, level);
    else half_down ? down2<true>(re, im, level) : down2<false>(re, im, level);
  }
  const int64_t part = level.n / level.radix, modulus = fft.length / level.n;
  for (int64_t r = 0; r < level.radix; ++r) {
    const int64_t own = at + r * part;
    if (wanted(residue + r * modulus, modulus * level.radix)) {
      walk<DOWN, UP>(fft, waves, false, false, wanted, leaf, depth + 1, own, residue + r * modulus);
      continue;
    }
    for (int i = 0; i < UP; ++i) {
      std::memset(waves[i].re + own, 0, part * sizeof(float));
      std::memset(waves[i].im + own, 0, part * sizeof(float));
    }
  }
  for (int i = 0; i < UP; ++i) {
    float *re = waves[i].re + at, *im = waves[i].im + at;
    if (level.radix == 4) half_up ? up4<true>(re, im, level) : up4<false>(re, im, level);
    else half_up ? up2<true>(re, im, level) : up2<false>(re, im, level);
  }
}

}  // namespace tilewise
