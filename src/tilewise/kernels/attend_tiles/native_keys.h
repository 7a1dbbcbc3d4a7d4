// Keys and values laid out for products: chunk by chunk, permuted, padded, in the number format of the products.
#pragma once

#include "native_scores.h"

namespace tilewise {

// One entry for each (batch, kv head), or a single one where the heads do not differ.
template <typename Entry>
struct PerHead {
  std::vector<Entry> entries;
  int64_t heads = 1;
  const Entry& at(int64_t b, int64_t kv) const { return entries[entries.size() == 1 ? 0 : b * heads + kv]; }
};

inline bool shared_by_heads(const Grid& grid) { return !grid || (grid.size[0] == 1 && grid.size[1] == 1); }

// Some consecutive heads of all, counted through batch entries and kv heads.
struct Span {
  int64_t first, last;
};

// Heads are worked on in spans, so that what is packed of them stays small and its memory is used again.
inline std::vector<Span> spans(const Call& c, int64_t bytes_per_head) {
  constexpr int64_t HELD = int64_t(48) << 20;
  const int64_t total = c.batch() * c.kv_heads();
  const int64_t most = std::clamp<int64_t>(HELD / std::max<int64_t>(bytes_per_head, 1), 1, std::max<int64_t>(total, 1));
  const int64_t even = most > c.threads ? most / c.threads * c.threads : most;
  std::vector<Span> all;
  for (int64_t first = 0; first < total; first += even) all.push_back({first, std::min(first + even, total)});
  return all;
}

inline PerHead<Chunks> chunk_all(const Call& c, int64_t k_size, int64_t longest = KEYS) {
  PerHead<Chunks> all;
  all.heads = c.kv_heads();
  const bool same = shared_by_heads(c.k_bounds);
  for (int64_t b = 0; b < (same ? 1 : c.batch()); ++b)
    for (int64_t kv = 0; kv < (same ? 1 : c.kv_heads()); ++kv)
      all.entries.emplace_back(cut(c, c.k_bounds, k_size, c.keys(), b, kv * c.group()), longest);
  return all;
}

inline PerHead<Positions> position_all(const Call& c, const PerHead<Chunks>& chunks) {
  PerHead<Positions> all;
  all.heads = c.kv_heads();
  const bool same = shared_by_heads(c.pos) && shared_by_heads(c.k_order) && shared_by_heads(c.k_bounds);
  const int64_t heads = same ? 1 : c.batch() * c.kv_heads();
  all.entries.resize(heads);
  for_each_job(heads, c.threads, false, [&](int64_t job) {
    const int64_t b = job / c.kv_heads(), kv = job % c.kv_heads();
    all.entries[job].fill(c, b, kv, chunks.at(b, kv));
  });
  return all;
}

// How the keys of a call are cut and where they stand.
struct KeyAxis {
  PerHead<Chunks> chunks;
  PerHead<Positions> positions;
  int64_t longest = 0;  // padded keys of a head

  explicit KeyAxis(const Call& c) : chunks(chunk_all(c, c.keep ? c.k_size : KEYS)), positions(position_all(c, chunks)) {
    for (const Chunks& head : chunks.entries) longest = std::max(longest, head.padded);
  }
};

// Rows of chunk `at` of x, in order: [at.width, depth], each `ld` long with zeros behind.
template <typename S, typename T>
void chunk_rows(const Call& c, const Grid& x, int64_t b, int64_t kv, const Chunk& at, T* to, int64_t ld) {
  const int64_t order = c.k_order ? c.base(c.k_order, b, kv * c.group()) : 0;
  for (int64_t j = 0; j < at.width; ++j) {
    const int64_t t = token(c.k_order, order, at.start + j);
    copy_row(x.at<S>(c.row(x, b, kv, t)), x.stride[3], x.size[3], to + j * ld);
    std::memset(static_cast<void*>(to + j * ld + x.size[3]), 0, (ld - x.size[3]) * sizeof(T));
  }
}

// The rows of chunk `at` of x where they lie, or null where they must be copied: another format, order or depth.
template <typename S, typename T>
const T* rows_in_place(const Call& c, const Grid& x, int64_t b, int64_t kv, const Chunk& at, int64_t depth) {
  if constexpr (std::is_same_v<S, T>) {
    const bool fits = !c.k_order && !c.pages && x.stride[3] == 1 && x.size[3] == depth && x.stride[2] * sizeof(T) % 4 == 0;
    const T* own = x.at<S>(c.row(x, b, kv, at.start));
    if (fits && reinterpret_cast<uintptr_t>(own) % 4 == 0) return own;  // packing reads words
  }
  return nullptr;
}

// Which forms of the keys and values a pass needs.
enum Forms : int { K_RIGHT = 1, V_RIGHT = 2, K_LEFT = 4, V_LEFT = 8, K_TURNED = 16 };

// K_RIGHT: keys^T as right operand [depth, width]. V_RIGHT: values as right operand [width, values].
// K_LEFT, V_LEFT: rows as left operands [padded, depth]. K_TURNED: keys^T as left operand [depth, padded].
// With K = int8_t keys are packed as they come and K_RIGHT is all there is of them, with `factors` and `shifts`: a
// product p of a query q + 128 without sign is worth p * factor + shift.
template <typename T, typename K = T>
struct PackedKeys {
  static constexpr bool INTEGERS = std::is_same_v<K, int8_t>;
  const PerHead<Chunks>& chunks;
  const Span span;
  int64_t depth, values, heads;
  K* k_right = nullptr;
  T *v_right = nullptr, *k_left = nullptr, *v_left = nullptr, *k_turned = nullptr;
  float *factors = nullptr, *shifts = nullptr;

  PackedKeys(const Call& c, const PerHead<Chunks>& all, Span which, Arena& arena, int forms)
      : chunks(all), span(which), depth(product_depth<K>(c.depth())), values(product_depth<T>(c.values())),
        heads(c.kv_heads()) {
    begin_.push_back(0);
    for (int64_t i = span.first; i < span.last; ++i)
      begin_.push_back(begin_.back() + all.at(i / heads, i % heads).padded);
    const int64_t total = begin_.back();
    const int64_t sizes[] = {total * depth, total * c.values(), total * depth, total * values, total * depth};
    if (forms & K_RIGHT) at_[0] = arena.announce<K>(sizes[0]);
    for (int f = 1; f < 5; ++f)
      if (forms >> f & 1) at_[f] = arena.announce<T>(sizes[f]);
    for (int f = 5; f < 7 && INTEGERS; ++f) at_[f] = arena.announce<float>(total);
  }

  // First padded key of a head in the packed arrays.
  int64_t begin(int64_t b, int64_t kv) const { return begin_[b * heads + kv - span.first]; }

  template <typename S>
  void fill(const Call& c, const Arena& arena, int forms) {
    T** parts[] = {nullptr, &v_right, &k_left, &v_left, &k_turned};
    if (forms & K_RIGHT) k_right = arena.part<K>(at_[0]);
    for (int f = 1; f < 5; ++f)
      if (forms >> f & 1) *parts[f] = arena.part<T>(at_[f]);
    if constexpr (INTEGERS) {
      factors = arena.part<float>(at_[5]);
      shifts = arena.part<float>(at_[6]);
    }
    constexpr int64_t TOGETHER = 8;  // chunks in one job
    std::vector<int64_t> jobs;       // (head, first chunk), one after the other
    for (int64_t head = span.first; head < span.last; ++head) {
      const int64_t count = chunks.at(head / heads, head % heads).list.size();
      for (int64_t i = 0; i < count; i += TOGETHER) jobs.insert(jobs.end(), {head, i});
    }
    for_each_job(jobs.size() / 2, c.threads, false, [&](int64_t job) {
      const int64_t head = jobs[2 * job], b = head / heads, kv = head % heads;
      const std::vector<Chunk>& list = chunks.at(b, kv).list;
      const int64_t last = std::min<int64_t>(jobs[2 * job + 1] + TOGETHER, list.size());
      for (int64_t i = jobs[2 * job + 1]; i < last; ++i) pack<S>(c, b, kv, list[i], begin(b, kv) + list[i].offset);
    });
  }

 private:
  template <typename S>
  void pack(const Call& c, int64_t b, int64_t kv, const Chunk& at, int64_t slot) {
    thread_local Buffer memory;
    T* rows = memory.take<T>(KEYS * std::max(depth, values) + 64);
    if constexpr (INTEGERS) {
      pack_integers(c, b, kv, at, slot, reinterpret_cast<int8_t*>(rows));
    } else if (k_right || k_left || k_turned) {
      const T* own = k_left || k_turned ? nullptr : rows_in_place<S, T>(c, c.k, b, kv, at, depth);
      const int64_t ld = own ? c.k.stride[2] : depth;
      if (!own) {
        T* keys = k_left ? k_left + slot * depth : rows;
        chunk_rows<S>(c, c.k, b, kv, at, keys, depth);
        std::memset(static_cast<void*>(keys + at.width * depth), 0, (at.padded - at.width) * depth * sizeof(T));
        if (k_turned) turn(keys, at.padded, k_turned + slot * depth);
        own = keys;
      }
      if (k_right) pack_transposed(own, ld, at.width, at.padded, c.depth(), k_right + slot * depth);
    }
    if (v_right || v_left) {
      const T* own = v_left ? nullptr : rows_in_place<S, T>(c, c.v, b, kv, at, values);
      const int64_t ld = own ? c.v.stride[2] : values;
      if (!own) {
        T* from = v_left ? v_left + slot * values : rows;
        chunk_rows<S>(c, c.v, b, kv, at, from, values);
        std::memset(static_cast<void*>(from + at.width * values), 0, (at.padded - at.width) * values * sizeof(T));
        own = from;
      }
      if (v_right) pack_rows(own, ld, at.width, at.padded, c.values(), v_right + slot * c.values());
    }
  }

  void pack_integers(const Call& c, int64_t b, int64_t kv, const Chunk& at, int64_t slot, int8_t* rows) {
    chunk_rows<int8_t>(c, c.k, b, kv, at, rows, depth);
    pack_transposed(rows, depth, at.width, at.padded, depth, k_right + slot * depth);
    const int64_t order = c.k_order ? c.base(c.k_order, b, kv * c.group()) : 0;
    const float* scales = c.k_scale.at<float>(b * c.k_scale.stride[0] + kv * c.k_scale.stride[1]);
    for (int64_t j = 0; j < at.padded; ++j) {
      int32_t sum = 0;
      for (int64_t d = 0; d < depth && j < at.width; ++d) sum += rows[j * depth + d];
      factors[slot + j] = j < at.width ? scales[token(c.k_order, order, at.start + j) * c.k_scale.stride[2]] : 0;
      shifts[slot + j] = -128.f * static_cast<float>(sum) * factors[slot + j];
    }
  }

  void turn(const T* rows, int64_t padded, T* to) const {
    using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
    transpose(reinterpret_cast<const Word*>(rows), depth, padded, padded, depth, reinterpret_cast<Word*>(to), padded);
  }

  std::vector<int64_t> begin_;
  int64_t at_[7] = {};
};

}  // namespace tilewise
