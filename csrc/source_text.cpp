#include "source_text.hpp"

#include "utf8.hpp"

namespace tinylm {

namespace {

constexpr std::uint32_t kReplacement = 0xFFFD;

inline bool is_surrogate(std::uint32_t code_point) {
  return code_point >= 0xD800 && code_point < 0xE000;
}

template <class CodeUnit>
std::size_t find_surrogate_in(const CodeUnit* data, std::size_t length) {
  for (std::size_t i = 0; i < length; ++i) {
    if (is_surrogate(data[i])) return i;
  }
  return kNoPosition;
}

template <class CodeUnit>
std::string_view write_utf8(const CodeUnit* data, std::size_t length, std::string& buffer) {
  // A code unit of one byte is below U+0100, of two bytes below U+10000.
  constexpr std::size_t kMaxBytes = sizeof(CodeUnit) == 1 ? 2 : sizeof(CodeUnit) == 2 ? 3 : 4;
  // encode_utf8 may ask for room beyond what it keeps.
  const std::size_t room = length * kMaxBytes + kMaxUtf8Bytes;
  if (buffer.size() < room) buffer.resize(room);
  char* out = buffer.data();
  for (std::size_t i = 0; i < length; ++i) {
    const std::uint32_t code_point = data[i];
    out = encode_utf8(is_surrogate(code_point) ? kReplacement : code_point, out);
  }
  return {buffer.data(), static_cast<std::size_t>(out - buffer.data())};
}

}  // namespace

std::size_t find_surrogate(const SourceText& text) {
  switch (text.width) {
    case 1:
      return kNoPosition;
    case 2:
      return find_surrogate_in(static_cast<const std::uint16_t*>(text.data), text.length);
    default:
      return find_surrogate_in(static_cast<const std::uint32_t*>(text.data), text.length);
  }
}

std::string_view to_utf8(const SourceText& text, std::string& buffer) {
  if (text.is_ascii) return {static_cast<const char*>(text.data), text.length};
  switch (text.width) {
    case 1:
      return write_utf8(static_cast<const std::uint8_t*>(text.data), text.length, buffer);
    case 2:
      return write_utf8(static_cast<const std::uint16_t*>(text.data), text.length, buffer);
    default:
      return write_utf8(static_cast<const std::uint32_t*>(text.data), text.length, buffer);
  }
}

}  // namespace tinylm
