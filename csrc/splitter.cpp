#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "bits.hpp"
#include "piece_starts.hpp"
#include "pretokenize.hpp"
#include "unicode_classes.hpp"
#include "utf8.hpp"

namespace tinylm {

namespace {

constexpr std::size_t kMaxWindowBytes = std::size_t{1} << 31;

// What is behind a window, and what its last block is filled up with.
constexpr char kFill = ' ';
constexpr std::uint64_t kTopBit = std::uint64_t{1} << 63;

constexpr BlockClasses kBehindWindow = {0, 0, 0, ~std::uint64_t{0}, 0, 0, 0, 0};

// At most `bytes` of [begin, end), cut between characters.
std::size_t whole_characters(const char* begin, const char* end, std::size_t bytes) {
  const auto left = static_cast<std::size_t>(end - begin);
  if (left <= bytes) return left;
  while ((begin[bytes] & 0xC0) == 0x80) --bytes;
  return bytes;
}

// Nothing behind a window can change the pieces that start before the last white space that has
// something behind it in the window: no pattern looks further than that. This is where that white
// space begins, or 0.
std::size_t certain_bytes(const BlockClasses* classes, std::size_t blocks) {
  std::uint64_t word_behind = 0;  // all bits set if there is one
  for (std::size_t i = blocks; i-- > 0;) {
    const std::uint64_t space = classes[i].space;
    const std::uint64_t space_before = i == 0 ? ~std::uint64_t{0} : classes[i - 1].space;
    std::uint64_t first = space & ~(space << 1 | space_before >> 63);
    if (word_behind == 0) {
      const std::uint64_t words = ~space;
      if (words == 0) continue;
      // Not behind the last word.
      first &= (std::uint64_t{1} << highest_bit(words)) - 1;
      word_behind = ~std::uint64_t{0};
    }
    if (first != 0) return i * kBlockBytes + static_cast<std::size_t>(highest_bit(first));
  }
  return 0;
}

}  // namespace

Splitter::Splitter(SplitPattern pattern, std::string_view text)
    : pattern_(pattern),
      begin_(text.data()),
      next_(text.data()),
      text_end_(text.data() + text.size()) {}

bool Splitter::next() {
  begin_ = next_;
  size_ = 0;
  if (begin_ == text_end_) return false;
  for (std::size_t wanted = kWindowBytes; wanted <= kMaxWindowBytes; wanted *= 2) {
    const std::size_t bytes = whole_characters(begin_, text_end_, wanted);
    read_window(bytes);
    const bool is_last = begin_ + bytes == text_end_;
    const std::size_t certain =
        is_last ? bytes : certain_bytes(classes_, (bytes + kBlockBytes - 1) / kBlockBytes);
    if (certain == 0) continue;
    find_ends(bytes, certain);
    next_ = begin_ + ends_[size_ - 1];
    return true;
  }
  throw std::length_error("2 GiB of text without white space");
}

// The window's classes; `bytes` from begin_ on.
void Splitter::read_window(std::size_t bytes) {
  const std::size_t whole = bytes / kBlockBytes;
  const std::size_t rest = bytes % kBlockBytes;
  reserve_blocks(whole + (rest != 0));
  classify_blocks(begin_, whole, classes_);
  if (rest != 0) {
    char filled[kBlockBytes];
    std::memset(filled, kFill, sizeof(filled));
    std::memcpy(filled, begin_ + whole * kBlockBytes, rest);
    classify_blocks(filled, 1, classes_ + whole);
  }
  classes_[whole + (rest != 0)] = kBehindWindow;
  read_wide_chars(bytes);
}

void Splitter::reserve_blocks(std::size_t blocks) {
  if (blocks <= kWindowBlocks) {
    classes_ = small_classes_;
    starts_ = small_starts_;
    return;
  }
  if (large_classes_.size() < blocks + 1) {
    large_classes_.resize(blocks + 1);
    large_starts_.resize(blocks + 1);
  }
  classes_ = large_classes_.data();
  starts_ = large_starts_.data();
}

// Gives the bytes of characters beyond ASCII their classes, and notes what bits cannot tell.
void Splitter::read_wide_chars(std::size_t bytes) {
  has_uncased_ = false;
  wide_spaces_.clear();
  wide_symbols_.clear();
  const CharClassTable* const table = &char_classes();
  for (std::size_t block = 0; block * kBlockBytes < bytes; ++block) {
    BlockClasses& here = classes_[block];
    std::uint64_t lower = 0;  // which most are, kept out of memory
    for (std::uint64_t wide = here.wide; wide != 0; wide &= wide - 1) {
      const int first = lowest_bit(wide);
      const std::size_t at = block * kBlockBytes + static_cast<std::size_t>(first);
      const char* next = begin_ + at;
      const CharClass char_class = (*table)[decode_utf8(next)];
      const auto size = static_cast<int>(next - (begin_ + at));
      const std::uint64_t bits = (std::uint64_t{1} << size) - 1;
      const bool goes_on = first + size > static_cast<int>(kBlockBytes);  // in the next block
      if (char_class == kLower && !goes_on) {
        lower |= bits << first;
        continue;
      }
      const WideChar wide_char = {static_cast<std::uint32_t>(at), static_cast<std::uint32_t>(size)};
      std::uint64_t BlockClasses::* field = &BlockClasses::lower;
      switch (char_class) {
        case kOther:
          wide_symbols_.push_back(wide_char);
          continue;
        case kMark:
          has_uncased_ = true;
          wide_symbols_.push_back(wide_char);
          continue;
        case kUncased:
          has_uncased_ = true;
          break;
        case kLower:
          break;
        case kUpper:
          field = &BlockClasses::upper;
          break;
        case kNumber:
          field = &BlockClasses::number;
          break;
        case kSpace:
          field = &BlockClasses::space;
          wide_spaces_.push_back(wide_char);
          break;
      }
      here.*field |= bits << first;
      if (goes_on) classes_[block + 1].*field |= bits >> (static_cast<int>(kBlockBytes) - first);
    }
    here.lower |= lower;
  }
}

// The ends of the pieces that start before `certain`, which is above 0.
void Splitter::find_ends(std::size_t bytes, std::size_t certain) {
  const Window window = {begin_,       bytes,         text_end_,     classes_,
                         has_uncased_, &wide_spaces_, &wide_symbols_};
  if (!find_piece_starts(pattern_, window, starts_)) return find_ends_slowly(certain);
  starts_[0] &= ~std::uint64_t{1};
  const std::size_t last_block = certain / kBlockBytes;
  const std::uint64_t certain_bits = (std::uint64_t{1} << certain % kBlockBytes) - 1;
  const std::uint64_t uncertain_starts = starts_[last_block] & ~certain_bits;
  starts_[last_block] &= certain_bits;
  reserve_ends(last_block + 1);

  std::uint32_t* out = ends_;
  for (std::size_t block = 0; block <= last_block; ++block) {
    std::uint64_t starts = starts_[block];
    const auto base = static_cast<std::uint32_t>(block * kBlockBytes);
    std::uint32_t* const next_out = out + count_bits(starts);
    // Some at a time: it costs less to write too many than to predict how many there are.
    for (; out < next_out; out += kSpareEnds) {
      for (std::size_t i = 0; i < kSpareEnds; ++i) {
        out[i] = base + static_cast<std::uint32_t>(lowest_bit(starts | kTopBit));
        starts &= starts - 1;
      }
    }
    out = next_out;
  }

  // The piece that starts last ends where the next one starts, or with the text.
  std::uint64_t behind = uncertain_starts;
  std::size_t block = last_block;
  while (behind == 0 && (block + 1) * kBlockBytes < bytes) behind = starts_[++block];
  std::size_t end = bytes;
  if (behind != 0) {
    end = std::min(end, block * kBlockBytes + static_cast<std::size_t>(lowest_bit(behind)));
  }
  *out++ = static_cast<std::uint32_t>(end);
  size_ = static_cast<std::size_t>(out - ends_);
}

// Makes room for the starts in so many blocks, and as many more as are written too many.
void Splitter::reserve_ends(std::size_t blocks) {
  ends_ = small_ends_;
  if (blocks <= kWindowBlocks) return;
  std::size_t count = 0;
  for (std::size_t i = 0; i < blocks; ++i)
    count += static_cast<std::size_t>(count_bits(starts_[i]));
  if (large_ends_.size() < count + kSpareEnds) large_ends_.resize(count + kSpareEnds);
  ends_ = large_ends_.data();
}

void Splitter::find_ends_slowly(std::size_t certain) {
  const PieceEnd piece_end = piece_end_of(pattern_);
  const char* at = begin_;
  ends_ = small_ends_;
  // The small array has room for a piece of each byte of a usual window, and of no other.
  while (at < begin_ + certain && size_ < kWindowBytes) {
    at = piece_end(at, text_end_);
    ends_[size_++] = static_cast<std::uint32_t>(at - begin_);
  }
}

}  // namespace tinylm
