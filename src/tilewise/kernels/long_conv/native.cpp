// Entry points of the native engine of the long convolution; native.py calls them.
#include "native_backward.h"

using namespace tilewise;

extern "C" {

int64_t tilewise_long_conv_words() { return sizeof(Conv) / 8; }

int64_t tilewise_long_conv_leaf() { return LEAF; }

int tilewise_long_conv_forward(const void* call, char* message, int64_t room) {
  return guarded(message, room, [&] { run_forward(*static_cast<const Conv*>(call)); });
}

int tilewise_long_conv_backward(const void* call, char* message, int64_t room) {
  return guarded(message, room, [&] { run_backward(*static_cast<const Conv*>(call)); });
}

int tilewise_long_conv_prepare(const void* call, char* message, int64_t room) {
  return guarded(message, room, [&] { run_prepare(*static_cast<const Conv*>(call)); });
}
}
