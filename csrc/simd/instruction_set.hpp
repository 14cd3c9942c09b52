// Which of a function's variants runs.
#pragma once

// Where the compiler can build one function for another instruction set than the file's.
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define TINYLM_X86_VARIANTS 1
#else
#define TINYLM_X86_VARIANTS 0
#endif

namespace tinylm {

// In rising order; each processor that has one has those before it.
enum class InstructionSet { kPortable, kAvx2, kAvx512 };

// The best that this processor has.
InstructionSet best_instruction_set();

// The one in use: the best there is, unless another was chosen.
InstructionSet instruction_set();

// Chooses one, at most the best; for tests and measurements, before other threads run.
void use_instruction_set(InstructionSet chosen);

}  // namespace tinylm
