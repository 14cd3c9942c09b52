// Texts to ids by a fixed vocabulary.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "word_table.hpp"
#include "word_text.hpp"

namespace tinylm {

// Immutable once made, so any number of threads may encode with one encoder.
class WordEncoder {
 public:
  // vocab[i] (WTF-8) gets the id ids[i]; all other words get `unk_id`, and `eos_id` ends a text.
  WordEncoder(const std::vector<std::string_view>& vocab, const std::vector<std::uint32_t>& ids,
              std::uint32_t unk_id, std::uint32_t eos_id);

  std::uint32_t max_id() const { return max_id_; }

  // How many ids `encode` may write, at most, for texts cut into `pieces`.
  static std::size_t max_ids(const std::vector<TextPiece>& pieces, std::size_t texts, bool add_eos);

  // Writes the ids of all texts to `out`, which has room for max_ids, and where each text's ids
  // start and the last one's end to `offsets`, which has room for texts.size() + 1. `pieces` are
  // those of cut_texts(texts), and Id holds every id. Linear time; equal for any number of threads.
  template <class Id>
  void encode(const std::vector<TextView>& texts, const std::vector<TextPiece>& pieces,
              bool add_eos, int threads, Id* out, std::int64_t* offsets) const;

 private:
  // An id less unk_id_, so that a word which is not there has unk_id_.
  struct Value {
    std::uint32_t id;
  };

  template <class Id>
  void encode_words(const Words& words, Id* out) const;

  WordTable<Value> table_;
  std::uint32_t unk_id_, eos_id_, max_id_;
};

}  // namespace tinylm
