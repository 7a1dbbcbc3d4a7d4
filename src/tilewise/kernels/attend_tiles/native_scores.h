// What happens to a block of raw scores before the softmax: scale, soft cap, bias, mask.
#pragma once

#include "native_call.h"

namespace tilewise {

// One row of a bias or of a boolean grid: element j is that of token tokens[j].
inline float bias_at(const Grid& bias, int64_t offset) {
  switch (bias.kind) {
    case BFLOAT16: return get(bias.at<BFloat16>()[offset]);
    case FLOAT16: return get(bias.at<Half>()[offset]);
    default: return bias.at<float>()[offset];
  }
}

// Stride of an axis that may be broadcast.
inline int64_t step(const Grid& grid, int64_t axis) { return grid.size[axis] == 1 ? 0 : grid.stride[axis]; }

struct Scoring {
  const Call& c;
  const Chunks& chunks;
  float scale, cap;
  bool plain;  // scores need the scale alone, which the softmax applies by itself

  Scoring(const Call& call, const Chunks& all)
      : c(call), chunks(all), scale(static_cast<float>(call.scale)), cap(static_cast<float>(call.softcap)),
        plain(call.softcap == 0 && !call.bias && call.scale > 0) {}

  // Scores of `rows` queries against one chunk, queries down the rows: scale, cap and bias in place.
  // `slope`, where not null, receives the cap's derivative.
  void finish_row(float* row, int64_t n, float* slope) const {
    if (cap == 0) {
      for (int64_t j = 0; j < n; ++j) row[j] *= scale;
      return;
    }
    const float inner = scale / cap;
    if (slope) {
      for (int64_t j = 0; j < n; ++j) {
        const float t = tanh_of(row[j] * inner);
        slope[j] = 1.f - t * t;
        row[j] = cap * t;
      }
    } else {
      for (int64_t j = 0; j < n; ++j) row[j] = cap * tanh_of(row[j] * inner);
    }
  }

  // A bias that stands for -inf, like the smallest float32, is raised to one that can still be multiplied.
  void add_bias(float* row, int64_t bias_row, const int64_t* tokens, int64_t width) const {
    constexpr float LOWEST = -1e38f;
    const int64_t by = step(c.bias, 3);
    const auto add = [](float& to, float x) { to += x < LOWEST && x > -INF ? LOWEST : x; };
    if (c.bias.kind == FLOAT32) {
      const float* from = c.bias.at<float>(bias_row);
      for (int64_t j = 0; j < width; ++j) add(row[j], from[tokens[j] * by]);
    } else {
      for (int64_t j = 0; j < width; ++j) add(row[j], bias_at(c.bias, bias_row + tokens[j] * by));
    }
  }

  // Hides from query i of `limits` what it may not see in a chunk; the pads of the chunk go with it.
  void mask_row(float* row, const Limits& limits, int64_t i, const Positions& keys, int64_t chunk, int64_t b,
                int64_t h) const {
    const Chunk& at = chunks.list[chunk];
    const int64_t* pos = keys.pos.data() + at.offset;
    if (keys.runs[chunk]) {
      const int64_t first = std::clamp<int64_t>(limits.lo[i] - pos[0], 0, at.width);
      const int64_t last = std::clamp<int64_t>(limits.hi[i] - pos[0] + 1, first, at.width);
      std::fill(row, row + first, -INF);
      std::fill(row + last, row + at.padded, -INF);
    } else {
      for (int64_t a = 0; a < c.axes(); ++a, pos += chunks.padded) {
        const int64_t lo = std::max(limits.lo[a * ROWS + i], HIDDEN + 1), hi = limits.hi[a * ROWS + i];
        for (int64_t j = 0; j < at.padded; ++j) row[j] = (pos[j] < lo) | (pos[j] > hi) ? -INF : row[j];
      }
    }
    if (!c.dense) return;
    const int64_t* tokens = keys.tokens.data() + at.offset;
    const bool* seen = c.dense.at<bool>(c.base(c.dense, b, h) + limits.tokens[i] * step(c.dense, 2));
    for (int64_t j = 0; j < at.width; ++j) row[j] = seen[tokens[j] * step(c.dense, 3)] ? row[j] : -INF;
  }
};

}  // namespace tilewise
