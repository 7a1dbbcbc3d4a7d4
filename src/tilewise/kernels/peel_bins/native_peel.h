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

constexpr int64_t WORD = 64;

class Peel {
 public:
  explicit Peel(const Bins& c)
      : c_(c), allowed_(*c.allowed), words_((c.offsets + WORD - 1) / WORD), left_(c.groups * c.bins * c_.offsets),
        signs_(c.groups * c.n * words_), own_(words_), dirty_(c.groups * c.bins, 1) {
    for (int64_t g = 0; g < c.groups; ++g)
      for (int64_t p = 0; p < c.offsets; ++p) {
        for (int64_t j = 0; j < c.bins; ++j)  // an offset's bins lie together; here a bin's offsets do
          left_[(g * c.bins + j) * c_.offsets + p] = c.left[(g * c.offsets + p) * c.bins + j];
        for (int64_t i = 0; i < c.n; ++i)
          signs_[(g * c.n + i) * words_ + p / WORD] |= uint64_t(c.shifts[g * c.offsets + p] >> i & 1) << p % WORD;
      }
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
    int64_t kept = 0;
    for (const Single& one : all) {
      if (!counts(one.value)) continue;
      c_.index[kept] = one.place;
      c_.value[kept++] = one.value;
    }
    bool explained = true;
    for (int64_t at = 0; at < c_.groups * c_.bins; ++at) explained = explained && power(at) <= allowed_;
    c_.told[0] = kept;
    c_.told[1] = explained;
    c_.told[2] = rounds;
  }

 private:
  struct Single {
    int64_t place;
    double value;
  };

  double* bin(int64_t at) { return left_.data() + at * c_.offsets; }

  // The sum over all offsets of f(what is seen, whether its sign is turned), in as many parts as fill registers.
  template <typename F>
  double sum_over(const double* seen, const F& f) const {
    constexpr int64_t PARTS = 16;
    double parts[PARTS] = {};
    int64_t p = 0;
    for (; p + PARTS <= c_.offsets; p += PARTS) {
      const uint64_t bits = own_[p / WORD] >> p % WORD;
      for (int64_t i = 0; i < PARTS; ++i) parts[i] += f(turned(seen[p + i], bits >> i));
    }
    for (; p < c_.offsets; ++p) parts[p % PARTS] += f(turned(seen[p], own_[p / WORD] >> p % WORD));
    double sum = 0;
    for (double part : parts) sum += part;
    return sum;
  }

  // With the other sign where the lowest bit says so.
  static double turned(double x, uint64_t bits) {
    uint64_t own;
    std::memcpy(&own, &x, sizeof(x));
    own ^= bits << 63;
    std::memcpy(&x, &own, sizeof(x));
    return x;
  }

  bool counts(double value) const { return c_.offsets * value * value > 12 * allowed_; }

  double power(int64_t at) {
    return sum_over(bin(at), [](double x) { return x * x; }) / c_.offsets;
  }

  // The signs of a place at all offsets of a group.
  void find_signs(int64_t group, int64_t place) {
    std::fill(own_.begin(), own_.end(), 0);
    for (int64_t i = 0; i < c_.n; ++i)
      for (int64_t w = 0; w < words_; ++w) own_[w] ^= signs_[(group * c_.n + i) * words_ + w] & -uint64_t(place >> i & 1);
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

  void decode(int64_t at, std::vector<Single>& found) {
    if (!(power(at) > allowed_)) return;
    const int64_t group = at / c_.bins;
    const double* seen = bin(at);
    for (int64_t t = 0, last = -1; t < c_.decoders; ++t) {
      const int64_t place = place_by(group, at % c_.bins, t, seen);
      if (place == last) continue;
      last = place;
      find_signs(group, place);
      const double value = sum_over(seen, [](double x) { return x; }) / c_.offsets;
      if (!counts(value)) continue;
      const double rest = sum_over(seen, [&](double x) { return (x - value) * (x - value); });
      if (rest / c_.offsets <= allowed_) return found.push_back({place, value});
    }
  }

  void take_out(const Single& one) {
    for (int64_t g = 0; g < c_.groups; ++g) {
      int64_t number = 0;
      for (int64_t i = 0; i < c_.b; ++i)
        number |= int64_t(__builtin_parityll(c_.hashes[g * c_.b + i] & one.place)) << i;
      const int64_t at = g * c_.bins + number;
      double* seen = bin(at);
      find_signs(g, one.place);
      for (int64_t p = 0; p < c_.offsets; ++p) seen[p] -= turned(one.value, own_[p / WORD] >> p % WORD);
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
  const int64_t words_;                 // of the signs at all offsets
  std::vector<double> left_;            // [groups, bins, offsets]
  std::vector<uint64_t> signs_, own_;   // of each bit of a place, [groups, n, words], and of one place
  std::vector<char> dirty_;
};

}  // namespace tilewise
