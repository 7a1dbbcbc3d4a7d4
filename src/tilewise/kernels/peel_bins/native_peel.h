// The peeling decoder: bins are decoded, what is alone in one is taken out of all groups, and what that changed is
// decoded again.
#pragma once

#include "../native.h"

namespace tilewise {

// Field for field what native.py writes; every number is 64 bits wide.
struct Bins {
  const double* left;        // [groups, offsets, bins]
  const int64_t* hashes;     // [groups, b]
  const int64_t* shifts;     // [groups, offsets]
  const int64_t* chosen;     // [groups, decoders, n - b + 1]
  const int64_t* decoders_;  // [groups, decoders, n + 1]
  int64_t* index;            // out, as are values and told: found, explained, rounds
  double* value;
  const double* allowed;
  int64_t* told;
  int64_t groups, offsets, bins, b, decoders, n, rounds;
};

inline double sign_of(int64_t common) { return __builtin_parityll(common) ? -1.0 : 1.0; }

class Peel {
 public:
  explicit Peel(const Bins& c)
      : c_(c), allowed_(*c.allowed), left_(c.groups * c.bins * c.offsets), dirty_(c.groups * c.bins, 1) {
    for (int64_t g = 0; g < c.groups; ++g)  // an offset's bins lie together; here a bin's offsets do
      for (int64_t p = 0; p < c.offsets; ++p)
        for (int64_t j = 0; j < c.bins; ++j)
          left_[(g * c.bins + j) * c.offsets + p] = c.left[(g * c.offsets + p) * c.bins + j];
  }

  void run() {
    int64_t rounds = 0;
    std::vector<Single> all, found;
    for (; rounds < c_.rounds; ++rounds) {
      found.clear();
      for (int64_t at = 0; at < c_.groups * c_.bins; ++at) {
        if (!dirty_[at]) continue;
        dirty_[at] = 0;
        decode(at, found);
      }
      if (found.empty()) break;
      merge(found, true);
      for (const Single& one : found) take_out(one);
      all.insert(all.end(), found.begin(), found.end());
    }
    merge(all, false);
    for (size_t i = 0; i < all.size(); ++i) {
      c_.index[i] = all[i].place;
      c_.value[i] = all[i].value;
    }
    bool explained = true;
    for (int64_t at = 0; at < c_.groups * c_.bins; ++at) explained = explained && power(at) <= allowed_;
    c_.told[0] = all.size();
    c_.told[1] = explained;
    c_.told[2] = rounds;
  }

 private:
  struct Single {
    int64_t place;
    double value;
  };

  const double* bin(int64_t at) const { return left_.data() + at * c_.offsets; }

  double power(int64_t at) const {
    const double* seen = bin(at);
    double sum = 0;
    for (int64_t p = 0; p < c_.offsets; ++p) sum += seen[p] * seen[p];
    return sum / c_.offsets;
  }

  // The place that one decoder reads from a bin.
  int64_t place_by(int64_t group, int64_t number, int64_t decoder, const double* seen) const {
    const int64_t* columns = c_.decoders_ + (group * c_.decoders + decoder) * (c_.n + 1);
    const int64_t* chosen = c_.chosen + (group * c_.decoders + decoder) * (c_.n - c_.b + 1);
    int64_t solved = 0;
    for (int64_t i = 0; i < c_.b; ++i) solved ^= columns[i] & -(number >> i & 1);
    for (int64_t i = 0; i <= c_.n - c_.b; ++i) solved ^= columns[c_.b + i] & -int64_t(seen[chosen[i]] < 0);
    return solved & ((int64_t(1) << c_.n) - 1);
  }

  double mean_at(const int64_t* shifts, int64_t place, const double* seen) const {
    double sum = 0;
    for (int64_t p = 0; p < c_.offsets; ++p) sum += sign_of(shifts[p] & place) * seen[p];
    return sum / c_.offsets;
  }

  void decode(int64_t at, std::vector<Single>& found) const {
    if (!(power(at) > allowed_)) return;
    const int64_t group = at / c_.bins, *shifts = c_.shifts + group * c_.offsets;
    const double* seen = bin(at);
    Single best{0, 0};
    for (int64_t t = 0; t < c_.decoders; ++t) {
      const int64_t place = place_by(group, at % c_.bins, t, seen);
      if (t && place == best.place) continue;
      const double mean = mean_at(shifts, place, seen);
      if (std::fabs(mean) > std::fabs(best.value)) best = {place, mean};
    }
    double rest = 0;
    for (int64_t p = 0; p < c_.offsets; ++p) {
      const double x = seen[p] - best.value * sign_of(shifts[p] & best.place);
      rest += x * x;
    }
    if (rest / c_.offsets <= allowed_ && best.value * best.value > allowed_) found.push_back(best);
  }

  void take_out(const Single& one) {
    for (int64_t g = 0; g < c_.groups; ++g) {
      int64_t number = 0;
      for (int64_t i = 0; i < c_.b; ++i)
        number |= int64_t(__builtin_parityll(c_.hashes[g * c_.b + i] & one.place)) << i;
      const int64_t at = g * c_.bins + number, *shifts = c_.shifts + g * c_.offsets;
      double* seen = left_.data() + at * c_.offsets;
      for (int64_t p = 0; p < c_.offsets; ++p) seen[p] -= one.value * sign_of(shifts[p] & one.place);
      dirty_[at] = 1;
    }
  }

  // Every place once, in rising order, with the mean or the sum of its values.
  static void merge(std::vector<Single>& all, bool mean) {
    std::stable_sort(all.begin(), all.end(), [](const Single& x, const Single& y) { return x.place < y.place; });
    size_t to = 0;
    for (size_t i = 0; i < all.size();) {
      size_t next = i;
      double sum = 0;
      for (; next < all.size() && all[next].place == all[i].place; ++next) sum += all[next].value;
      all[to++] = {all[i].place, mean ? sum / (next - i) : sum};
      i = next;
    }
    all.resize(to);
  }

  const Bins& c_;
  const double allowed_;
  std::vector<double> left_;  // [groups, bins, offsets]
  std::vector<char> dirty_;
};

}  // namespace tilewise
