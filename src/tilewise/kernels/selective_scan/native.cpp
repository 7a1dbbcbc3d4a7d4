// Entry points of the native engine of the selective scan; native.py calls them.
#include "native_backward.h"

using namespace tilewise;

extern "C" {

int64_t tilewise_selective_scan_words() { return sizeof(Scan) / 8; }

int tilewise_selective_scan_forward(const void* call, char* message, int64_t room) {
  return guarded(message, room, [&] { run_forward(*static_cast<const Scan*>(call)); });
}

int tilewise_selective_scan_backward(const void* call, char* message, int64_t room) {
  return guarded(message, room, [&] { run_backward(*static_cast<const Scan*>(call)); });
}
}
