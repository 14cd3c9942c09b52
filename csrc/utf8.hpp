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

constexpr std::uint32_t kReplacementCharacter = 0xFFFD;

// What read_utf8 finds: a code point and the bytes it takes. What is no UTF-8 is U+FFFD, as many
// times and over as many bytes each as bytes.decode("utf-8", "replace") makes of it in Python.
struct Utf8Read {
  std::uint32_t code_point;
  std::uint32_t bytes;
  bool valid;
};

// Reads the code point at `in`, before `end`. Any bytes will do: nothing beyond `end` is touched.
// Surrogates are not valid. Constant time.
inline Utf8Read read_utf8(const std::uint8_t* in, const std::uint8_t* end) {
  const std::uint32_t lead = *in;
  if (lead < 0x80) return {lead, 1, true};
  const auto left = static_cast<std::size_t>(end - in);
  const auto tail = [in](int i) { return static_cast<std::uint32_t>(in[i]) - 0x80; };
  if (lead < 0xE0) {
    if (lead >= 0xC2 && left >= 2 && tail(1) < 0x40) {
      return {(lead & 0x1F) << 6 | tail(1), 2, true};
    }
    return {kReplacementCharacter, 1, false};
  }
  if (lead > 0xF4 || left < 2 || tail(1) >= 0x40) return {kReplacementCharacter, 1, false};
  const std::uint32_t top = lead << 6 | tail(1);
  if (lead < 0xF0) {
    // Neither what is too long nor a surrogate.
    const bool fits = top >= (0xE0 << 6 | 0x20) && (lead != 0xED || tail(1) < 0x20);
    if (!fits) return {kReplacementCharacter, 1, false};
    if (left < 3 || tail(2) >= 0x40) return {kReplacementCharacter, 2, false};
    return {(top & 0x3FF) << 6 | tail(2), 3, true};
  }
  const bool fits = top >= (0xF0 << 6 | 0x10) && top < (0xF4 << 6 | 0x10);
  if (!fits) return {kReplacementCharacter, 1, false};
  if (left < 3 || tail(2) >= 0x40) return {kReplacementCharacter, 2, false};
  if (left < 4 || tail(3) >= 0x40) return {kReplacementCharacter, 3, false};
  return {(top & 0x1FF) << 12 | tail(2) << 6 | tail(3), 4, true};
}

// The position of the first byte of [data, data + size) that read_utf8 finds not to be valid, or
// `size`. Linear; fastest on ASCII.
std::size_t find_invalid_utf8(const std::uint8_t* data, std::size_t size);

}  // namespace tinylm
