// Learning the merges of a byte-level BPE from counted pieces of text.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "bpe.hpp"
#include "pair_map.hpp"
#include "piece_table.hpp"
#include "watch.hpp"

namespace tinylm {

// Rule: the pair with the highest count is merged next; ties go to the smaller left id, then to the
// smaller right id; pairs seen less often than `min_frequency` (at least 1) are not merged. When
// the joined bytes are those of an existing token, that token is the result and the vocabulary does
// not grow; when they are reserved, the pair is passed over. Without reserved ones these are the
// merges of Hugging Face tokenizers' BpeTrainer.
//
// Works on words, which are the distinct pieces as symbols, each with its count. Counts of pairs
// are exact at all times. The queue of pairs is a lazy heap (arXiv 2306.16837): an entry whose
// count is out of date is put back with the right one when it comes up. An entry also carries the
// words in which its pair arose, so a merge touches no others. In all, training takes time in
// proportion to the symbols of the words that are touched, plus log n for each entry of the queue;
// memory is about 12 bytes for each word, 8 for each symbol and 40 for each pair.
class BpeTrainer {
 public:
  // The vocabulary begins with `first_free_id` tokens, among them the single bytes, `byte_ids`.
  // Text must not become a token that is spelled like one of `reserved`.
  BpeTrainer(const std::array<TokenId, 256>& byte_ids, TokenId first_free_id,
             std::unordered_set<std::string> reserved);

  // Takes a piece to learn from; it is copied.
  void add(const PieceCount& piece);

  // The merges, in order, that bring the vocabulary to `vocab_size` tokens, or as near as there are
  // pairs. To be called once.
  std::vector<BpeMerge> train(std::size_t vocab_size, std::int64_t min_frequency, Watch& watch);

  // How many tokens the vocabulary has so far; may be asked while it grows, by the same thread.
  std::size_t vocab_size() const { return next_id_; }

 private:
  using Word = std::uint32_t;  // where it begins in words_

  struct Candidate {
    std::int64_t count;
    std::uint64_t pair;
    std::vector<Word> words;

    bool operator<(const Candidate& other) const {
      return count != other.count ? count < other.count : pair > other.pair;
    }
  };

  // What one merge does to the pairs with some symbol beside it.
  struct Neighbour {
    std::int64_t count = 0;    // how often it stands there
    Word last_word = kNoWord;  // in which it was seen there; kNoWord: in none yet
    std::uint32_t words = 0;   // in which a new pair arose; then its candidate's number
  };

  static constexpr Word kNoWord = 0xFFFFFFFF;
  static constexpr std::uint32_t kNoCandidate = 0xFFFFFFFF;
  // A word is its count (two entries), its length and its symbols.
  static constexpr std::size_t kHeader = 3;

  std::int64_t count_of(Word word) const;
  void queue_byte_pairs(Watch& watch);
  Candidate pop();
  void push(Candidate candidate);
  TokenId id_of_joined(std::string joined);
  void merge_everywhere(const std::vector<Word>& words, const BpeMerge& merge, Watch& watch);
  void merge_in_word(Word word, const BpeMerge& merge);
  void see_neighbour(std::size_t place, Word word, std::int64_t count, const BpeMerge& merge);
  void update_pairs(const BpeMerge& merge);
  void queue_new_pairs(const BpeMerge& merge);

  std::array<TokenId, 256> byte_ids_;
  TokenId next_id_;
  std::unordered_set<std::string> reserved_;
  std::vector<std::string> spelling_;  // by id; empty for tokens that are not made of bytes
  std::unordered_map<std::string, TokenId> ids_;

  std::vector<std::uint32_t> words_;
  PairMap<std::int64_t> pairs_;
  std::vector<Candidate> queue_;

  // Of the merge in progress. A neighbour's place is twice its symbol, plus 1 on the right.
  std::vector<Neighbour> neighbours_;
  std::vector<std::size_t> seen_;                     // places
  std::vector<std::pair<std::size_t, Word>> arisen_;  // where new pairs arose
};

}  // namespace tinylm
