// UTF-8 that also carries lone surrogates (WTF-8, Python's "surrogatepass"): a Python str may hold
// any code point from 0 to U+10FFFF, and each one has exactly one encoding here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tinylm {

constexpr std::size_t kMaxUtf8Bytes = 4;  // per code point

// Writes `code_point` at `out`, which has room for kMaxUtf8Bytes; returns the end. Constant time.
inline char* encode_utf8(std::uint32_t code_point, char* out) {
  const auto put = [&out](std::uint32_t byte) { *out++ = static_cast<char>(byte); };
  if (code_point < 0x80) {
    put(code_point);
  } else if (code_point < 0x800) {
    put(0xC0 | (code_point >> 6));
    put(0x80 | (code_point & 0x3F));
  } else if (code_point < 0x10000) {
    put(0xE0 | (code_point >> 12));
    put(0x80 | ((code_point >> 6) & 0x3F));
    put(0x80 | (code_point & 0x3F));
  } else {
    put(0xF0 | (code_point >> 18));
    put(0x80 | ((code_point >> 12) & 0x3F));
    put(0x80 | ((code_point >> 6) & 0x3F));
    put(0x80 | (code_point & 0x3F));
  }
  return out;
}

// Reads the code point at `in`, which must start a sequence written by encode_utf8, and moves `in`
// past it. For text made in this program only: nothing is validated. Constant time.
inline std::uint32_t decode_utf8(const char*& in) {
  const auto next = [&in] { return static_cast<std::uint32_t>(static_cast<unsigned char>(*in++)); };
  const std::uint32_t lead = next();
  if (lead < 0x80) return lead;
  std::uint32_t code_point = lead < 0xE0 ? lead & 0x1F : lead < 0xF0 ? lead & 0x0F : lead & 0x07;
  const int tail_bytes = lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
  for (int i = 0; i < tail_bytes; ++i) code_point = code_point << 6 | (next() & 0x3F);
  return code_point;
}

}  // namespace tinylm
