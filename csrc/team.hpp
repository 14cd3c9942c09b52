// Short tasks on the threads that are there already: those of the OpenMP runtime that torch has
// brought into the process, which cost microseconds to wake, where new ones cost tens of them and
// would have to share cores with torch's, which spin for a while after their own work.
#pragma once

#include <algorithm>
#include <cstddef>

#include "threads.hpp"

namespace tinylm {

// Runs body(context) on up to `threads` threads, one of them the calling one, and returns when all
// have. False, and nothing is done, where there is no such runtime.
bool run_on_team(int threads, void (*body)(void*), void* context);

// Calls function(part) once for every part in [0, parts), on up to `parts` threads. The first
// exception is rethrown here when all have stopped.
template <class Function>
void run_parts(int parts, Function&& function) {
  if (parts <= 1) {
    if (parts == 1) function(0);
    return;
  }
  struct Shared {
    std::atomic<int> next;
    int parts;
    Function& function;
    std::atomic<bool> failed;
    std::exception_ptr error;
  } shared{{0}, parts, function, {false}, nullptr};
  const auto body = [](void* context) {
    auto& all = *static_cast<Shared*>(context);
    try {
      for (int part; (part = all.next.fetch_add(1)) < all.parts;) all.function(part);
    } catch (...) {
      if (!all.failed.exchange(true)) all.error = std::current_exception();
    }
  };
  if (run_on_team(parts, body, &shared)) {
    if (shared.error) std::rethrow_exception(shared.error);
    return;
  }
  parallel_for(static_cast<std::size_t>(parts), parts,
               [&](std::size_t part, int) { function(static_cast<int>(part)); });
}

// Calls function(item) for every item in [0, items), on up to `threads` threads, which take the
// next one as they come free.
template <class Function>
void share_items(std::size_t items, int threads, Function&& function) {
  std::atomic<std::size_t> next{0};
  const auto most = static_cast<std::size_t>(std::max(threads, 1));
  run_parts(static_cast<int>(std::min(items, most)), [&](int) {
    for (std::size_t item; (item = next.fetch_add(1)) < items;) function(item);
  });
}

}  // namespace tinylm
