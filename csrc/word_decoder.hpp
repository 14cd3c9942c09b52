// Ids back to words with spaces between, written straight into Python's own form of a text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "text_view.hpp"

namespace tinylm {

// Immutable once made, so any number of threads may decode with one decoder.
class WordDecoder {
 public:
  // Word i, of any code points, is the text of id i; an id without a word has that of `unk_id`.
  WordDecoder(const std::vector<std::u32string>& words, std::uint32_t unk_id);

  // What a text needs: its length, and all bits that its code points have.
  struct Size {
    std::size_t length = 0;
    std::uint32_t bits = 0;
  };

  // Ids one of which may follow; a space is counted, and written, after every word.
  template <class Id>
  Size measure(const Id* first, const Id* last) const;

  // Writes the words of [first, last) to [out, end), which is as long as measured, in units that
  // hold the bits measured. Should the ids have changed meanwhile, it still writes nowhere else,
  // and throws std::runtime_error. Linear time.
  template <class Id, class Unit>
  void write(const Id* first, const Id* last, Unit* out, Unit* end) const;

 private:
  // A word with the space after it, ready to be copied whole whatever its length; the last unit
  // tells how many units it is, 0 for a word that does not fit.
  static constexpr std::size_t kSlot = 16;
  template <class Unit>
  struct Slot {
    Unit units[kSlot];
  };
  template <class Unit>
  static std::vector<Slot<Unit>> make_slots(const std::vector<std::u32string>& words);
  template <class Unit>
  const std::vector<Slot<Unit>>& slots() const;

  template <class Id>
  std::size_t word_of(Id id) const {
    return static_cast<std::uint64_t>(id) < words_.size() ? static_cast<std::size_t>(id) : unk_id_;
  }
  template <class Unit>
  Unit* write_slowly(std::size_t word, Unit* out, Unit* end) const;

  std::vector<std::u32string> words_;
  std::vector<Size> sizes_;  // of each word with its space
  std::vector<Slot<std::uint8_t>> slots8_;
  std::vector<Slot<std::uint16_t>> slots16_;
  std::size_t unk_id_;
};

}  // namespace tinylm
