// Backward: through time from the last token, with what the forward pass kept. Gradients of recurrent sums are gathered
// over `depth` tokens, then go into the gradient of R as one product.
#pragma once

#include "native_forward.h"

namespace tilewise {

// What a team works with on the backward pass. Rings have two halves of `room` rows: while one is worked into the
// gradient of R, others of the team may already write the next token's rows to the other.
template <typename S>
struct BackwardBench {
  const Packed<S>* right;  // of all heads
  float* d_h;              // [rows, ldh]
  float* d_parts;          // [rows, PARTS - 1, padded]
  float* by_gate;          // ring of [room, ldg]
  float* before;           // ring of [room, ldh]
  int64_t room, ldg, ldh;
};

template <typename N, typename S>
class Backward {
 public:
  // d_R [GATES, padded, padded] and d_bias [GATES, padded] are added to.
  Backward(const Rnn& c, const Worker& worker, int64_t head, const BackwardBench<S>& bench, float* d_R, float* d_bias)
      : c_(c), w_(worker), bench_(bench), head_(head), first_(worker.first(c.vectors())),
        last_(worker.last(c.vectors())), padded_(c.padded()),
        right_(bench.right + head * N::GATES * padded_ * padded_), d_R_(d_R), d_bias_(d_bias) {}

  void run(const Block& block) {
    block_ = &block;
    for (int64_t row = 0; row < block.rows; ++row)
      for (int64_t p = 0; p < N::PARTS; ++p)
        load_state(c_.d_after, block.sequence[row], head_, p, first_, last_, of_part(row, p));
    for (int64_t t = block.length() - 1; t >= 0; --t) {
      const int64_t live = block.live(t);
      if (gathered_ + live > bench_.room) gather();
      for (int64_t row = 0; row < live; ++row)
        for (int64_t v = first_; v < last_; ++v) unit(t, row, v);
      w_.wait();
      through_R(live);
      gathered_ += live;
    }
    for (int64_t row = 0; row < block.rows && c_.d_state; ++row)
      for (int64_t p = 0; p < N::PARTS; ++p)
        for (int64_t v = first_; v < last_; ++v)
          store_state(load<Floats>(of_part(row, p) + v * LANES), c_.d_state, block.sequence[row], head_, p, v);
  }

  // Works what was gathered into the gradients of R and bias.
  void gather() {
    const float* own = bench_.by_gate + half_ * bench_.room * bench_.ldg;
    const float* before = bench_.before + half_ * bench_.room * bench_.ldh;
    for (int64_t v = 0; v < c_.vectors(); v += ACROSS) {
      const int64_t across = std::min(ACROSS, c_.vectors() - v);
      for (int64_t g = 0; g < N::GATES; ++g)
        runs((last_ - first_) * LANES, std::min<int64_t>(HIGH, 4), [&](int64_t first, int64_t count) {
          const int64_t unit = g * padded_ + first_ * LANES + first;
          multiply_for<float>(count, across)(gathered_, own + unit, 1, bench_.ldg, before + v * LANES, bench_.ldh,
                                            d_R_ + unit * padded_ + v * LANES, padded_, true);
        });
    }
    for (int64_t g = 0; g < N::GATES; ++g)
      for (int64_t v = first_; v < last_; ++v) {
        const int64_t unit = g * padded_ + v * LANES;
        Floats sum{};
        for (int64_t i = 0; i < gathered_; ++i) sum += load<Floats>(own + i * bench_.ldg + unit);
        store(d_bias_ + unit, load<Floats>(d_bias_ + unit) + sum);
      }
    gathered_ = 0;
    half_ = 1 - half_;
  }

 private:
  float* of_part(int64_t row, int64_t p) const {
    return p ? bench_.d_parts + (row * (N::PARTS - 1) + p - 1) * padded_ : bench_.d_h + row * bench_.ldh;
  }
  int64_t gathered_at(int64_t row) const { return half_ * bench_.room + gathered_ + row; }

  void unit(int64_t t, int64_t row, int64_t v) {
    const Sequence& at = block_->sequence[row];
    const int64_t place = at.start + t, count = c_.width - v * LANES, stride = c_.kept_width();
    float* by_gate = bench_.by_gate + gathered_at(row) * bench_.ldg + v * LANES;
    float* before = bench_.before + gathered_at(row) * bench_.ldh + v * LANES;
    S* d_wx = units_of<S>(c_.d_wx, at.b, head_, place, v);
    Floats d_x[N::GATES] = {}, d_r[N::GATES] = {}, h{};
    if (!c_.is_passed_over(at.b, place)) {
      Floats kept[N::KEPT], d[N::PARTS];
      const float* from = kept_of(c_, at.b, head_, place, v);
      for (int64_t k = 0; k < N::KEPT; ++k) kept[k] = load<Floats>(from + k * stride);
      h = load<Floats>(from + N::KEPT * stride);
      for (int64_t k = 0; k <= N::KEPT; ++k) __builtin_prefetch(from + k * stride - c_.kept.stride[1]);
      for (int64_t p = 0; p < N::PARTS; ++p) d[p] = load<Floats>(of_part(row, p) + v * LANES);
      if (c_.d_out) {
        const S* out = units_of<const S>(c_.d_out, at.b, head_, place, v);
        d[0] += load_units(out, count);
        __builtin_prefetch(out - c_.d_out.stride[2]);
      }
      N::backward(kept, h, d, d_x, d_r);
      for (int64_t p = 0; p < N::PARTS; ++p) store(of_part(row, p) + v * LANES, d[p]);
    }
    for (int64_t g = 0; g < N::GATES; ++g) {
      store_units(d_x[g], d_wx + g * c_.d_wx.stride[3], count);
      store(by_gate + g * padded_, d_r[g]);
    }
    store(before, h);
  }

  // Gradients of h before the token, by way of the recurrent sums.
  void through_R(int64_t live) {
    const float* own = bench_.by_gate + gathered_at(0) * bench_.ldg;
    for (int64_t v = first_; v < last_; v += ACROSS) {
      const int64_t across = std::min(ACROSS, last_ - v);
      const Packed<S>* right = right_ + v * LANES * N::GATES * padded_;
      runs(live, HIGH, [&](int64_t first, int64_t count) {
        multiply_for<Packed<S>>(count, across)(N::GATES * padded_, own + first * bench_.ldg, bench_.ldg, 1, right,
                                              across * LANES, bench_.d_h + first * bench_.ldh + v * LANES, bench_.ldh,
                                              true);
      });
    }
  }

  const Rnn& c_;
  const Worker& w_;
  const BackwardBench<S>& bench_;
  const Block* block_ = nullptr;
  int64_t head_, first_, last_, padded_, gathered_ = 0, half_ = 0;
  const Packed<S>* right_;
  float *d_R_, *d_bias_;
};

// Sums over the parts of a head, a row of units each, in the format of R.
template <typename N, typename S>
void sum_parts(const Rnn& c, const float* d_R, const float* d_bias, int64_t head, int64_t unit) {
  const int64_t padded = c.padded();
  for (int64_t g = 0; g < N::GATES; ++g) {
    const float* from = d_R + (head * c.parts * N::GATES + g) * padded * padded + unit * padded;
    S* to = c.d_R.at<S>(head * c.d_R.stride[0] + g * c.d_R.stride[1] + unit * c.d_R.stride[2]);
    for (int64_t v = 0; v < c.vectors(); ++v) {
      Floats sum = load<Floats>(from + v * LANES);
      for (int64_t p = 1; p < c.parts; ++p) sum += load<Floats>(from + p * N::GATES * padded * padded + v * LANES);
      store_units(sum, to + v * LANES, c.width - v * LANES);
    }
    float sum = 0;
    for (int64_t p = 0; p < c.parts; ++p) sum += d_bias[((head * c.parts + p) * N::GATES + g) * padded + unit];
    if (c.d_bias) put(*c.d_bias.at<S>(head * c.d_bias.stride[0] + g * c.d_bias.stride[1] + unit), sum);
  }
}

template <typename N, typename S>
void run_backward(const Rnn& c) {
  const std::vector<Sequence> all = sequences(c);
  const int64_t heads = c.heads(), padded = c.padded(), matrix = N::GATES * padded * padded, row = N::GATES * padded;
  const int64_t teams = std::max<int64_t>(1, c.threads / c.team), room = std::max(c.depth, c.rows);
  const int64_t ldh = padded + LANES, ldg = row + LANES;
  Arena arena;
  const int64_t at_right = arena.announce<Packed<S>>(heads * matrix);
  const int64_t at_d_R = arena.announce<float>(heads * c.parts * matrix);
  const int64_t at_d_bias = arena.announce<float>(heads * c.parts * row);
  const int64_t at_d_h = arena.announce<float>(teams * c.rows * ldh);
  const int64_t at_parts = arena.announce<float>(teams * c.rows * N::PARTS * padded);
  const int64_t at_gates = arena.announce<float>(teams * 2 * room * ldg);
  const int64_t at_before = arena.announce<float>(teams * 2 * room * ldh);
  arena.settle();
  float *d_R = arena.part<float>(at_d_R), *d_bias = arena.part<float>(at_d_bias);
  std::atomic<int64_t> packed{0}, next{0}, summed{0};
  const auto pack = [&](const Worker& worker) {
    for (int64_t job = packed++; job < heads * worker.team; job = packed++) {
      Worker owner = worker;
      owner.member = job % worker.team;
      pack_backward<S>(c, job / worker.team, owner.first(c.vectors()), owner.last(c.vectors()),
                       arena.part<Packed<S>>(at_right) + job / worker.team * matrix);
    }
  };
  const auto work = [&](const Worker& worker) {
    const FlushSubnormals flush;
    const int64_t group = worker.group;
    const BackwardBench<S> bench{arena.part<Packed<S>>(at_right),
                                 arena.part<float>(at_d_h) + group * c.rows * ldh,
                                 arena.part<float>(at_parts) + group * c.rows * N::PARTS * padded,
                                 arena.part<float>(at_gates) + group * 2 * room * ldg,
                                 arena.part<float>(at_before) + group * 2 * room * ldh, room, ldg, ldh};
    for_own_jobs(worker, heads * c.parts, next, [&](int64_t job) {
      float *own = d_R + job * matrix, *own_bias = d_bias + job * row;
      for (int64_t g = 0; g < N::GATES; ++g) {
        const int64_t first = worker.first(c.vectors()) * LANES, last = worker.last(c.vectors()) * LANES;
        std::memset(own + (g * padded + first) * padded, 0, (last - first) * padded * sizeof(float));
        std::memset(own_bias + g * padded + first, 0, (last - first) * sizeof(float));
      }
      Backward<N, S> backward(c, worker, job / c.parts, bench, own, own_bias);
      for (int64_t number = job % c.parts; number < c.blocks(); number += c.parts)
        backward.run(block_of(c, all, job / c.parts, number));
      backward.gather();
      worker.wait();
    });
  };
  const auto sum = [&](const Worker&) {
    for (int64_t job = summed++; job < heads * c.width; job = summed++)
      sum_parts<N, S>(c, d_R, d_bias, job / c.width, job % c.width);
  };
  in_teams(c.threads, c.team, pack, work, sum);
}

}  // namespace tilewise
