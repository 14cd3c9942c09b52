#include "word_counter.hpp"

#include <algorithm>

#include "threads.hpp"

namespace tinylm {
namespace {

struct Item {
  const char* word;
  std::size_t size;
  std::int64_t count;
  std::uint64_t first;
};

bool is_more_frequent(const Item& a, const Item& b) {
  return a.count != b.count ? a.count > b.count : a.first < b.first;
}

WordCounts to_counts(const std::vector<Item>& items) {
  WordCounts result;
  for (const Item& item : items) {
    result.text.append(item.word, item.size);
    result.ends.push_back(result.text.size());
    result.counts.push_back(item.count);
  }
  return result;
}

// Leaves the first n.
void keep_most_frequent(std::vector<Item>& items, std::size_t n) {
  if (items.size() <= n) return;
  const auto end = items.begin() + static_cast<std::ptrdiff_t>(n);
  std::nth_element(items.begin(), end, items.end(), is_more_frequent);
  items.erase(end, items.end());
}

}  // namespace

// A word's first appearance in a table is the one that adds it, for a worker takes pieces in order;
// but only within a batch may words come in another.
void WordCounter::add_words(const Words& words, std::uint64_t piece, Table& table) {
  const auto count = [place = piece << 32](Tally& tally, std::size_t i) {
    if (tally.count == 0) tally.first = place + i;
    ++tally.count;
  };
  look_up_all(
      words, table,
      [&](std::size_t i, ShortKey key, std::uint64_t hash) {
        count(table.find_or_add_short(key, hash), i);
      },
      [&](std::size_t i, const char* word, std::size_t size, std::uint64_t hash) {
        count(table.find_or_add_long(word, size, hash), i);
      });
}

void WordCounter::add(const std::vector<TextView>& texts, const std::vector<TextPiece>& pieces,
                      int threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int workers = resolve_threads(threads, pieces.size());
  if (tables_.size() < static_cast<std::size_t>(workers)) {
    tables_.resize(static_cast<std::size_t>(workers));
  }
  std::vector<WordFinder> finders(static_cast<std::size_t>(workers));
  const std::uint64_t first_piece = pieces_;
  pieces_ += pieces.size();
  parallel_for(pieces.size(), workers, [&](std::size_t i, int worker) {
    const auto w = static_cast<std::size_t>(worker);
    add_words(finders[w].find_words(texts[pieces[i].text], pieces[i]), first_piece + i, tables_[w]);
  });
}

// Linear in the number of different words of all tables.
const WordCounter::Table& WordCounter::merged() {
  for (std::size_t i = 1; i < tables_.size(); ++i) {
    tables_[0].merge(tables_[i], [](Tally& all, const Tally& more) {
      all.first = all.count == 0 ? more.first : std::min(all.first, more.first);
      all.count += more.count;
    });
    tables_[i] = Table();
  }
  return tables_[0];
}

// Keeps about 2n words at a time: linear in the number of different words, and n log n.
WordCounts WordCounter::most_common(std::size_t n) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Item> best;
  std::int64_t least = 1;  // what a word must have been counted to be among the n
  merged().for_each([&](const char* word, std::size_t size, const Tally& tally) {
    if (tally.count < least || n == 0) return;
    best.push_back({word, size, tally.count, tally.first});
    if (best.size() / 2 < n || best.size() < 1024) return;
    keep_most_frequent(best, n);
    least = std::min_element(best.begin(), best.end(), [](const Item& a, const Item& b) {
              return a.count < b.count;
            })->count;
  });
  keep_most_frequent(best, n);
  std::sort(best.begin(), best.end(), is_more_frequent);
  return to_counts(best);
}

WordCounts WordCounter::items() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Item> all;
  merged().for_each([&](const char* word, std::size_t size, const Tally& tally) {
    all.push_back({word, size, tally.count, tally.first});
  });
  std::sort(all.begin(), all.end(), [](const Item& a, const Item& b) { return a.first < b.first; });
  return to_counts(all);
}

}  // namespace tinylm
