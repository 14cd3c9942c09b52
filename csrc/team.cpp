#include "team.hpp"

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace tinylm {

#if defined(__linux__)

// GNU's OpenMP runtime, and LLVM's under the same name, by the interface that compilers call.
bool run_on_team(int threads, void (*body)(void*), void* context) {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (parallel == nullptr) return false;
  parallel(body, context, static_cast<unsigned>(threads), 0);
  return true;
}

#else

bool run_on_team(int, void (*)(void*), void*) { return false; }

#endif

}  // namespace tinylm
