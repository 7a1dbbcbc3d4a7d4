// One choice of keys as the native engine sees it: the operands, how keys are cut, and what each query sees.
#pragma once

#include "../native.h"

namespace tilewise {

constexpr int64_t HIDDEN = -(int64_t(1) << 62);  // as in tiles/visibility.py
constexpr int64_t WIDE = 128;                    // keys in a panel: a product's columns
constexpr float LOWEST = -std::numeric_limits<float>::max();

// Field for field what native.py writes; every number is 64 bits wide.
struct Choice {
  Grid q, k, weight, lo, hi, pos, dense, among, quantiles, out;
  int64_t lists, block, covers, top;
  int64_t most;  // of a choice by quantile; 0 for the highest alone
  int64_t ends, latest, threads;
  double slope;

  int64_t batch() const { return q.size[0]; }
  int64_t share() const { return q.size[1] / lists; }  // heads of a list
  int64_t queries() const { return q.size[2]; }
  int64_t keys() const { return k.size[2]; }
  int64_t tokens() const { return pos.size[2]; }
  int64_t depth() const { return q.size[3]; }
  int64_t width() const { return out.size[3]; }
  int64_t key_head(int64_t list) const { return list * k.size[1] / lists; }

  int64_t pos_of(int64_t b, int64_t list) const {
    return (pos.size[0] == 1 ? 0 : b) * pos.size[1] + list * pos.size[1] / lists;
  }

  // Offset of a (batch, list) in a tensor for one batch entry or all, and for heads that divide the lists.
  int64_t base(const Grid& grid, int64_t b, int64_t list) const {
    return (grid.size[0] == 1 ? 0 : b * grid.stride[0]) + list * grid.size[1] / lists * grid.stride[1];
  }
};

// A run of keys of one block, `padded` to a width that products like.
struct Panel {
  int64_t start, width, padded;
};

// How keys are cut: blocks that queries are sought in, or a single one, and panels within them.
struct Panels {
  int64_t block, room;  // keys of a block; scores that a query's copy of it takes
  std::vector<Panel> list;
  std::vector<int64_t> first;  // of each block; one more at the end

  explicit Panels(const Choice& c) : block(c.among ? std::min(c.block, c.keys()) : c.keys()), room(round_up(block, 16)) {
    first.push_back(0);
    for (int64_t start = 0; start < c.keys(); start += block) {
      const int64_t end = std::min(start + block, c.keys());
      for (int64_t at = start; at < end; at += WIDE) {
        const int64_t width = std::min(WIDE, end - at);
        list.push_back({at, width, round_up(width, 16)});
      }
      first.push_back(static_cast<int64_t>(list.size()));
    }
  }

  int64_t blocks() const { return static_cast<int64_t>(first.size()) - 1; }
};

// How far the positions of each panel's tokens reach on every axis, for masks that are no runs of tokens.
struct Reach {
  std::vector<int64_t> low, high;  // [panels][axes]; of a panel without tokens to see, low is above high

  Reach() = default;
  Reach(const Choice& c, const Panels& panels, int64_t b, int64_t head) {
    const int64_t axes = c.lo.size[3];
    for (const Panel& panel : panels.list) {
      const int64_t from = panel.start * c.covers, to = std::min((panel.start + panel.width) * c.covers, c.tokens());
      for (int64_t a = 0; a < axes; ++a) {
        const int64_t* pos = c.pos.at<int64_t>(b * c.pos.stride[0] + head * c.pos.stride[1] + a * c.pos.stride[3]);
        int64_t least = std::numeric_limits<int64_t>::max(), most = HIDDEN;
        for (int64_t t = from; t < to; ++t) {
          const int64_t p = pos[t * c.pos.stride[2]];
          least = p == HIDDEN ? least : std::min(least, p);
          most = std::max(most, p);
        }
        low.push_back(least);
        high.push_back(most);
      }
    }
  }
};

// What the queries of one list see.
class View {
 public:
  View(const Choice& c, int64_t b, int64_t list, bool sorted)
      : c_(c), lo_(c.lo.at<int64_t>(c.base(c.lo, b, list))), hi_(c.hi.at<int64_t>(c.base(c.hi, b, list))),
        pos_(c.pos.at<int64_t>(c.base(c.pos, b, list))),
        dense_(c.dense ? c.dense.at<bool>(c.base(c.dense, b, list)) : nullptr), sorted_(sorted) {}

  // Whether positions of a (batch, head) rise, so that what a query sees is a run of tokens.
  static bool rise(const Choice& c, int64_t b, int64_t head) {
    if (c.dense || c.lo.size[3] != 1) return false;
    const int64_t* pos = c.pos.at<int64_t>(b * c.pos.stride[0] + head * c.pos.stride[1]);
    bool rises = true;
    for (int64_t t = 1; t < c.tokens(); ++t) rises &= pos[t * c.pos.stride[2]] >= pos[(t - 1) * c.pos.stride[2]];
    return rises;
  }

  bool sorted() const { return sorted_; }

  // Where positions rise: the first key that query i sees, and one past the last.
  std::pair<int64_t, int64_t> run(int64_t i) const {
    const int64_t first = tokens_below(low(i, 0)), last = high(i, 0) == MOST ? c_.tokens() : tokens_below(high(i, 0) + 1);
    if (last <= first) return {0, 0};
    return {first / c_.covers, (last + c_.covers - 1) / c_.covers};
  }

  // Elsewhere: whether any of queries `first` to `last - 1` may see some of a panel.
  bool may_see(int64_t first, int64_t last, const Reach& reach, int64_t panel) const {
    for (int64_t a = 0, axes = c_.lo.size[3]; a < axes; ++a) {
      bool any = false;
      for (int64_t i = first; i < last && !any; ++i)
        any = low(i, a) <= reach.high[panel * axes + a] && high(i, a) >= reach.low[panel * axes + a];
      if (!any) return false;
    }
    return true;
  }

  // Elsewhere: hides from query i what it does not see of `width` keys from `start` on.
  void hide(int64_t i, int64_t start, int64_t width, float* scores) const {
    if (c_.covers == 1 && !dense_) {
      for (int64_t a = 0; a < c_.lo.size[3]; ++a) {
        const int64_t *pos = pos_ + start * c_.pos.stride[2] + a * c_.pos.stride[3], by = c_.pos.stride[2];
        const int64_t lo = low(i, a), hi = high(i, a);
        for (int64_t j = 0; j < width; ++j) scores[j] = (pos[j * by] < lo) | (pos[j * by] > hi) ? -INF : scores[j];
      }
      return;
    }
    for (int64_t j = 0; j < width; ++j) {
      bool any = false;
      const int64_t from = (start + j) * c_.covers, to = std::min(from + c_.covers, c_.tokens());
      for (int64_t t = from; t < to && !any; ++t) any = sees(i, t);
      if (!any) scores[j] = -INF;
    }
  }

 private:
  static constexpr int64_t MOST = std::numeric_limits<int64_t>::max();

  int64_t low(int64_t i, int64_t a) const {
    return std::max(lo_[i * c_.lo.stride[2] + a * c_.lo.stride[3]], HIDDEN + 1);
  }
  int64_t high(int64_t i, int64_t a) const { return hi_[i * c_.hi.stride[2] + a * c_.hi.stride[3]]; }

  int64_t tokens_below(int64_t position) const {
    int64_t from = 0, to = c_.tokens();
    while (from < to) {
      const int64_t middle = (from + to) / 2;
      if (pos_[middle * c_.pos.stride[2]] < position) from = middle + 1;
      else to = middle;
    }
    return from;
  }

  bool sees(int64_t i, int64_t t) const {
    bool all = !dense_ || dense_[(c_.dense.size[2] == 1 ? 0 : i * c_.dense.stride[2]) +
                                 (c_.dense.size[3] == 1 ? 0 : t * c_.dense.stride[3])];
    for (int64_t a = 0; a < c_.lo.size[3] && all; ++a) {
      const int64_t p = pos_[t * c_.pos.stride[2] + a * c_.pos.stride[3]];
      all = p >= low(i, a) && p <= high(i, a);
    }
    return all;
  }

  const Choice& c_;
  const int64_t *lo_, *hi_, *pos_;
  const bool* dense_;
  const bool sorted_;
};

}  // namespace tilewise
