// Byte-level BPE with a fixed vocabulary: text to ids and back.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "pair_map.hpp"
#include "pretokenize.hpp"
#include "watch.hpp"

namespace tinylm {

// `left` followed by `right` becomes `result`.
struct BpeMerge {
  TokenId left, right, result;
};

struct BpeOptions {
  SplitPattern pattern = SplitPattern::kGpt2;
  // A piece that is a whole token is that token, whether or not merges lead to it.
  bool ignore_merges = false;
  // A merge's rank is the id of its result instead of its place in the list, as in tiktoken: merges
  // with the same result are equal, and the leftmost goes first.
  bool ranks_are_ids = false;
  // Text that does not start with a space is read as if it did.
  bool add_prefix_space = false;
};

class BpeModel {
 public:
  // Working memory of one thread: buffers and a bounded cache of pieces.
  class Scratch;

  // `tokens[id]` is a token's bytes, empty if the id is not used; `byte_ids[b]` the token of the
  // single byte b. `special_ids` are tokens that text never becomes. The caller has checked that
  // all ids are below tokens.size() and that each merge's result is its parts joined.
  BpeModel(std::vector<std::string> tokens, const std::vector<BpeMerge>& merges,
           const std::array<TokenId, 256>& byte_ids, const std::vector<TokenId>& special_ids,
           BpeOptions options);
  ~BpeModel();
  BpeModel(const BpeModel&) = delete;
  BpeModel& operator=(const BpeModel&) = delete;

  std::size_t vocab_size() const { return tokens_.size(); }

  // Appends the ids of `text`, valid UTF-8 in pieces of less than 4 GiB. n log n in a piece's
  // length at worst. Any number of threads may call it at once, each with its own scratch. `watch`
  // stops it by an exception.
  void encode(std::string_view text, Scratch& scratch, std::vector<TokenId>& ids,
              Watch& watch) const;

  // The bytes of a token, empty if there is none; `id` < vocab_size().
  std::string_view token(TokenId id) const { return tokens_[id]; }

 private:
  friend class ScratchLease;

  struct RankAndResult {
    std::uint32_t rank;
    TokenId result;
  };

  void encode_piece(std::string_view piece, Scratch& scratch, std::vector<TokenId>& ids,
                    Watch& watch) const;
  void merge_piece(std::string_view piece, Scratch& scratch, std::vector<TokenId>& ids,
                   Watch& watch) const;
  void merge_short(std::string_view piece, std::vector<TokenId>& ids) const;
  void merge_long(std::string_view piece, Scratch& scratch, std::vector<TokenId>& ids,
                  Watch& watch) const;

  std::vector<std::string> tokens_;
  std::array<TokenId, 256> byte_ids_;
  PairMap<RankAndResult> merges_;
  std::size_t ranks_ = 0;                                       // more than any rank
  std::unordered_map<std::string_view, TokenId> whole_pieces_;  // only with ignore_merges
  BpeOptions options_;

  mutable std::mutex pool_mutex_;
  mutable std::vector<std::unique_ptr<Scratch>> pool_;
};

// A scratch that no one else uses, for as long as the lease lives. Scratches go back to the model's
// pool, so that their caches stay warm between calls.
class ScratchLease {
 public:
  explicit ScratchLease(const BpeModel& model);
  ~ScratchLease();
  ScratchLease(const ScratchLease&) = delete;
  ScratchLease& operator=(const ScratchLease&) = delete;
  BpeModel::Scratch& operator*() const { return *scratch_; }

 private:
  const BpeModel& model_;
  std::unique_ptr<BpeModel::Scratch> scratch_;
};

}  // namespace tinylm
