// Which scores of a row are chosen, in linear time: the highest, or those above a quantile.
#pragma once

#include "native_choice.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace tilewise {

// Scores of keys first to first + n - 1; -inf for those that the query does not see.
struct Segment {
  float* scores;
  int64_t n, first;
};

// Scores of at least `least`, and their keys: first and those after it or, with `LISTED`, those that are given. Writes
// both behind one another, `values` and `keys` being the given ones or others, and up to 16 places after them; returns
// how many.
template <bool LISTED>
inline int64_t at_least(const float* scores, const int32_t* given, int64_t first, int64_t n, float least, float* values,
                        int32_t* keys) {
  int64_t count = 0, j = 0;
#if defined(__AVX512F__)  // a third of the time of the loop below, which stores every score
  const __m512 bound = _mm512_set1_ps(least);
  __m512i own = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(first)),
                                 _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  for (; j + 16 <= n; j += 16) {
    const __m512 x = _mm512_loadu_ps(scores + j);
    if constexpr (LISTED) own = _mm512_loadu_si512(given + j);
    const __mmask16 chosen = _mm512_cmp_ps_mask(x, bound, _CMP_GE_OQ);
    _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(chosen, x));
    _mm512_storeu_si512(keys + count, _mm512_maskz_compress_epi32(chosen, own));
    count += __builtin_popcount(chosen);
    if constexpr (!LISTED) own = _mm512_add_epi32(own, _mm512_set1_epi32(16));
  }
#endif
  for (; j < n; ++j) {
    const float x = scores[j];
    const int32_t key = LISTED ? given[j] : static_cast<int32_t>(first + j);
    values[count] = x;
    keys[count] = key;
    count += x >= least;
  }
  return count;
}

class Picker {
 public:
  // The chosen keys of a row, ascending, in memory of the picker's; `visible` scores are above -inf.
  std::pair<const int32_t*, int64_t> pick(const Choice& c, const Segment* segments, int64_t count, int64_t visible) {
    int64_t room = 0;
    for (int64_t s = 0; s < count; ++s) room += segments[s].n;
    values_ = memory_[0].template take<float>(room + 64);
    keys_ = memory_[1].template take<int32_t>(room + 64);
    if (visible <= c.top) return {keys_, visible < room ? find(segments, count, LOWEST) : all(segments, count)};
    if (c.most) {
      const int64_t found = find(segments, count, quantile(c, segments, count, visible));
      const int64_t kept = std::min(found, c.most);
      return {keys_ + found - kept, kept};
    }
    if (c.ends) raise_ends(segments, count);
    highest(c, segments, count, visible, room);
    return {keys_, c.top};
  }

 private:
  static constexpr int64_t SAMPLE = 256, FLUSHED = 1024;  // scores looked at beforehand; added up in float32

  int64_t find(const Segment* segments, int64_t count, float least) {
    int64_t n = 0;
    for (int64_t s = 0; s < count; ++s)
      n += at_least<false>(segments[s].scores, nullptr, segments[s].first, segments[s].n, least, values_ + n, keys_ + n);
    return n;
  }

  // Every key, whatever the scores, which need not have been computed.
  int64_t all(const Segment* segments, int64_t count) {
    int64_t n = 0;
    for (int64_t s = 0; s < count; ++s)
      for (int64_t j = 0; j < segments[s].n; ++j) keys_[n++] = static_cast<int32_t>(segments[s].first + j);
    return n;
  }

  static void raise_ends(const Segment* segments, int64_t count) {
    const auto visible = [](float x) { return x > -INF; };
    for (int64_t s = 0; s < count; ++s) {
      float *end = segments[s].scores + segments[s].n, *first = std::find_if(segments[s].scores, end, visible);
      if (first == end) continue;
      *first = INF;
      break;
    }
    for (int64_t s = count - 1; s >= 0; --s)
      for (int64_t j = segments[s].n - 1; j >= 0; --j)
        if (visible(segments[s].scores[j])) {
          segments[s].scores[j] = INF;
          return;
        }
  }

  // Leaves the highest of more visible scores than are wanted. A sample says between which scores the least of them
  // lies, most likely, so that few are looked at again; where it is wrong, all are.
  void highest(const Choice& c, const Segment* segments, int64_t count, int64_t visible, int64_t room) {
    auto [low, high] = bracket(segments, count, static_cast<double>(c.top) / visible, room);
    int64_t n = find(segments, count, low);
    if (n < c.top) n = find(segments, count, low = LOWEST);
    const float least = least_of(values_, n, c.top, low, high);
    n = at_least<true>(values_, keys_, 0, n, least, values_, keys_);
    if (n > c.top) drop_equals(c, least, n);
  }

  // Scores that are likely to lie below and above the one that a share of the visible ones reach.
  std::pair<float, float> bracket(const Segment* segments, int64_t count, double share, int64_t room) const {
    if (room < 4 * SAMPLE) return {LOWEST, INF};
    float sample[SAMPLE];
    const int64_t step = room / SAMPLE;
    int64_t size = 0, at = step / 2;  // of the next score, from the beginning of the segment
    for (int64_t s = 0; s < count; ++s) {
      for (; at < segments[s].n && size < SAMPLE; at += step) {
        sample[size] = segments[s].scores[at];
        size += sample[size] > -INF;
      }
      at -= segments[s].n;
    }
    const double rank = share * size, doubt = 3 * std::sqrt(rank * (1 - share)) + 1;
    const int64_t below = static_cast<int64_t>(rank + doubt), above = static_cast<int64_t>(rank - doubt);
    return {below < size ? least_of(sample, size, below + 1, LOWEST, INF) : LOWEST,
            above > 0 ? least_of(sample, size, above, LOWEST, INF) : INF};
  }

  static int64_t reach(const float* values, int64_t n, float least) {
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t j = 0; j < n; ++j) count += values[j] >= least;
    return count;
  }

  // Whole numbers in the order of floats.
  static int64_t order_of(float x) {
    const int32_t bits = static_cast<int32_t>(bits_of(x));
    return bits < 0 ? bits ^ 0x7fffffff : bits;
  }
  static float float_at(int64_t order) {
    const int32_t bits = static_cast<int32_t>(order);
    return float_of(static_cast<uint32_t>(bits < 0 ? bits ^ 0x7fffffff : bits));
  }

  // What k of n >= k values reach, or more if they are equal. At least k reach `low`, and less, it is likely, `high`.
  // Halves the floats in between: selection by comparing values with one another mispredicts every second time.
  static float least_of(const float* values, int64_t n, int64_t k, float low, float high) {
    int64_t from = order_of(low), to = high < INF && reach(values, n, high) < k ? order_of(high) : order_of(INF) + 1;
    while (to - from > 1) {
      const int64_t middle = from + (to - from) / 2, count = reach(values, n, float_at(middle));
      if (count == k) return float_at(middle);
      (count > k ? from : to) = middle;
    }
    return float_at(from);
  }

  // Of n keys found, leaves out those beyond the wanted that score `least`: the highest of these keys, or the lowest.
  void drop_equals(const Choice& c, float least, int64_t n) {
    const int64_t equal = std::count(values_, values_ + n, least), extra = n - c.top;
    const int64_t from = c.latest ? extra : 0, to = c.latest ? equal : equal - extra;
    int64_t kept = 0, place = 0;
    for (int64_t j = 0; j < n; ++j) {
      const bool same = values_[j] == least, left_out = same & ((place < from) | (place >= to));
      keys_[kept] = keys_[j];
      kept += !left_out;
      place += same;
    }
  }

  // The quantile of a normal distribution with the mean and deviation of the scores; no higher than the highest.
  static float quantile(const Choice& c, const Segment* segments, int64_t count, int64_t visible) {
    const float shift = middle_of(segments, count);
    double sum = 0, squares = 0;  // of distances from there, so that nothing cancels
    float top = -INF;
    for (int64_t s = 0; s < count; ++s)
      for (int64_t from = 0; from < segments[s].n; from += FLUSHED)
        add_distances(segments[s].scores + from, std::min(FLUSHED, segments[s].n - from), shift, sum, squares, top);
    const double mean = sum / visible, left = squares - sum * mean;
    const double deviation = std::sqrt(std::max(left, 0.) / std::max<int64_t>(visible - 1, 1));
    const float least = static_cast<float>(shift + mean + deviation * c.quantiles.at<float>()[visible]);
    return least < top ? least : least >= top ? top : LOWEST;  // where scores are infinite there is no quantile
  }

  // The mean of a few visible scores.
  static float middle_of(const Segment* segments, int64_t count) {
    float sum = 0;
    int64_t n = 0;
    for (int64_t s = 0; s < count && n < 64; ++s)
      for (int64_t j = 0, step = segments[s].n / 64 + 1; j < segments[s].n; j += step)
        if (segments[s].scores[j] > -INF) {
          sum += segments[s].scores[j];
          ++n;
        }
    return n ? sum / static_cast<float>(n) : 0.f;
  }

  static void add_distances(const float* scores, int64_t n, float shift, double& sum, double& squares, float& top) {
    const Floats none = {};
    Floats sums = {}, second = {}, highest = none - INF;
    for (int64_t j = 0; j < n; j += LANES) {
      Floats x = none - INF;
      if (j + LANES <= n) x = load<Floats>(scores + j);
      else std::memcpy(&x, scores + j, (n - j) * sizeof(float));
      const Floats distance = x > none - INF ? x - shift : none;
      sums += distance;
      second += distance * distance;
      highest = x > highest ? x : highest;
    }
    sum += sum_of(sums);
    squares += sum_of(second);
    top = std::max(top, largest_of(highest));
  }

  Buffer memory_[2];
  float* values_ = nullptr;
  int32_t* keys_ = nullptr;
};

}  // namespace tilewise
