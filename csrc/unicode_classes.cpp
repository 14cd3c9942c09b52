#include "unicode_classes.hpp"

#include <map>

#include "unicode_class_ranges.hpp"

namespace tinylm {

namespace {

template <std::size_t N>
void assign(std::vector<CharClass>& classes, const CodePointRange (&ranges)[N], CharClass value) {
  for (const CodePointRange& range : ranges) {
    for (std::uint32_t c = range.first; c <= range.last; c += range.step) classes[c] = value;
  }
}

}  // namespace

CharClassTable::CharClassTable() {
  std::vector<CharClass> classes(kCodePoints, kOther);
  assign(classes, kUpperRanges, kUpper);
  assign(classes, kLowerRanges, kLower);
  assign(classes, kUncasedRanges, kUncased);
  assign(classes, kMarkRanges, kMark);
  assign(classes, kNumberRanges, kNumber);
  assign(classes, kSpaceRanges, kSpace);

  std::map<Block, std::uint16_t> seen;
  for (std::size_t i = 0; i < block_of_.size(); ++i) {
    Block block;
    for (std::size_t j = 0; j < kBlockSize; ++j) block[j] = classes[i * kBlockSize + j];
    const auto [entry, is_new] = seen.emplace(block, static_cast<std::uint16_t>(blocks_.size()));
    if (is_new) blocks_.push_back(block);
    block_of_[i] = entry->second;
  }
}

const CharClassTable& char_classes() {
  static const CharClassTable table;
  return table;
}

}  // namespace tinylm
