// The backward pass of the native engine of tile attention.
#include "native_backward.h"
#include "native_formats.h"

using namespace tilewise;

extern "C" int tilewise_attend_backward(const void* call, char* message, int64_t room) {
  return guarded(message, room, [&] {
    const Call& c = *static_cast<const Call*>(call);
    by_format(c, [&]<typename S, typename T>() { Backward<S, T>::run(c); });
  });
}
