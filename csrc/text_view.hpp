// A text in one of the four forms in which Python hands it over, and its code points one by one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "utf8.hpp"

namespace tinylm {

// `length` units: code points of 1, 2 or 4 bytes as a str holds them (surrogates are code points
// like any other), or, if `kind` is kUtf8, bytes. Bytes that are no UTF-8 are read as U+FFFD; they
// may even change meanwhile, which makes the result anything but reads nothing outside of them.
struct TextView {
  static constexpr int kUtf8 = 0;
  const void* data;
  std::size_t length;
  int kind;  // bytes in a unit, or kUtf8
};

template <class UnitType>
struct UnitText {
  using Unit = UnitType;
  static constexpr std::size_t kMaxLowerBytes = sizeof(Unit) == 1 ? 2 : sizeof(Unit) == 2 ? 3 : 4;
  const Unit* data;
  std::size_t length;

  // The code point at `at`, which is moved past it; the one before `at`, which is moved there.
  std::uint32_t next(std::size_t& at) const { return data[at++]; }
  std::uint32_t previous(std::size_t& at) const { return data[--at]; }

  // Whether a code point starts at `at`.
  static bool is_start(Unit) { return true; }
};

struct Utf8Text {
  using Unit = std::uint8_t;
  static constexpr std::size_t kMaxLowerBytes = 3;  // of one byte: U+FFFD if it is no UTF-8
  const Unit* data;
  std::size_t length;

  std::uint32_t next(std::size_t& at) const {
    const Utf8Read read = read_utf8(data + at, data + length);
    at += read.bytes;
    return read.code_point;
  }

  // Every lead byte starts a code point, valid or not, so one that ends at `at` is unambiguous.
  std::uint32_t previous(std::size_t& at) const {
    std::size_t start = at - 1;
    while (start > 0 && at - start < kMaxUtf8Bytes && !is_start(data[start])) --start;
    const Utf8Read read = read_utf8(data + start, data + at);
    const bool ends_here = read.valid && start + read.bytes == at;
    at = ends_here ? start : at - 1;
    return ends_here ? read.code_point : kReplacementCharacter;
  }

  static bool is_start(Unit unit) { return (unit & 0xC0) != 0x80; }
};

// Calls function(text) with the UnitText or Utf8Text of `view`.
template <class Function>
auto with_text(const TextView& view, Function&& function) {
  switch (view.kind) {
    case TextView::kUtf8:
      return function(Utf8Text{static_cast<const std::uint8_t*>(view.data), view.length});
    case 1:
      return function(
          UnitText<std::uint8_t>{static_cast<const std::uint8_t*>(view.data), view.length});
    case 2:
      return function(
          UnitText<std::uint16_t>{static_cast<const std::uint16_t*>(view.data), view.length});
    default:
      return function(
          UnitText<std::uint32_t>{static_cast<const std::uint32_t*>(view.data), view.length});
  }
}

}  // namespace tinylm
