// Entry points of the native engine of tile attention; native.py calls them. Compiled in parts, side by side.
#include "native_decode.h"
#include "native_formats.h"

using namespace tilewise;

extern "C" {

int64_t tilewise_call_words() { return sizeof(Call) / 8; }

int64_t tilewise_bfloat16_products() { return has_bfloat16_products(); }

int64_t tilewise_int8_products() { return has_int8_products(); }

int tilewise_attend_forward(const void* call, char* message, int64_t room) {
  return guarded(message, room, [&] {
    const Call& c = *static_cast<const Call*>(call);
    if (c.lists) return attend_lists(c);
    if (c.q_scale) return attend_quantised(c);
    by_format(c, [&]<typename S, typename T>() { decodes(c) ? Decode<S, T>::run(c) : Forward<S, T>::run(c); });
  });
}

// Pieces of decoding that a unified maximum did not fit, since the last time this was asked.
int64_t tilewise_recomputed_pieces() { return recomputed_pieces().exchange(0); }

// Always fails, so that the way of an error to Python can be tested.
int tilewise_fail(const void*, char* message, int64_t room) {
  return guarded(message, room, [] { throw std::runtime_error("asked to"); });
}
}
