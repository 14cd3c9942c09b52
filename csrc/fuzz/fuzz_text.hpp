// Texts made of a fuzzer's bytes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "source_text.hpp"

namespace tinylm {

// Code points as Python stores them, in units of 1, 2 or 4 bytes as the first byte says. Units of 4
// bytes are brought below U+110000; surrogates may occur. Half of the small code points become
// those that patterns tell apart, which bytes alone would seldom be.
class FuzzText {
 public:
  FuzzText(const std::uint8_t* data, std::size_t size) {
    const int choice = size > 0 ? data[0] % 4 : 0;
    width_ = choice == 3 ? 4 : choice == 2 ? 2 : 1;
    const std::size_t bytes = choice == 0 ? 1 : static_cast<std::size_t>(width_);
    for (std::size_t i = 1; i + bytes <= size; i += bytes) {
      std::uint32_t unit = 0;
      for (std::size_t j = 0; j < bytes; ++j) unit = unit << 8 | data[i + j];
      units_.push_back(choice == 0 ? kAwkward[unit % kAwkwardSize] : unit % 0x110000);
    }
    if (choice == 0) {
      for (const std::uint32_t unit : units_) {
        width_ = std::max(width_, unit < 0x100 ? 1 : unit < 0x10000 ? 2 : 4);
      }
    }
    narrow();
  }

  const void* data() const { return bytes_.data(); }
  std::size_t length() const { return units_.size(); }
  int width() const { return width_; }
  SourceText source() const { return {{data(), length(), width_}, is_ascii_}; }

 private:
  static constexpr std::uint32_t kAwkward[] = {
      'a',    'b',    's',    't',     'l',     'L',      'v',   'e',    'r',    'S',    'D',
      'M',    '\'',   ' ',    ' ',     '\t',    '\n',     '\r',  '1',    '2',    '.',    '/',
      '!',    0x17F,  0x212A, 0x1C5,   0x2B0,   0x301,    0x345, 0x3A3,  0x3C2,  0x130,  0x131,
      0x3042, 0x5D0,  0x660,  0xB2,    0x2167,  0x85,     0xA0,  0x2028, 0x3000, 0x200D, 0xFEFF,
      0xFFFD, 0xD800, 0xDFFF, 0x1D400, 0x1F600, 0x10FFFF, 0,     0x1C,   0xAD,   0xE9,   0xDF};
  static constexpr std::size_t kAwkwardSize = sizeof(kAwkward) / sizeof(kAwkward[0]);

  void narrow() {
    is_ascii_ = width_ == 1;
    bytes_.resize(units_.size() * static_cast<std::size_t>(width_) + 1);
    for (std::size_t i = 0; i < units_.size(); ++i) {
      is_ascii_ = is_ascii_ && units_[i] < 0x80;
      if (width_ == 1) bytes_[i] = static_cast<std::uint8_t>(units_[i]);
      if (width_ == 2) put(i, static_cast<std::uint16_t>(units_[i]));
      if (width_ == 4) put(i, units_[i]);
    }
  }

  template <class Unit>
  void put(std::size_t i, Unit unit) {
    reinterpret_cast<Unit*>(bytes_.data())[i] = unit;
  }

  int width_ = 1;
  bool is_ascii_ = true;
  std::vector<std::uint32_t> units_;
  std::vector<std::uint8_t> bytes_;
};

}  // namespace tinylm
