// Entry points of the native engine of the gated networks; native.py calls them.
#include "native_backward.h"

using namespace tilewise;

namespace {
template <typename N, typename Work>
void by_format(const Rnn& c, const Work& work) {
  switch (c.wx.kind) {
    case FLOAT32: return work.template operator()<N, float>();
    case FLOAT16: return work.template operator()<N, Half>();
    default: return work.template operator()<N, BFloat16>();
  }
}

template <typename Work>
void by_network(const Rnn& c, const Work& work) {
  switch (c.network) {
    case ELMAN: return by_format<Elman>(c, work);
    case LSTM: return by_format<Lstm>(c, work);
    case GRU: return by_format<Gru>(c, work);
    default: return by_format<Slstm>(c, work);
  }
}
}  // namespace

extern "C" {

int64_t tilewise_gated_rnn_words() { return sizeof(Rnn) / 8; }

int tilewise_gated_rnn_forward(const void* call, char* message, int64_t room) {
  return guarded(message, room, [&] {
    const Rnn& c = *static_cast<const Rnn*>(call);
    by_network(c, [&]<typename N, typename S>() { run_forward<N, S>(c); });
  });
}

int tilewise_gated_rnn_backward(const void* call, char* message, int64_t room) {
  return guarded(message, room, [&] {
    const Rnn& c = *static_cast<const Rnn*>(call);
    by_network(c, [&]<typename N, typename S>() { run_backward<N, S>(c); });
  });
}
}
