// Counting in bounded memory and learning merges, against doing both the plainest way.
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "bpe_train.hpp"
#include "fuzz_text.hpp"
#include "piece_counter.hpp"

namespace tinylm {
namespace {

using Counts = std::map<std::string, std::int64_t>;
using Pair = std::pair<TokenId, TokenId>;

void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

// The trainer's rule with a list for its queue, maps for its tables and sets for its words.
class PlainTrainer {
 public:
  PlainTrainer(const Counts& counts, const std::array<TokenId, 256>& byte_ids, TokenId first_id)
      : next_id_(first_id) {
    for (std::size_t byte = 0; byte < 256; ++byte) {
      spelling_[byte_ids[byte]] = std::string(1, static_cast<char>(byte));
      ids_[spelling_[byte_ids[byte]]] = byte_ids[byte];
    }
    for (const auto& [piece, count] : counts) {
      std::vector<TokenId> word;
      for (const char byte : piece) word.push_back(byte_ids[static_cast<unsigned char>(byte)]);
      for (std::size_t i = 0; i + 1 < word.size(); ++i) {
        change({word[i], word[i + 1]}, words_.size(), count);
      }
      words_.push_back(word);
      counts_.push_back(count);
    }
    queue_new_pairs();
  }

  std::vector<BpeMerge> train(std::size_t vocab_size, std::int64_t min_frequency,
                              const std::string& reserved) {
    std::vector<BpeMerge> merges;
    while (next_id_ < vocab_size && !queue_.empty()) {
      std::size_t best = 0;
      for (std::size_t i = 1; i < queue_.size(); ++i) {
        const Entry &a = queue_[i], &b = queue_[best];
        if (a.count > b.count || (a.count == b.count && a.pair < b.pair)) best = i;
      }
      Entry& top = queue_[best];
      if (top.count != pairs_[top.pair]) {
        top.count = pairs_[top.pair];
        continue;
      }
      if (top.count < min_frequency) break;
      const Entry entry = top;
      queue_.erase(queue_.begin() + static_cast<std::ptrdiff_t>(best));
      const std::string joined = spelling_[entry.pair.first] + spelling_[entry.pair.second];
      if (joined == reserved) continue;
      if (ids_.count(joined) == 0) {
        ids_[joined] = next_id_;
        spelling_[next_id_++] = joined;
      }
      merges.push_back({entry.pair.first, entry.pair.second, ids_[joined]});
      for (const std::size_t word : entry.words) merge(word, merges.back());
      queue_new_pairs();
    }
    return merges;
  }

 private:
  struct Entry {
    std::int64_t count;
    Pair pair;
    std::set<std::size_t> words;
  };

  void change(Pair pair, std::size_t word, std::int64_t count) {
    pairs_[pair] += count;
    if (count > 0) new_pairs_[pair].insert(word);
  }

  void merge(std::size_t w, const BpeMerge& merge) {
    std::vector<TokenId> merged;
    const std::vector<TokenId>& word = words_[w];
    for (std::size_t i = 0; i < word.size(); ++i) {
      if (word[i] != merge.left || i + 1 == word.size() || word[i + 1] != merge.right) {
        merged.push_back(word[i]);
        continue;
      }
      if (!merged.empty()) {
        change({merged.back(), merge.left}, w, -counts_[w]);
        change({merged.back(), merge.result}, w, counts_[w]);
      }
      merged.push_back(merge.result);
      if (++i + 1 < word.size()) {
        change({merge.right, word[i + 1]}, w, -counts_[w]);
        change({merge.result, word[i + 1]}, w, counts_[w]);
      }
    }
    words_[w] = merged;
  }

  void queue_new_pairs() {
    for (const auto& [pair, words] : new_pairs_) {
      if (pairs_[pair] > 0) queue_.push_back({pairs_[pair], pair, words});
    }
    new_pairs_.clear();
  }

  TokenId next_id_;
  std::map<TokenId, std::string> spelling_;
  std::map<std::string, TokenId> ids_;
  std::vector<std::vector<TokenId>> words_;
  std::vector<std::int64_t> counts_;
  std::map<Pair, std::int64_t> pairs_;
  std::map<Pair, std::set<std::size_t>> new_pairs_;
  std::vector<Entry> queue_;
};

void check_counts(PieceCounter& counter, const Counts& expected, Watch& watch) {
  if (counter.size(watch) != expected.size()) fail("there are more or fewer distinct pieces");
  Counts counts;
  counter.for_each(
      [&](const PieceCount& entry) { counts[std::string(entry.piece)] += entry.count; }, watch);
  if (counts != expected) fail("the counts are others");
  auto next = expected.begin();
  counter.for_each_sorted(
      [&](const PieceCount& entry) {
        if (next->first != entry.piece || next->second != entry.count) fail("not in order");
        ++next;
      },
      watch);
  if (next != expected.end()) fail("some are left out");
}

// data: the pattern and the budget; how the text is shared out; the least count; repetitions.
void check(const std::uint8_t* data, std::string_view text) {
  const auto pattern = static_cast<SplitPattern>(data[0] % 5);
  const std::size_t memory = (data[0] & 0x80) != 0 ? 0 : std::size_t{1} << (data[0] >> 4 & 7) << 14;
  PieceCounter counter(pattern, memory, std::filesystem::temp_directory_path().string());
  counter.reserve_workers(3);
  Counts expected;
  Watch watch;
  for (std::size_t round = 0; round <= data[3] % 16u; ++round) {
    // Cut anywhere between characters, and the cuts move, so that pieces differ.
    std::size_t cut = std::min<std::size_t>(text.size(), round * (data[1] % 8u));
    while (cut < text.size() && (static_cast<unsigned char>(text[cut]) & 0xC0) == 0x80) ++cut;
    int worker = data[1] % 3;
    for (const std::string_view part : {text.substr(0, cut), text.substr(cut)}) {
      // A copy of exactly the text, so that reading beyond its end is seen.
      const std::vector<char> exact(part.begin(), part.end());
      counter.add({exact.data(), exact.size()}, worker++ % 3, watch);
      for_each_piece(pattern, part,
                     [&](std::string_view piece) { ++expected[std::string(piece)]; });
    }
    if (round % 4 == data[1] % 4u) check_counts(counter, expected, watch);
  }
  check_counts(counter, expected, watch);

  std::array<TokenId, 256> byte_ids;
  for (std::size_t byte = 0; byte < 256; ++byte) byte_ids[byte] = static_cast<TokenId>(257 - byte);
  const std::string reserved = expected.empty() ? "" : expected.rbegin()->first;
  BpeTrainer trainer(byte_ids, 258, {reserved});
  counter.for_each([&](const PieceCount& entry) { trainer.add(entry); }, watch);
  const std::int64_t min_frequency = 1 + data[2] % 3;
  const std::size_t vocab_size = 258 + data[2] / 3;
  const auto merges = trainer.train(vocab_size, min_frequency, watch);
  const auto plain =
      PlainTrainer(expected, byte_ids, 258).train(vocab_size, min_frequency, reserved);
  if (merges.size() != plain.size()) fail("more or fewer merges");
  for (std::size_t i = 0; i < plain.size(); ++i) {
    const BpeMerge &a = merges[i], &b = plain[i];
    if (a.left != b.left || a.right != b.right || a.result != b.result) fail("another merge");
  }
}

}  // namespace
}  // namespace tinylm

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 4) return 0;
  const tinylm::FuzzText text(data + 4, size - 4);
  tinylm::Utf8Buffer buffer;
  tinylm::check(data, tinylm::to_utf8(text.source(), buffer));
  return 0;
}
