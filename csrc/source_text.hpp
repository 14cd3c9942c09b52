// Python strings as the threads see them: the code points where they lie, with no copy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace tinylm {

struct SourceText {
  const void* data;
  std::size_t length;  // in code points
  int width;           // bytes per code point: 1, 2 or 4
  bool is_ascii;
};

constexpr std::size_t kNoPosition = static_cast<std::size_t>(-1);

// Position of the first surrogate of `text`, or kNoPosition. Linear.
std::size_t find_surrogate(const SourceText& text);

// The text as UTF-8, with U+FFFD for each surrogate. ASCII stays where it is; the rest is written
// to `buffer`, which must live as long as the result. Linear.
std::string_view to_utf8(const SourceText& text, std::string& buffer);

}  // namespace tinylm
