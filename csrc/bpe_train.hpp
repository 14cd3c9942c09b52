// Learning the merges of a byte-level BPE from text.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "bpe.hpp"
#include "pretokenize.hpp"

namespace tinylm {

// Counts distinct pieces; memory grows with their number only.
class PieceCounter {
 public:
  struct Entry {
    std::string_view piece;  // valid until the next `add`
    std::int64_t count;
  };

  void add(std::string_view piece, std::int64_t count = 1);
  std::size_t size() const { return slots_used_; }

  // In no particular order.
  std::vector<Entry> entries() const;

 private:
  static constexpr std::size_t kMinSlots = 1024;

  struct Slot {
    std::uint64_t hash = 0;
    std::size_t offset = 0;
    std::size_t length = 0;
    std::int64_t count = 0;  // 0: empty
  };

  std::string_view piece_of(const Slot& slot) const { return {&bytes_[slot.offset], slot.length}; }
  void grow();

  std::vector<Slot> slots_ = std::vector<Slot>(kMinSlots);
  std::size_t slots_used_ = 0;
  std::string bytes_;
};

// Counts the pieces of texts that come in batches, each worker in its own table. Callers that may
// run at once hold `lock` around what they do.
class BpeCounter {
 public:
  explicit BpeCounter(SplitPattern pattern) : pattern_(pattern) {}

  [[nodiscard]] std::unique_lock<std::mutex> lock() { return std::unique_lock(mutex_); }

  // Makes room for workers 0 .. threads - 1; call it before they start.
  void reserve_workers(int threads);

  // Counts the pieces of `text`, valid UTF-8, in the table of `worker`. Stopped by `watch`, it has
  // counted some of them.
  void add(std::string_view text, int worker, Watch& watch);

  // How many distinct pieces there are.
  std::size_t size();

  // All pieces and their counts, in the order of their bytes.
  std::vector<PieceCounter::Entry> sorted_entries();

 private:
  // Moves everything into the first table.
  void join_workers();

  std::mutex mutex_;
  SplitPattern pattern_;
  std::vector<PieceCounter> workers_ = std::vector<PieceCounter>(1);
};

// The merges learnt from `pieces`, in order; at most so many that the vocabulary, which begins with
// `first_free_id` tokens, has `vocab_size`.
//
// Rule: the pair with the highest count is merged next; ties go to the smaller left id, then to the
// smaller right id; pairs seen less often than `min_frequency` (at least 1) are not merged. When
// the joined bytes are those of an existing token, that token is the result and the vocabulary does
// not grow. These are the merges of Hugging Face tokenizers' BpeTrainer.
std::vector<BpeMerge> train_bpe(const std::vector<PieceCounter::Entry>& pieces,
                                const std::array<TokenId, 256>& byte_ids, TokenId first_free_id,
                                std::size_t vocab_size, std::int64_t min_frequency, Watch& watch);

}  // namespace tinylm
