// Attention over quantised queries and keys, and their rounding.
#include "native_formats.h"
#include "native_forward.h"
#include "native_round.h"

namespace tilewise {

void attend_quantised(const Call& c) {
  by_format(c, [&]<typename S, typename T>() { Forward<S, T, uint8_t>::run(c); });
}

}  // namespace tilewise

extern "C" int tilewise_round_tokens(const void* rounding, char* message, int64_t room) {
  using namespace tilewise;
  return guarded(message, room, [&] {
    const Rounding& r = *static_cast<const Rounding*>(rounding);
    switch (r.x.kind) {
      case FLOAT32: return Round<float>(r).run();
      case FLOAT16: return Round<Half>(r).run();
      default: return Round<BFloat16>(r).run();
    }
  });
}
