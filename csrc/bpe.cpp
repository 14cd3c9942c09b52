#include "bpe.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <set>
#include <stdexcept>
#include <utility>

#include "merge_queue.hpp"

namespace tinylm {

namespace {

constexpr std::uint32_t kNoRank = std::numeric_limits<std::uint32_t>::max();

// Up to this many bytes, scanning all ranks for the lowest beats a heap.
constexpr std::size_t kMaxShortPiece = 48;

// After so many bytes, or steps that take about as long, it is asked whether to go on.
constexpr std::size_t kPollBytes = std::size_t{1} << 16;

// Working memory for longer pieces, which are rare, is given back.
constexpr std::size_t kMaxKeptSymbols = std::size_t{1} << 18;

// More idle scratches than this are not worth their memory.
constexpr std::size_t kMaxPool = 64;

// Pieces with few bytes and few ids, which nearly all are, and their ids. Direct-mapped: a new
// piece takes the place of the one that shares its slot, so memory is bounded.
class PieceCache {
 public:
  static constexpr std::size_t kMaxBytes = 24;
  static constexpr std::size_t kMaxIds = 9;

  // The bytes of a piece and its length. Words overlap where the piece does not fill them, which is
  // quicker than padding them, and one-to-one for a given length.
  struct Key {
    // `piece` has 1 to kMaxBytes bytes.
    explicit Key(std::string_view piece) : length(static_cast<std::uint16_t>(piece.size())) {
      const char* const begin = piece.data();
      if (piece.size() < 8) {
        words[0] = load_short(piece);
        return;
      }
      words[0] = load<std::uint64_t>(begin);
      words[1] = load<std::uint64_t>(begin + piece.size() - 8);
      if (piece.size() > 16) words[2] = load<std::uint64_t>(begin + 8);
    }

    std::uint64_t hash() const {
      std::uint64_t mixed = words[0] * 0x9E3779B97F4A7C15u;
      mixed = ((mixed ^ mixed >> 32) + words[1]) * 0xD6E8FEB86659FD93u;
      mixed = ((mixed ^ mixed >> 32) + words[2]) * 0xCA5A826395121157u;
      return (mixed >> 32) + length;
    }

    std::uint64_t words[3] = {};
    std::uint16_t length;
  };

  // One cache line.
  struct alignas(64) Slot {
    std::uint64_t words[3] = {};
    std::uint16_t length = 0;  // 0: empty
    std::uint16_t count = 0;
    TokenId ids[kMaxIds] = {};

    bool holds(const Key& key) const {
      return length == key.length && words[0] == key.words[0] && words[1] == key.words[1] &&
             words[2] == key.words[2];
    }
  };

  PieceCache() : slots_(kSlots) {}

  // The only slot that may hold `key`.
  Slot& slot_of(const Key& key) { return slots_[key.hash() & (kSlots - 1)]; }

  static void fill(Slot& slot, const Key& key, const TokenId* ids, std::size_t count) {
    std::copy(key.words, key.words + 3, slot.words);
    slot.length = key.length;
    slot.count = static_cast<std::uint16_t>(count);
    std::copy(ids, ids + count, slot.ids);
  }

 private:
#ifdef TINYLM_FUZZING
  static constexpr std::size_t kSlots = 16;  // quickly made, and pieces get in each other's way
#else
  static constexpr std::size_t kSlots = std::size_t{1} << 16;
#endif

  template <class Word>
  static Word load(const char* at) {
    Word word;
    std::memcpy(&word, at, sizeof(word));
    return word;
  }

  // 1 to 7 bytes.
  static std::uint64_t load_short(std::string_view piece) {
    const std::size_t size = piece.size();
    if (size >= 4) {
      const std::uint64_t first = load<std::uint32_t>(piece.data());
      return first << 32 | load<std::uint32_t>(piece.data() + size - 4);
    }
    const auto byte = [&](std::size_t i) -> std::uint64_t {
      return static_cast<unsigned char>(piece[i]);
    };
    return byte(0) << 16 | byte(size / 2) << 8 | byte(size - 1);
  }

  std::vector<Slot> slots_;
};

}  // namespace

class BpeModel::Scratch {
 public:
  PieceCache cache;
  std::string prefixed;

  // The linked list and the queue of merge_long.
  struct Symbol {
    TokenId id;
    std::uint32_t rank;  // of the merge with the next symbol
    std::uint32_t previous, next;
  };
  std::vector<Symbol> symbols;
  std::unique_ptr<MergeQueue> queue;
};

BpeModel::BpeModel(std::vector<std::string> tokens, const std::vector<BpeMerge>& merges,
                   const std::array<TokenId, 256>& byte_ids,
                   const std::vector<TokenId>& special_ids, BpeOptions options)
    : tokens_(std::move(tokens)), byte_ids_(byte_ids), options_(options) {
  pool_.reserve(kMaxPool);  // So that giving a scratch back cannot throw.
  for (std::size_t place = 0; place < merges.size(); ++place) {
    const BpeMerge& merge = merges[place];
    const auto rank = options_.ranks_are_ids ? merge.result : static_cast<std::uint32_t>(place);
    merges_[pair_key(merge.left, merge.right)] = {rank, merge.result};
    ranks_ = std::max<std::size_t>(ranks_, std::size_t{rank} + 1);
  }
  if (options_.ignore_merges) {
    const std::set<TokenId> special(special_ids.begin(), special_ids.end());
    for (TokenId id = 0; id < tokens_.size(); ++id) {
      if (special.count(id) == 0) whole_pieces_.emplace(tokens_[id], id);
    }
  }
}

BpeModel::~BpeModel() = default;

// Only tries to lock: a fork while another thread held the lock must not leave the child waiting
// for ever. Without the pool, all that is lost is a warm cache.
ScratchLease::ScratchLease(const BpeModel& model) : model_(model) {
  const std::unique_lock<std::mutex> lock(model.pool_mutex_, std::try_to_lock);
  if (lock.owns_lock() && !model.pool_.empty()) {
    scratch_ = std::move(model.pool_.back());
    model.pool_.pop_back();
  } else {
    scratch_ = std::make_unique<BpeModel::Scratch>();
  }
}

ScratchLease::~ScratchLease() {
  const std::unique_lock<std::mutex> lock(model_.pool_mutex_, std::try_to_lock);
  if (lock.owns_lock() && model_.pool_.size() < kMaxPool) {
    model_.pool_.push_back(std::move(scratch_));
  }
}

void BpeModel::encode(std::string_view text, Scratch& scratch, std::vector<TokenId>& ids,
                      Watch& watch) const {
  if (options_.add_prefix_space && !text.empty() && text.front() != ' ') {
    scratch.prefixed.assign(1, ' ').append(text);
    text = scratch.prefixed;
  }
  const char* next_poll = text.data() + kPollBytes;
  for_each_piece(options_.pattern, text, [&](std::string_view piece) {
    if (piece.data() >= next_poll) {
      watch.poll();
      next_poll = piece.data() + kPollBytes;
    }
    encode_piece(piece, scratch, ids, watch);
  });
}

void BpeModel::encode_piece(std::string_view piece, Scratch& scratch, std::vector<TokenId>& ids,
                            Watch& watch) const {
  if (piece.size() > PieceCache::kMaxBytes) return merge_piece(piece, scratch, ids, watch);
  const PieceCache::Key key(piece);
  PieceCache::Slot& slot = scratch.cache.slot_of(key);
  if (slot.holds(key)) {
    ids.insert(ids.end(), slot.ids, slot.ids + slot.count);
    return;
  }
  const std::size_t start = ids.size();
  merge_piece(piece, scratch, ids, watch);
  const std::size_t count = ids.size() - start;
  if (count <= PieceCache::kMaxIds) PieceCache::fill(slot, key, &ids[start], count);
}

void BpeModel::merge_piece(std::string_view piece, Scratch& scratch, std::vector<TokenId>& ids,
                           Watch& watch) const {
  if (options_.ignore_merges) {
    const auto found = whole_pieces_.find(piece);
    if (found != whole_pieces_.end()) return ids.push_back(found->second);
  }
  if (piece.size() <= kMaxShortPiece) return merge_short(piece, ids);
  merge_long(piece, scratch, ids, watch);
}

// Merges, again and again, the leftmost pair of lowest rank.
void BpeModel::merge_short(std::string_view piece, std::vector<TokenId>& ids) const {
  TokenId symbols[kMaxShortPiece];
  std::uint32_t ranks[kMaxShortPiece];  // of the merge with the next symbol
  std::size_t count = piece.size();
  const auto rank_pair = [&](std::size_t i) {
    const RankAndResult* const merge = merges_.find(pair_key(symbols[i], symbols[i + 1]));
    ranks[i] = merge ? merge->rank : kNoRank;
  };

  for (std::size_t i = 0; i < count; ++i) {
    symbols[i] = byte_ids_[static_cast<unsigned char>(piece[i])];
  }
  for (std::size_t i = 0; i + 1 < count; ++i) rank_pair(i);
  while (count > 1) {
    const auto best = static_cast<std::size_t>(std::min_element(ranks, ranks + count - 1) - ranks);
    if (ranks[best] == kNoRank) break;
    symbols[best] = merges_.find(pair_key(symbols[best], symbols[best + 1]))->result;
    std::copy(symbols + best + 2, symbols + count, symbols + best + 1);
    std::copy(ranks + best + 1, ranks + count - 1, ranks + best);
    --count;
    if (best > 0) rank_pair(best - 1);
    if (best + 1 < count) rank_pair(best);
  }
  ids.insert(ids.end(), symbols, symbols + count);
}

// The same with a linked list and a queue of (rank, position). An entry of the queue is stale when
// its symbol is gone or now has another rank, and is then dropped.
void BpeModel::merge_long(std::string_view piece, Scratch& scratch, std::vector<TokenId>& ids,
                          Watch& watch) const {
  if (piece.size() >= kNoRank) throw std::length_error("a piece of text is longer than 4 GiB");
  constexpr std::uint32_t kEnd = kNoRank;
  const auto count = static_cast<std::uint32_t>(piece.size());
  if (!scratch.queue) scratch.queue = std::make_unique<MergeQueue>(ranks_);
  // Taken out of the scratch: if this is stopped half-way, the next piece gets a new one.
  std::unique_ptr<MergeQueue> queue = std::move(scratch.queue);
  auto& symbols = scratch.symbols;
  const auto rank_pair = [&](std::uint32_t i) {
    Scratch::Symbol& symbol = symbols[i];
    symbol.rank = kNoRank;
    if (symbol.next == kEnd) return;
    const RankAndResult* const merge = merges_.find(pair_key(symbol.id, symbols[symbol.next].id));
    if (!merge) return;
    symbol.rank = merge->rank;
    queue->push({merge->rank, i});
  };

  symbols.resize(count);
  for (std::uint32_t i = 0; i < count; ++i) {
    const TokenId id = byte_ids_[static_cast<unsigned char>(piece[i])];
    symbols[i] = {id, kNoRank, i == 0 ? kEnd : i - 1, i + 1 == count ? kEnd : i + 1};
  }
  for (std::uint32_t i = 0; i < count; ++i) {
    if (i % kPollBytes == 0) watch.poll();
    rank_pair(i);
  }
  for (std::size_t steps = 0; !queue->empty(); ++steps) {
    if (steps % kPollBytes == 0) watch.poll();
    const auto [rank, i] = queue->pop();
    Scratch::Symbol& symbol = symbols[i];
    if (symbol.rank != rank) continue;
    Scratch::Symbol& absorbed = symbols[symbol.next];
    symbol.id = merges_.find(pair_key(symbol.id, absorbed.id))->result;
    absorbed.rank = kNoRank;
    symbol.next = absorbed.next;
    if (symbol.next != kEnd) symbols[symbol.next].previous = i;
    if (symbol.previous != kEnd) rank_pair(symbol.previous);
    rank_pair(i);
  }
  for (std::uint32_t i = 0; i != kEnd; i = symbols[i].next) ids.push_back(symbols[i].id);

  if (count > kMaxKeptSymbols) {
    std::vector<Scratch::Symbol>().swap(symbols);
    return;
  }
  queue->reset();
  scratch.queue = std::move(queue);
}

}  // namespace tinylm
