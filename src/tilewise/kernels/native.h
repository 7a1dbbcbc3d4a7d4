// What every native engine shares: tensors handed over from Python, number formats, small matrix products, packing,
// memory that is used again, and the parallel loop.
//
// Vector code is left to the compiler: loops over contiguous floats without branches. Matrix products are PyTorch's
// own `brgemm`, which falls back to its gemm for float32 where oneDNN has no kernel for the machine.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace tilewise {

using at::BFloat16;
using at::Half;

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.44269504088896341f;

// ------------------------------------------------------------------------------------------------- tensors
enum Kind : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT64 = 3, BOOL = 4, INT32 = 5, INT8 = 6 };

// A tensor of up to four axes as Python hands it over; `data` is null where there is none. Strides count elements.
struct Grid {
  void* data;
  int64_t kind;
  int64_t size[4];
  int64_t stride[4];

  explicit operator bool() const { return data != nullptr; }

  // Offset of a (batch, head) pair for a tensor whose batch may be 1 and whose heads may be 1, the kv heads or all.
  int64_t base(int64_t b, int64_t h, int64_t heads, int64_t group) const {
    const int64_t own = size[1] == 1 ? 0 : size[1] == heads ? h : h / group;
    return (size[0] == 1 ? 0 : b * stride[0]) + own * stride[1];
  }

  template <typename T>
  T* at(int64_t offset = 0) const {
    return static_cast<T*>(data) + offset;
  }
};

// ---------------------------------------------------------------------------------------- number formats
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline void put(float& to, float x) { to = x; }
inline void put(Half& to, float x) { to = Half(x); }
inline void put(BFloat16& to, float x) {  // round to nearest, ties to even; a NaN stays one
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.x = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline float get(float x) { return x; }
inline float get(BFloat16 x) { return float_of(static_cast<uint32_t>(x.x) << 16); }
#ifdef __FLT16_MAX__
inline float get(Half x) {  // the compiler's own type, whose conversion it can do for many at once
  _Float16 own;
  std::memcpy(&own, &x, 2);
  return static_cast<float>(own);
}
#else
inline float get(Half x) { return static_cast<float>(x); }
#endif

template <typename S, typename T>
inline void copy_row(const S* from, int64_t stride, int64_t n, T* to) {
  if constexpr (std::is_same_v<S, T>) {
    if (stride == 1) std::memcpy(static_cast<void*>(to), from, n * sizeof(T));
    for (int64_t i = 0; i < n && stride != 1; ++i) to[i] = from[i * stride];
  } else if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) put(to[i], get(from[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) put(to[i], get(from[i * stride]));
  }
}

// e^x for x at most a little above 0, to 1 unit in the last place; `brief` leaves out a term (1e-7), for weights that
// are rounded to 8 bits. What float32 holds only with fewer bits becomes 0, so e^-inf is 0; NaN stays NaN.
template <bool brief>
inline float exp_of(float x) {
  constexpr float SHIFT = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const float shifted = x * LOG2E + SHIFT, n = shifted - SHIFT;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  const float r = x - n * 0.693147180559945309f;  // one fused operation, so nothing is lost when it cancels
#else
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts, the first times n exact
#endif
  float tail;
  if constexpr (brief) {
    tail = 0.4999923149f + r * (0.1666711465f + r * (0.0418901572f + r * 0.0083125203f));
  } else {
    tail = 0.0416683881f + r * (0.0083687169f + r * 0.0013814599f);
    tail = 0.4999999345f + r * (0.1666652063f + r * tail);
  }
  const float p = 1.f + (r + r * r * tail);
  const float power = float_of((bits_of(shifted) - bits_of(SHIFT) + 127u) << 23);
  const float result = p * power;
  return x < -87.3f ? 0.f : result;
}

// tanh to 1e-7: a rational form near 0, where 1 - 2 / (e^2x + 1) would cancel.
inline float tanh_of(float x) {
  const float a = std::fabs(x), y = std::min(a, 10.f), s = y * y;
  const float near = y * (1.f + s * (-0.33333333f + s * (0.13333333f + s * (-0.05396825f + s * (0.02186949f + s *
      (-0.00886324f + s * (0.00359213f + s * -0.00145583f)))))));
  const float e = exp_of<false>(-2.f * y);
  const float far = (1.f - e) / (1.f + e);
  const float t = a < 0.45f ? near : far;
  return a > 10.f ? std::copysign(1.f, x) : a <= 10.f ? std::copysign(t, x) : x;
}

// -------------------------------------------------------------------------------------------------- vectors
// Several numbers at once, as many as one register holds, in the compiler's own vector types.
#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t HalfWords __attribute__((vector_size(LANES * 2)));

template <typename To, typename From>
inline To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename V, typename T>
inline V load(const T* from) {
  V to;
  std::memcpy(&to, from, sizeof(V));
  return to;
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof(x)); }
inline void store(BFloat16* to, Floats x) {  // rounded half up; some NaNs become 0
  const HalfWords high = __builtin_convertvector((same_bits<Words>(x) + 0x8000u) >> 16, HalfWords);
  std::memcpy(static_cast<void*>(to), &high, sizeof(high));
}

// The upper halves of both, one after the other.
template <size_t... I>
inline auto upper_halves(Floats x, Floats y, std::index_sequence<I...>) {
  typedef uint16_t Halves __attribute__((vector_size(LANES * 4)));
  return __builtin_shufflevector(same_bits<Halves>(x), same_bits<Halves>(y), (2 * I + 1)...);
}
inline void store(float* to, Floats x, Floats y) {
  store(to, x);
  store(to + LANES, y);
}
inline void store(BFloat16* to, Floats x, Floats y) {
  const Floats up = same_bits<Floats>(same_bits<Words>(x) + 0x8000u), down = same_bits<Floats>(same_bits<Words>(y) + 0x8000u);
  const auto both = upper_halves(up, down, std::make_index_sequence<2 * LANES>());
  std::memcpy(static_cast<void*>(to), &both, sizeof(both));
}

inline float largest_of(Floats x) {  // NaNs are left out
  float top = -INF;
  for (int64_t i = 0; i < LANES; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

inline float sum_of(Floats x) {
  float sum = 0;
  for (int64_t i = 0; i < LANES; ++i) sum += x[i];
  return sum;
}

// Lane i: the sum of rows[i]. Halves of pairs of rows are added until one is left.
template <int64_t STEP = LANES / 2, size_t... I>
inline Floats sums_of(Floats* rows, std::index_sequence<I...> lanes) {
  for (int64_t i = 0; i < STEP; ++i) {
    const Floats x = rows[i], y = rows[i + STEP];
    rows[i] = __builtin_shufflevector(x, y, (I & STEP ? LANES + I : I)...) +
              __builtin_shufflevector(x, y, (I & STEP ? LANES + I - STEP : I + STEP)...);
  }
  if constexpr (STEP > 1) return sums_of<STEP / 2>(rows, lanes);
  return rows[0];
}

// The even and the odd numbers of a register of bfloat16.
inline Floats evens_of(Words pairs) { return same_bits<Floats>(pairs << 16); }
inline Floats odds_of(Words pairs) { return same_bits<Floats>(pairs & 0xffff0000u); }

// 2^x for x at most some 100, to 1 unit in the last place; `brief` to 8e-5, for results that are rounded to 8 bits.
// Below 2^-126 the result is 0, so 2^-inf is 0; NaN stays NaN.
template <bool brief>
inline Floats exp2_of(Floats x) {
  constexpr float SHIFT = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const Floats shifted = x + SHIFT, r = x - (shifted - SHIFT);
  Floats p;
  if constexpr (brief) {
    p = 0.9999280736f + r * (0.6932609862f + r * (0.2426111219f + r * 0.0551716649f));
  } else {
    p = 0.2402264689f + r * (0.0555032878f + r * (0.0096184890f + r * (0.0013399931f + r * 0.0001534581f)));
    p = 1.f + r * (0.6931472057f + r * p);
  }
  const Words bits = same_bits<Words>(p) + (same_bits<Words>(shifted) << 23);  // the integer, added to the exponent
  return same_bits<Floats>(x < -126.f ? Words{} : bits);
}

// While it lives, this thread takes numbers that float32 holds only with fewer bits for 0: decays that fade out make
// many of them, and processors that work on them slowly are common.
class FlushSubnormals {
 public:
#if defined(__SSE__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  FlushSubnormals() {}
  ~FlushSubnormals() {}
#endif
};

// ----------------------------------------------------------------------------------------- matrix products
// c [m, n] (+)= a [m, k] b [k, n], row by row; b in bfloat16 is packed in pairs of rows, [k / 2, n, 2].
template <typename T>
inline void product(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, float* c,
                    int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, std::is_same_v<T, BFloat16>);
}

// The same in integers: a without sign, b packed in fours of rows, [k / 4, n, 4].
inline void product(int64_t m, int64_t n, int64_t k, const uint8_t* a, int64_t lda, const int8_t* b, int64_t ldb,
                    int32_t* c, int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, true);
}

// Seconds of the fastest of some small products of a format.
template <typename T>
inline double time_product() {
  constexpr int64_t M = 128, N = 128, K = 64;
  const std::vector<T> a(M * K), b(N * K);
  std::vector<float> c(M * N);
  double best = 1;
  for (int repeat = 0; repeat < 10; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < 4; ++i) product(M, N, K, a.data(), K, b.data(), N, c.data(), N, false);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

// Whether this machine multiplies packed bfloat16, and faster than float32 (AMX does 3 to 7 times, AVX512-BF16 1.6
// times on one make of processor and 0.7 times on another); elsewhere it is widened to float32 tile by tile.
inline bool has_bfloat16_products() {
  static const bool has = [] {
    try {
      const double narrow = time_product<BFloat16>();
      at::native::cpublas::brgemm_release(true);
      return 1.1 * narrow < time_product<float>();
    } catch (const std::exception&) {
      return false;
    }
  }();
  return has;
}

// Calls work.operator()<S, T>() for a stored format S and the format T of the products.
template <typename Work>
void by_format(int64_t kind, const Work& work) {
  switch (kind) {
    case FLOAT32: return work.template operator()<float, float>();
    case FLOAT16: return work.template operator()<Half, float>();
    default:
      if (has_bfloat16_products()) return work.template operator()<BFloat16, BFloat16>();
      return work.template operator()<BFloat16, float>();
  }
}

// Whether this machine multiplies packed integers of 8 bits, the left ones without sign (AMX and AVX512-VNNI do).
inline bool has_int8_products() {
  static const bool has = [] {
    try {
      const uint8_t a[16 * 4] = {255, 1};
      const int8_t b[16 * 4] = {-127, 2};
      int32_t c[16 * 16];
      product(16, 16, 4, a, 4, b, 16, c, 16, false);
      at::native::cpublas::brgemm_release(true);
      return c[0] == 255 * -127 + 2 && c[1] == 0 && c[16] == 0;
    } catch (const std::exception&) {
      return false;
    }
  }();
  return has;
}

// ----------------------------------------------------------------------------------------------- packing
// Swaps, in a square of LANES rows of words, the blocks of STEP words beside its diagonal; done for every power of two
// below LANES, the square is transposed.
template <int64_t STEP, size_t... I>
inline void swap_blocks(Words* rows, std::index_sequence<I...>) {
  for (int64_t i = 0; i < LANES; ++i) {
    if (i & STEP) continue;
    const Words x = rows[i], y = rows[i + STEP];
    rows[i] = __builtin_shufflevector(x, y, (I & STEP ? LANES + I - STEP : I)...);
    rows[i + STEP] = __builtin_shufflevector(x, y, (I & STEP ? LANES + I : I + STEP)...);
  }
  if constexpr (STEP > 1) swap_blocks<STEP / 2>(rows, std::index_sequence<I...>());
}

// to [units, width] = from [width, units] transposed, words of 32 or 16 bits. Rows `rows`..width - 1 count as 0.
template <typename Word>
inline void transpose(const Word* from, int64_t ld, int64_t rows, int64_t width, int64_t units, Word* to,
                      int64_t ld_to) {
  for (int64_t r = 0; r < width; r += LANES) {
    const int64_t height = std::min(LANES, width - r), real = std::clamp<int64_t>(rows - r, 0, height);
    for (int64_t u = 0; u < units; u += LANES) {
      const int64_t wide = std::min(LANES, units - u);
      if constexpr (sizeof(Word) == sizeof(uint32_t)) {
        if (real == LANES && wide == LANES) {
          Words square[LANES];
          for (int64_t i = 0; i < LANES; ++i) square[i] = load<Words>(from + (r + i) * ld + u);
          swap_blocks<LANES / 2>(square, std::make_index_sequence<LANES>());
          for (int64_t i = 0; i < LANES; ++i) std::memcpy(to + (u + i) * ld_to + r, &square[i], sizeof(Words));
          continue;
        }
      }
      for (int64_t j = 0; j < wide; ++j)
        for (int64_t i = 0; i < height; ++i)
          to[(u + j) * ld_to + r + i] = i < real ? from[(r + i) * ld + u + j] : Word(0);
    }
  }
}

inline int64_t even(int64_t n) { return n + (n & 1); }
inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Numbers of a row of a product's operand.
template <typename T>
int64_t product_depth(int64_t depth) {
  return sizeof(T) < 4 ? round_up(depth, 4 / sizeof(T)) : depth;
}

// The right operand of a product from its transpose: rows [width, depth] become b [depth, width].
// `rows` of them are real; rows are whole words of 32 bits, and what lies past the depth must be 0.
inline void pack_transposed(const float* from, int64_t ld, int64_t rows, int64_t width, int64_t depth, float* to) {
  transpose(reinterpret_cast<const uint32_t*>(from), ld, rows, width, depth, reinterpret_cast<uint32_t*>(to), width);
}
inline void pack_transposed(const int8_t* from, int64_t ld, int64_t rows, int64_t width, int64_t depth, int8_t* to) {
  transpose(reinterpret_cast<const uint32_t*>(from), ld / 4, rows, width, round_up(depth, 4) / 4,
            reinterpret_cast<uint32_t*>(to), width);
}
inline void pack_transposed(const BFloat16* from, int64_t ld, int64_t rows, int64_t width, int64_t depth,
                            BFloat16* to) {
  transpose(reinterpret_cast<const uint32_t*>(from), ld / 2, rows, width, even(depth) / 2,
            reinterpret_cast<uint32_t*>(to), width);
}

// The right operand of a product from its own rows: [depth, width] becomes b; rows from `rows` on count as 0.
inline void pack_rows(const float* from, int64_t ld, int64_t rows, int64_t depth, int64_t width, float* to) {
  for (int64_t r = 0; r < depth; ++r) {
    if (r < rows) {
      std::memcpy(to + r * width, from + r * ld, width * sizeof(float));
    } else {
      std::memset(static_cast<void*>(to + r * width), 0, width * sizeof(float));
    }
  }
}
inline void pack_rows(const BFloat16* from, int64_t ld, int64_t rows, int64_t depth, int64_t width, BFloat16* to) {
  uint32_t* words = reinterpret_cast<uint32_t*>(to);
  for (int64_t r = 0; r < even(depth); r += 2, words += width) {
    const BFloat16 *first = from + r * ld, *second = first + ld;
    if (r + 1 < rows) {
      for (int64_t i = 0; i < width; ++i) words[i] = first[i].x | static_cast<uint32_t>(second[i].x) << 16;
    } else if (r < rows) {
      for (int64_t i = 0; i < width; ++i) words[i] = first[i].x;
    } else {
      std::memset(words, 0, width * sizeof(uint32_t));
    }
  }
}

// ----------------------------------------------------------------------------------------------- memory
struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Numbers in memory that grows and is used again: fresh pages cost as much as the product that fills them.
class Buffer {
 public:
  template <typename T>
  T* take(int64_t count) {
    const size_t bytes = round_up(std::max<int64_t>(count, 1) * sizeof(T), 64);
    if (bytes > held_) {
      data_.reset();
      held_ = 0;
      data_.reset(std::aligned_alloc(64, bytes));
      if (!data_) throw std::bad_alloc();
      held_ = bytes;
    }
    return static_cast<T*>(data_.get());
  }
  size_t held() const { return held_; }
  void drop() {
    data_.reset();
    held_ = 0;
  }

 private:
  std::unique_ptr<void, Free> data_;
  size_t held_ = 0;
};

// Hands out parts of one buffer: first every part is announced, then `settle` finds the memory, then parts are taken.
class Arena {
 public:
  static constexpr size_t KEPT = size_t(64) << 20;  // bytes kept between calls

  Arena() : owner_(shared_lock().try_lock()) {}
  Arena(const Arena&) = delete;
  ~Arena() {
    if (!owner_) return;
    if (shared().held() > KEPT) shared().drop();
    shared_lock().unlock();
  }
  template <typename T>
  int64_t announce(int64_t count) {
    const int64_t at = total_;
    total_ += round_up(std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(T)), 64);
    return at;
  }
  void settle() { base_ = (owner_ ? shared() : own_).template take<char>(total_); }
  template <typename T>
  T* part(int64_t at) const {
    return reinterpret_cast<T*>(base_ + at);
  }

 private:
  static std::mutex& shared_lock() {
    static std::mutex lock;
    return lock;
  }
  static Buffer& shared() {
    static Buffer buffer;
    return buffer;
  }
  bool owner_;
  Buffer own_;
  char* base_ = nullptr;
  int64_t total_ = 0;
};

// ----------------------------------------------------------------------------------------- parallel loop
// Runs work(job) for every job, on at most `threads` threads, each taking the next job when it is done with one.
// The first exception is thrown again on the calling thread.
template <typename Work>
void for_each_job(int64_t jobs, int64_t threads, bool tiles_unit, const Work& work) {
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex failing;
  const int team = static_cast<int>(std::max<int64_t>(1, std::min(threads, jobs)));
#pragma omp parallel num_threads(team) if (team > 1)
  {
    try {
      for (int64_t job = next++; job < jobs; job = next++) work(job);
    } catch (...) {
      const std::lock_guard<std::mutex> guard(failing);
      if (!failure) failure = std::current_exception();
      next = jobs;
    }
    if (tiles_unit) at::native::cpublas::brgemm_release(true);
  }
  if (failure) std::rethrow_exception(failure);
}

// Runs an entry point for Python: 0, or what went wrong in `message` and 1, or 2 where it was an argument.
template <typename Work>
int guarded(char* message, int64_t room, const Work& work) {
  message[room - 1] = 0;
  try {
    work();
    return 0;
  } catch (const std::invalid_argument& failure) {
    std::strncpy(message, failure.what(), room - 1);
    return 2;
  } catch (const std::exception& failure) {
    std::strncpy(message, failure.what(), room - 1);
  } catch (...) {
    std::strncpy(message, "unknown failure", room - 1);
  }
  return 1;
}

}  // namespace tilewise
