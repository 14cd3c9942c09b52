#include "instruction_set.hpp"

#include <atomic>

#if TINYLM_X86_VARIANTS
#include <cpuid.h>
#endif
#if TINYLM_AMX_VARIANT
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tinylm {

namespace {

// Whether this process may use tiles, whose 8 KB Linux saves only for those that ask.
bool may_use_tiles() {
#if TINYLM_AMX_VARIANT
  constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return has_matrix_unit() && __builtin_cpu_supports("avx512bf16") &&
         syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}

InstructionSet detect() {
#if TINYLM_X86_VARIANTS
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2")) return InstructionSet::kPortable;
  if (!__builtin_cpu_supports("avx512bw")) return InstructionSet::kAvx2;
  return may_use_tiles() ? InstructionSet::kAmx : InstructionSet::kAvx512;
#else
  return InstructionSet::kPortable;
#endif
}

std::atomic<InstructionSet>& in_use() {
  static std::atomic<InstructionSet> set{best_instruction_set()};
  return set;
}

}  // namespace

InstructionSet best_instruction_set() {
  static const InstructionSet best = detect();
  return best;
}

InstructionSet instruction_set() { return in_use().load(std::memory_order_relaxed); }

void use_instruction_set(InstructionSet chosen) { in_use().store(chosen); }

bool has_matrix_unit() {
#if TINYLM_X86_VARIANTS
  // AMX-TILE and AMX-BF16 are bits 24 and 22 of EDX in leaf 7; not every compiler knows their
  // names.
  constexpr unsigned kBits = 1u << 24 | 1u << 22;
  static const bool has_unit = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBits) == kBits;
  }();
  return has_unit;
#else
  return false;
#endif
}

}  // namespace tinylm
