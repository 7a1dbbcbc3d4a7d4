// One call of the gated networks as the native engine sees it: sequences, blocks of them, and who works on which units.
#pragma once

#include <thread>

#include "../native.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace tilewise {

constexpr int64_t STREAMED = int64_t(8) << 20;  // bytes kept from which on they are written past the caches

enum Network : int64_t { ELMAN = 0, LSTM = 1, GRU = 2, SLSTM = 3 };

// Field for field what native.py writes; every number is 64 bits wide. The last axis of wx, out and their gradients, of
// length `width`, is not among their four and has stride 1.
struct Rnn {
  Grid wx, R, bias, state, mask, offsets, out, after, kept;
  Grid d_out, d_after, d_wx, d_R, d_bias, d_state;
  int64_t network, width, threads;
  int64_t rows;   // sequences of a block, which go through time together
  int64_t team;   // threads that share a block, each with units of its own
  int64_t parts;  // of the blocks of a head, which are worked on at the same time
  int64_t depth;  // tokens whose gradients are gathered before they go into that of R

  int64_t heads() const { return R.size[0]; }
  int64_t gates() const { return R.size[1]; }
  int64_t sequences() const { return offsets ? offsets.size[0] - 1 : wx.size[0]; }
  int64_t vectors() const { return (width + LANES - 1) / LANES; }
  int64_t padded() const { return vectors() * LANES; }
  // Rows of what is kept are padded to 16 numbers, whatever the machine's registers hold.
  int64_t kept_width() const { return round_up(width, 16); }
  // Whether what is kept goes past the caches: it does not fit them.
  bool streams() const {
    const int64_t size = kept ? kept.size[0] * kept.stride[0] * 4 : 0;
    return size > STREAMED && reinterpret_cast<uintptr_t>(kept.data) % 64 == 0;
  }
  int64_t blocks() const { return (sequences() + rows - 1) / rows; }
  bool is_passed_over(int64_t b, int64_t t) const {
    return mask && !mask.at<bool>()[b * mask.stride[0] + t * mask.stride[1]];
  }
};

// Writes a line of 64 bytes past the caches, which would have forgotten it when it is read: nothing is read from memory
// first. Where a register is not a line it is an ordinary store.
inline void stream(float* to, Floats x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, same_bits<__m512>(x));
#else
  store(to, x);
#endif
}
inline void end_streams() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

struct Sequence {
  int64_t number, b, start, length;
};

// The longest first, so that those of a block that have ended are its last.
inline std::vector<Sequence> sequences(const Rnn& c) {
  std::vector<Sequence> all;
  const int64_t* at = c.offsets ? c.offsets.at<int64_t>() : nullptr;
  for (int64_t s = 0; s < c.sequences(); ++s) {
    const int64_t start = at ? at[s * c.offsets.stride[0]] : 0;
    const int64_t end = at ? at[(s + 1) * c.offsets.stride[0]] : c.wx.size[2];
    all.push_back({s, at ? 0 : s, start, end - start});
  }
  std::stable_sort(all.begin(), all.end(), [](const Sequence& x, const Sequence& y) { return x.length > y.length; });
  return all;
}

// Sequences of a block of one head.
struct Block {
  int64_t head, rows;
  const Sequence* sequence;

  int64_t length() const { return rows ? sequence[0].length : 0; }
  int64_t live(int64_t t) const {  // how many have a token t
    int64_t n = rows;
    while (n && sequence[n - 1].length <= t) --n;
    return n;
  }
};

inline Block block_of(const Rnn& c, const std::vector<Sequence>& all, int64_t head, int64_t number) {
  const int64_t first = number * c.rows;
  return {head, std::min<int64_t>(c.rows, static_cast<int64_t>(all.size()) - first), all.data() + first};
}

// Where threads that share a block wait for one another after every token.
struct alignas(64) Meeting {
  std::atomic<int64_t> arrived{0};
  alignas(64) std::atomic<int64_t> round{0};

  void wait(int64_t members) {
    if (members == 1) return;
    const int64_t now = round.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == members) {
      arrived.store(0, std::memory_order_relaxed);
      round.store(now + 1, std::memory_order_release);
      return;
    }
    for (int64_t spins = 0; round.load(std::memory_order_acquire) == now; ++spins) {
      if (spins > 20000) std::this_thread::yield();  // someone else has the processor
#if defined(__SSE__)
      _mm_pause();
#endif
    }
  }
};

// One of the threads of a call.
struct Worker {
  int64_t team, member, group, groups;
  Meeting* meeting;

  void wait() const { meeting->wait(team); }
  // The vectors of units that are this one's.
  int64_t first(int64_t vectors) const { return vectors * member / team; }
  int64_t last(int64_t vectors) const { return vectors * (member + 1) / team; }
};

// Runs stages one after the other on all threads, each when all are done with the one before: stage(worker) for every
// stage. Teams are made of the threads that there really are. Nothing in a stage may throw.
template <typename... Stages>
void in_teams(int64_t threads, int64_t team, const Stages&... stages) {
  std::vector<Meeting> meetings(threads);
  std::atomic<int64_t> arrived{0};
  const int wanted = static_cast<int>(threads);
#pragma omp parallel num_threads(wanted) if (wanted > 1)
  {
    const int64_t me = arrived++;
#pragma omp barrier
    const int64_t all = arrived, size = std::min(team, all), groups = all / size;
    const Worker worker{size, me % size, me / size, groups, &meetings[me / size]};
    const auto run = [&](const auto& stage) {
      if (worker.group < groups) stage(worker);
#pragma omp barrier
    };
    (run(stages), ...);
  }
}

// Jobs of a stage: a team alone takes the next one when it is done, teams of several take turns.
template <typename Work>
void for_own_jobs(const Worker& worker, int64_t jobs, std::atomic<int64_t>& next, const Work& work) {
  if (worker.team == 1) {
    for (int64_t job = next++; job < jobs; job = next++) work(job);
  } else {
    for (int64_t job = worker.group; job < jobs; job += worker.groups) work(job);
  }
}

}  // namespace tilewise
