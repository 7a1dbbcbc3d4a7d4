// What a token does to a vector of units of each network, forward and backward.
//
// forward: `x` and `r` are inputs and recurrent sums of each gate, `s` the parts of the state, before and then after;
// `keep` what the backward pass needs, without h before. backward: `kept` is that, `before` h before the token, `d` the
// gradients of the parts, after and then before the token, of h only what does not pass the recurrent sums.
#pragma once

#include "native_products.h"

namespace tilewise {

// e^x - 1 = 2^n (1 + q) - 1, as 2^n and q.
struct Power {
  Floats scale, rest;
};

inline Power power_of(Floats x) {  // |x| at most some 87
  constexpr float SHIFT = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const Floats shifted = x * LOG2E + SHIFT, n = shifted - SHIFT;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  const Floats r = x - n * 0.693147180559945309f;  // one fused operation, so nothing is lost when it cancels
#else
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts, the first times n exact
#endif
  Floats tail = 0.0416683881f + r * (0.0083687169f + r * 0.0013814599f);
  tail = 0.4999999345f + r * (0.1666652063f + r * tail);
  const Words bits = (same_bits<Words>(shifted) - bits_of(SHIFT) + 127u) << 23;
  return {same_bits<Floats>(bits), r + r * r * tail};
}

inline Floats clamp(Floats x, float low, float high) {  // NaN stays NaN
  x = x < low ? Floats{} + low : x;
  return x > high ? Floats{} + high : x;
}

// e^x for x at most 0; below -87 it is 0.
inline Floats exp_of(Floats x) {
  const Power p = power_of(x < -87.f ? Floats{} : x);
  return x < -87.f ? Floats{} : p.scale + p.scale * p.rest;
}

inline Floats sigmoid_of(Floats x) {
  const Power p = power_of(clamp(-x, -87.f, 87.f));
  return 1.f / (1.f + (p.scale + p.scale * p.rest));
}

// (e^2a - 1) / (e^2a + 1) with a = |x|, exact near 0 as well; from where that is a half on as 1 - 2 / (e^2a + 1), which
// rounds half as much.
inline Floats tanh_of(Floats x) {
  const Words sign = same_bits<Words>(x) & 0x80000000u;
  const Floats twice = 2.f * same_bits<Floats>(same_bits<Words>(x) ^ sign);
  const Power p = power_of(twice > 20.f ? Floats{} + 20.f : twice);  // NaN stays NaN
  const Floats less = p.scale * p.rest + (p.scale - 1.f);
  const Floats part = (twice > 1.1f ? Floats{} + 2.f : less) / (less + 2.f);
  const Floats size = twice > 1.1f ? 1.f - part : part;
  return same_bits<Floats>(same_bits<Words>(size) | sign);
}

// log(sigmoid(x)), and sigmoid(-x).
inline Floats log_sigmoid_of(Floats x, Floats& mirrored) {
  const Floats e = exp_of(x < 0.f ? x : -x);
  // log(1 + e) = 2 artanh(e / (2 + e)), whose argument is at most 1/3.
  const Floats s = e / (2.f + e), q = s * s;
  const Floats log1p = 2.f * s * (1.f + q * (0.333333333f + q * (0.2f + q * (0.142857143f + q * (0.111111111f +
      q * (0.0909090909f + q * (0.0769230769f + q * 0.0666666667f)))))));
  const Floats inverse = 1.f / (1.f + e);
  mirrored = x < 0.f ? inverse : e * inverse;
  return (x < 0.f ? x : Floats{}) - log1p;
}

inline Floats sigmoid_slope(Floats y) { return y * (1.f - y); }
inline Floats tanh_slope(Floats y) { return 1.f - y * y; }

struct Elman {
  static constexpr int64_t GATES = 1, PARTS = 1, KEPT = 1;

  static void forward(const Floats* x, const Floats* r, Floats* s, Floats* keep) { keep[0] = s[0] = tanh_of(x[0] + r[0]); }
  static void backward(const Floats* kept, Floats, Floats* d, Floats* d_x, Floats* d_r) {
    d_x[0] = d_r[0] = d[0] * tanh_slope(kept[0]);
    d[0] = Floats{};
  }
};

struct Lstm {
  static constexpr int64_t GATES = 4, PARTS = 2, KEPT = 5;

  static void forward(const Floats* x, const Floats* r, Floats* s, Floats* keep) {
    const Floats i = sigmoid_of(x[0] + r[0]), f = sigmoid_of(x[1] + r[1]);
    const Floats z = tanh_of(x[2] + r[2]), o = sigmoid_of(x[3] + r[3]);
    keep[0] = i, keep[1] = f, keep[2] = z, keep[3] = o, keep[4] = s[1];
    s[1] = f * s[1] + i * z;
    s[0] = o * tanh_of(s[1]);
  }
  static void backward(const Floats* kept, Floats, Floats* d, Floats* d_x, Floats* d_r) {
    const Floats i = kept[0], f = kept[1], z = kept[2], o = kept[3], before = kept[4];
    const Floats read = tanh_of(f * before + i * z), d_c = d[1] + d[0] * o * tanh_slope(read);
    d_x[0] = d_r[0] = d_c * z * sigmoid_slope(i);
    d_x[1] = d_r[1] = d_c * before * sigmoid_slope(f);
    d_x[2] = d_r[2] = d_c * i * tanh_slope(z);
    d_x[3] = d_r[3] = d[0] * read * sigmoid_slope(o);
    d[0] = Floats{};
    d[1] = d_c * f;
  }
};

struct Gru {
  static constexpr int64_t GATES = 3, PARTS = 1, KEPT = 4;

  static void forward(const Floats* x, const Floats* r, Floats* s, Floats* keep) {
    const Floats reset = sigmoid_of(x[0] + r[0]), update = sigmoid_of(x[1] + r[1]);
    const Floats made = tanh_of(x[2] + reset * r[2]);
    keep[0] = reset, keep[1] = update, keep[2] = made, keep[3] = r[2];
    s[0] = (1.f - update) * made + update * s[0];
  }
  static void backward(const Floats* kept, Floats before, Floats* d, Floats* d_x, Floats* d_r) {
    const Floats reset = kept[0], update = kept[1], made = kept[2], read = kept[3];
    const Floats d_made = d[0] * (1.f - update) * tanh_slope(made);
    d_x[0] = d_r[0] = d_made * read * sigmoid_slope(reset);
    d_x[1] = d_r[1] = d[0] * (before - made) * sigmoid_slope(update);
    d_x[2] = d_made;
    d_r[2] = d_made * reset;
    d[0] *= update;
  }
};

struct Slstm {
  static constexpr int64_t GATES = 4, PARTS = 4, KEPT = 7;

  static void forward(const Floats* x, const Floats* r, Floats* s, Floats* keep) {
    const Floats i = x[0] + r[0], z = tanh_of(x[2] + r[2]), o = sigmoid_of(x[3] + r[3]);
    Floats forgets, decayed = log_sigmoid_of(x[1] + r[1], forgets) + s[3];
    decayed = s[2] == 0.f ? Floats{} - INF : decayed;
    const Floats peak = decayed >= i ? decayed : i;
    const Floats write = exp_of(i - peak), hold = exp_of(decayed - peak);
    keep[0] = write, keep[1] = hold, keep[2] = z, keep[3] = o, keep[4] = forgets, keep[5] = s[1], keep[6] = s[2];
    s[1] = hold * s[1] + write * z;
    s[2] = hold * s[2] + write;
    s[3] = peak;
    s[0] = o * s[1] / s[2];
  }
  static void backward(const Floats* kept, Floats, Floats* d, Floats* d_x, Floats* d_r) {
    const Floats write = kept[0], hold = kept[1], z = kept[2], o = kept[3], c = kept[5], n = kept[6];
    const Floats inverse = 1.f / (hold * n + write), read = (hold * c + write * z) * inverse;
    const Floats d_read = d[0] * o * inverse, d_c = d[1] + d_read, d_n = d[2] - d_read * read;
    const Floats by_write = (d_c * z + d_n) * write, by_hold = (d_c * c + d_n * n) * hold;
    // The peak is one of the two logs, whose own factor is then 1 whatever it is.
    const Floats d_decayed = hold == 1.f ? d[3] - by_write : by_hold;
    d_x[0] = d_r[0] = hold == 1.f ? by_write : d[3] - by_hold;
    d_x[1] = d_r[1] = d_decayed * kept[4];
    d_x[2] = d_r[2] = d_c * write * tanh_slope(z);
    d_x[3] = d_r[3] = d[0] * read * sigmoid_slope(o);
    d[0] = Floats{};
    d[1] = d_c * hold;
    d[2] = d_n * hold;
    d[3] = d_decayed;
  }
};

}  // namespace tilewise
