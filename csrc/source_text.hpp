// Texts as the threads see them: code points of Python strings where they lie, or UTF-8 in bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "text_view.hpp"

namespace tinylm {

struct SourceText : TextView {
  bool is_ascii;  // known to be
};

constexpr std::size_t kNoPosition = static_cast<std::size_t>(-1);

// A piece of a text that has the pieces it has in the whole; `is_last` of its text.
struct TextPart {
  std::size_t text;
  SourceText source;
  bool is_last;
};

// Appends text number `index` in parts of at least `length` code points, the last one apart, which
// are longer only where there is no place to cut: before a space that is behind anything but white
// space. Whatever the pattern, a piece ends there, also if the text does. Linear.
void cut_text(const SourceText& text, std::size_t index, std::size_t length,
              std::vector<TextPart>& parts);

// Position of the first surrogate of `text`, or kNoPosition. Linear.
std::size_t find_surrogate(const SourceText& text);

// Whether `text`, if it is UTF-8 at all, is valid. Linear.
bool is_valid_utf8(const SourceText& text);

// Room for one text after another, which is not filled before it is written.
class Utf8Buffer {
 public:
  char* reserve(std::size_t bytes) {
    if (bytes > capacity_) {
      bytes_.reset();
      bytes_.reset(new char[bytes]);
      capacity_ = bytes;
    }
    return bytes_.get();
  }

 private:
  std::unique_ptr<char[]> bytes_;
  std::size_t capacity_ = 0;
};

struct Utf8Bytes {
  std::string_view bytes;
  bool has_replaced;  // U+FFFD for a surrogate

  operator std::string_view() const { return bytes; }
};

// The text as UTF-8, with U+FFFD for each surrogate. ASCII and UTF-8 stay where they are; the rest
// is written to `buffer`, which must live as long as the result. Linear.
Utf8Bytes to_utf8(const SourceText& text, Utf8Buffer& buffer);

}  // namespace tinylm
