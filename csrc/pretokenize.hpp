// Splitting text into the pieces within which BPE may merge. Written by hand instead of run by a
// regular-expression engine: linear time, no backtracking, no dependency.
#pragma once

#include <string_view>

namespace tinylm {

// The published patterns. A new one is a function like `gpt2_piece_end` and a case in
// `for_each_piece`.
enum class SplitPattern {
  // '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
  kGpt2,
};

// End of the piece that starts at `begin` < `end`; [begin, end) is valid UTF-8 up to the end of the
// text, because the pattern looks ahead. Linear in the piece and the white space after it.
const char* gpt2_piece_end(const char* begin, const char* end);

// Calls function(piece) for each piece of `text` in order; together they are `text`.
template <class Function>
void for_each_piece(SplitPattern pattern, std::string_view text, Function&& function) {
  const char* begin = text.data();
  const char* const end = begin + text.size();
  switch (pattern) {
    case SplitPattern::kGpt2:
      while (begin != end) {
        const char* const piece_end = gpt2_piece_end(begin, end);
        function(std::string_view(begin, static_cast<std::size_t>(piece_end - begin)));
        begin = piece_end;
      }
  }
}

}  // namespace tinylm
