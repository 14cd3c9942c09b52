#include "bpe_train.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "memory.hpp"

namespace tinylm {

namespace {

// After so many words, it is asked whether to go on.
constexpr std::size_t kPollWords = std::size_t{1} << 12;
// So many words ahead, the next is fetched from memory.
constexpr std::size_t kFetchAhead = 12;

}  // namespace

BpeTrainer::BpeTrainer(const std::array<TokenId, 256>& byte_ids, TokenId first_free_id,
                       std::unordered_set<std::string> reserved)
    : byte_ids_(byte_ids),
      next_id_(first_free_id),
      reserved_(std::move(reserved)),
      spelling_(first_free_id) {
  for (std::size_t byte = 0; byte < byte_ids.size(); ++byte) {
    const TokenId id = byte_ids[byte];
    if (id >= first_free_id) throw std::invalid_argument("the id of a byte is not among the first");
    spelling_[id] = std::string(1, static_cast<char>(byte));
    ids_.emplace(spelling_[id], id);
  }
}

void BpeTrainer::add(const PieceCount& entry) {
  const std::size_t size = entry.piece.size();
  if (size < 2) return;  // It has no pair.
  if (size >= kNoWord || words_.size() >= kNoWord - kHeader - size) {
    throw std::length_error("there are too many distinct pieces of text to train on");
  }
  const std::size_t word = words_.size();
  words_.resize(word + kHeader);
  std::memcpy(&words_[word], &entry.count, sizeof entry.count);
  words_[word + 2] = static_cast<std::uint32_t>(size);
  for (const char byte : entry.piece) {
    words_.push_back(byte_ids_[static_cast<unsigned char>(byte)]);
  }
}

std::vector<BpeMerge> BpeTrainer::train(std::size_t vocab_size, std::int64_t min_frequency,
                                        Watch& watch) {
  queue_byte_pairs(watch);
  std::vector<BpeMerge> merges;
  while (next_id_ < vocab_size && !queue_.empty()) {
    watch.poll();
    Candidate top = pop();
    const std::int64_t count = pairs_[top.pair];
    if (top.count != count) {
      top.count = count;
      push(std::move(top));
      continue;
    }
    if (count < std::max<std::int64_t>(1, min_frequency)) break;
    const auto left = static_cast<TokenId>(top.pair >> 32);
    const auto right = static_cast<TokenId>(top.pair);
    std::string joined = spelling_[left] + spelling_[right];
    if (reserved_.count(joined) != 0) continue;
    merges.push_back({left, right, id_of_joined(std::move(joined))});
    merge_everywhere(top.words, merges.back(), watch);
  }
  return merges;
}

std::int64_t BpeTrainer::count_of(Word word) const {
  std::int64_t count;
  std::memcpy(&count, &words_[word], sizeof count);
  return count;
}

// There are few pairs of bytes, so a table tells where in the queue they are.
void BpeTrainer::queue_byte_pairs(Watch& watch) {
  std::vector<std::size_t> byte_of(next_id_);
  for (std::size_t byte = 0; byte < byte_ids_.size(); ++byte) byte_of[byte_ids_[byte]] = byte;
  std::vector<std::uint32_t> candidates(1 << 16, kNoCandidate);
  std::size_t polled = 0;
  for (std::size_t word = 0; word < words_.size(); word += kHeader + words_[word + 2]) {
    if (polled++ % kPollWords == 0) watch.poll();
    const std::uint32_t* const symbols = &words_[word + kHeader];
    const std::int64_t count = count_of(static_cast<Word>(word));
    for (std::uint32_t i = 0; i + 1 < words_[word + 2]; ++i) {
      std::uint32_t& number = candidates[byte_of[symbols[i]] << 8 | byte_of[symbols[i + 1]]];
      if (number == kNoCandidate) {
        number = static_cast<std::uint32_t>(queue_.size());
        queue_.push_back({0, pair_key(symbols[i], symbols[i + 1]), {}});
      }
      Candidate& candidate = queue_[number];
      candidate.count += count;
      if (candidate.words.empty() || candidate.words.back() != word) {
        candidate.words.push_back(static_cast<Word>(word));
      }
    }
  }
  for (const Candidate& candidate : queue_) pairs_[candidate.pair] = candidate.count;
  std::make_heap(queue_.begin(), queue_.end());
}

BpeTrainer::Candidate BpeTrainer::pop() {
  std::pop_heap(queue_.begin(), queue_.end());
  Candidate top = std::move(queue_.back());
  queue_.pop_back();
  return top;
}

void BpeTrainer::push(Candidate candidate) {
  queue_.push_back(std::move(candidate));
  std::push_heap(queue_.begin(), queue_.end());
}

TokenId BpeTrainer::id_of_joined(std::string joined) {
  const auto [entry, is_new] = ids_.emplace(std::move(joined), next_id_);
  if (is_new) {
    spelling_.push_back(entry->first);
    ++next_id_;
  }
  return entry->second;
}

// Only pairs with the merge's parts or its result change, so a merge is first made in all its
// words, which says how often each symbol stands beside it; then each pair is changed once.
void BpeTrainer::merge_everywhere(const std::vector<Word>& words, const BpeMerge& merge,
                                  Watch& watch) {
  neighbours_.resize(2 * std::size_t{next_id_});
  for (std::size_t i = 0; i < words.size(); ++i) {
    if (i % kPollWords == 0) watch.poll();
    if (i + kFetchAhead < words.size()) prefetch(&words_[words[i + kFetchAhead]]);
    merge_in_word(words[i], merge);
  }
  update_pairs(merge);
  queue_new_pairs(merge);
  for (const std::size_t place : seen_) neighbours_[place] = Neighbour{};
  seen_.clear();
  arisen_.clear();
}

// From left to right, in place.
void BpeTrainer::merge_in_word(Word word, const BpeMerge& merge) {
  std::uint32_t& length = words_[word + 2];
  std::uint32_t* const symbols = &words_[word + kHeader];
  const std::int64_t count = count_of(word);
  std::uint32_t kept = 0;
  for (std::uint32_t i = 0; i < length; ++i) {
    const bool matches =
        symbols[i] == merge.left && i + 1 < length && symbols[i + 1] == merge.right;
    if (!matches) {
      symbols[kept++] = symbols[i];
      continue;
    }
    if (kept > 0) see_neighbour(2 * std::size_t{symbols[kept - 1]}, word, count, merge);
    symbols[kept++] = merge.result;
    ++i;
    if (i + 1 < length) see_neighbour(2 * std::size_t{symbols[i + 1]} + 1, word, count, merge);
  }
  length = kept;
}

void BpeTrainer::see_neighbour(std::size_t place, Word word, std::int64_t count,
                               const BpeMerge& merge) {
  const auto see = [&](std::size_t at) -> bool {
    Neighbour& neighbour = neighbours_[at];
    if (neighbour.last_word == word) return false;
    if (neighbour.last_word == kNoWord) seen_.push_back(at);
    neighbour.last_word = word;
    return true;
  };
  neighbours_[place].count += count;
  bool arises = see(place);
  // The result beside itself is one pair, on whichever side it is noticed.
  if (place == 2 * std::size_t{merge.result} + 1) arises = see(--place);
  if (!arises) return;
  ++neighbours_[place].words;
  arisen_.emplace_back(place, word);
}

void BpeTrainer::update_pairs(const BpeMerge& merge) {
  for (const std::size_t place : seen_) {
    const auto symbol = static_cast<TokenId>(place / 2);
    const std::int64_t count = neighbours_[place].count;
    const bool is_right = place % 2 == 1;
    pairs_[is_right ? pair_key(merge.right, symbol) : pair_key(symbol, merge.left)] -= count;
    pairs_[is_right ? pair_key(merge.result, symbol) : pair_key(symbol, merge.result)] += count;
  }
}

void BpeTrainer::queue_new_pairs(const BpeMerge& merge) {
  const std::size_t first = queue_.size();
  for (const std::size_t place : seen_) {
    std::uint32_t& words = neighbours_[place].words;
    if (words == 0) continue;
    const auto symbol = static_cast<TokenId>(place / 2);
    const std::uint64_t pair =
        place % 2 == 1 ? pair_key(merge.result, symbol) : pair_key(symbol, merge.result);
    const std::int64_t count = pairs_[pair];
    const auto candidate = static_cast<std::uint32_t>(queue_.size() - first);
    if (count > 0) {
      queue_.push_back({count, pair, {}});
      queue_.back().words.reserve(words);
    }
    words = count > 0 ? candidate : kNoCandidate;
  }
  for (const auto& [place, word] : arisen_) {
    const std::uint32_t candidate = neighbours_[place].words;
    if (candidate != kNoCandidate) queue_[first + candidate].words.push_back(word);
  }
  for (std::size_t end = first + 1; end <= queue_.size(); ++end) {
    std::push_heap(queue_.begin(), queue_.begin() + static_cast<std::ptrdiff_t>(end));
  }
}

}  // namespace tinylm
