// The two passes over a text that vector instructions speed up: lower-casing ASCII, and finding
// where words begin and end. Every variant gives exactly the same results.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace tinylm {

// What a variant may write beyond its result, in bytes or in numbers, and read beyond a text whose
// words it finds.
constexpr std::size_t kWordSlack = 64;

// Each ASCII character in lower case, a separator as a space.
using AsciiMap = std::array<char, 128>;
constexpr AsciiMap make_ascii_map() {
  AsciiMap map{};
  for (int c = 0; c < 128; ++c) {
    const bool space = (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20);
    const bool mark = c == '.' || c == ',' || c == '!' || c == '?' || c == ';' || c == ':' ||
                      c == '"' || c == '\'' || c == '(' || c == ')';
    const bool upper = c >= 'A' && c <= 'Z';
    map[static_cast<std::size_t>(c)] = static_cast<char>(space || mark ? ' '
                                                         : upper       ? c + ('a' - 'A')
                                                                       : c);
  }
  return map;
}
inline constexpr AsciiMap kAsciiMap = make_ascii_map();

struct WordKernels {
  // Maps units of [in, in + n) by kAsciiMap to `out` and returns how many: as far as all are ASCII,
  // or not quite so far.
  std::size_t (*map_ascii8)(const std::uint8_t* in, std::size_t n, char* out);
  std::size_t (*map_ascii16)(const std::uint16_t* in, std::size_t n, char* out);
  std::size_t (*map_ascii32)(const std::uint32_t* in, std::size_t n, char* out);

  // Writes the starts and ends of the runs without spaces in [text, text + size), which kWordSlack
  // spaces follow, and returns the end of what it wrote: two numbers a run.
  std::uint32_t* (*find_bounds)(const char* text, std::size_t size, std::uint32_t* out);
};

extern const WordKernels kWordKernelsPortable, kWordKernelsAvx2, kWordKernelsAvx512;

// Those of instruction_set().
const WordKernels& word_kernels();

}  // namespace tinylm
