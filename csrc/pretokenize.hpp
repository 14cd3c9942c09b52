// Splitting text into the pieces within which BPE may merge. Written by hand instead of run by a
// regular-expression engine: linear time, no backtracking, no dependency.
//
// There are two ways to the same pieces. `piece_end_of` goes from one piece to the next, character
// by character: short, and for any text. `Splitter` looks at 64 bytes at once and takes several
// times less; where it does not know a way, it takes the first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "simd/ascii_classes.hpp"

namespace tinylm {

// The published patterns, spelled out in tinylm/tokenizer/split_patterns.py. A new one is a
// function in pretokenize.cpp and a case in `piece_end_of`, which is enough, and one in
// splitter.cpp to be quick.
enum class SplitPattern { kGpt2, kCl100k, kCl100kTiktoken, kO200k, kWhitespace };

// A function that gives the end of the piece that starts at `begin` < `end`; [begin, end) is valid
// UTF-8 up to the end of the text, because patterns look ahead. Splitting a whole text takes linear
// time: no character is looked at more than a few times.
using PieceEnd = const char* (*)(const char* begin, const char* end);
PieceEnd piece_end_of(SplitPattern pattern);

// A character of several bytes: where in a window, and how many.
struct WideChar {
  std::uint32_t position, bytes;
};

// The pieces of a text, some hundreds at a time. A window of the text is read as bits, one for each
// byte: those of a class of characters, and in the end those where a piece starts. A window begins
// where a piece does and is read as if no text were before it, for patterns do not look back. It
// ends anywhere; only pieces that what comes after cannot change are taken from it, and the next
// window begins behind them. Linear time; memory in proportion to the longest stretch without white
// space.
class Splitter {
 public:
  // `text` is valid UTF-8 and outlives the splitter.
  Splitter(SplitPattern pattern, std::string_view text);
  Splitter(const Splitter&) = delete;
  Splitter& operator=(const Splitter&) = delete;

  // Goes to the next pieces; false if there are none. Piece i is [begin() + ends()[i - 1],
  // begin() + ends()[i]), the first one from begin(). Throws std::length_error for 2 GiB without
  // white space.
  bool next();

  const char* begin() const { return begin_; }
  const std::uint32_t* ends() const { return ends_; }
  std::size_t size() const { return size_; }

 private:
#ifdef TINYLM_FUZZING
  static constexpr std::size_t kWindowBlocks = 1;  // so that short texts have several windows
#else
  static constexpr std::size_t kWindowBlocks = 64;
#endif
  static constexpr std::size_t kWindowBytes = kWindowBlocks * kBlockBytes;
  static constexpr std::size_t kSpareEnds = 8;  // written too many, because that is quicker

  void reserve_blocks(std::size_t blocks);
  void read_window(std::size_t bytes);
  void read_wide_chars(std::size_t bytes);
  void find_ends(std::size_t bytes, std::size_t certain);
  void find_ends_slowly(std::size_t certain);
  void reserve_ends(std::size_t blocks);

  SplitPattern pattern_;
  const char* begin_;  // of the pieces found last
  const char* next_;   // of those that come next
  const char* text_end_;
  std::size_t size_ = 0;

  bool has_uncased_ = false;
  std::vector<WideChar> wide_spaces_;
  std::vector<WideChar> wide_symbols_;

  // A window of usual size has its bits here, a larger one in the vectors.
  BlockClasses* classes_ = small_classes_;
  std::uint64_t* starts_ = small_starts_;
  std::uint32_t* ends_ = small_ends_;
  BlockClasses small_classes_[kWindowBlocks + 1];
  std::uint64_t small_starts_[kWindowBlocks + 1];
  std::uint32_t small_ends_[kWindowBytes + kSpareEnds];
  std::vector<BlockClasses> large_classes_;
  std::vector<std::uint64_t> large_starts_;
  std::vector<std::uint32_t> large_ends_;
};

// Calls function(piece) for each piece of `text` in order; together they are `text`.
template <class Function>
void for_each_piece(SplitPattern pattern, std::string_view text, Function&& function) {
  Splitter splitter(pattern, text);
  while (splitter.next()) {
    std::uint32_t begin = 0;
    for (std::size_t i = 0; i < splitter.size(); ++i) {
      const std::uint32_t end = splitter.ends()[i];
      function(std::string_view(splitter.begin() + begin, end - begin));
      begin = end;
    }
  }
}

}  // namespace tinylm
