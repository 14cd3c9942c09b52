// Which of a function's variants runs.
#pragma once

// Where the compiler can build one function for another instruction set than the file's.
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define TINYLM_X86_VARIANTS 1
#else
#define TINYLM_X86_VARIANTS 0
#endif

// Where it knows Intel's AMX besides, for which a process has to ask Linux.
#if TINYLM_X86_VARIANTS && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define TINYLM_AMX_VARIANT 1
#else
#define TINYLM_AMX_VARIANT 0
#endif

namespace tinylm {

// In rising order; each processor that has one has those before it.
enum class InstructionSet { kPortable, kAvx2, kAvx512, kAmx };

// The best that this processor has, of those that this was built for.
InstructionSet best_instruction_set();

// The one in use: the best there is, unless another was chosen.
InstructionSet instruction_set();

// Chooses one, at most the best; for tests and measurements, before other threads run.
void use_instruction_set(InstructionSet chosen);

// Whether the processor has a unit for whole matrices of bf16 (Intel's AMX), usable or not.
bool has_matrix_unit();

}  // namespace tinylm
