#include "instruction_set.hpp"

#include <atomic>

namespace tinylm {

namespace {

InstructionSet detect() {
#if TINYLM_X86_VARIANTS
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2")) return InstructionSet::kPortable;
  if (!__builtin_cpu_supports("avx512bw")) return InstructionSet::kAvx2;
  return InstructionSet::kAvx512;
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

}  // namespace tinylm
