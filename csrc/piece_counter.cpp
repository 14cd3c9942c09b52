#include "piece_counter.hpp"

#include <algorithm>
#include <array>
#include <utility>

namespace tinylm {

namespace {

// After so many bytes of text, it is asked whether to go on.
constexpr std::size_t kPollBytes = std::size_t{1} << 16;
// The same, for pieces and for comparisons of two.
constexpr std::size_t kPollPieces = std::size_t{1} << 12;

std::vector<PieceCount> sorted(const PieceTable& table, Watch& watch) {
  std::vector<PieceCount> pieces;
  pieces.reserve(table.size());
  table.for_each([&](const PieceCount& entry) { pieces.push_back(entry); });
  std::size_t comparisons = 0;
  std::sort(pieces.begin(), pieces.end(), [&](const PieceCount& a, const PieceCount& b) {
    if (++comparisons % kPollPieces == 0) watch.poll();
    return a.piece < b.piece;
  });
  return pieces;
}

}  // namespace

// Pieces on their way into a table: the slots of short ones come from memory meanwhile.
class PieceCounter::Batch {
 public:
  Batch(PieceTable& table, std::string_view text)
      : table_(table), text_end_(text.data() + text.size()) {}

  bool is_full() const { return short_count_ == kSize || long_count_ == kSize; }

  void add(std::string_view piece) {
    if (piece.size() > kMaxShortKey) {
      long_[long_count_++] = piece;
      long_bytes_ += piece.size();
      return;
    }
    const ShortKey key = key_of(piece);
    keys_[short_count_] = key;
    hashes_[short_count_] = key_hash(key);
    table_.prefetch(hashes_[short_count_++]);
  }

  std::size_t table_bytes() const {
    return table_.bytes_with(std::max(short_count_, long_count_), long_bytes_);
  }

  void flush() {
    for (std::size_t i = 0; i < short_count_; ++i) table_.add_short(keys_[i], hashes_[i], 1);
    for (std::size_t i = 0; i < long_count_; ++i) table_.add(long_[i], 1);
    short_count_ = long_count_ = long_bytes_ = 0;
  }

 private:
  static constexpr std::size_t kSize = 64;

  ShortKey key_of(std::string_view piece) const {
    const auto room = static_cast<std::size_t>(text_end_ - piece.data());
    if (room >= sizeof(ShortKey)) return short_key(piece.data(), piece.size());
    return short_key_exactly(piece.data(), piece.size());
  }

  PieceTable& table_;
  const char* text_end_;
  std::array<ShortKey, kSize> keys_;
  std::array<std::uint64_t, kSize> hashes_;
  std::array<std::string_view, kSize> long_;
  std::size_t short_count_ = 0, long_count_ = 0, long_bytes_ = 0;
};

void PieceCounter::reserve_workers(int threads) {
  const auto wanted = static_cast<std::size_t>(std::max(1, threads));
  if (workers_.size() < wanted) workers_.resize(wanted);
}

void PieceCounter::add(std::string_view text, int worker, Watch& watch) {
  PieceTable& table = workers_[static_cast<std::size_t>(worker)];
  const std::size_t share = memory_ / workers_.size();
  Batch batch(table, text);
  const auto flush = [&] {
    if (batch.table_bytes() > share) spill(table, watch);
    batch.flush();
  };
  const char* next_poll = text.data() + std::min(text.size(), kPollBytes);
  for_each_piece(pattern_, text, [&](std::string_view piece) {
    batch.add(piece);
    if (batch.is_full()) flush();
    if (piece.data() >= next_poll) {
      watch.poll();
      next_poll = piece.data() + kPollBytes;
    }
  });
  flush();
}

void PieceCounter::spill(PieceTable& table, Watch& watch) {
  if (table.size() == 0) return;
  PieceTable fresh;
  const std::vector<PieceCount> pieces = sorted(table, watch);
  {
    const std::lock_guard<std::mutex> lock(runs_mutex_);
    runs_.add(pieces, watch);
  }
  std::swap(table, fresh);
}

void PieceCounter::join(Watch& watch) {
  std::size_t bytes = 0;
  for (const PieceTable& table : workers_) bytes += table.bytes_with(0, 0);
  // One table for all would take up to that again, and thrice while it grows.
  if (!runs_.empty() || (workers_.size() > 1 && bytes > memory_ / 4)) {
    for (PieceTable& table : workers_) spill(table, watch);
    runs_.join(watch);
  }
  for (std::size_t i = 1; i < workers_.size(); ++i) {
    // Not stopped in the middle of a table, as some of its pieces would then be counted twice.
    watch.poll();
    workers_[i].for_each(
        [&](const PieceCount& entry) { workers_[0].add(entry.piece, entry.count); });
    workers_[i] = PieceTable();
  }
}

std::size_t PieceCounter::size(Watch& watch) {
  join(watch);
  return runs_.empty() ? workers_[0].size() : static_cast<std::size_t>(runs_.size());
}

void PieceCounter::for_each(const std::function<void(const PieceCount&)>& function, Watch& watch) {
  join(watch);
  if (!runs_.empty()) return runs_.for_each(function, watch);
  std::size_t pieces = 0;
  workers_[0].for_each([&](const PieceCount& entry) {
    if (pieces++ % kPollPieces == 0) watch.poll();
    function(entry);
  });
}

void PieceCounter::for_each_sorted(const std::function<void(const PieceCount&)>& function,
                                   Watch& watch) {
  join(watch);
  if (!runs_.empty()) return runs_.for_each(function, watch);
  for (const PieceCount& entry : sorted(workers_[0], watch)) function(entry);
}

}  // namespace tinylm
