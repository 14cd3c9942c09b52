// Counts the words of any number of texts, on several threads, with the same result as on one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "word_table.hpp"
#include "word_text.hpp"

namespace tinylm {

// Word i is the WTF-8 text [ends[i - 1], ends[i]) of `text`, from 0 for the first, counts[i] times.
struct WordCounts {
  std::string text;
  std::vector<std::size_t> ends;
  std::vector<std::int64_t> counts;
};

// Each worker counts in a table of its own; the tables are brought together when asked for. The
// place of a word's first appearance is the number of its piece among all pieces ever added and its
// own number in it, so ties are broken alike however the pieces were shared out. Calls exclude one
// another, so the counter may be used from several threads.
class WordCounter {
 public:
  // `pieces` are those of cut_texts(texts).
  void add(const std::vector<TextView>& texts, const std::vector<TextPiece>& pieces, int threads);

  // The n most frequent words, most frequent first, ties by first appearance.
  WordCounts most_common(std::size_t n);

  // All words by first appearance.
  WordCounts items();

 private:
  struct Tally {
    std::int64_t count;
    std::uint64_t first;  // appearance: number of the piece << 32 | number of the word in it
  };
  using Table = WordTable<Tally>;

  static void add_words(const Words& words, std::uint64_t piece, Table& table);
  const Table& merged();

  std::mutex mutex_;
  std::vector<Table> tables_ = std::vector<Table>(1);  // one for each worker
  std::uint64_t pieces_ = 0;                           // added so far
};

}  // namespace tinylm
