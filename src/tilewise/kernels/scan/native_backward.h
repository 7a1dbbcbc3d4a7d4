// Backward: tile by tile from the last, after a forward pass that keeps the state before every chunk of tiles. The
// states before the tiles of a chunk are then computed again, so memory grows with the chunks, not with the tiles.
#pragma once

#include "native_forward.h"

namespace tilewise {

constexpr int64_t KEPT = int64_t(4) << 20;  // bytes of states that are kept for a head, where nobody says how many

// The adjoint of `solve`: from what reaches the values to what reaches the sums in brackets, in place, and the gradients
// of the betas. left_t is `left` transposed.
inline void solve_back(int64_t rows, int64_t wide, const float* left_t, const float* betas, const float* rest, float* d_u,
                       int64_t ldv, float* d_beta) {
  for (int64_t r = rows - LANES; r >= 0; r -= LANES) {
    const int64_t below = r + LANES;
    if (below < rows)
      product(LANES, wide, rows - below, left_t + r * SCORES_LD + below, SCORES_LD, d_u + below * ldv, ldv, d_u + r * ldv,
              ldv, true);
    for (int64_t j = below - 1; j >= r; --j) {
      float* to = d_u + j * ldv;
      for (int64_t i = j + 1; i < below; ++i)
        for (int64_t x = 0; x < wide; ++x) to[x] += left_t[j * SCORES_LD + i] * d_u[i * ldv + x];
      d_beta[j] = dot(to, rest + j * ldv, wide);
      scale_row(to, betas[j], wide);
    }
  }
}

template <typename S>
class Backward {
 public:
  Backward(const Scan& call, const Lane& lane)
      : c_(call), at_(lane), w_(call, lane.columns), ld_(w_.ld), ldv_(w_.ldv), wide_(w_.wide), depth_(w_.depth),
        size_(depth_ * ldv_) {
    const int64_t sizes[] = {TILE * ldv_, TILE * ldv_, TILE * ldv_, TILE * ldv_, TILE * ld_, TILE * ld_, TILE * ld_, TILE * ld_,
                             TILE * ld_, TILE * SCORES_LD, TILE * SCORES_LD, wide_ * ld_, wide_ * ld_, wide_ * SCORES_LD,
                             ld_ * SCORES_LD, size_, ld_};
    float** parts[] = {&rest_, &d_out_, &d_u_, &scaled_, &scratch_, &d_q_, &d_k_, &d_read_, &gate_, &square_, &d_scores_,
                       &before_t_, &d_after_t_, &u_t_, &turned_, &d_state_, &total_};
    int64_t all = 0;
    for (int64_t size : sizes) all += round_up(size, LANES);
    float* from = memory_.take<float>(all);
    for (int i = 0; i < 17; ++i) {
      *parts[i] = from;
      from += round_up(sizes[i], LANES);
    }
  }

  void run() {
    const int64_t tiles = (at_.length() + TILE - 1) / TILE;
    int64_t per = c_.chunk ? c_.chunk / TILE : (tiles * size_ * 4 + KEPT - 1) / KEPT;  // tiles of a chunk
    per = std::clamp<int64_t>(per, 1, std::max<int64_t>(tiles, 1));
    const int64_t chunks = (tiles + per - 1) / per;
    std::vector<float> kept(chunks * size_), inner(per > 1 ? per * size_ : 0);
    load_state(c_.state, at_, w_.state, ldv_, depth_);
    for (int64_t i = 0; i < tiles; ++i) {
      if (i % per == 0) std::memcpy(kept.data() + i / per * size_, w_.state, size_ * 4);
      forward(i, w_.state);
    }
    load_state(c_.d_after, at_, d_state_, ldv_, depth_);
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      const int64_t first = chunk * per, last = std::min(first + per, tiles);
      float* states = kept.data() + chunk * size_;
      if (per > 1) {
        std::memcpy(inner.data(), states, size_ * 4);
        states = inner.data();
        for (int64_t i = first; i < last - 1; ++i) {
          std::memcpy(states + (i - first + 1) * size_, states + (i - first) * size_, size_ * 4);
          forward(i, states + (i - first + 1) * size_);
        }
      }
      for (int64_t i = last - 1; i >= first; --i)
        backward(i, states + (i - first) * size_);
    }
    if (c_.d_state) store_state(d_state_, ldv_, c_.d_state, at_);
  }

 private:
  int64_t token(int64_t tile) const { return at_.start + tile * TILE; }
  int64_t tokens(int64_t tile) const { return std::min(TILE, at_.end - token(tile)); }

  void forward(int64_t i, float* state) {
    prepare<S>(c_, at_, token(i), tokens(i), w_, state, nullptr);
    advance(w_, state);
  }

  // One tile, from the state before it; d_state_ is that of the state after, and becomes that of the state before.
  void backward(int64_t i, const float* before) {
    Tile& tile = w_.tile;
    const int64_t t = token(i), n = tokens(i);
    prepare<S>(c_, at_, t, n, w_, before, rest_);
    const int64_t rows = tile.rows;
    alignas(64) float betas[TILE], d_beta[TILE];
    for (int64_t j = 0; j < rows; ++j) betas[j] = j < n ? beta_of(c_, at_, t + j) : 0.f;
    turn(before, ldv_, depth_, wide_, before_t_, ld_);
    turn(d_state_, ldv_, depth_, wide_, d_after_t_, ld_);
    turn(w_.u, ldv_, rows, wide_, u_t_, SCORES_LD);
    for (int64_t d = 0; d < depth_; ++d) total_[d] = dot(before + d * ldv_, d_state_ + d * ldv_, wide_);
    values_from_state(rows);
    tile.decay_state(d_state_, ldv_, wide_);
    std::memset(d_k_, 0, rows * ld_ * 4);
    std::memset(gate_, 0, tile.gate_size() * 4);
    tile.gate_through(total_, gate_);
    for (int64_t g = 0; g < c_.group(); ++g) query(at_.head * c_.group() + g, t, n);
    keys_from_state(rows);
    if (c_.delta) {
      turn(w_.own, SCORES_LD, rows, rows, square_, SCORES_LD);
      solve_back(rows, wide_, square_, betas, rest_, d_u_, ldv_, d_beta);
      store_rows<S>(d_u_, ldv_, n, at_.columns, 1.f, c_.d_v, at_.b, at_.head, t, 0);
      for (int64_t j = 0; j < rows * ldv_; ++j) d_u_[j] = -d_u_[j];
      reading(w_.k, w_.turned, d_u_, w_.own, -1.f, true, d_read_);
      for (int64_t j = 0; j < rows * ld_; ++j) d_k_[j] += d_read_[j];
    } else {
      for (int64_t j = 0; j < rows; ++j) {
        d_beta[j] = dot(d_u_ + j * ldv_, rest_ + j * ldv_, wide_);
        scale_row(d_u_ + j * ldv_, betas[j], wide_);
      }
      store_rows<S>(d_u_, ldv_, n, at_.columns, 1.f, c_.d_v, at_.b, at_.head, t, 0);
    }
    store_rows<S>(d_k_, ld_, n, c_.depth(), 1.f, c_.d_k, at_.b, at_.head, t, 0);
    for (int64_t j = 0; j < n && c_.d_beta; ++j) *row<float>(c_.d_beta, at_.b, at_.head, t + j) = d_beta[j];
    if (c_.d_decay) store_decay(t, n);
  }

  // What reaches the values through the state after the tile.
  void values_from_state(int64_t rows) {
    const float* keys = w_.k;
    if (w_.tile.channels) {
      std::memcpy(scratch_, w_.k, rows * ld_ * 4);
      w_.tile.decay_after(scratch_, ld_, depth_);
      keys = scratch_;
    }
    product(rows, wide_, depth_, keys, ld_, d_state_, ldv_, d_u_, ldv_, false);
    if (!w_.tile.channels) w_.tile.decay_after(d_u_, ldv_, wide_);
  }

  // What reaches the keys through the state after the tile.
  void keys_from_state(int64_t rows) {
    product(rows, depth_, wide_, w_.u, ldv_, d_after_t_, ld_, scratch_, ld_, false);
    w_.tile.decay_after(scratch_, ld_, depth_);
    w_.tile.gate_after(w_.k, scratch_, gate_);
    for (int64_t j = 0; j < rows; ++j)
      for (int64_t d = 0; d < depth_; ++d) d_k_[j * ld_ + d] += scratch_[j * ld_ + d];
  }

  void query(int64_t head, int64_t t, int64_t n) {
    const int64_t rows = w_.tile.rows;
    load_rows<S>(c_.q, at_.b, head, t, n, rows, 0, c_.depth(), static_cast<float>(c_.scale), w_.q, ld_);
    load_rows<S>(c_.d_out, at_.b, head, t, n, rows, 0, at_.columns, 1.f, d_out_, ldv_);
    w_.tile.scores(w_.q, w_.k, w_.turned, false, w_.scores);
    turn(w_.scores, SCORES_LD, rows, rows, square_, SCORES_LD);
    upper_product(rows, wide_, square_, d_out_, ldv_, d_u_, ldv_);
    turn(w_.q, ld_, rows, depth_, turned_, SCORES_LD);
    reading(w_.q, turned_, d_out_, w_.scores, 1.f, false, d_q_);
    store_rows<S>(d_q_, ld_, n, c_.depth(), static_cast<float>(c_.scale), c_.d_q, at_.b, head, t, 0);
  }

  // Gradients of rows x that read: `x S` before the tile and, by their scores with keys, its values; `made` is that of
  // what they read, `scores` those with keys, times `sign`. d_x is set, that of the keys and of the state before the tile
  // added to.
  void reading(const float* x, const float* x_turned, const float* made, const float* scores, float sign, bool strict,
               float* d_x) {
    Tile& tile = w_.tile;
    const int64_t rows = tile.rows;
    product(rows, depth_, wide_, made, ldv_, before_t_, ld_, d_x, ld_, false);
    for (int64_t j = 0; j < rows; ++j)
      for (int64_t d = depth_; d < ld_; ++d) d_x[j * ld_ + d] = 0;
    tile.decay_before(d_x, ld_, depth_);
    tile.gate_before(x, d_x, gate_);
    strips(rows, [&](int64_t r, int64_t high, int64_t wide) {
      product(high, wide, wide_, made + r * ldv_, ldv_, u_t_, SCORES_LD, d_scores_ + r * SCORES_LD, SCORES_LD, false);
    });
    tile.gradients(d_scores_, scores, sign, x, w_.k, strict, square_, d_x, d_k_, gate_);
    const float *left = x_turned, *right = made;
    if (tile.channels) {
      std::memcpy(scratch_, x, rows * ld_ * 4);
      tile.decay_before(scratch_, ld_, depth_);
      turn(scratch_, ld_, rows, depth_, w_.moved, SCORES_LD);
      left = w_.moved;
    } else {
      std::memcpy(scaled_, made, rows * ldv_ * 4);
      tile.decay_before(scaled_, ldv_, wide_);
      right = scaled_;
    }
    product(depth_, wide_, rows, left, SCORES_LD, right, ldv_, d_state_, ldv_, true);
  }

  void store_decay(int64_t t, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      float* to = row<float>(c_.d_decay, at_.b, at_.head, t + j);
      if (!w_.tile.channels) *to = gate_[j];
      for (int64_t d = 0; d < c_.depth() && w_.tile.channels; ++d) to[d * c_.d_decay.stride[3]] = gate_[j * ld_ + d];
    }
  }

  const Scan& c_;
  const Lane at_;
  Bench w_;
  const int64_t ld_, ldv_, wide_, depth_, size_;
  Buffer memory_;
  float *rest_, *d_out_, *d_u_, *scaled_, *scratch_, *d_q_, *d_k_, *d_read_, *gate_, *square_, *d_scores_, *before_t_, *d_after_t_,
      *u_t_, *turned_, *d_state_, *total_;
};

template <typename S>
void run_backward(const Scan& c) {
  const std::vector<Lane> all = lanes(c, 1);
  for_each_job(all.size(), c.threads, false, [&](int64_t job) {
    const FlushSubnormals flushed;
    Backward<S>(c, all[job]).run();
  });
}

}  // namespace tilewise
