// Forward: every sequence and head tile by tile, its state in the nearest caches; short ones step by step.
#pragma once

#include "native_tile.h"

namespace tilewise {

constexpr int64_t STEPS = 8;  // sequences up to this long are worked on token by token

// What one thread works with on the forward pass.
struct Bench {
  Buffer memory[9];
  Tile tile;
  int64_t depth, ld, wide, ldv;  // wide: columns of the values, padded; ldv: of their rows
  float *q, *k, *turned, *u, *out, *state, *scores, *own, *moved;

  Bench(const Scan& c, int64_t columns)
      : tile(c), depth(tile.depth), ld(tile.ld), wide(round_up(columns, LANES)), ldv(wide % 64 ? wide : wide + 16) {
    q = memory[0].take<float>(TILE * ld);
    k = memory[1].take<float>(TILE * ld);
    turned = memory[2].take<float>(ld * SCORES_LD);
    u = memory[3].take<float>(TILE * ldv);
    out = memory[4].take<float>(TILE * ldv);
    state = memory[5].take<float>(depth * ldv);
    scores = memory[6].take<float>(TILE * SCORES_LD);
    own = memory[7].take<float>(TILE * SCORES_LD);
    moved = memory[8].take<float>(std::max(TILE * std::max(ld, ldv), ld * SCORES_LD));
  }
};

inline void load_state(const Grid& from, const Lane& at, float* to, int64_t ld, int64_t depth) {
  for (int64_t d = 0; d < depth; ++d) {
    int64_t j = 0;
    if (from && d < from.size[2]) {
      const float* x = row<float>(from, at.sequence, at.head, d) + at.column * from.stride[3];
      copy_row(x, from.stride[3], at.columns, to + d * ld);
      j = at.columns;
    }
    for (; j < ld; ++j) to[d * ld + j] = 0;
  }
}

inline void store_state(const float* from, int64_t ld, const Grid& to, const Lane& at) {
  for (int64_t d = 0; d < to.size[2]; ++d) {
    float* x = row<float>(to, at.sequence, at.head, d) + at.column * to.stride[3];
    for (int64_t j = 0; j < at.columns; ++j) x[j * to.stride[3]] = from[d * ld + j];
  }
}

inline float beta_of(const Scan& c, const Lane& at, int64_t t) {
  return c.beta ? *row<float>(c.beta, at.b, at.head, t) : 1.f;
}

// Turns `u`, which holds what keys are to be paired with before earlier tokens of the tile have had their say, into the
// values of the delta rule: u_i = beta_i (u_i + sum_j<i left_ij u_j). `rest`, where given, keeps the sums in brackets.
inline void solve(int64_t rows, int64_t wide, const float* left, const float* betas, float* u, int64_t ldv, float* rest) {
  for (int64_t r = 0; r < rows; r += LANES) {
    if (r) product(LANES, wide, r, left + r * SCORES_LD, SCORES_LD, u, ldv, u + r * ldv, ldv, true);
    for (int64_t i = r; i < r + LANES; ++i) {
      const float* weights = left + i * SCORES_LD;
      float* to = u + i * ldv;
      for (int64_t j = r; j < i; ++j)
        for (int64_t x = 0; x < wide; ++x) to[x] += weights[j] * u[j * ldv + x];
      if (rest) std::memcpy(rest + i * ldv, to, wide * sizeof(float));
      scale_row(to, betas[i], wide);
    }
  }
}

// Keys and values of a tile, up to the values that the state takes: k, turned, u; for the delta rule `own` has the
// scores of keys and earlier keys, negative.
template <typename S>
void prepare(const Scan& c, const Lane& at, int64_t t, int64_t n, Bench& w, const float* state, float* rest) {
  Tile& tile = w.tile;
  tile.read(c, at.b, at.head, t, n);
  const int64_t rows = tile.rows;
  load_rows<S>(c.k, at.b, at.head, t, n, rows, 0, c.depth(), 1.f, w.k, w.ld);
  turn(w.k, w.ld, rows, w.depth, w.turned, SCORES_LD);
  load_rows<S>(c.v, at.b, at.head, t, n, rows, at.column, at.columns, 1.f, w.u, w.ldv);
  alignas(64) float betas[TILE];
  for (int64_t i = 0; i < rows; ++i) betas[i] = i < n ? beta_of(c, at, t + i) : 0.f;
  if (!c.delta) {
    if (rest) std::memcpy(rest, w.u, rows * w.ldv * sizeof(float));
    if (c.beta)
      for (int64_t i = 0; i < rows; ++i) scale_row(w.u + i * w.ldv, betas[i], w.wide);
    return;
  }
  tile.scores(w.k, w.k, w.turned, true, w.own);
  for (int64_t i = 0; i < rows * SCORES_LD; ++i) w.own[i] = -w.own[i];
  const float* keys = w.k;
  if (tile.channels) {
    std::memcpy(w.moved, w.k, rows * w.ld * sizeof(float));
    tile.decay_before(w.moved, w.ld, w.depth);
    keys = w.moved;
  }
  product(rows, w.wide, w.depth, keys, w.ld, state, w.ldv, w.out, w.ldv, false);
  if (!tile.channels) tile.decay_before(w.out, w.ldv, w.wide);
  for (int64_t i = 0; i < rows * w.ldv; ++i) w.u[i] -= w.out[i];
  solve(rows, w.wide, w.own, betas, w.u, w.ldv, rest);
}

// The state after the tile, in place.
inline void advance(Bench& w, float* state) {
  Tile& tile = w.tile;
  const int64_t rows = tile.rows;
  tile.decay_state(state, w.ldv, w.wide);
  if (!tile.channels) {
    std::memcpy(w.moved, w.u, rows * w.ldv * sizeof(float));
    tile.decay_after(w.moved, w.ldv, w.wide);
    return product(w.depth, w.wide, rows, w.turned, SCORES_LD, w.moved, w.ldv, state, w.ldv, true);
  }
  float* kept = w.k;  // no longer needed as it was
  tile.decay_after(kept, w.ld, w.depth);
  turn(kept, w.ld, rows, w.depth, w.moved, SCORES_LD);
  product(w.depth, w.wide, rows, w.moved, SCORES_LD, w.u, w.ldv, state, w.ldv, true);
}

template <typename S>
void run_tiles(const Scan& c, const Lane& at) {
  Bench w(c, at.columns);
  load_state(c.state, at, w.state, w.ldv, w.depth);
  for (int64_t t = at.start; t < at.end; t += TILE) {
    const int64_t n = std::min(TILE, at.end - t);
    prepare<S>(c, at, t, n, w, w.state, nullptr);
    const int64_t rows = w.tile.rows;
    for (int64_t g = 0; g < c.group(); ++g) {
      const int64_t head = at.head * c.group() + g;
      load_rows<S>(c.q, at.b, head, t, n, rows, 0, c.depth(), static_cast<float>(c.scale), w.q, w.ld);
      w.tile.scores(w.q, w.k, w.turned, false, w.scores);
      if (w.tile.channels) w.tile.decay_before(w.q, w.ld, w.depth);
      product(rows, w.wide, w.depth, w.q, w.ld, w.state, w.ldv, w.out, w.ldv, false);
      if (!w.tile.channels) w.tile.decay_before(w.out, w.ldv, w.wide);
      lower_product(rows, w.wide, w.scores, w.u, w.ldv, w.out, w.ldv);
      store_rows<S>(w.out, w.ldv, n, at.columns, 1.f, c.out, at.b, head, t, at.column);
    }
    advance(w, w.state);
  }
  store_state(w.state, w.ldv, c.after, at);
}

// Token by token, the state read once and written once for each.
template <typename S>
void run_steps(const Scan& c, const Lane& at) {
  thread_local Buffer memory[4];
  const int64_t depth = c.depth(), wide = round_up(at.columns, LANES);
  // Where the new state's rows are as long as its registers want, it is worked on in its place.
  const Grid& to = c.after;
  const bool in_place = at.columns == wide && to.stride[3] == 1 && to.stride[2] == wide;
  float* state = in_place ? row<float>(to, at.sequence, at.head, 0) : memory[0].take<float>(depth * wide);
  float* rows = memory[1].take<float>((3 + c.group()) * round_up(depth, LANES));
  float* sums = memory[2].take<float>((2 + c.group()) * wide);
  const int64_t ld = round_up(depth, LANES);
  float *k = rows, *steps = rows + ld, *q = rows + 2 * ld, *u = sums, *read = sums + wide, *out = sums + 2 * wide;
  load_state(c.state, at, state, wide, depth);
  for (int64_t t = at.start; t < at.end; ++t) {
    load_rows<S>(c.k, at.b, at.head, t, 1, 1, 0, depth, 1.f, k, ld);
    load_rows<S>(c.v, at.b, at.head, t, 1, 1, at.column, at.columns, 1.f, u, wide);
    for (int64_t g = 0; g < c.group(); ++g)
      load_rows<S>(c.q, at.b, at.head * c.group() + g, t, 1, 1, 0, depth, static_cast<float>(c.scale), q + g * ld, ld);
    for (int64_t d = 0; d < depth; ++d) {
      const float* from = c.decay ? row<float>(c.decay, at.b, at.head, t) : nullptr;
      steps[d] = from ? exp_of<false>(from[c.channels ? d * c.decay.stride[3] : 0]) : 1.f;
    }
    if (c.delta) {
      std::memset(read, 0, wide * sizeof(float));
      for (int64_t d = 0; d < depth; ++d) {
        const float weight = k[d] * steps[d];
        for (int64_t j = 0; j < wide; ++j) read[j] += weight * state[d * wide + j];
      }
      for (int64_t j = 0; j < wide; ++j) u[j] -= read[j];
    }
    scale_row(u, beta_of(c, at, t), wide);
    std::memset(out, 0, c.group() * wide * sizeof(float));
    for (int64_t d = 0; d < depth; ++d) {
      float* own = state + d * wide;
      for (int64_t j = 0; j < wide; ++j) own[j] = steps[d] * own[j] + k[d] * u[j];
      for (int64_t g = 0; g < c.group(); ++g) {
        const float weight = q[g * ld + d];
        for (int64_t j = 0; j < wide; ++j) out[g * wide + j] += weight * own[j];
      }
    }
    for (int64_t g = 0; g < c.group(); ++g)
      store_rows<S>(out + g * wide, wide, 1, at.columns, 1.f, c.out, at.b, at.head * c.group() + g, t, at.column);
  }
  if (!in_place) store_state(state, wide, c.after, at);
}

template <typename S>
void run_forward(const Scan& c) {
  const int64_t heads = c.sequences() * c.heads();
  const bool split = heads % c.threads && heads < 4 * c.threads && c.values() >= 2 * LANES;
  const std::vector<Lane> all = lanes(c, split ? 2 : 1);
  for_each_job(all.size(), c.threads, false, [&](int64_t job) {
    const FlushSubnormals flushed;
    all[job].length() <= STEPS ? run_steps<S>(c, all[job]) : run_tiles<S>(c, all[job]);
  });
}

}  // namespace tilewise
