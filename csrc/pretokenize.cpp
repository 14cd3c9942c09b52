#include "pretokenize.hpp"

#include <array>
#include <cstdint>

#include "unicode_classes.hpp"
#include "utf8.hpp"

namespace tinylm {

namespace {

constexpr std::array<CharClass, 128> make_ascii_classes() {
  std::array<CharClass, 128> classes{};
  for (int c = '\t'; c <= '\r'; ++c) classes[c] = CharClass::kSpace;
  classes[' '] = CharClass::kSpace;
  for (int c = '0'; c <= '9'; ++c) classes[c] = CharClass::kNumber;
  for (int c = 'A'; c <= 'Z'; ++c) classes[c] = CharClass::kLetter;
  for (int c = 'a'; c <= 'z'; ++c) classes[c] = CharClass::kLetter;
  return classes;
}

constexpr std::array<CharClass, 128> kAsciiClasses = make_ascii_classes();

struct Char {
  CharClass char_class;
  const char* end;
};

inline Char read_char(const char* at) {
  const auto byte = static_cast<unsigned char>(*at);
  if (byte < 0x80) return {kAsciiClasses[byte], at + 1};
  const std::uint32_t code_point = decode_utf8(at);
  return {char_classes()[code_point], at};
}

// Past all characters of `char_class` from `at` on.
inline const char* skip_class(CharClass char_class, const char* at, const char* end) {
  while (at != end) {
    const Char next = read_char(at);
    if (next.char_class != char_class) break;
    at = next.end;
  }
  return at;
}

// '(?:[sdmt]|ll|ve|re) at an apostrophe, or nullptr.
inline const char* contraction_end(const char* begin, const char* end) {
  if (end - begin < 2) return nullptr;
  const char first = begin[1];
  if (first == 's' || first == 'd' || first == 'm' || first == 't') return begin + 2;
  if (end - begin < 3) return nullptr;
  const char second = begin[2];
  const bool is_contraction = (first == 'l' && second == 'l') || (first == 'v' && second == 'e') ||
                              (first == 'r' && second == 'e');
  return is_contraction ? begin + 3 : nullptr;
}

// \s+(?!\S)|\s+ : the whole run at the end of the text; else all but its last character, which is
// left to the next piece; a run of one is a piece by itself.
inline const char* space_end(const char* begin, const char* end) {
  const char* last = begin;
  const char* at = begin;
  while (at != end) {
    const Char next = read_char(at);
    if (next.char_class != CharClass::kSpace) return last == begin ? at : last;
    last = at;
    at = next.end;
  }
  return end;
}

}  // namespace

const char* gpt2_piece_end(const char* begin, const char* end) {
  if (*begin == '\'') {
    if (const char* const contraction = contraction_end(begin, end)) return contraction;
  }
  const Char first = read_char(begin);
  if (first.char_class != CharClass::kSpace) return skip_class(first.char_class, first.end, end);
  if (*begin == ' ' && first.end != end) {
    const Char second = read_char(first.end);
    if (second.char_class != CharClass::kSpace) {
      return skip_class(second.char_class, second.end, end);
    }
  }
  return space_end(begin, end);
}

}  // namespace tinylm
