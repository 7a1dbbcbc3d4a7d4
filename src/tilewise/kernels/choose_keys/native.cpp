// Entry points of the native engine of the choice of keys; native.py calls them.
#include "native_choose.h"

using namespace tilewise;

extern "C" {

int64_t tilewise_choice_words() { return sizeof(Choice) / 8; }

// Products of a query and a key since the last time this was asked.
int64_t tilewise_scores_computed() { return scores_computed().exchange(0); }

int tilewise_choose_keys(const void* choice, char* message, int64_t room) {
  return guarded(message, room, [&] {
    const Choice& c = *static_cast<const Choice*>(choice);
    by_format(c.q.kind, [&]<typename S, typename T>() { Choose<S, T>::run(c); });
  });
}
}
