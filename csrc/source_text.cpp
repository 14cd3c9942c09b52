#include "source_text.hpp"

#include "unicode_classes.hpp"
#include "utf8.hpp"

namespace tinylm {

namespace {

constexpr std::uint32_t kReplacement = 0xFFFD;

inline bool is_surrogate(std::uint32_t code_point) { return (code_point & 0xFFFFF800) == 0xD800; }

// Loops over so many code units at a time have no early end, so compilers turn them into vector
// instructions.
constexpr std::size_t kRun = 16;

template <class CodeUnit>
std::size_t find_surrogate_in(const CodeUnit* data, std::size_t length) {
  std::size_t i = 0;
  for (; i + kRun <= length; i += kRun) {
    unsigned found = 0;
    for (std::size_t j = 0; j < kRun; ++j) found |= is_surrogate(data[i + j]);
    if (found != 0) break;
  }
  for (; i < length; ++i) {
    if (is_surrogate(data[i])) return i;
  }
  return kNoPosition;
}

template <class CodeUnit>
Utf8Bytes write_utf8(const CodeUnit* data, std::size_t length, Utf8Buffer& buffer) {
  // A code unit of one byte is below U+0100, of two bytes below U+10000.
  constexpr std::size_t kMaxBytes = sizeof(CodeUnit) == 1 ? 2 : sizeof(CodeUnit) == 2 ? 3 : 4;
  // encode_utf8 may ask for room beyond what it keeps.
  char* const begin = buffer.reserve(length * kMaxBytes + kMaxUtf8Bytes);
  char* out = begin;
  bool has_replaced = false;
  const auto write = [&](std::uint32_t code_point) {
    if (sizeof(CodeUnit) > 1 && is_surrogate(code_point)) {
      has_replaced = true;
      code_point = kReplacement;
    }
    out = encode_utf8(code_point, out);
  };
  std::size_t i = 0;
  bool was_mixed = false;
  while (i + kRun <= length) {
    CodeUnit all_bits = 0;
    for (std::size_t j = 0; j < kRun; ++j) all_bits |= data[i + j];
    if (was_mixed && all_bits >= 0x80) {
      for (std::size_t j = 0; j < kRun; ++j) write(data[i + j]);
      i += kRun;
      continue;
    }
    for (std::size_t j = 0; j < kRun; ++j) out[j] = static_cast<char>(data[i + j]);
    was_mixed = all_bits >= 0x80;
    std::size_t ascii = kRun;
    // Most often that is a lone quotation mark or dash, and behind it all is ASCII again.
    if (was_mixed) {
      for (ascii = 0; data[i + ascii] < 0x80;) ++ascii;
    }
    out += ascii;
    i += ascii;
    while (was_mixed && i < length && data[i] >= 0x80) write(data[i++]);
  }
  for (; i < length; ++i) write(data[i]);
  return {{begin, static_cast<std::size_t>(out - begin)}, has_replaced};
}

template <class Text>
void cut_text_of(const Text& units, const SourceText& text, std::size_t index, std::size_t length,
                 std::vector<TextPart>& parts) {
  const auto* const data = units.data;
  const auto is_cut = [&units](std::size_t i) {
    return units.data[i] == ' ' && char_classes()[units.previous(i)] != kSpace;
  };
  std::size_t begin = 0;
  while (true) {
    std::size_t end = text.length;
    if (text.length - begin > length) {
      end = begin + length;
      while (end < text.length && !is_cut(end)) ++end;
    }
    parts.push_back(
        {index, {{data + begin, end - begin, text.kind}, text.is_ascii}, end == text.length});
    if (end == text.length) return;
    begin = end;
  }
}

}  // namespace

std::size_t find_surrogate(const SourceText& text) {
  switch (text.kind) {
    case TextView::kUtf8:
    case 1:
      return kNoPosition;
    case 2:
      return find_surrogate_in(static_cast<const std::uint16_t*>(text.data), text.length);
    default:
      return find_surrogate_in(static_cast<const std::uint32_t*>(text.data), text.length);
  }
}

bool is_valid_utf8(const SourceText& text) {
  if (text.kind != TextView::kUtf8) return true;
  const auto* const bytes = static_cast<const std::uint8_t*>(text.data);
  return find_invalid_utf8(bytes, text.length) == text.length;
}

Utf8Bytes to_utf8(const SourceText& text, Utf8Buffer& buffer) {
  if (text.is_ascii || text.kind == TextView::kUtf8)
    return {{static_cast<const char*>(text.data), text.length}, false};
  switch (text.kind) {
    case 1:
      return write_utf8(static_cast<const std::uint8_t*>(text.data), text.length, buffer);
    case 2:
      return write_utf8(static_cast<const std::uint16_t*>(text.data), text.length, buffer);
    default:
      return write_utf8(static_cast<const std::uint32_t*>(text.data), text.length, buffer);
  }
}

void cut_text(const SourceText& text, std::size_t index, std::size_t length,
              std::vector<TextPart>& parts) {
  with_text(text, [&](const auto& units) { cut_text_of(units, text, index, length, parts); });
}

}  // namespace tinylm
