// The character classes that BPE splitting patterns are made of.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace tinylm {

// Each class is a bit, so that a set of classes is their sum.
enum CharClass : std::uint8_t {
  kOther = 1,
  kMark = 2,      // \p{M}
  kUpper = 4,     // \p{Lu} and \p{Lt}
  kLower = 8,     // \p{Ll}
  kUncased = 16,  // \p{Lm} and \p{Lo}
  kNumber = 32,   // \p{N}
  kSpace = 64,    // \s
};
using CharClasses = int;
constexpr CharClasses kLetter = kUpper | kLower | kUncased;  // \p{L}
constexpr CharClasses kSymbol = kOther | kMark;              // [^\s\p{L}\p{N}]

// Classes by code point, in blocks of 256; equal blocks are stored once.
class CharClassTable {
 public:
  CharClassTable();

  CharClass operator[](std::uint32_t code_point) const {
    return blocks_[block_of_[code_point >> kBlockBits]][code_point & (kBlockSize - 1)];
  }

 private:
  static constexpr int kBlockBits = 8;
  static constexpr std::uint32_t kBlockSize = 1u << kBlockBits;
  static constexpr std::uint32_t kCodePoints = 0x110000;
  using Block = std::array<CharClass, kBlockSize>;

  std::array<std::uint16_t, kCodePoints / kBlockSize> block_of_;
  std::vector<Block> blocks_;
};

// The one table of the process, built at first use.
const CharClassTable& char_classes();

}  // namespace tinylm
