#include "word_counter.hpp"

#include <algorithm>
#include <stdexcept>

#include "threads.hpp"

namespace tinylm {

void WordCounter::Table::add(const char* word, std::size_t size, ShortKey key, std::uint64_t hash,
                             std::int64_t count, std::uint64_t first) {
  const auto fresh = static_cast<std::uint32_t>(entries.size());
  if (fresh == WordMap::kNone) throw std::length_error("too many different words");
  const std::uint32_t index = size <= kMaxShortWord ? map.find_or_add_short(key, hash, fresh)
                                                    : map.find_or_add_long(word, size, fresh);
  if (index == fresh) {
    entries.push_back({0, first, text.size(), size});
    text.insert(text.end(), word, word + size);
  }
  Entry& entry = entries[index];
  entry.count += count;
  entry.first = std::min(entry.first, first);
}

void WordCounter::Table::add_words(const Words& words, std::uint64_t piece) {
  std::uint64_t place = piece << 32;
  look_up_all(words, map,
              [&](const char* word, std::size_t size, ShortKey key, std::uint64_t hash) {
                add(word, size, key, hash, 1, place++);
              });
}

template <class Iterator>
WordCounts WordCounter::Table::counts(Iterator begin, Iterator end) const {
  WordCounts result;
  for (; begin != end; ++begin) {
    result.text.append(text.data() + begin->begin, begin->size);
    result.ends.push_back(result.text.size());
    result.counts.push_back(begin->count);
  }
  return result;
}

void WordCounter::add(const std::vector<TextView>& texts, int threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::vector<TextPiece> pieces = cut_texts(texts);
  const int workers = resolve_threads(threads, pieces.size());
  if (tables_.size() < static_cast<std::size_t>(workers)) {
    tables_.resize(static_cast<std::size_t>(workers));
  }
  std::vector<WordFinder> finders(static_cast<std::size_t>(workers));
  const std::uint64_t first_piece = pieces_;
  pieces_ += pieces.size();
  parallel_for(pieces.size(), workers, [&](std::size_t i, int worker) {
    const auto w = static_cast<std::size_t>(worker);
    tables_[w].add_words(finders[w].find_words(texts[pieces[i].text], pieces[i]), first_piece + i);
  });
}

// Linear in the number of different words of all tables.
WordCounter::Table& WordCounter::merged() {
  Table& all = tables_[0];
  for (std::size_t i = 1; i < tables_.size(); ++i) {
    Table& table = tables_[i];
    table.text.resize(table.text.size() + kReadAhead);
    for (const Entry& entry : table.entries) {
      const char* word = table.text.data() + entry.begin;
      const ShortKey key = short_key(word, std::min(entry.size, kMaxShortWord));
      all.add(word, entry.size, key, short_hash(key), entry.count, entry.first);
    }
    table = Table();
  }
  return all;
}

WordCounts WordCounter::most_common(std::size_t n) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Table& all = merged();
  std::vector<Entry> entries = all.entries;
  const auto end = entries.begin() + static_cast<std::ptrdiff_t>(std::min(n, entries.size()));
  std::partial_sort(entries.begin(), end, entries.end(), [](const Entry& a, const Entry& b) {
    return a.count != b.count ? a.count > b.count : a.first < b.first;
  });
  return all.counts(entries.begin(), end);
}

WordCounts WordCounter::items() {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Table& all = merged();
  std::vector<Entry> entries = all.entries;
  std::sort(entries.begin(), entries.end(),
            [](const Entry& a, const Entry& b) { return a.first < b.first; });
  return all.counts(entries.begin(), entries.end());
}

}  // namespace tinylm
