#include "bpe_train.hpp"

#include <algorithm>
#include <cstring>
#include <queue>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "pair_map.hpp"

namespace tinylm {

namespace {

// After so many bytes of text, it is asked whether to go on.
constexpr std::size_t kPollBytes = std::size_t{1} << 16;
// The same, for words.
constexpr std::size_t kPollWords = std::size_t{1} << 12;

std::uint64_t hash_bytes(std::string_view bytes) {
  std::uint64_t mixed = bytes.size() * 0x9E3779B97F4A7C15u;
  const char* at = bytes.data();
  for (std::size_t left = bytes.size(); left > 0;) {
    const std::size_t taken = std::min<std::size_t>(left, sizeof(std::uint64_t));
    std::uint64_t word = 0;
    std::memcpy(&word, at, taken);
    mixed = ((mixed ^ mixed >> 32) + word) * 0xD6E8FEB86659FD93u;
    at += taken;
    left -= taken;
  }
  return mixed ^ mixed >> 32;
}

}  // namespace

void PieceCounter::add(std::string_view piece, std::int64_t count) {
  if (2 * (slots_used_ + 1) > slots_.size()) grow();
  const std::uint64_t hash = hash_bytes(piece);
  const std::size_t mask = slots_.size() - 1;
  std::size_t i = hash & mask;
  for (; slots_[i].count != 0; i = (i + 1) & mask) {
    if (slots_[i].hash == hash && piece_of(slots_[i]) == piece) {
      slots_[i].count += count;
      return;
    }
  }
  const std::size_t offset = bytes_.size();
  bytes_.append(piece);
  slots_[i] = {hash, offset, piece.size(), count};
  ++slots_used_;
}

std::vector<PieceCounter::Entry> PieceCounter::entries() const {
  std::vector<Entry> entries;
  entries.reserve(slots_used_);
  for (const Slot& slot : slots_) {
    if (slot.count != 0) entries.push_back({piece_of(slot), slot.count});
  }
  return entries;
}

void PieceCounter::grow() {
  std::vector<Slot> old(2 * slots_.size());
  old.swap(slots_);
  const std::size_t mask = slots_.size() - 1;
  for (const Slot& slot : old) {
    if (slot.count == 0) continue;
    std::size_t i = slot.hash & mask;
    while (slots_[i].count != 0) i = (i + 1) & mask;
    slots_[i] = slot;
  }
}

void BpeCounter::reserve_workers(int threads) {
  const auto wanted = static_cast<std::size_t>(std::max(1, threads));
  if (workers_.size() < wanted) workers_.resize(wanted);
}

void BpeCounter::add(std::string_view text, int worker, Watch& watch) {
  PieceCounter& counter = workers_[static_cast<std::size_t>(worker)];
  const char* next_poll = text.data() + kPollBytes;
  for_each_piece(pattern_, text, [&](std::string_view piece) {
    if (piece.data() >= next_poll) {
      watch.poll();
      next_poll = piece.data() + kPollBytes;
    }
    counter.add(piece);
  });
}

void BpeCounter::join_workers() {
  for (std::size_t i = 1; i < workers_.size(); ++i) {
    for (const PieceCounter::Entry& entry : workers_[i].entries()) {
      workers_[0].add(entry.piece, entry.count);
    }
  }
  workers_.resize(1);
}

std::size_t BpeCounter::size() {
  join_workers();
  return workers_[0].size();
}

std::vector<PieceCounter::Entry> BpeCounter::sorted_entries() {
  join_workers();
  std::vector<PieceCounter::Entry> entries = workers_[0].entries();
  std::sort(entries.begin(), entries.end(),
            [](const auto& a, const auto& b) { return a.piece < b.piece; });
  return entries;
}

namespace {

// Works on words, which are the distinct pieces as symbols, each with its count. Counts of pairs
// are exact at all times; the heap is lazy: an entry whose count is out of date is put back with
// the right one when it comes up. An entry also carries the words in which its pair arose, so a
// merge touches no other words.
class Trainer {
 public:
  Trainer(const std::vector<PieceCounter::Entry>& pieces, const std::array<TokenId, 256>& byte_ids,
          TokenId first_free_id, Watch& watch)
      : first_free_id_(first_free_id), watch_(watch) {
    add_single_bytes(byte_ids);
    add_words(pieces, byte_ids);
    count_pairs();
  }

  std::vector<BpeMerge> run(std::size_t vocab_size, std::int64_t min_frequency) {
    std::vector<BpeMerge> merges;
    while (first_free_id_ < vocab_size && !queue_.empty()) {
      Candidate top = pop();
      const std::int64_t count = pairs_[top.key].count;
      if (top.count != count) {
        top.count = count;
        push(std::move(top));
        continue;
      }
      if (count < std::max<std::int64_t>(1, min_frequency)) break;
      const auto left = static_cast<TokenId>(top.key >> 32);
      const auto right = static_cast<TokenId>(top.key);
      const BpeMerge merge{left, right, id_of_joined(left, right)};
      merges.push_back(merge);
      for (std::size_t i = 0; i < top.words.size(); ++i) {
        if (i % kPollWords == 0) watch_.poll();
        merge_in_word(top.words[i], merge);
      }
      push_new_pairs();
    }
    return merges;
  }

 private:
  struct Word {
    std::size_t offset;  // in symbols_
    std::size_t length;
    std::int64_t count;
  };

  struct Pair {
    std::int64_t count = 0;
    std::vector<std::uint32_t> words;  // in which it arose since it was last put in the queue
  };

  struct Candidate {
    std::int64_t count;
    std::uint64_t key;
    std::vector<std::uint32_t> words;

    bool operator<(const Candidate& other) const {
      return count != other.count ? count < other.count : key > other.key;
    }
  };

  void add_single_bytes(const std::array<TokenId, 256>& byte_ids) {
    for (int byte = 0; byte < 256; ++byte) {
      const TokenId id = byte_ids[static_cast<std::size_t>(byte)];
      if (spelling_.size() <= id) spelling_.resize(id + 1);
      spelling_[id] = std::string(1, static_cast<char>(byte));
      ids_.emplace(spelling_[id], id);
    }
    spelling_.resize(std::max<std::size_t>(spelling_.size(), first_free_id_));
  }

  void add_words(const std::vector<PieceCounter::Entry>& pieces,
                 const std::array<TokenId, 256>& byte_ids) {
    if (pieces.size() >= UINT32_MAX) throw std::length_error("too many distinct pieces of text");
    std::size_t total = 0;
    for (const PieceCounter::Entry& entry : pieces) total += entry.piece.size();
    symbols_.reserve(total);
    words_.reserve(pieces.size());
    for (const PieceCounter::Entry& entry : pieces) {
      words_.push_back({symbols_.size(), entry.piece.size(), entry.count});
      for (const char byte : entry.piece) {
        symbols_.push_back(byte_ids[static_cast<unsigned char>(byte)]);
      }
    }
  }

  void count_pairs() {
    for (std::uint32_t w = 0; w < words_.size(); ++w) {
      if (w % kPollWords == 0) watch_.poll();
      const TokenId* const symbols = &symbols_[words_[w].offset];
      for (std::size_t i = 0; i + 1 < words_[w].length; ++i) {
        add_pair(symbols[i], symbols[i + 1], w);
      }
    }
    push_new_pairs();
  }

  void add_pair(TokenId left, TokenId right, std::uint32_t word) {
    const std::uint64_t key = pair_key(left, right);
    Pair& pair = pairs_[key];
    pair.count += words_[word].count;
    if (pair.words.empty()) new_pairs_.push_back(key);
    if (pair.words.empty() || pair.words.back() != word) pair.words.push_back(word);
  }

  void remove_pair(TokenId left, TokenId right, std::uint32_t word) {
    pairs_[pair_key(left, right)].count -= words_[word].count;
  }

  // Replaces the pair from left to right, keeping the counts of its neighbours' pairs. The merged
  // pair's own count stays as it was; nothing asks for it again.
  void merge_in_word(std::uint32_t w, const BpeMerge& merge) {
    Word& word = words_[w];
    TokenId* const symbols = &symbols_[word.offset];
    std::size_t kept = 0;
    for (std::size_t i = 0; i < word.length; ++i) {
      const bool matches =
          symbols[i] == merge.left && i + 1 < word.length && symbols[i + 1] == merge.right;
      if (!matches) {
        symbols[kept++] = symbols[i];
        continue;
      }
      if (kept > 0) {
        remove_pair(symbols[kept - 1], merge.left, w);
        add_pair(symbols[kept - 1], merge.result, w);
      }
      symbols[kept++] = merge.result;
      ++i;
      if (i + 1 < word.length) {
        remove_pair(merge.right, symbols[i + 1], w);
        add_pair(merge.result, symbols[i + 1], w);
      }
    }
    word.length = kept;
  }

  TokenId id_of_joined(TokenId left, TokenId right) {
    const auto [entry, is_new] = ids_.emplace(spelling_[left] + spelling_[right], first_free_id_);
    if (is_new) {
      spelling_.push_back(entry->first);
      ++first_free_id_;
    }
    return entry->second;
  }

  void push_new_pairs() {
    for (const std::uint64_t key : new_pairs_) {
      Pair& pair = pairs_[key];
      std::vector<std::uint32_t> words = std::exchange(pair.words, {});
      if (pair.count > 0) push({pair.count, key, std::move(words)});
    }
    new_pairs_.clear();
  }

  void push(Candidate candidate) {
    queue_.push_back(std::move(candidate));
    std::push_heap(queue_.begin(), queue_.end());
  }

  Candidate pop() {
    std::pop_heap(queue_.begin(), queue_.end());
    Candidate top = std::move(queue_.back());
    queue_.pop_back();
    return top;
  }

  std::vector<TokenId> symbols_;
  std::vector<Word> words_;
  PairMap<Pair> pairs_;
  std::vector<std::uint64_t> new_pairs_;
  std::vector<Candidate> queue_;
  std::vector<std::string> spelling_;  // by id; empty for tokens that are not made of bytes
  std::unordered_map<std::string, TokenId> ids_;
  TokenId first_free_id_;
  Watch& watch_;
};

}  // namespace

std::vector<BpeMerge> train_bpe(const std::vector<PieceCounter::Entry>& pieces,
                                const std::array<TokenId, 256>& byte_ids, TokenId first_free_id,
                                std::size_t vocab_size, std::int64_t min_frequency, Watch& watch) {
  return Trainer(pieces, byte_ids, first_free_id, watch).run(vocab_size, min_frequency);
}

}  // namespace tinylm
