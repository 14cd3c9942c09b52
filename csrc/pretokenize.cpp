#include "pretokenize.hpp"

#include <array>
#include <cstdint>

#include "contractions.hpp"
#include "unicode_classes.hpp"
#include "utf8.hpp"

namespace tinylm {

namespace {

constexpr std::array<CharClass, 128> make_ascii_classes() {
  std::array<CharClass, 128> classes{};
  for (int c = 0; c < 128; ++c) classes[c] = kOther;
  for (int c = '\t'; c <= '\r'; ++c) classes[c] = kSpace;
  classes[' '] = kSpace;
  for (int c = '0'; c <= '9'; ++c) classes[c] = kNumber;
  for (int c = 'A'; c <= 'Z'; ++c) classes[c] = kUpper;
  for (int c = 'a'; c <= 'z'; ++c) classes[c] = kLower;
  return classes;
}

constexpr std::array<CharClass, 128> kAsciiClasses = make_ascii_classes();

struct Char {
  CharClass char_class;
  const char* end;

  bool is(CharClasses classes) const { return (char_class & classes) != 0; }
};

inline Char read_char(const char* at) {
  const auto byte = static_cast<unsigned char>(*at);
  if (byte < 0x80) return {kAsciiClasses[byte], at + 1};
  const std::uint32_t code_point = decode_utf8(at);
  return {char_classes()[code_point], at};
}

inline bool is_newline(char c) { return c == '\r' || c == '\n'; }

// Past all characters of the classes from `at` on.
template <CharClasses kClasses>
inline const char* skip(const char* at, const char* end) {
  while (at != end) {
    const Char next = read_char(at);
    if (!next.is(kClasses)) break;
    at = next.end;
  }
  return at;
}

// [\r\n]*
inline const char* skip_newlines(const char* at, const char* end) {
  while (at != end && is_newline(*at)) ++at;
  return at;
}

// \s+(?!\S)|\s+ : the whole run at the end of the text; else all but its last character, which is
// left to the next piece; a run of one is a piece by itself.
inline const char* space_end(const char* begin, const char* end) {
  const char* last = begin;
  const char* at = begin;
  while (at != end) {
    const Char next = read_char(at);
    if (!next.is(kSpace)) return last == begin ? at : last;
    last = at;
    at = next.end;
  }
  return end;
}

enum class AtTextEnd { kSplitAfterNewline, kTakeAll };

// \s*[\r\n]+|\s+(?!\S)|\s+ : up to the last newline of the run, or as space_end where there is
// none. With kTakeAll, \s++$ comes first: a run at the end of the text is one piece.
template <AtTextEnd kAtTextEnd>
const char* line_space_end(const char* begin, const char* end) {
  const char* last = begin;
  const char* after_newline = nullptr;
  const char* at = begin;
  while (at != end) {
    const Char next = read_char(at);
    if (!next.is(kSpace)) break;
    last = at;
    at = next.end;
    if (is_newline(*last)) after_newline = at;
  }
  if (kAtTextEnd == AtTextEnd::kTakeAll && at == end) return end;
  if (after_newline) return after_newline;
  return at == end || last == begin ? at : last;
}

// \p{N}{1,3} after its first digit.
inline const char* digits_end(const char* at, const char* end) {
  for (int i = 0; i < 2 && at != end; ++i) {
    const Char next = read_char(at);
    if (!next.is(kNumber)) break;
    at = next.end;
  }
  return at;
}

const char* gpt2_piece_end(const char* begin, const char* end) {
  if (*begin == '\'') {
    if (const char* const contraction = contraction_end(begin, end)) return contraction;
  }
  // A run of the first character's kind, with a space before it if there is one.
  const auto run_end = [end](const Char& first) {
    if (first.is(kLetter)) return skip<kLetter>(first.end, end);
    if (first.is(kNumber)) return skip<kNumber>(first.end, end);
    return skip<kSymbol>(first.end, end);
  };
  const Char first = read_char(begin);
  if (!first.is(kSpace)) return run_end(first);
  if (*begin == ' ' && first.end != end) {
    const Char second = read_char(first.end);
    if (!second.is(kSpace)) return run_end(second);
  }
  return space_end(begin, end);
}

template <AtTextEnd kAtTextEnd>
const char* cl100k_piece_end(const char* begin, const char* end) {
  if (*begin == '\'') {
    if (const char* const contraction = caseless_contraction_end(begin, end)) return contraction;
  }
  const Char first = read_char(begin);
  if (first.is(kLetter)) return skip<kLetter>(first.end, end);
  if (first.is(kNumber)) return digits_end(first.end, end);
  if (first.end != end) {
    const Char second = read_char(first.end);
    if (second.is(kLetter) && !is_newline(*begin)) return skip<kLetter>(second.end, end);
    if (second.is(kSymbol) && *begin == ' ') {
      return skip_newlines(skip<kSymbol>(second.end, end), end);
    }
  }
  if (first.is(kSymbol)) return skip_newlines(skip<kSymbol>(first.end, end), end);
  return line_space_end<kAtTextEnd>(begin, end);
}

// [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+ , or nullptr. Letters without case and
// marks are in both sets: where no lower-case letter follows the first run, that run gives back all
// behind its last such character.
inline const char* lower_word_end(const char* begin, const char* end) {
  const char* after_uncased = nullptr;
  for (const char* at = begin; at != end;) {
    const Char next = read_char(at);
    if (next.is(kLower)) return skip<kLower | kUncased | kMark>(next.end, end);
    if (!next.is(kUpper | kUncased | kMark)) break;
    at = next.end;
    if (!next.is(kUpper)) after_uncased = at;
  }
  return after_uncased;
}

// The word of o200k without its contraction, with or without the character before it that is
// neither letter nor number nor newline; or nullptr.
inline const char* o200k_word_end(const char* begin, const char* end, const Char& first) {
  const bool is_prefix = !first.is(kLetter | kNumber) && !is_newline(*begin);
  if (is_prefix) {
    if (const char* const word = lower_word_end(first.end, end)) return word;
  }
  // A mark can be a prefix or begin a word.
  if (first.is(kLetter | kMark)) {
    if (const char* const word = lower_word_end(begin, end)) return word;
  }
  // What no lower-case word begins with can only be capitals.
  const char* const capitals = is_prefix ? first.end : begin;
  const char* const word = skip<kUpper>(capitals, end);
  return word == capitals ? nullptr : word;
}

const char* o200k_piece_end(const char* begin, const char* end) {
  const Char first = read_char(begin);
  if (first.is(kNumber)) return digits_end(first.end, end);
  if (const char* const word = o200k_word_end(begin, end, first)) {
    const char* const contraction =
        word != end && *word == '\'' ? caseless_contraction_end(word, end) : nullptr;
    return contraction ? contraction : word;
  }
  const char* at = begin;
  if (*begin == ' ' && first.end != end && read_char(first.end).is(kSymbol)) at = first.end;
  if (at != begin || first.is(kSymbol)) {
    at = skip<kSymbol>(at, end);
    while (at != end && (is_newline(*at) || *at == '/')) ++at;
    return at;
  }
  return line_space_end<AtTextEnd::kSplitAfterNewline>(begin, end);
}

const char* whitespace_piece_end(const char* begin, const char* end) {
  constexpr CharClasses kNotSpace = kLetter | kNumber | kSymbol;
  const Char first = read_char(begin);
  if (first.is(kNotSpace)) return skip<kNotSpace>(first.end, end);
  if (*begin == ' ' && first.end != end) {
    const Char second = read_char(first.end);
    if (second.is(kNotSpace)) return skip<kNotSpace>(second.end, end);
  }
  return space_end(begin, end);
}

}  // namespace

PieceEnd piece_end_of(SplitPattern pattern) {
  switch (pattern) {
    case SplitPattern::kGpt2:
      return gpt2_piece_end;
    case SplitPattern::kCl100k:
      return cl100k_piece_end<AtTextEnd::kSplitAfterNewline>;
    case SplitPattern::kCl100kTiktoken:
      return cl100k_piece_end<AtTextEnd::kTakeAll>;
    case SplitPattern::kO200k:
      return o200k_piece_end;
    case SplitPattern::kWhitespace:
      return whitespace_piece_end;
  }
  return nullptr;  // Not reached: the cases are all there are.
}

}  // namespace tinylm
