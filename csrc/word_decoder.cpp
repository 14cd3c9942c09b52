#include "word_decoder.hpp"

#include <cstring>
#include <limits>
#include <stdexcept>

namespace tinylm {

template <class Unit>
std::vector<WordDecoder::Slot<Unit>> WordDecoder::make_slots(
    const std::vector<std::u32string>& words) {
  std::vector<Slot<Unit>> slots(words.size());
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::u32string& word = words[i];
    bool fits = word.size() + 1 < kSlot;
    for (const char32_t c : word) fits = fits && c <= std::numeric_limits<Unit>::max();
    if (!fits) continue;
    Unit* out = slots[i].units;
    for (const char32_t c : word) *out++ = static_cast<Unit>(c);
    *out = ' ';
    slots[i].units[kSlot - 1] = static_cast<Unit>(word.size() + 1);
  }
  return slots;
}

WordDecoder::WordDecoder(const std::vector<std::u32string>& words, std::uint32_t unk_id)
    : words_(words),
      slots8_(make_slots<std::uint8_t>(words)),
      slots16_(make_slots<std::uint16_t>(words)),
      unk_id_(unk_id) {
  sizes_.reserve(words.size());
  for (const std::u32string& word : words) {
    Size size{word.size() + 1, ' '};
    for (const char32_t c : word) size.bits |= static_cast<std::uint32_t>(c);
    sizes_.push_back(size);
  }
}

template <class Id>
WordDecoder::Size WordDecoder::measure(const Id* first, const Id* last) const {
  Size all;
  for (; first != last; ++first) {
    const Size& size = sizes_[word_of(*first)];
    all.length += size.length;
    all.bits |= size.bits;
  }
  return all;
}

template <>
const std::vector<WordDecoder::Slot<std::uint8_t>>& WordDecoder::slots() const {
  return slots8_;
}
// Texts beyond U+FFFF are rare enough to widen these.
template <>
const std::vector<WordDecoder::Slot<std::uint16_t>>& WordDecoder::slots() const {
  return slots16_;
}

// A word that has no slot, or that stands at the end, where there is no room for a whole one.
template <class Unit>
Unit* WordDecoder::write_slowly(std::size_t word, Unit* out, Unit* end) const {
  const std::u32string& text = words_[word];
  const auto left = static_cast<std::size_t>(end - out);
  if (text.size() + 1 > left) throw std::runtime_error("the ids have changed while being decoded");
  for (const char32_t c : text) *out++ = static_cast<Unit>(c);
  *out++ = ' ';
  return out;
}

template <class Id, class Unit>
void WordDecoder::write(const Id* first, const Id* last, Unit* out, Unit* end) const {
  using Stored = std::conditional_t<sizeof(Unit) == 1, std::uint8_t, std::uint16_t>;
  const Slot<Stored>* const all = slots<Stored>().data();
  for (; first != last; ++first) {
    const std::size_t word = word_of(*first);
    const Stored* const slot = all[word].units;
    const std::size_t size = slot[kSlot - 1];
    if (size == 0 || static_cast<std::size_t>(end - out) < kSlot) {
      out = write_slowly(word, out, end);
      continue;
    }
    if constexpr (sizeof(Unit) == sizeof(Stored)) {
      std::memcpy(out, slot, sizeof(Slot<Stored>));
    } else {
      for (std::size_t i = 0; i < kSlot; ++i) out[i] = slot[i];
    }
    out += size;
  }
  if (out != end) throw std::runtime_error("the ids have changed while being decoded");
}

#define TINYLM_DECODE(Id)                                                                       \
  template WordDecoder::Size WordDecoder::measure(const Id*, const Id*) const;                  \
  template void WordDecoder::write(const Id*, const Id*, std::uint8_t*, std::uint8_t*) const;   \
  template void WordDecoder::write(const Id*, const Id*, std::uint16_t*, std::uint16_t*) const; \
  template void WordDecoder::write(const Id*, const Id*, std::uint32_t*, std::uint32_t*) const;
TINYLM_DECODE(std::uint16_t)
TINYLM_DECODE(std::int32_t)
TINYLM_DECODE(std::uint32_t)
TINYLM_DECODE(std::int64_t)
#undef TINYLM_DECODE

}  // namespace tinylm
