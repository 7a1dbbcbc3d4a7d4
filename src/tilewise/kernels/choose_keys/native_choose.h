// Scores of a strip of queries, block by block, and what is chosen of them.
//
// Products are of many rows: the queries that seek in a block, times the heads of their list, against the keys of a
// panel. Only the scores of one strip are held. Without blocks to seek in there is a single one, of all keys, which
// every query seeks in.
#pragma once

#include "native_select.h"

namespace tilewise {

constexpr int64_t HELD = int64_t(1) << 18;  // scores of a strip: 1 MiB, what the second cache holds
constexpr int64_t STRIP = 128, FLAT_STRIP = 64, LEAST = 8;  // queries of one
constexpr int64_t MOST_ROWS = 256;                          // rows of a product
constexpr int64_t PRODUCTS_LD = WIDE + 16;  // not a power of two, whose rows would fall into the same cache lines
constexpr int64_t FEW = 16;                 // queries for which keys are packed when they are met

inline std::atomic<int64_t>& scores_computed() {
  static std::atomic<int64_t> count{0};
  return count;
}

template <typename S, typename T>
class Choose {
 public:
  static void run(const Choice& c) { Choose(c).run(); }

 private:
  struct Seeker {
    int64_t row, slot;  // a query of the strip, and which of its blocks
  };
  struct Bench {
    Buffer memory[6];
    std::vector<std::pair<int64_t, int64_t>> runs;
    std::vector<int64_t> visible, begin;
    std::vector<Seeker> seekers;
    std::vector<Segment> segments;
    Picker picker;
  };
  struct Strip {
    int64_t b, list, first, rows;  // queries first to first + rows - 1
    const View& view;
    Bench& bench;
    float* scores;    // [rows][ld_]
    float* weights;   // [heads][rows]
    T* queries;       // [heads][rows][depth_], and some more rows
    int64_t low, high;  // keys that any of its queries may see
  };

  explicit Choose(const Choice& call)
      : c_(call), panels_(call), depth_(product_depth<T>(call.depth())), slots_(call.among ? call.among.size[3] : 1),
        ld_(slots_ * panels_.room + LANES),
        height_(std::min(call.queries(), std::clamp<int64_t>(HELD / ld_, LEAST, call.among ? STRIP : FLAT_STRIP))),
        ahead_(call.queries() >= FEW) {
    for (const Panel& panel : panels_.list) {
      offset_.push_back(packed_);
      packed_ += panel.padded * depth_;
    }
  }

  void run() {
    const int64_t heads = c_.k.size[1], panels = panels_.list.size();
    if (ahead_) {
      const int64_t at = arena_.announce<T>(c_.batch() * heads * packed_);
      arena_.settle();
      T* keys = arena_.part<T>(at);
      keys_ = keys;
      for_each_job(c_.batch() * heads * panels, c_.threads, false, [&](int64_t job) {
        const int64_t head = job / panels, panel = job % panels;
        pack(head / heads, head % heads, panel, keys + head * packed_ + offset_[panel]);
      });
    }
    find_order();
    const int64_t strips = (c_.queries() + height_ - 1) / height_;
    constexpr bool tiles_unit = std::is_same_v<T, BFloat16>;
    for_each_job(c_.batch() * c_.lists * strips, c_.threads, tiles_unit, [&](int64_t job) {
      thread_local Bench bench;
      const int64_t b = job / strips / c_.lists, list = job / strips % c_.lists;
      const int64_t first = (strips - 1 - job % strips) * height_;  // those that see most come first
      const View view(c_, b, list, rises_[c_.pos_of(b, list)]);
      choose(b, list, first, std::min(height_, c_.queries() - first), view, bench);
    });
  }

  // For each set of positions: whether they rise, and how far each panel's reach.
  void find_order() {
    const int64_t sets = c_.pos.size[0] * c_.pos.size[1];
    rises_.resize(sets);
    reach_.resize(sets);
    for_each_job(sets, c_.threads, false, [&](int64_t set) {
      const int64_t b = set / c_.pos.size[1], head = set % c_.pos.size[1];
      rises_[set] = View::rise(c_, b, head);
      if (!rises_[set]) reach_[set] = Reach(c_, panels_, b, head);
    });
  }

  void pack(int64_t b, int64_t head, int64_t panel, T* to) const {
    thread_local Buffer memory;
    const Panel& at = panels_.list[panel];
    T* rows = memory.take<T>(WIDE * depth_ + 64);
    const S* from = c_.k.at<S>(b * c_.k.stride[0] + head * c_.k.stride[1] + at.start * c_.k.stride[2]);
    for (int64_t j = 0; j < at.width; ++j) {
      copy_row(from + j * c_.k.stride[2], c_.k.stride[3], c_.depth(), rows + j * depth_);
      for (int64_t d = c_.depth(); d < depth_; ++d) put(rows[j * depth_ + d], 0.f);
    }
    pack_transposed(rows, depth_, at.width, at.padded, c_.depth(), to);
  }

  void choose(int64_t b, int64_t list, int64_t first, int64_t rows, const View& view, Bench& w) const {
    const int64_t heads = c_.share();
    Strip strip{b, list, first, rows, view, w, w.memory[0].template take<float>(height_ * ld_),
                w.memory[1].template take<float>(heads * rows),
                w.memory[2].template take<T>((heads * rows + 16) * depth_), c_.keys(), 0};
    if (look(strip)) {
      load_queries(strip);
      score(strip);
    }
    for (int64_t r = 0; r < rows; ++r) pick(strip, r);
  }

  // What the queries see; whether any of them sees so much that scores are needed.
  bool look(Strip& strip) const {
    Bench& w = strip.bench;
    w.runs.assign(strip.rows, {0, c_.keys()});
    w.visible.assign(strip.rows, -1);
    if (!strip.view.sorted()) {
      strip.low = 0;
      strip.high = c_.keys();
      return true;
    }
    bool needed = false;
    for (int64_t r = 0; r < strip.rows; ++r) {
      const auto [low, high] = w.runs[r] = strip.view.run(strip.first + r);
      strip.low = std::min(strip.low, high > low ? low : c_.keys());
      strip.high = std::max(strip.high, high);
      w.visible[r] = 0;
      for (int64_t slot = 0; slot < slots_; ++slot) {
        const auto [start, end] = sought(strip, r, slot);
        w.visible[r] += end - start;
      }
      needed = needed || w.visible[r] > c_.top;
    }
    return needed;
  }

  // The block in a query's slot, or -1.
  int64_t block_of(const Strip& strip, int64_t r, int64_t slot) const {
    if (!c_.among) return 0;
    const int64_t at = strip.b * c_.among.stride[0] + strip.list * c_.among.stride[1] +
                       (strip.first + r) * c_.among.stride[2] + slot * c_.among.stride[3];
    const int64_t block = *c_.among.at<int32_t>(at);
    return block < panels_.blocks() ? block : -1;
  }

  // Keys of a query's block that it may see.
  std::pair<int64_t, int64_t> sought(const Strip& strip, int64_t r, int64_t slot) const {
    const int64_t block = block_of(strip, r, slot);
    if (block < 0) return {0, 0};
    const auto [low, high] = strip.bench.runs[r];
    const int64_t start = std::max(low, block * panels_.block);
    return {start, std::max(start, std::min({high, (block + 1) * panels_.block, c_.keys()}))};
  }

  void load_queries(const Strip& strip) const {
    for (int64_t s = 0; s < c_.share(); ++s)
      for (int64_t r = 0; r < strip.rows; ++r) {
        const int64_t h = strip.list * c_.share() + s, i = strip.first + r;
        T* to = strip.queries + (s * strip.rows + r) * depth_;
        copy_row(c_.q.at<S>(strip.b * c_.q.stride[0] + h * c_.q.stride[1] + i * c_.q.stride[2]), c_.q.stride[3],
                 c_.depth(), to);
        for (int64_t d = c_.depth(); d < depth_; ++d) put(to[d], 0.f);
        strip.weights[s * strip.rows + r] =
            c_.weight ? c_.weight.at<float>(strip.b * c_.weight.stride[0] + h * c_.weight.stride[1])[i * c_.weight.stride[2]]
                      : 1.f;
      }
    std::memset(static_cast<void*>(strip.queries + c_.share() * strip.rows * depth_), 0, 16 * depth_ * sizeof(T));
  }

  // Who seeks in which block: those of block n are seekers begin[n] to begin[n + 1] - 1, by row.
  void find_seekers(const Strip& strip) const {
    Bench& w = strip.bench;
    w.begin.assign(panels_.blocks() + 1, 0);
    const auto each = [&](const auto& work) {
      for (int64_t r = 0; r < strip.rows; ++r)
        for (int64_t slot = 0; slot < slots_; ++slot)
          if (const int64_t block = block_of(strip, r, slot); block >= 0) work(block, Seeker{r, slot});
    };
    each([&](int64_t block, Seeker) { ++w.begin[block]; });
    int64_t total = 0;
    for (int64_t& begin : w.begin) total += std::exchange(begin, total);
    w.seekers.resize(total);
    each([&](int64_t block, Seeker seeker) { w.seekers[w.begin[block]++] = seeker; });
    for (int64_t block = panels_.blocks(); block > 0; --block) w.begin[block] = w.begin[block - 1];
    w.begin[0] = 0;
  }

  void score(const Strip& strip) const {
    find_seekers(strip);
    const Bench& w = strip.bench;
    for (int64_t block = 0; block < panels_.blocks(); ++block) {
      const Seeker* seekers = w.seekers.data() + w.begin[block];
      const int64_t count = w.begin[block + 1] - w.begin[block];
      if (!count) continue;
      for (int64_t at = panels_.first[block]; at < panels_.first[block + 1]; ++at) {
        const Panel& panel = panels_.list[at];
        const int64_t inner = panel.start - block * panels_.block;
        if (strip.view.sorted()) {
          if (panel.start < strip.high && panel.start + panel.width > strip.low) multiply(strip, at, seekers, count, inner);
          continue;
        }
        const Reach& reach = reach_[c_.pos_of(strip.b, strip.list)];
        const bool seen = strip.view.may_see(strip.first, strip.first + strip.rows, reach, at);
        if (seen) multiply(strip, at, seekers, count, inner);
        for (int64_t s = 0; s < count; ++s) {
          float* row = place(strip, seekers[s]) + inner;
          if (seen) strip.view.hide(strip.first + seekers[s].row, panel.start, panel.width, row);
          else std::fill(row, row + panel.width, -INF);
        }
      }
    }
  }

  float* place(const Strip& strip, Seeker seeker) const {
    return strip.scores + seeker.row * ld_ + seeker.slot * panels_.room;
  }

  // Scores of some queries against a panel, `inner` keys into their blocks.
  void multiply(const Strip& strip, int64_t at, const Seeker* seekers, int64_t count, int64_t inner) const {
    Bench& w = strip.bench;
    const Panel& panel = panels_.list[at];
    const int64_t heads = c_.share(), together = std::max<int64_t>(1, MOST_ROWS / count);
    const T* keys = ahead_ ? keys_ + (strip.b * c_.k.size[1] + c_.key_head(strip.list)) * packed_ + offset_[at] : nullptr;
    if (!keys) {
      T* own = w.memory[3].template take<T>(WIDE * depth_);
      pack(strip.b, c_.key_head(strip.list), at, own);
      keys = own;
    }
    for (int64_t s = 0; s < heads; s += together) {
      const int64_t some = std::min(together, heads - s), rows = count * some;
      // A product is compiled for every number of rows that it has not yet had.
      const int64_t padded = rows <= 4 ? rows : round_up(rows, 16);
      const T* queries = strip.queries + s * strip.rows * depth_;
      if (count < strip.rows) queries = gather(strip, seekers, count, s, some, padded);
      float* products = w.memory[4].template take<float>(padded * PRODUCTS_LD);
      scores_computed() += padded * panel.padded;
      product(padded, panel.padded, depth_, queries, depth_, keys, panel.padded, products, PRODUCTS_LD, false);
      for (int64_t e = 0; e < count; ++e) {
        const float* own = products + e * PRODUCTS_LD;
        const float* weights = strip.weights + s * strip.rows + seekers[e].row;
        add_heads(own, count * PRODUCTS_LD, weights, strip.rows, some, panel.padded, s == 0, s + some == heads,
                  place(strip, seekers[e]) + inner);
      }
    }
  }

  const T* gather(const Strip& strip, const Seeker* seekers, int64_t count, int64_t s, int64_t heads,
                  int64_t padded) const {
    T* to = strip.bench.memory[5].template take<T>(padded * depth_);
    T* at = to;
    for (int64_t h = s; h < s + heads; ++h)
      for (int64_t e = 0; e < count; ++e, at += depth_)
        std::memcpy(static_cast<void*>(at), strip.queries + (h * strip.rows + seekers[e].row) * depth_, depth_ * sizeof(T));
    std::memset(static_cast<void*>(at), 0, (to + padded * depth_ - at) * sizeof(T));
    return to;
  }

  // scores (+)= sum of weights times rectified products of some heads; what is not a number is infinite in the end.
  void add_heads(const float* products, int64_t by, const float* weights, int64_t weights_by, int64_t heads, int64_t n,
                 bool first, bool last, float* scores) const {
    const float slope = static_cast<float>(c_.slope);
    const Floats none = {};
    for (int64_t j = 0; j < n; j += LANES) {
      Floats sum = first ? none : load<Floats>(scores + j);
      for (int64_t s = 0; s < heads; ++s) {
        const Floats x = load<Floats>(products + s * by + j);
        sum += (x > none ? x : x * slope) * weights[s * weights_by];
      }
      if (last) {
        sum = sum == sum ? sum : none + INF;
        sum = sum > none + LOWEST ? sum : none + LOWEST;
      }
      store(scores + j, sum);
    }
  }

  void pick(const Strip& strip, int64_t r) const {
    Bench& w = strip.bench;
    w.segments.clear();
    int64_t visible = 0;
    for (int64_t slot = 0; slot < slots_; ++slot) {
      const auto [start, end] = sought(strip, r, slot);
      if (end <= start) continue;
      float* scores = place(strip, {r, slot}) + (c_.among ? start % panels_.block : start);
      w.segments.push_back({scores, end - start, start});
      if (strip.view.sorted()) continue;
      for (int64_t j = 0; j < end - start; ++j) visible += scores[j] > -INF;
    }
    if (strip.view.sorted()) visible = w.visible[r];
    const auto [keys, count] = w.picker.pick(c_, w.segments.data(), w.segments.size(), visible);
    int32_t* out = c_.out.at<int32_t>(strip.b * c_.out.stride[0] + strip.list * c_.out.stride[1] +
                                      (strip.first + r) * c_.out.stride[2]);
    std::copy(keys, keys + count, out);
    std::fill(out + count, out + c_.width(), -1);
  }

  const Choice& c_;
  const Panels panels_;
  const int64_t depth_, slots_, ld_, height_;
  const bool ahead_;
  std::vector<int64_t> offset_;  // of each packed panel
  int64_t packed_ = 0;           // numbers of a head
  const T* keys_ = nullptr;
  std::vector<uint8_t> rises_;
  std::vector<Reach> reach_;
  Arena arena_;
};

}  // namespace tilewise
