// Entry points of the native engine of the scan; native.py calls them.
#include "native_backward.h"

using namespace tilewise;

namespace {
template <typename Work>
void by_format(const Scan& c, const Work& work) {
  switch (c.v.kind) {
    case FLOAT32: return work.template operator()<float>();
    case FLOAT16: return work.template operator()<Half>();
    default: return work.template operator()<BFloat16>();
  }
}
}  // namespace

extern "C" {

int64_t tilewise_scan_words() { return sizeof(Scan) / 8; }

int tilewise_scan_forward(const void* call, char* message, int64_t room) {
  return guarded(message, room, [&] {
    const Scan& c = *static_cast<const Scan*>(call);
    by_format(c, [&]<typename S>() { run_forward<S>(c); });
  });
}

int tilewise_scan_backward(const void* call, char* message, int64_t room) {
  return guarded(message, room, [&] {
    const Scan& c = *static_cast<const Scan*>(call);
    by_format(c, [&]<typename S>() { run_backward<S>(c); });
  });
}
}
