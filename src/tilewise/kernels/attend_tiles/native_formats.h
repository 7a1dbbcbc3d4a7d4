// Which number formats a call is stored and multiplied in.
#pragma once

#include "native_call.h"

namespace tilewise {

template <typename Work>
void by_format(const Call& c, const Work& work) {
  by_format(c.v.kind, work);
}

void attend_quantised(const Call& c);  // native_quantised.cpp
void attend_lists(const Call& c);      // native_lists.cpp

}  // namespace tilewise
