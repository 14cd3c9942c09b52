// The classes of ASCII characters, 64 bytes at a time: the part of splitting that has variants for
// instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tinylm {

constexpr std::size_t kBlockBytes = 64;

// Bit i of each field is about byte i of a block. Of characters beyond ASCII only the first byte
// has a bit, in `wide`.
struct BlockClasses {
  std::uint64_t upper;
  std::uint64_t lower;
  std::uint64_t number;
  std::uint64_t space;       // \t \n \v \f \r and ' ', the \s of the patterns
  std::uint64_t newline;     // \n \r
  std::uint64_t blank;       // ' '
  std::uint64_t apostrophe;  // '
  std::uint64_t wide;
};

// Writes the classes of `blocks` blocks; reads no byte beyond them. Linear.
void classify_blocks(const char* text, std::size_t blocks, BlockClasses* classes);

}  // namespace tinylm
