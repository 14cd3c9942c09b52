// BPE with a vocabulary that the fuzzer makes up, against merging the plainest way; and back.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "bpe.hpp"
#include "fuzz_text.hpp"

namespace tinylm {
namespace {

void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

struct Vocabulary {
  std::vector<std::string> tokens;
  std::vector<BpeMerge> merges;
  std::array<TokenId, 256> byte_ids;
  BpeOptions options;
};

// Bytes first, then what each two bytes of `data` say to join.
Vocabulary make_vocabulary(const std::uint8_t* data, std::size_t size, std::uint8_t flags) {
  Vocabulary vocabulary;
  std::map<std::string, TokenId> ids;
  std::map<std::pair<TokenId, TokenId>, bool> seen;
  for (int byte = 0; byte < 256; ++byte) {
    const auto id = static_cast<TokenId>(255 - byte);
    vocabulary.byte_ids[static_cast<std::size_t>(byte)] = id;
  }
  for (int id = 0; id < 256; ++id) {
    vocabulary.tokens.emplace_back(1, static_cast<char>(255 - id));
    ids[vocabulary.tokens.back()] = static_cast<TokenId>(id);
  }
  // The bytes of letters and spaces, and whatever was joined before.
  std::vector<TokenId> parts;
  for (const char c : std::string(" abeltsv'1\n\xC3\xA9\xE3\x81\x82")) {
    parts.push_back(vocabulary.byte_ids[static_cast<unsigned char>(c)]);
  }
  for (std::size_t i = 0; i + 2 <= size; i += 2) {
    const TokenId left = parts[data[i] % parts.size()];
    const TokenId right = parts[data[i + 1] % parts.size()];
    const std::string joined = vocabulary.tokens[left] + vocabulary.tokens[right];
    if (joined.size() > 40 || seen[{left, right}]) continue;
    seen[{left, right}] = true;
    const auto next = static_cast<TokenId>(vocabulary.tokens.size());
    const auto [entry, is_new] = ids.emplace(joined, next);
    if (is_new) {
      vocabulary.tokens.push_back(joined);
      parts.push_back(next);
    }
    vocabulary.merges.push_back({left, right, entry->second});
  }
  vocabulary.options.pattern = static_cast<SplitPattern>(flags % 5);
  vocabulary.options.ignore_merges = (flags & 0x20) != 0;
  vocabulary.options.ranks_are_ids = (flags & 0x40) != 0;
  return vocabulary;
}

// The leftmost pair of lowest rank, again and again.
void merge_plainly(const Vocabulary& vocabulary, std::string_view piece,
                   std::vector<TokenId>& ids) {
  if (vocabulary.options.ignore_merges) {
    for (TokenId id = 0; id < vocabulary.tokens.size(); ++id) {
      if (vocabulary.tokens[id] == piece) return ids.push_back(id);
    }
  }
  std::map<std::pair<TokenId, TokenId>, std::pair<std::size_t, TokenId>> ranks;
  for (std::size_t i = 0; i < vocabulary.merges.size(); ++i) {
    const BpeMerge& merge = vocabulary.merges[i];
    ranks[{merge.left, merge.right}] = {vocabulary.options.ranks_are_ids ? merge.result : i,
                                        merge.result};
  }
  std::vector<TokenId> symbols;
  for (const char byte : piece) {
    symbols.push_back(vocabulary.byte_ids[static_cast<unsigned char>(byte)]);
  }
  while (true) {
    std::size_t best = symbols.size();
    std::pair<std::size_t, TokenId> lowest;
    for (std::size_t i = 0; i + 1 < symbols.size(); ++i) {
      const auto found = ranks.find({symbols[i], symbols[i + 1]});
      if (found == ranks.end()) continue;
      if (best != symbols.size() && found->second.first >= lowest.first) continue;
      best = i;
      lowest = found->second;
    }
    if (best == symbols.size()) break;
    symbols[best] = lowest.second;
    symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(best) + 1);
  }
  ids.insert(ids.end(), symbols.begin(), symbols.end());
}

template <class Id>
void check_ids(const BpeModel& model, std::string_view text, const std::vector<TokenId>& expected) {
  const ScratchLease scratch(model);
  Watch watch;
  for (int round = 0; round < 2; ++round) {  // The second finds its pieces in the cache.
    IdVector<Id> ids;
    model.encode(text, *scratch, ids, watch);
    if (!std::equal(ids.begin(), ids.end(), expected.begin(), expected.end())) {
      fail("the ids are not those of plain merging");
    }
    std::string decoded;
    for (const TokenId id : ids) decoded += model.token(id);
    if (decoded != text) fail("decoding does not give the text back");
  }
}

void check_encoding(const Vocabulary& vocabulary, std::string_view text) {
  const BpeModel model(vocabulary.tokens, vocabulary.merges, vocabulary.byte_ids, {},
                       vocabulary.options);
  std::vector<TokenId> expected;
  for_each_piece(vocabulary.options.pattern, text,
                 [&](std::string_view piece) { merge_plainly(vocabulary, piece, expected); });
  check_ids<std::uint32_t>(model, text, expected);
  check_ids<std::uint16_t>(model, text, expected);
}

}  // namespace
}  // namespace tinylm

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 2) return 0;
  const std::size_t merges = std::min<std::size_t>(data[1] % 64 * 2, size - 2);
  const auto vocabulary = tinylm::make_vocabulary(data + 2, merges, data[0]);
  const tinylm::FuzzText text(data + 2 + merges, size - 2 - merges);
  tinylm::Utf8Buffer buffer;
  const std::string_view utf8 = tinylm::to_utf8(text.source(), buffer);
  tinylm::check_encoding(vocabulary, utf8);
  return 0;
}
