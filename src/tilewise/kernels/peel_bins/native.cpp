// Entry points of the native engine of the peeling decoder; native.py calls them.
#include "native_peel.h"

using namespace tilewise;

extern "C" {

int64_t tilewise_peel_bins_words() { return sizeof(Bins) / 8; }

int tilewise_peel_bins_run(const void* call, char* message, int64_t room) {
  return guarded(message, room, [&] { Peel(*static_cast<const Bins*>(call)).run(); });
}
}
