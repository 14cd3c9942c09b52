// Byte-level BPE with a fixed vocabulary: text to ids and back.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "memory.hpp"
#include "merge_table.hpp"
#include "pretokenize.hpp"
#include "watch.hpp"
#include "whole_pieces.hpp"

namespace tinylm {

// Ids of a text, of 16 bits if all fit, else of 32.
template <class Id>
using IdVector = std::vector<Id, UninitializedAllocator<Id>>;

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

  // Appends the ids of `text`, valid UTF-8 in pieces of less than 2 GiB; Id is std::uint16_t, if
  // all ids fit, or std::uint32_t. n log n in a piece's length at worst. Any number of threads may
  // call it at once, each with its own scratch. `watch` stops it by an exception.
  template <class Id>
  void encode(std::string_view text, Scratch& scratch, IdVector<Id>& ids, Watch& watch) const;

  // Whether the ids fit 16 bits.
  bool is_narrow() const { return tokens_.size() <= std::size_t{1} << 16; }

  // The bytes of a token, empty if there is none; `id` < vocab_size().
  std::string_view token(TokenId id) const { return tokens_[id]; }

  // The bytes of some ids together, or of those before the first that has none, which `bad` then
  // points to; Id is any integer. Linear.
  template <class Id>
  std::size_t decoded_size(const Id* first, const Id* last, const Id*& bad) const {
    std::size_t size = 0;
    for (bad = first; bad != last; ++bad) {
      if (*bad < 0 || static_cast<std::uint64_t>(*bad) >= tokens_.size()) break;
      const auto id = static_cast<std::size_t>(*bad);
      const std::size_t token_size = short_tokens_[id].size;
      if (token_size == 0) break;
      size += token_size <= ShortToken::kMaxBytes ? token_size : tokens_[id].size();
    }
    return size;
  }

  // Writes the bytes of ids that all have some to [out, out_end), which they fill. Linear.
  template <class Id>
  void decode(const Id* first, const Id* last, char* out, const char* out_end) const {
    for (; first != last; ++first) {
      const auto id = static_cast<std::size_t>(*first);
      const ShortToken& token = short_tokens_[id];
      if (token.size <= ShortToken::kMaxBytes && out_end - out >= std::ptrdiff_t{sizeof(token)}) {
        // One copy of known size is quicker than one of just the token's.
        std::memcpy(out, &token, sizeof(token));
        out += token.size;
      } else {
        std::memcpy(out, tokens_[id].data(), tokens_[id].size());
        out += tokens_[id].size();
      }
    }
  }

 private:
  friend class ScratchLease;

  struct ShortToken {
    static constexpr std::size_t kMaxBytes = 15;
    char bytes[kMaxBytes] = {};
    std::uint8_t size = 0;  // 0: no token; above kMaxBytes: see tokens_
  };

  // The merge of bytes i and i + 1.
  RankedMerge byte_merge(std::string_view piece, std::size_t i) const {
    const auto byte = [piece](std::size_t at) { return static_cast<unsigned char>(piece[at]); };
    return byte_merges_[std::size_t{byte(i)} << 8 | byte(i + 1)];
  }
  void find_whole_pieces(const std::vector<TokenId>& special_ids);
  template <class Id>
  Id* encode_pieces(const Splitter& splitter, std::string_view text, Scratch& scratch, Id* out,
                    Watch& watch) const;
  template <class Id, class Key>
  Id* encode_unlikely_piece(std::string_view piece, const Key& key, std::uint64_t hash,
                            Scratch& scratch, Id* out, Watch& watch) const;
  template <class Id>
  Id* encode_long_piece(std::string_view piece, Scratch& scratch, Id* out, Watch& watch) const;
  template <class Id>
  Id* merge_piece(std::string_view piece, Scratch& scratch, Id* out, Watch& watch) const;
  template <class Id>
  Id* merge(std::string_view piece, Scratch& scratch, Id* out, Watch& watch) const;
  template <class Id>
  Id* merge_short(std::string_view piece, Id* out) const;
  template <class Id>
  Id* merge_long(std::string_view piece, Scratch& scratch, Id* out, Watch& watch) const;

  std::vector<std::string> tokens_;
  std::vector<ShortToken> short_tokens_;
  std::array<TokenId, 256> byte_ids_;
  MergeTable merges_;
  std::vector<RankedMerge> byte_merges_;  // of each byte with each
  // With ignore_merges, tokens that their own merges do not lead to.
  WholePieces whole_pieces_;
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
