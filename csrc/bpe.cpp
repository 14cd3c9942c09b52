#include "bpe.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <set>
#include <stdexcept>
#include <utility>

#include "bits.hpp"
#include "merge_queue.hpp"
#include "piece_cache.hpp"

namespace tinylm {

namespace {

// Up to this many bytes, scanning all ranks for the lowest beats a heap.
constexpr std::size_t kMaxShortPiece = 48;
// The merge of a symbol with the next in one number: rank, the symbol's place, result.
constexpr int kPlaceBits = 6;
constexpr int kResultBits = 32 - kPlaceBits;
constexpr std::size_t kMaxTokens = std::size_t{1} << kResultBits;
static_assert(kMaxShortPiece <= std::size_t{1} << kPlaceBits);
static_assert(kResultBits <= PackedIds<std::uint32_t>::kIdBits);

// After so many steps of merging it is asked whether to go on.
constexpr std::size_t kPollSteps = std::size_t{1} << 16;

// Working memory for longer pieces, which are rare, is given back.
constexpr std::size_t kMaxKeptSymbols = std::size_t{1} << 18;

// More idle scratches than this are not worth their memory.
constexpr std::size_t kMaxPool = 64;

unsigned char byte_at(std::string_view piece, std::size_t i) {
  return static_cast<unsigned char>(piece[i]);
}

// Pieces that are looked up together.
struct PieceGroup {
  static constexpr std::size_t kSize = 32;

  struct Entry {
    ShortKey key;        // if the piece has one
    std::uint64_t hash;  // of its key
    std::uint32_t begin, bytes;
  };

  // Reads pieces from number `first` on and asks for their slots in `caches`.
  template <class Id>
  void read(const Splitter& splitter, std::size_t first, std::string_view text,
            const PieceCaches<Id>& caches) {
    count = first < splitter.size() ? std::min(kSize, splitter.size() - first) : 0;
    const typename PieceCaches<Id>::Shorts::View shorts(caches.shorts());
    const char* const text_end = text.data() + text.size();
    const std::uint32_t* const ends = splitter.ends() + first;
    std::uint32_t begin = first == 0 || count == 0 ? 0 : ends[-1];
    for (std::size_t i = 0; i < count; ++i) {
      Entry& entry = entries[i];
      entry.begin = begin;
      entry.bytes = ends[i] - begin;
      const char* const at = splitter.begin() + begin;
      begin = ends[i];
      const std::ptrdiff_t readable = text_end - at;
      if (entry.bytes <= kMaxShortKey) {
        entry.key = readable >= std::ptrdiff_t{sizeof(ShortKey)}
                        ? short_key(at, entry.bytes)
                        : short_key_exactly(at, entry.bytes);
        entry.hash = key_hash(entry.key);
        shorts.prefetch(entry.hash);
      } else if (entry.bytes <= kMaxMiddleKey) {
        middle_keys[i] = readable >= std::ptrdiff_t{sizeof(MiddleKey)}
                             ? middle_key(at, entry.bytes)
                             : middle_key_exactly(at, entry.bytes);
        entry.hash = key_hash(middle_keys[i]);
        typename PieceCaches<Id>::Middles::View(caches.middles()).prefetch(entry.hash);
      }
    }
  }

  std::size_t count = 0;
  Entry entries[kSize];
  MiddleKey middle_keys[kSize];  // of those that have one
};

}  // namespace

class BpeModel::Scratch {
 public:
  template <class Id>
  PieceCaches<Id>& caches() {
    if constexpr (sizeof(Id) == sizeof(std::uint16_t)) {
      return narrow_caches;
    } else {
      return wide_caches;
    }
  }

  PieceCaches<std::uint16_t> narrow_caches;
  PieceCaches<std::uint32_t> wide_caches;
  LongPieceCache long_pieces;
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
    : tokens_(std::move(tokens)),
      byte_ids_(byte_ids),
      merges_(merges, options.ranks_are_ids),
      options_(options) {
  if (tokens_.size() > kMaxTokens) throw std::length_error("more than 67 million tokens");
  pool_.reserve(kMaxPool);  // So that giving a scratch back cannot throw.
  byte_merges_.reserve(256 * 256);
  for (const TokenId left : byte_ids_) {
    for (const TokenId right : byte_ids_) byte_merges_.push_back(merges_.find(left, right));
  }
  short_tokens_.resize(tokens_.size());
  for (std::size_t id = 0; id < tokens_.size(); ++id) {
    ShortToken& token = short_tokens_[id];
    token.size = static_cast<std::uint8_t>(
        std::min<std::size_t>(tokens_[id].size(), ShortToken::kMaxBytes + 1));
    if (token.size <= ShortToken::kMaxBytes)
      std::memcpy(token.bytes, tokens_[id].data(), token.size);
  }
  if (options_.ignore_merges) find_whole_pieces(special_ids);
}

// Published vocabularies have no such tokens, or few: then pieces need not be looked up twice.
void BpeModel::find_whole_pieces(const std::vector<TokenId>& special_ids) {
  const std::set<TokenId> special(special_ids.begin(), special_ids.end());
  Scratch scratch;
  IdVector<TokenId> merged;
  Watch watch;
  for (TokenId id = 0; id < tokens_.size(); ++id) {
    const std::string& token = tokens_[id];
    if (token.empty() || special.count(id) != 0) continue;
    merged.resize(token.size());
    const TokenId* const end = merge(token, scratch, merged.data(), watch);
    // Of tokens with the same bytes the first one counts.
    const bool is_merged =
        end == merged.data() + 1 && merged[0] <= id && special.count(merged[0]) == 0;
    if (!is_merged) whole_pieces_.insert(token, id);
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

template <class Id>
void BpeModel::encode(std::string_view text, Scratch& scratch, IdVector<Id>& ids,
                      Watch& watch) const {
  if (options_.add_prefix_space && !text.empty() && text.front() != ' ') {
    scratch.prefixed.assign(1, ' ').append(text);
    text = scratch.prefixed;
  }
  Splitter splitter(options_.pattern, text);
  while (splitter.next()) {
    watch.poll();
    // No more ids than bytes, and room for a whole slot's behind them.
    const std::size_t before = ids.size();
    ids.resize(before + splitter.ends()[splitter.size() - 1] + PackedIds<Id>::kWords);
    const Id* const end = encode_pieces(splitter, text, scratch, ids.data() + before, watch);
    ids.resize(static_cast<std::size_t>(end - ids.data()));
  }
}

template void BpeModel::encode(std::string_view, Scratch&, IdVector<std::uint16_t>&, Watch&) const;
template void BpeModel::encode(std::string_view, Scratch&, IdVector<std::uint32_t>&, Watch&) const;

// A look at the cache takes as long as all else where it goes to memory, so the slots of some
// pieces are fetched while those before them are read. Nearly all pieces are short, few are new:
// one branch tells whether a piece is one of the rest, for those that are often mistaken cost more
// than all else here.
template <class Id>
Id* BpeModel::encode_pieces(const Splitter& splitter, std::string_view text, Scratch& scratch,
                            Id* out, Watch& watch) const {
  const PieceCaches<Id>& caches = scratch.caches<Id>();
  PieceGroup groups[2];
  groups[0].read(splitter, 0, text, caches);
  for (std::size_t number = 0; groups[number % 2].count != 0; ++number) {
    const PieceGroup& group = groups[number % 2];
    groups[(number + 1) % 2].read(splitter, (number + 1) * PieceGroup::kSize, text, caches);
    typename PieceCaches<Id>::Shorts::View shorts(caches.shorts());
    for (std::size_t i = 0; i < group.count; ++i) {
      const PieceGroup::Entry& entry = group.entries[i];
      const std::string_view piece(splitter.begin() + entry.begin, entry.bytes);
      if (entry.bytes <= kMaxShortKey) {
        const auto& slot = shorts.likely_slot(entry.key, entry.hash);
        const std::size_t count = slot.ids.count();
        slot.ids.copy_to(out);
        if ((slot.key == entry.key) & (count <= PackedIds<Id>::kMaxIds)) {
          out += count;
          continue;
        }
        out = encode_unlikely_piece(piece, entry.key, entry.hash, scratch, out, watch);
      } else if (entry.bytes <= kMaxMiddleKey) {
        out = encode_unlikely_piece(piece, group.middle_keys[i], entry.hash, scratch, out, watch);
      } else {
        out = encode_long_piece(piece, scratch, out, watch);
      }
      shorts = typename PieceCaches<Id>::Shorts::View(caches.shorts());
    }
  }
  return out;
}

// A piece that has a key.
template <class Id, class Key>
Id* BpeModel::encode_unlikely_piece(std::string_view piece, const Key& key, std::uint64_t hash,
                                    Scratch& scratch, Id* out, Watch& watch) const {
  PieceCaches<Id>& caches = scratch.caches<Id>();
  const PackedIds<Id>* known;
  if constexpr (sizeof(Key) == sizeof(ShortKey)) {
    known = caches.shorts().find(key, hash);
  } else {
    known = caches.middles().find(key, hash);
  }
  if (known) return caches.copy(*known, out);
  Id* const end = merge_piece(piece, scratch, out, watch);
  caches.insert(key, out, static_cast<std::size_t>(end - out));
  return end;
}

// A piece that has none.
template <class Id>
Id* BpeModel::encode_long_piece(std::string_view piece, Scratch& scratch, Id* out,
                                Watch& watch) const {
  const bool may_be_kept = piece.size() <= LongPieceCache::kMaxBytes;
  if (may_be_kept) {
    const auto [first, last] = scratch.long_pieces.find(piece);
    if (first) return std::copy(first, last, out);
  }
  Id* const end = merge_piece(piece, scratch, out, watch);
  if (may_be_kept) {
    scratch.long_pieces.insert(piece, out, static_cast<std::size_t>(end - out));
  }
  return end;
}

template <class Id>
Id* BpeModel::merge_piece(std::string_view piece, Scratch& scratch, Id* out, Watch& watch) const {
  if (const TokenId whole = whole_pieces_.find(piece); whole != WholePieces::kNone) {
    *out = static_cast<Id>(whole);
    return out + 1;
  }
  return merge(piece, scratch, out, watch);
}

template <class Id>
Id* BpeModel::merge(std::string_view piece, Scratch& scratch, Id* out, Watch& watch) const {
  if (piece.size() <= kMaxShortPiece) return merge_short(piece, out);
  return merge_long(piece, scratch, out, watch);
}

// Merges, again and again, the leftmost pair of lowest rank. Symbols stay in the place of their
// first byte, and a set of bits tells where there is one.
template <class Id>
Id* BpeModel::merge_short(std::string_view piece, Id* out) const {
  const std::size_t count = piece.size();
  TokenId symbols[kMaxShortPiece];
  std::uint64_t merges[kMaxShortPiece];  // of a symbol with the next; the least goes first
  const auto set_merge = [&](int i, RankedMerge merge) {
    merges[i] = merge == kNoMerge ? kNoMerge : merge | static_cast<std::uint64_t>(i) << kResultBits;
  };
  for (std::size_t i = 0; i < count; ++i) symbols[i] = byte_ids_[byte_at(piece, i)];
  for (std::size_t i = 0; i + 1 < count; ++i) set_merge(static_cast<int>(i), byte_merge(piece, i));
  merges[count - 1] = kNoMerge;
  std::uint64_t places = ~std::uint64_t{0} >> (64 - count);
  while (true) {
    std::uint64_t best = merges[0];
    for (std::size_t i = 1; i < count; ++i) best = std::min(best, merges[i]);
    if (best == kNoMerge) break;
    const auto i = static_cast<int>(best >> kResultBits & ((1u << kPlaceBits) - 1));
    symbols[i] = static_cast<TokenId>(best & ((1u << kResultBits) - 1));
    std::uint64_t behind = places & ~std::uint64_t{1} << i;
    merges[lowest_bit(behind)] = kNoMerge;
    places ^= behind & -behind;
    behind &= behind - 1;
    const std::uint64_t before = places & ((std::uint64_t{1} << i) - 1);
    set_merge(i, behind == 0 ? kNoMerge : merges_.find(symbols[i], symbols[lowest_bit(behind)]));
    if (before != 0) {
      const int previous = highest_bit(before);
      set_merge(previous, merges_.find(symbols[previous], symbols[i]));
    }
  }
  for (; places != 0; places &= places - 1) {
    *out++ = static_cast<Id>(symbols[lowest_bit(places)]);
  }
  return out;
}

// The same with a linked list and a queue of (rank, position). An entry of the queue is stale when
// its symbol is gone or now has another rank, and is then dropped.
template <class Id>
Id* BpeModel::merge_long(std::string_view piece, Scratch& scratch, Id* out, Watch& watch) const {
  if (piece.size() >= kNoRank) throw std::length_error("a piece of text is longer than 4 GiB");
  constexpr std::uint32_t kEnd = kNoRank;
  const auto count = static_cast<std::uint32_t>(piece.size());
  if (!scratch.queue) scratch.queue = std::make_unique<MergeQueue>(merges_.ranks());
  // Taken out of the scratch: if this is stopped half-way, the next piece gets a new one.
  std::unique_ptr<MergeQueue> queue = std::move(scratch.queue);
  auto& symbols = scratch.symbols;
  const auto rank = [&](std::uint32_t i, RankedMerge merge) {
    if (merge != kNoMerge) queue->push({rank_of(merge), i});
    return rank_of(merge);
  };
  const auto rank_pair = [&](std::uint32_t i) {
    Scratch::Symbol& symbol = symbols[i];
    const bool is_last = symbol.next == kEnd;
    symbol.rank = rank(i, is_last ? kNoMerge : merges_.find(symbol.id, symbols[symbol.next].id));
  };

  symbols.clear();
  symbols.reserve(count);
  for (std::uint32_t i = 0; i < count; ++i) {
    if (i % kPollSteps == 0) watch.poll();
    const bool is_last = i + 1 == count;
    // Field by field: a whole symbol would be put together elsewhere and then copied.
    Scratch::Symbol& symbol = symbols.emplace_back();
    symbol.id = byte_ids_[byte_at(piece, i)];
    symbol.rank = rank(i, is_last ? kNoMerge : byte_merge(piece, i));
    symbol.previous = i == 0 ? kEnd : i - 1;
    symbol.next = is_last ? kEnd : i + 1;
  }
  for (std::size_t steps = 0; !queue->empty(); ++steps) {
    if (steps % kPollSteps == 0) watch.poll();
    const auto [lowest, i] = queue->pop();
    Scratch::Symbol& symbol = symbols[i];
    if (symbol.rank != lowest) continue;
    Scratch::Symbol& absorbed = symbols[symbol.next];
    symbol.id = merges_.result(lowest);
    absorbed.rank = kNoRank;
    symbol.next = absorbed.next;
    if (symbol.next != kEnd) symbols[symbol.next].previous = i;
    if (symbol.previous != kEnd) rank_pair(symbol.previous);
    rank_pair(i);
  }
  for (std::uint32_t i = 0; i != kEnd; i = symbols[i].next) *out++ = static_cast<Id>(symbols[i].id);

  if (count > kMaxKeptSymbols) {
    std::vector<Scratch::Symbol>().swap(symbols);
  } else {
    queue->reset();
    scratch.queue = std::move(queue);
  }
  return out;
}

}  // namespace tinylm
