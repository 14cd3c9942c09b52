#include "piece_table.hpp"

namespace tinylm {

namespace {

bool is_full(std::size_t used, std::size_t slots) { return 3 * used > 2 * slots; }

}  // namespace

void PieceTable::add(std::string_view piece, std::int64_t count) {
  if (piece.size() > kMaxShortKey) return add_long(piece, count);
  const ShortKey key = short_key_exactly(piece.data(), piece.size());
  add_short(key, key_hash(key), count);
}

void PieceTable::add_short(ShortKey key, std::uint64_t hash, std::int64_t count) {
  const std::size_t mask = short_slots_.size() - 1;
  for (std::size_t i = hash >> short_shift_;; i = (i + 1) & mask) {
    ShortSlot& slot = short_slots_[i];
    if (((slot.key.low ^ key.low) | (slot.key.high ^ key.high)) == 0) {
      slot.count += count;
      return;
    }
    if (slot.is_empty()) {
      slot = {key, count};
      break;
    }
  }
  if (is_full(++short_used_, short_slots_.size())) grow_short();
}

void PieceTable::add_long(std::string_view piece, std::int64_t count) {
  const std::uint64_t hash = long_hash(piece.data(), piece.size());
  const std::size_t mask = long_slots_.size() - 1;
  std::size_t i = hash >> long_shift_;
  for (; long_slots_[i].count != 0; i = (i + 1) & mask) {
    if (long_slots_[i].hash == hash && piece_of(long_slots_[i]) == piece) {
      long_slots_[i].count += count;
      return;
    }
  }
  const std::size_t begin = long_text_.size();
  long_text_.append(piece);
  long_slots_[i] = {hash, begin, piece.size(), count};
  if (is_full(++long_used_, long_slots_.size())) grow_long();
}

void PieceTable::grow_short() {
  std::vector<ShortSlot> larger(2 * short_slots_.size());
  const int shift = short_shift_ - 1;
  for (const ShortSlot& slot : short_slots_) {
    if (slot.is_empty()) continue;
    std::size_t i = key_hash(slot.key) >> shift;
    while (!larger[i].is_empty()) i = (i + 1) & (larger.size() - 1);
    larger[i] = slot;
  }
  short_slots_.swap(larger);
  short_shift_ = shift;
}

void PieceTable::grow_long() {
  std::vector<LongSlot> larger(2 * long_slots_.size());
  const int shift = long_shift_ - 1;
  for (const LongSlot& slot : long_slots_) {
    if (slot.count == 0) continue;
    std::size_t i = slot.hash >> shift;
    while (larger[i].count != 0) i = (i + 1) & (larger.size() - 1);
    larger[i] = slot;
  }
  long_slots_.swap(larger);
  long_shift_ = shift;
}

std::size_t PieceTable::bytes_with(std::size_t pieces, std::size_t piece_bytes) const {
  // What grows is there twice for a moment: as it was, and twice as large.
  const auto memory = [](std::size_t bytes, bool grows) { return grows ? 3 * bytes : bytes; };
  return memory(short_slots_.size() * sizeof(ShortSlot),
                is_full(short_used_ + pieces, short_slots_.size())) +
         memory(long_slots_.size() * sizeof(LongSlot),
                is_full(long_used_ + pieces, long_slots_.size())) +
         memory(long_text_.capacity(), long_text_.size() + piece_bytes > long_text_.capacity());
}

}  // namespace tinylm
