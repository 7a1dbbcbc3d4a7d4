// Tokens as integers with scales: what quantised attention does to queries and keys before anything else.
//
// Rows are read twice while they lie in the nearest cache, once for the largest number of their group and once to be
// rounded; a mean to take out first costs one more reading.
#pragma once

#include "../native.h"

namespace tilewise {

// Field for field what rounding.py writes.
struct Rounding {
  Grid x, seen, integers, scales, means;  // seen, and means where nothing is smoothed, may be absent
  int64_t smooth;                         // consecutive tokens that share a mean; 0 for none
  int64_t size, split[3];                 // tokens of a block of groups, and the axes it is folded into
  int64_t most, threads;
};

template <typename S>
class Round {
 public:
  explicit Round(const Rounding& r) : r_(r), n_(r.x.size[2]), depth_(r.x.size[3]) {}

  void run() const {
    const int64_t heads = r_.x.size[0] * r_.x.size[1];
    if (r_.smooth) {
      const int64_t blocks = r_.means.size[2];
      for_each_job(heads * blocks, r_.threads, false, [&](int64_t j) { average(j / blocks, j % blocks); });
    }
    const int64_t blocks = (n_ + r_.size - 1) / r_.size, together = std::max<int64_t>(1, 256 / r_.size);
    const int64_t jobs = (blocks + together - 1) / together;
    for_each_job(heads * jobs, r_.threads, false, [&](int64_t j) {
      const int64_t first = j % jobs * together;
      for (int64_t i = first; i < std::min(first + together, blocks); ++i) round_block(j / jobs, i * r_.size);
    });
  }

 private:
  int64_t base(const Grid& grid, int64_t head) const {
    const int64_t b = head / r_.x.size[1], h = head % r_.x.size[1];
    return (grid.size[0] == 1 ? 0 : b * grid.stride[0]) + (grid.size[1] == 1 ? 0 : h * grid.stride[1]);
  }

  bool seen(int64_t head, int64_t t) const {
    return !r_.seen || *r_.seen.at<bool>(base(r_.seen, head) + t * r_.seen.stride[2]);
  }

  void read(int64_t head, int64_t t, float* row) const {
    copy_row(r_.x.at<S>(base(r_.x, head) + t * r_.x.stride[2]), r_.x.stride[3], depth_, row);
  }

  static bool finite(const float* row, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < n; ++d) sum += row[d] * 0.f;
    return sum == 0;
  }

  void average(int64_t head, int64_t block) const {
    thread_local Buffer memory;
    float *row = memory.take<float>(depth_), *mean = r_.means.at<float>(base(r_.means, head) + block * depth_);
    int64_t count = 0;
    std::fill(mean, mean + depth_, 0.f);
    for (int64_t t = block * r_.smooth; t < std::min((block + 1) * r_.smooth, n_); ++t) {
      read(head, t, row);
      if (!seen(head, t) || !finite(row, depth_)) continue;
      ++count;
      for (int64_t d = 0; d < depth_; ++d) mean[d] += row[d];
    }
    for (int64_t d = 0; d < depth_ && count; ++d) mean[d] /= static_cast<float>(count);
  }

  void round_block(int64_t head, int64_t start) const {
    thread_local Buffer memory, maxima;
    const int64_t rows = std::min(r_.size, n_ - start), groups = r_.split[1];
    float *block = memory.take<float>(rows * depth_), *top = maxima.take<float>(2 * r_.size);
    bool* whole = reinterpret_cast<bool*>(top + r_.size);
    std::fill(top, top + groups, 0.f);
    for (int64_t i = 0; i < rows; ++i) {
      float* row = block + i * depth_;
      read(head, start + i, row);
      if (r_.smooth) {
        const float* mean = r_.means.at<float>(base(r_.means, head) + (start + i) / r_.smooth * depth_);
        for (int64_t d = 0; d < depth_; ++d) row[d] -= mean[d];
      }
      whole[i] = finite(row, depth_);
      if (!whole[i] || !seen(head, start + i)) continue;
      float largest = 0;
#pragma omp simd reduction(max : largest)
      for (int64_t d = 0; d < depth_; ++d) largest = std::max(largest, std::fabs(row[d]));
      float& own = top[group(i)];
      own = std::max(own, largest);
    }
    const float most = static_cast<float>(r_.most);
    int8_t* to = r_.integers.at<int8_t>(base(r_.integers, head) + start * depth_);
    float* scales = r_.scales.at<float>(base(r_.scales, head) + start);
    for (int64_t i = 0; i < rows; ++i, to += depth_) {
      const float scale = top[group(i)] / most, inverse = scale > 0 ? 1.f / scale : 0.f;
      scales[i] = whole[i] ? scale : std::numeric_limits<float>::quiet_NaN();
      put_integers(block + i * depth_, inverse, most, to);
    }
  }

  // A block is folded into split[0] x split[1] x split[2] tokens; those that differ in the middle alone do not share.
  int64_t group(int64_t i) const { return i / r_.split[2] % r_.split[1]; }

  void put_integers(const float* row, float inverse, float most, int8_t* to) const {
    constexpr float SHIFT = 12582912.f;  // adding it rounds, ties to even, and leaves the integer in the low bits
    for (int64_t d = 0; d < depth_; ++d) {
      const float x = row[d] * inverse, held = x < -most ? -most : x > most ? most : x;  // NaN stays: any integer will do
      to[d] = static_cast<int8_t>(bits_of(held + SHIFT) & 0xffu);
    }
  }

  const Rounding& r_;
  const int64_t n_, depth_;
};

}  // namespace tilewise
