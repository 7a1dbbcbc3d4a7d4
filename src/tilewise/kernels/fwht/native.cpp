// Entry points of the native engine of the Walsh-Hadamard transform; native.py calls them.
#include "native_rows.h"

using namespace tilewise;

extern "C" {

int64_t tilewise_fwht_words() { return sizeof(Walsh) / 8; }

int tilewise_fwht_forward(const void* call, char* message, int64_t room) {
  return guarded(message, room, [&] { run_walsh(*static_cast<const Walsh*>(call)); });
}
}
