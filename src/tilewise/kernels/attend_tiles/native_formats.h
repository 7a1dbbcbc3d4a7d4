// Which number formats a call is stored and multiplied in.
#pragma once

#include "native_call.h"

namespace tilewise {

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

void attend_quantised(const Call& c);  // native_quantised.cpp

}  // namespace tilewise
