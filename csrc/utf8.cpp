#include "utf8.hpp"

#include <cstring>

namespace tinylm {

std::size_t find_invalid_utf8(const std::uint8_t* data, std::size_t size) {
  const std::uint8_t *in = data, *const end = data + size;
  while (in != end) {
    while (end - in >= 16) {
      std::uint64_t words[2];
      std::memcpy(words, in, 16);
      if (((words[0] | words[1]) & 0x8080808080808080u) != 0) break;
      in += 16;
    }
    // Most often that is a lone quotation mark or dash, or a word, and behind it all is ASCII
    // again.
    while (in != end && *in < 0x80) ++in;
    while (in != end && *in >= 0x80) {
      const Utf8Read read = read_utf8(in, end);
      if (!read.valid) return static_cast<std::size_t>(in - data);
      in += read.bytes;
    }
  }
  return size;
}

}  // namespace tinylm
