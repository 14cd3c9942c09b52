// Splitting by hand against a small matcher that backtracks as a regular-expression engine does.
// Compiled once for each pattern, which TINYLM_PATTERN names.
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "fuzz_text.hpp"
#include "pretokenize.hpp"
#include "simd/instruction_set.hpp"
#include "unicode_classes.hpp"
#include "utf8.hpp"

namespace tinylm {
namespace {

struct FuzzChar {
  std::uint32_t code_point;
  CharClass char_class;
};
using Chars = std::vector<FuzzChar>;

constexpr CharClasses kAnything = kLetter | kSymbol | kNumber | kSpace;

// Part of a pattern: so many characters of some classes, or something special.
struct Item {
  enum Kind { kRun, kContraction, kNotBeforeWord, kTextEnd } kind = kRun;
  CharClasses classes = 0;
  std::string extra;  // characters taken though of no class
  std::string but;    // characters not taken though of a class
  int min = 1, max = 1 << 30;
  bool caseless = false;

  bool takes(const FuzzChar& c) const {
    const bool is_ascii = c.code_point < 0x80;
    const char ascii = static_cast<char>(c.code_point);
    if (is_ascii && but.find(ascii) != std::string::npos) return false;
    if (is_ascii && extra.find(ascii) != std::string::npos) return true;
    return (c.char_class & classes) != 0;
  }
};
using Alternative = std::vector<Item>;

std::optional<std::size_t> contraction(const Chars& chars, std::size_t at, bool caseless) {
  const auto letter = [&](std::size_t i) -> char {
    if (i >= chars.size()) return 0;
    const std::uint32_t c = chars[i].code_point;
    if (caseless && c == 0x17F) return 's';
    if (caseless && c >= 'A' && c <= 'Z') return static_cast<char>(c - 'A' + 'a');
    return c < 0x80 ? static_cast<char>(c) : char{0};
  };
  if (letter(at) != '\'') return std::nullopt;
  for (const std::string& ending : {"s", "t", "re", "ve", "m", "ll", "d"}) {
    std::size_t i = 0;
    while (i < ending.size() && letter(at + 1 + i) == ending[i]) ++i;
    if (i == ending.size()) return at + 1 + i;
  }
  return std::nullopt;
}

std::optional<std::size_t> match(const Alternative& items, std::size_t item, const Chars& chars,
                                 std::size_t at) {
  if (item == items.size()) return at;
  const Item& wanted = items[item];
  if (wanted.kind == Item::kContraction) {
    if (const auto end = contraction(chars, at, wanted.caseless)) {
      if (const auto rest = match(items, item + 1, chars, *end)) return rest;
    }
    if (wanted.min == 0) return match(items, item + 1, chars, at);
    return std::nullopt;
  }
  if (wanted.kind == Item::kNotBeforeWord) {
    if (at < chars.size() && chars[at].char_class != kSpace) return std::nullopt;
    return match(items, item + 1, chars, at);
  }
  if (wanted.kind == Item::kTextEnd) {
    if (at < chars.size()) return std::nullopt;
    return match(items, item + 1, chars, at);
  }
  int count = 0;
  while (count < wanted.max && at + count < chars.size() && wanted.takes(chars[at + count])) {
    ++count;
  }
  for (; count >= wanted.min; --count) {
    if (const auto end = match(items, item + 1, chars, at + count)) return end;
  }
  return std::nullopt;
}

Item run(CharClasses classes, int min, int max = 1 << 30) {
  Item item;
  item.classes = classes;
  item.min = min;
  item.max = max;
  return item;
}

Item only(const std::string& chars, int min, int max = 1 << 30) {
  Item item = run(0, min, max);
  item.extra = chars;
  return item;
}

// [^\r\n\p{L}\p{N}]?
Item prefix() {
  Item item = run(kSymbol | kSpace, 0, 1);
  item.but = "\r\n";
  return item;
}

Item special(Item::Kind kind) {
  Item item;
  item.kind = kind;
  return item;
}

Item contraction_item(bool caseless, int min) {
  Item item = special(Item::kContraction);
  item.caseless = caseless;
  item.min = min;
  return item;
}

std::vector<Alternative> alternatives(SplitPattern pattern) {
  const Alternative before_word{run(kSpace, 1), special(Item::kNotBeforeWord)};
  const Alternative spaces{run(kSpace, 1)};
  const Alternative lines{run(kSpace, 0), only("\r\n", 1)};
  const Alternative digits{run(kNumber, 1, 3)};
  const Item space = only(" ", 0, 1);
  const CharClasses upper = kUpper | kUncased | kMark, lower = kLower | kUncased | kMark;
  switch (pattern) {
    case SplitPattern::kGpt2:
      return {{contraction_item(false, 1)},
              {space, run(kLetter, 1)},
              {space, run(kNumber, 1)},
              {space, run(kSymbol, 1)},
              before_word,
              spaces};
    case SplitPattern::kCl100k:
    case SplitPattern::kCl100kTiktoken: {
      std::vector<Alternative> all{{contraction_item(true, 1)},
                                   {prefix(), run(kLetter, 1)},
                                   digits,
                                   {space, run(kSymbol, 1), only("\r\n", 0)}};
      if (pattern == SplitPattern::kCl100kTiktoken) {
        all.push_back({run(kSpace, 1), special(Item::kTextEnd)});
      }
      all.insert(all.end(), {lines, before_word, spaces});
      return all;
    }
    case SplitPattern::kO200k:
      return {{prefix(), run(upper, 0), run(lower, 1), contraction_item(true, 0)},
              {prefix(), run(upper, 1), run(lower, 0), contraction_item(true, 0)},
              digits,
              {space, run(kSymbol, 1), only("\r\n/", 0)},
              lines,
              before_word,
              spaces};
    case SplitPattern::kWhitespace:
      return {{space, run(kAnything & ~kSpace, 1)}, before_word, spaces};
  }
  std::abort();
}

void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

void check(std::string_view text) {
  static const std::vector<Alternative> all = alternatives(SplitPattern::TINYLM_PATTERN);
  Chars chars;
  std::vector<std::size_t> offsets;
  const char* const end = text.data() + text.size();
  for (const char* at = text.data(); at != end;) {
    offsets.push_back(static_cast<std::size_t>(at - text.data()));
    const std::uint32_t code_point = decode_utf8(at);
    chars.push_back({code_point, char_classes()[code_point]});
  }
  offsets.push_back(text.size());

  // The character classes of each instruction set in turn.
  static int calls = 0;
  const int sets = static_cast<int>(best_instruction_set()) + 1;
  use_instruction_set(static_cast<InstructionSet>(calls++ % sets));

  std::size_t begin = 0;
  for_each_piece(SplitPattern::TINYLM_PATTERN, text, [&](std::string_view piece) {
    if (begin >= chars.size()) fail("pieces after the end");
    std::optional<std::size_t> expected;
    for (const Alternative& alternative : all) {
      if ((expected = match(alternative, 0, chars, begin))) break;
    }
    if (!expected) fail("the pattern does not match");
    if (piece.data() != text.data() + offsets[begin]) fail("pieces do not join");
    if (piece.size() != offsets[*expected] - offsets[begin]) fail("a piece has another end");
    begin = *expected;
  });
  if (begin != chars.size()) fail("pieces end before the text");
}

// The parts of a text have the pieces of the whole.
void check_parts(const SourceText& source, std::string_view text) {
  std::vector<std::size_t> ends;
  for_each_piece(SplitPattern::TINYLM_PATTERN, text, [&](std::string_view piece) {
    ends.push_back(static_cast<std::size_t>(piece.data() + piece.size() - text.data()));
  });
  for (const std::size_t length : {1, 7}) {
    std::vector<TextPart> parts;
    cut_text(source, 0, length, parts);
    std::size_t begin = 0;
    std::vector<std::size_t> ends_of_parts;
    for (const TextPart& part : parts) {
      Utf8Buffer buffer;
      const std::string_view part_text = to_utf8(part.source, buffer);
      for_each_piece(SplitPattern::TINYLM_PATTERN, part_text, [&](std::string_view piece) {
        ends_of_parts.push_back(
            begin + static_cast<std::size_t>(piece.data() + piece.size() - part_text.data()));
      });
      begin += part_text.size();
    }
    if (ends_of_parts != ends) fail("parts have other pieces than the whole");
  }
}

}  // namespace
}  // namespace tinylm

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const tinylm::FuzzText text(data, size);
  tinylm::Utf8Buffer buffer;
  // A copy of exactly the text, so that reading beyond its end is seen.
  const std::string_view utf8 = tinylm::to_utf8(text.source(), buffer);
  const std::vector<char> exact(utf8.begin(), utf8.end());
  tinylm::check({exact.data(), exact.size()});
  tinylm::check_parts(text.source(), utf8);
  tinylm::check_parts({{exact.data(), exact.size(), tinylm::TextView::kUtf8}, false}, utf8);
  return 0;
}
