// Words: counting and encoding against what is found in a whole text.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "fuzz_text.hpp"
#include "word_counter.hpp"
#include "word_encoder.hpp"
#include "word_text.hpp"

namespace tinylm {
namespace {

constexpr std::uint32_t kUnk = 0, kEos = 1;

void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

std::vector<std::string> words_of(const WordCounts& counts) {
  std::vector<std::string> words;
  std::size_t begin = 0;
  for (const std::size_t end : counts.ends) {
    words.push_back(counts.text.substr(begin, end - begin));
    begin = end;
  }
  return words;
}

void check(const std::vector<TextView>& texts) {
  // Found in each text as one piece, however long.
  std::map<std::string, std::int64_t> found;
  std::vector<std::vector<std::string>> words(texts.size());
  WordFinder finder;
  for (std::size_t i = 0; i < texts.size(); ++i) {
    const Words in_text = finder.find_words(texts[i], {i, 0, texts[i].length});
    for (std::size_t w = 0; w < in_text.count; ++w) {
      const std::uint32_t *bounds = in_text.bounds + 2 * w, size = bounds[1] - bounds[0];
      if (size == 0) fail("a word is empty");
      words[i].emplace_back(in_text.text + bounds[0], size);
      ++found[words[i].back()];
    }
  }

  WordCounter counter;
  counter.add(texts, 1);
  const WordCounts items = counter.items();
  const std::vector<std::string> all = words_of(items);
  if (all.size() != found.size()) fail("counting finds other words");
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (found[all[i]] != items.counts[i]) fail("a count is wrong");
  }

  // Half of the words are known.
  const std::vector<std::string> known = words_of(counter.most_common((all.size() + 1) / 2));
  std::vector<std::uint32_t> ids;
  std::map<std::string, std::uint32_t> vocab;
  for (const std::string& word : known) {
    ids.push_back(static_cast<std::uint32_t>(ids.size()) + 2);
    vocab[word] = ids.back();
  }
  const WordEncoder encoder({known.begin(), known.end()}, ids, kUnk, kEos);
  const std::vector<TextPiece> pieces = cut_texts(texts);
  std::vector<std::uint16_t> out(WordEncoder::max_ids(pieces, texts.size(), true));
  std::vector<std::int64_t> offsets(texts.size() + 1);
  encoder.encode(texts, pieces, true, 1, out.data(), offsets.data());
  std::size_t at = 0;
  for (std::size_t i = 0; i < texts.size(); ++i) {
    if (offsets[i] != static_cast<std::int64_t>(at)) fail("an offset is wrong");
    for (const std::string& word : words[i]) {
      const auto entry = vocab.find(word);
      if (out[at++] != (entry == vocab.end() ? kUnk : entry->second)) fail("an id is wrong");
    }
    if (out[at++] != kEos) fail("a text does not end");
  }
  if (offsets.back() != static_cast<std::int64_t>(at)) fail("the last offset is wrong");
}

}  // namespace
}  // namespace tinylm

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using tinylm::FuzzText;
  // Two texts, so that something stands after the first.
  const std::size_t half = size > 0 ? data[0] * size / 256 : 0;
  const FuzzText first(data, half), second(data + half, size - half);
  tinylm::check({{first.data(), first.length(), first.width()},
                 {second.data(), second.length(), second.width()}});
  return 0;
}
