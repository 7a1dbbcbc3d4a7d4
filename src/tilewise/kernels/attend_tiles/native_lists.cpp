// Attention over lists of keys.
#include "native_lists.h"

namespace tilewise {

void attend_lists(const Call& c) {
  switch (c.v.kind) {
    case FLOAT32: return Listed<float>::run(c);
    case FLOAT16: return Listed<Half>::run(c);
    default: return Listed<BFloat16>::run(c);
  }
}

}  // namespace tilewise
