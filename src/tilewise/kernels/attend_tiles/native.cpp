// Entry points of the native engine of tile attention; native.py calls them.
#include "native_backward.h"
#include "native_decode.h"
#include "native_round.h"

namespace {

using namespace tilewise;

// Calls work.operator()<S, T>() for the stored format S and the format T of the products.
template <typename Work>
void by_format(const Call& c, const Work& work) {
  switch (c.v.kind) {
    case FLOAT32: return work.template operator()<float, float>();
    case FLOAT16: return work.template operator()<Half, float>();
    default:
      if (has_bfloat16_products()) return work.template operator()<BFloat16, BFloat16>();
      return work.template operator()<BFloat16, float>();
  }
}

}  // namespace

extern "C" {

int64_t tilewise_call_words() { return sizeof(Call) / 8; }

int tilewise_bfloat16_products() { return has_bfloat16_products(); }

int tilewise_int8_products() { return has_int8_products(); }

int tilewise_attend_forward(const void* call, char* message, int64_t room) {
  return guarded(message, room, [&] {
    const Call& c = *static_cast<const Call*>(call);
    by_format(c, [&]<typename S, typename T>() {
      if (c.q_scale) return Forward<S, T, uint8_t>::run(c);
      decodes(c) ? Decode<S, T>::run(c) : Forward<S, T>::run(c);
    });
  });
}

// Pieces of decoding that a unified maximum did not fit, since the last time this was asked.
int64_t tilewise_recomputed_pieces() { return recomputed_pieces().exchange(0); }

int tilewise_round_tokens(const void* rounding, char* message, int64_t room) {
  return guarded(message, room, [&] {
    const Rounding& r = *static_cast<const Rounding*>(rounding);
    switch (r.x.kind) {
      case FLOAT32: return Round<float>(r).run();
      case FLOAT16: return Round<Half>(r).run();
      default: return Round<BFloat16>(r).run();
    }
  });
}

// Always fails, so that the way of an error to Python can be tested.
int tilewise_fail(const void*, char* message, int64_t room) {
  return guarded(message, room, [] { throw std::runtime_error("asked to"); });
}

int tilewise_attend_backward(const void* call, char* message, int64_t room) {
  return guarded(message, room, [&] {
    const Call& c = *static_cast<const Call*>(call);
    by_format(c, [&]<typename S, typename T>() { Backward<S, T>::run(c); });
  });
}
}
