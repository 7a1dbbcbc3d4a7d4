// One call of the selective scan as the native engine sees it, and blocks of channels of it as float32.
#pragma once

#include "../native.h"

namespace tilewise {

constexpr int64_t TILE = 32;   // tokens worked on at a time
constexpr int64_t BLOCK = 128;  // channels worked on at a time, where there are enough blocks for all threads

// Field for field what native.py writes; every number is 64 bits wide.
struct Scan {
  Grid x, delta, a, b, c, d, state, offsets, out, after;
  Grid d_out, d_after, d_x, d_delta, d_a, d_b, d_c, d_d, d_state;
  int64_t threads;

  int64_t channels() const { return a.size[0]; }
  int64_t states() const { return a.size[1]; }
  int64_t groups() const { return b.size[1]; }
  int64_t sequences() const { return offsets ? offsets.size[0] - 1 : x.size[0]; }
};

// Some channels of one group, over the tokens of one sequence.
struct Lane {
  int64_t sequence, b, group, block, start, end, channel, channels;  // block: which one of the group

  int64_t length() const { return end - start; }
};

// Blocks grow until there would be too few of them; a group's are equally many in every sequence.
struct Blocks {
  int64_t wide, per_group;

  explicit Blocks(const Scan& c) {
    const int64_t own = c.channels() / c.groups();
    wide = BLOCK;
    while (wide > LANES && c.sequences() * c.groups() * ((own + wide - 1) / wide) < 2 * c.threads) wide /= 2;
    wide = std::max(wide, LANES);
    per_group = (own + wide - 1) / wide;
  }

  std::vector<Lane> lanes(const Scan& c) const {
    std::vector<Lane> all;
    const int64_t own = c.channels() / c.groups();
    for (int64_t s = 0; s < c.sequences(); ++s) {
      const int64_t* at = c.offsets ? c.offsets.at<int64_t>() : nullptr;
      const int64_t start = at ? at[s * c.offsets.stride[0]] : 0;
      const int64_t end = at ? at[(s + 1) * c.offsets.stride[0]] : c.x.size[1];
      for (int64_t g = 0; g < c.groups(); ++g)
        for (int64_t i = 0; i < per_group; ++i)
          all.push_back({s, at ? 0 : s, g, i, start, end, g * own + i * wide, std::min(wide, own - i * wide)});
    }
    return all;
  }
};

// Calls work(T()) with the type of x's numbers.
template <typename Work>
void by_format(const Grid& x, const Work& work) {
  switch (x.kind) {
    case FLOAT32: return work(float());
    case FLOAT16: return work(Half());
    default: return work(BFloat16());
  }
}

// Rows t .. t + n - 1 of x, `[batch, N, channels]`, as rows of `ld` floats, zeros behind the channels.
inline void load_rows(const Grid& x, const Lane& at, int64_t t, int64_t n, float* to, int64_t ld) {
  by_format(x, [&]<typename S>(S) {
    const S* from = x.at<S>(at.b * x.stride[0] + t * x.stride[1] + at.channel * x.stride[2]);
    if (x.stride[2] == 1 || x.stride[1] != 1) {
      for (int64_t i = 0; i < n; ++i) copy_row(from + i * x.stride[1], x.stride[2], at.channels, to + i * ld);
    } else {  // time is contiguous: walked through channel by channel
      for (int64_t j = 0; j < at.channels; ++j)
        for (int64_t i = 0; i < n; ++i) to[i * ld + j] = get(from[i + j * x.stride[2]]);
    }
  });
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = at.channels; j < ld; ++j) to[i * ld + j] = 0;
}

inline void store_rows(const float* from, int64_t ld, const Grid& x, const Lane& at, int64_t t, int64_t n) {
  by_format(x, [&]<typename S>(S) {
    for (int64_t i = 0; i < n; ++i) {
      S* to = x.at<S>(at.b * x.stride[0] + (t + i) * x.stride[1] + at.channel * x.stride[2]);
      if (x.stride[2] == 1) {
        copy_row(from + i * ld, 1, at.channels, to);
      } else {
        for (int64_t j = 0; j < at.channels; ++j) put(to[j * x.stride[2]], from[i * ld + j]);
      }
    }
  });
}

// What a group's channels share, `[batch, groups, N, S]`, in the same way.
inline void load_shared(const Grid& x, const Lane& at, int64_t t, int64_t n, float* to, int64_t ld) {
  by_format(x, [&]<typename S>(S) {
    for (int64_t i = 0; i < n; ++i, to += ld) {
      copy_row(x.at<S>(at.b * x.stride[0] + at.group * x.stride[1] + (t + i) * x.stride[2]), x.stride[3], x.size[3], to);
      for (int64_t j = x.size[3]; j < ld; ++j) to[j] = 0;
    }
  });
}

// Channels' own states, `[channels, S]` at `from`, as `[states, wide]`: a register holds one state of some channels.
// Zeros where there is no channel or state, or nothing at all.
inline void load_states(const float* from, const int64_t* stride, int64_t channels, int64_t real, float* to,
                        int64_t states, int64_t wide) {
  if (from == nullptr) channels = 0;
  if (real == states && channels && stride[1] == 1) {
    transpose(reinterpret_cast<const uint32_t*>(from), stride[0], channels, wide, states, reinterpret_cast<uint32_t*>(to),
              wide);
    return;
  }
  std::memset(to, 0, states * wide * sizeof(float));
  for (int64_t j = 0; j < channels; ++j)
    for (int64_t s = 0; s < real; ++s) to[s * wide + j] = from[j * stride[0] + s * stride[1]];
}

// The reverse, to contiguous rows of `real` states.
inline void store_states(const float* from, int64_t wide, int64_t channels, int64_t real, float* to) {
  transpose(reinterpret_cast<const uint32_t*>(from), wide, real, real, channels, reinterpret_cast<uint32_t*>(to), real);
}

inline const float* states_of(const Grid& x, const Lane& at) {
  return x ? x.at<float>(at.sequence * x.stride[0] + at.channel * x.stride[1]) : nullptr;
}

}  // namespace tilewise
