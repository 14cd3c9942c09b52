// Splitting text into the pieces within which BPE may merge. Written by hand instead of run by a
// regular-expression engine: linear time, no backtracking, no dependency.
#pragma once

#include <cstddef>
#include <string_view>

namespace tinylm {

// The published patterns, spelled out in tinylm/tokenizer/split_patterns.py. A new one is a
// function in pretokenize.cpp and a case in `piece_end_of`.
enum class SplitPattern { kGpt2, kCl100k, kCl100kTiktoken, kO200k, kWhitespace };

// A function that gives the end of the piece that starts at `begin` < `end`; [begin, end) is valid
// UTF-8 up to the end of the text, because patterns look ahead. Splitting a whole text takes linear
// time: no character is looked at more than a few times.
using PieceEnd = const char* (*)(const char* begin, const char* end);
PieceEnd piece_end_of(SplitPattern pattern);

// Calls function(piece) for each piece of `text` in order; together they are `text`.
template <class Function>
void for_each_piece(SplitPattern pattern, std::string_view text, Function&& function) {
  const PieceEnd piece_end = piece_end_of(pattern);
  const char* begin = text.data();
  const char* const end = begin + text.size();
  while (begin != end) {
    const char* const next = piece_end(begin, end);
    function(std::string_view(begin, static_cast<std::size_t>(next - begin)));
    begin = next;
  }
}

}  // namespace tinylm
