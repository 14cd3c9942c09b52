// From the code points of a text to its lower-cased words, exactly as Python's
//   re.split(r'\s+|[.,!?;:"\'()]+', text.lower())
// without the empty strings. Linear time; memory in proportion to one piece (see cut_texts).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace tinylm {

// A text as Python stores it: `length` code points in units of `kind` = 1, 2 or 4 bytes. Surrogates
// are code points like any other.
struct TextView {
  const void* data;
  std::size_t length;
  int kind;
};

// A stretch [begin, end) of texts[text]; no word crosses its ends.
struct TextPiece {
  std::size_t text;
  std::size_t begin;
  std::size_t end;
};

// Every text as one or more pieces, in order, of about kPieceLength code points: small enough for a
// piece's buffers to stay in the cache, and so that several threads can share one long text. A
// piece is longer only where a word is.
constexpr std::size_t kPieceLength = 1 << 14;
std::vector<TextPiece> cut_texts(const std::vector<TextView>& texts);

// No piece holds more words than this: there is a separator between any two.
inline std::size_t max_words(const TextPiece& piece) { return (piece.end - piece.begin + 1) / 2; }

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
  // Throws std::length_error for a word that takes a gigabyte or more.
  Words find_words(const TextView& text, const TextPiece& piece);

 private:
  void reserve(std::size_t code_points);

  std::size_t capacity_ = 0;  // in code points
  std::unique_ptr<char[]> buffer_;
  std::unique_ptr<std::uint32_t[]> bounds_;
};

}  // namespace tinylm
