// The softmax of blocks of scores, one pass over them.
//
// The weights of a query are relative to its base, a whole power of two next to the largest of its first scores.
// It is raised only when a later score lies 2^RISE above, which is rare; then what was added before is multiplied by
// a power of two, which rounds nothing. So a query's result depends on nothing that other queries of the block see.
// Sums are kept lane by lane and added up at the end.
#pragma once

#include "native_scores.h"

namespace tilewise {

constexpr int64_t BLOCK = 64;      // queries whose scores against one chunk lie in the nearest cache: 36 KiB
constexpr int64_t BLOCK_LD = KEYS + 16;  // not a power of two, whose rows would fall into the same cache lines
constexpr float RISE = 20;
constexpr float NO_BASE = -3e38f;  // of a query that has seen nothing: any score lies far above it

// A row of scores as the products leave them: floats, or integers that factors and shifts of their keys turn into
// floats.
struct FloatRow {
  const float* at;
  Floats operator()(int64_t j) const { return load<Floats>(at + j); }
  FloatRow next() const { return {at + BLOCK_LD}; }
};
struct IntRow {
  const int32_t* at;
  const float *factors, *shifts;
  Floats operator()(int64_t j) const {
    return __builtin_convertvector(load<Ints>(at + j), Floats) * load<Floats>(factors + j) + load<Floats>(shifts + j);
  }
  IntRow next() const { return {at + BLOCK_LD, factors, shifts}; }
};

// Weights of a block of scores, `n` columns, of the queries `which`: 2^(factor * score - base), the factor being that
// of the row. Their sums go to fresh [rows, LANES]. Returns whether all scores lie low enough above their bases.
template <bool brief, typename Row, typename T>
inline bool weigh(Row scores, int64_t rows, int64_t n, const float* factors, const float* bases, const int64_t* which,
                  T* weights, int64_t ld, float* fresh) {
  Floats highest = Floats{} - INF;
  for (int64_t i = 0; i < rows; ++i, scores = scores.next(), weights += ld, fresh += LANES) {
    const float base = bases[which[i]], factor = factors[i];
    Floats sum = {}, other = {};
    int64_t j = 0;
    for (; j + 2 * LANES <= n; j += 2 * LANES) {
      const Floats x = scores(j) * factor - base, y = scores(j + LANES) * factor - base;
      const Floats v = exp2_of<brief>(x), w = exp2_of<brief>(y);
      store(weights + j, v, w);
      sum += v;
      other += w;
      highest = x > highest ? x : highest;
      highest = y > highest ? y : highest;
    }
    for (; j < n; j += LANES) {
      const Floats x = scores(j) * factor - base, v = exp2_of<brief>(x);
      store(weights + j, v);
      sum += v;
      highest = x > highest ? x : highest;
    }
    store(fresh, sum + other);
  }
  return largest_of(highest) <= RISE;
}

// Running sums of queries.
struct Sums {
  float* bases;
  float* lanes;  // [queries, LANES]

  void clear(int64_t queries) {
    std::fill(bases, bases + queries, NO_BASE);
    std::memset(lanes, 0, queries * LANES * sizeof(float));
  }

  void add(int64_t query, const float* fresh) {
    float* own = lanes + query * LANES;
    store(own, load<Floats>(own) + load<Floats>(fresh));
  }

  float total(int64_t query) const { return sum_of(load<Floats>(lanes + query * LANES)); }
  bool empty(int64_t query, float total) const { return bases[query] == NO_BASE && total == 0; }
  float lse(int64_t query, float total) const { return (bases[query] + std::log2(total)) / LOG2E; }

  // A base for the query that fits scores up to `top`; returns what all it has must be multiplied by.
  float raise(int64_t query, float top) {
    float& base = bases[query];
    if (!(top > base + RISE)) return 1;
    const float before = base;
    base = std::ceil(top);
    const float keep = before == NO_BASE ? 1.f : std::exp2(before - base);
    for (int64_t l = 0; l < LANES; ++l) lanes[query * LANES + l] *= keep;
    return keep;
  }
};

}  // namespace tilewise
