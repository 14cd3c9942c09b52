// From texts to their lower-cased words, exactly as Python's
//   re.split(r'\s+|[.,!?;:"\'()]+', text.lower())
// without the empty strings. Linear time; memory in proportion to one piece (see cut_texts).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "text_view.hpp"

namespace tinylm {

// A stretch [begin, end) of texts[text], in its units; no word crosses its ends.
struct TextPiece {
  std::size_t text;
  std::size_t begin;
  std::size_t end;
};

// Every text as one or more pieces, in order, of about `length` units: small enough for a piece's
// buffers to stay in the cache, and so that several threads can share one long text. A piece is
// longer only where a word is. It is cut before separators only, and what a sigma becomes is
// decided by the whole text, so where it is cut does not change the words.
constexpr std::size_t kPieceLength = 1 << 14;
std::vector<TextPiece> cut_texts(const std::vector<TextView>& texts,
                                 std::size_t length = kPieceLength);

// No piece holds more words than this: there is a separator between any two.
inline std::size_t max_words(const TextPiece& piece) { return (piece.end - piece.begin + 1) / 2; }

// Where among `texts`, cut into `pieces`, the first bytes are that are no UTF-8; `text` is
// texts.size() if there are none. Linear, on several threads.
struct InvalidUtf8 {
  std::size_t text;
  std::size_t position;
};
InvalidUtf8 find_invalid(const std::vector<TextView>& texts, const std::vector<TextPiece>& pieces,
                         int threads);

// What find_words returns, valid until its next call: word i is the WTF-8 text
// [bounds[2 * i], bounds[2 * i + 1]) of `text`, and kReadAhead bytes may be read from any word's
// start or end.
constexpr std::size_t kReadAhead = 16;
struct Words {
  const char* text;
  const std::uint32_t* bounds;
  std::size_t count;
};

// Finds the words of one piece at a time; owns the buffers. One per thread.
class WordFinder {
 public:
  // Throws std::length_error for a word of 2^30 units or more.
  Words find_words(const TextView& text, const TextPiece& piece);

 private:
  void reserve(std::size_t units, std::size_t bytes);

  std::size_t units_ = 0, bytes_ = 0;  // for which there is room
  std::unique_ptr<char[]> buffer_;
  std::unique_ptr<std::uint32_t[]> bounds_;
};

}  // namespace tinylm
