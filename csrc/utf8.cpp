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
    // A script has its characters side by side, so what follows is likely to be of the same kind.
    for (int i = 0; i < 16 && in != end; ++i) {
      const Utf8Read read = read_utf8(in, end);
      if (!read.valid) return static_cast<std::size_t>(in - data);
      in += read.bytes;
    }
  }
  return size;
}

}  // namespace tinylm
