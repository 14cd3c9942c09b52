// Where the pieces of a window of text start, by operations on bits: 64 bytes at once and few
// branches, where going from character to character takes several for each piece.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "pretokenize.hpp"

namespace tinylm {

// A stretch of text as bits. All bytes of a character beyond ASCII have the character's class, but
// marks count as symbols and letters without case as lower-case ones. What is before the window
// counts as white space, as does what is behind it.
struct Window {
  const char* text;
  std::size_t bytes;
  const char* text_end;         // of the whole text
  const BlockClasses* classes;  // block_count() + 1 of them
  bool has_uncased;             // a mark or a letter without case
  const std::vector<WideChar>* wide_spaces;
  const std::vector<WideChar>* wide_symbols;

  std::size_t block_count() const { return (bytes + kBlockBytes - 1) / kBlockBytes; }
  bool is_text_end() const { return text + bytes == text_end; }
};

// Sets bit i of `starts`, block_count() + 1 words, where a piece starts at byte i if the text ends
// with the window, and perhaps bits from `bytes` on. False if the window has what this cannot do
// with this pattern; `starts` is then undefined. Linear time.
bool find_piece_starts(SplitPattern pattern, const Window& window, std::uint64_t* starts);

}  // namespace tinylm
