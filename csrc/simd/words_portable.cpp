#include <cstring>

#include "simd/instruction_set.hpp"
#include "simd/words.hpp"

namespace tinylm {
namespace {

template <class Unit>
std::size_t map_ascii(const Unit* in, std::size_t n, char* out) {
  std::size_t i = 0;
  for (; i < n && in[i] < 0x80; ++i) out[i] = kAsciiMap[in[i]];
  return i;
}

// One character at a time, without a branch: a bound is written in any case and kept if it is one.
std::uint32_t* find_bounds(const char* text, std::size_t size, std::uint32_t* out) {
  bool was_space = true;
  for (std::size_t i = 0; i <= size; ++i) {
    const bool is_space = text[i] == ' ';
    *out = static_cast<std::uint32_t>(i);
    out += is_space != was_space;
    was_space = is_space;
  }
  return out;
}

}  // namespace

const WordKernels kWordKernelsPortable = {&map_ascii, &map_ascii, &map_ascii, &find_bounds};

const WordKernels& word_kernels() {
#if TINYLM_X86_VARIANTS
  // The older processors with AVX-512 lack what the variant needs of it beyond BW.
  static const bool has_vbmi2 =
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
  const InstructionSet set = instruction_set();
  if (set >= InstructionSet::kAvx512 && has_vbmi2) return kWordKernelsAvx512;
  if (set != InstructionSet::kPortable) return kWordKernelsAvx2;
#endif
  return kWordKernelsPortable;
}

}  // namespace tinylm
