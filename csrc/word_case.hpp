// Lower case and separators of single code points, exactly as Python's str.lower() and
//   re.split(r'\s+|[.,!?;:"\'()]+', ...)
// by the Unicode tables of the interpreter that builds this.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace tinylm {

constexpr std::uint32_t kCapitalSigma = 0x3A3, kSigma = 0x3C3, kFinalSigma = 0x3C2;

// Whether words end at `code_point`. Constant time, as all here.
bool is_separator(std::uint32_t code_point);

// For the final sigma. What is both is case-ignorable only.
bool is_cased(std::uint32_t code_point);
bool is_case_ignorable(std::uint32_t code_point);

// Writes the lower case of any code point but the capital sigma, whose depends on what is around
// it, as WTF-8, and a separator as a space; returns the end. Of a code point of n bytes in UTF-8,
// it takes at most n, but 3 where n is 2.
char* write_lower(std::uint32_t code_point, char* out);

// The same for code points below U+10000 from a table: what to write, and how many bytes of it, 0
// for those few that write_lower or lower_sigma is to be asked about.
struct Lowered {
  char bytes[3];
  std::uint8_t size;
};
using LowerTable = std::array<Lowered, 0x10000>;
const LowerTable& lower_table();

}  // namespace tinylm
