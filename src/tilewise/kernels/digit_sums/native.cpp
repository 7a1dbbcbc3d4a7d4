// The native engine of sums of digits: points of lattices and digital nets; native.py calls it.
#include "../native.h"

namespace tilewise {

constexpr int64_t BITS = 52, MASK = (int64_t(1) << BITS) - 1, ONE = int64_t(0x3ff) << BITS;
constexpr int64_t TABLE = 1 << 14;  // numbers of the table of first points, 128 KB
constexpr int64_t SPAN = 64;        // blocks of that size that a thread takes at a time
constexpr int64_t PERIOD = 128;     // numbers joined with one run of offsets, at least

enum Number : int64_t { DIGITS = 0, DOUBLES = 1, SINGLES = 2 };

// Field for field what native.py writes; every number is 64 bits wide.
struct Sums {
  const int64_t* columns;  // [column_copies, m, d]
  const int64_t* shift;    // [copies, d]
  void* out;               // [copies, n, d]
  int64_t copies, column_copies, d, m, start, n, add, number, threads;

  const int64_t* column(int64_t copy, int64_t k) const {
    return columns + ((column_copies == 1 ? 0 : copy) * m + k) * d;
  }
};

template <bool add>
inline int64_t join(int64_t x, int64_t y) {
  return add ? (x + y) & MASK : x ^ y;
}

template <bool add>
inline void put_sum(int64_t& to, int64_t x, int64_t y) { to = join<add>(x, y); }

template <bool add>
inline void put_sum(double& to, int64_t x, int64_t y) {  // 1 + the point, from its digits; 1 is taken away exactly
  const int64_t bits = join<add>(x, y) | ONE;
  double one_more;
  std::memcpy(&one_more, &bits, sizeof(bits));
  to = one_more - 1.0;
}

template <bool add>
inline void put_sum(float& to, int64_t x, int64_t y) {  // cut to 24 digits, which float32 holds
  to = static_cast<float>(static_cast<int32_t>(join<add>(x, y) >> (BITS - 24))) * 0x1p-24f;
}

// to [rows, d] = from [rows, d] joined with offsets that repeat every `period` numbers.
template <bool add, typename T>
inline void write_rows(const int64_t* from, const int64_t* offsets, int64_t period, int64_t count, T* to) {
  for (int64_t at = 0; at < count; at += period) {
    const int64_t* x = from + at;
    T* out = to + at;
    const int64_t run = std::min(period, count - at);
    for (int64_t i = 0; i < run; ++i) put_sum<add>(out[i], x[i], offsets[i]);
  }
}

template <bool add, typename T>
void write_points(const Sums& c) {
  int64_t low = 0;  // rows of the table, as a power of two
  while (low < c.m && (int64_t(2) << low) * c.d <= TABLE && (int64_t(1) << low) < c.n) ++low;
  const int64_t rows = int64_t(1) << low, end = c.start + c.n;
  const int64_t first = c.start >> low, blocks = ((end - 1) >> low) + 1 - first;
  const int64_t spans = (blocks + SPAN - 1) / SPAN;
  int64_t repeats = 1;
  while (repeats * c.d < PERIOD) repeats *= 2;
  for_each_job(c.copies * spans, c.threads, false, [&](int64_t job) {
    const int64_t copy = job / spans, span = job % spans;
    std::vector<int64_t> table(rows * c.d), offsets(repeats * c.d);
    for (int64_t k = 0; k < low; ++k) {  // by doubling
      const int64_t half = (int64_t(1) << k) * c.d;
      for (int64_t i = 0; i < half; i += c.d)
        for (int64_t j = 0; j < c.d; ++j) table[half + i + j] = join<add>(table[i + j], c.column(copy, k)[j]);
    }
    const int64_t last = std::min(blocks, (span + 1) * SPAN);
    for (int64_t block = first + span * SPAN; block < first + last; ++block) {
      for (int64_t j = 0; j < c.d; ++j) offsets[j] = c.shift[copy * c.d + j];
      for (int64_t k = low; k < c.m; ++k) {
        if (!((block >> (k - low)) & 1)) continue;
        for (int64_t j = 0; j < c.d; ++j) offsets[j] = join<add>(offsets[j], c.column(copy, k)[j]);
      }
      for (int64_t i = c.d; i < repeats * c.d; ++i) offsets[i] = offsets[i - c.d];
      const int64_t begin = std::max(c.start, block << low), stop = std::min(end, (block + 1) << low);
      write_rows<add>(table.data() + (begin - (block << low)) * c.d, offsets.data(), repeats * c.d,
                      (stop - begin) * c.d, static_cast<T*>(c.out) + (copy * c.n + begin - c.start) * c.d);
    }
  });
}

template <bool add>
void write_numbers(const Sums& c) {
  switch (c.number) {
    case DIGITS: return write_points<add, int64_t>(c);
    case DOUBLES: return write_points<add, double>(c);
    default: return write_points<add, float>(c);
  }
}

}  // namespace tilewise

using namespace tilewise;

extern "C" {

int64_t tilewise_digit_sums_words() { return sizeof(Sums) / 8; }

int tilewise_digit_sums_points(const void* call, char* message, int64_t room) {
  return guarded(message, room, [&] {
    const Sums& c = *static_cast<const Sums*>(call);
    if (c.add) return write_numbers<true>(c);
    write_numbers<false>(c);
  });
}
}
