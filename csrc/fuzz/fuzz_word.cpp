// Words: counting, encoding and decoding, by every instruction set, on several threads and cut
// anywhere, against what a plain loop finds in a whole text.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "fuzz_text.hpp"
#include "simd/instruction_set.hpp"
#include "word_case.hpp"
#include "word_counter.hpp"
#include "word_decoder.hpp"
#include "word_encoder.hpp"
#include "word_text.hpp"

namespace tinylm {
namespace {

constexpr std::uint32_t kUnk = 0, kEos = 1;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::abort();
}

using Code = std::vector<std::uint32_t>;
using WordList = std::vector<std::string>;

// Bytes as Python's decoder reads them, written without a look at read_utf8.
Code decode_bytes(const std::uint8_t* in, std::size_t size) {
  Code code;
  for (std::size_t i = 0; i < size;) {
    const std::uint8_t lead = in[i++];
    int tail = lead < 0x80 ? 0 : lead < 0xC2 ? -1 : lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
    if (lead > 0xF4) tail = -1;
    std::uint32_t c = tail <= 0 ? lead : lead & (0x3Fu >> tail);
    std::uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    std::uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    for (; tail > 0; --tail) {
      if (i == size || in[i] < low || in[i] > high) break;
      c = c << 6 | (in[i++] & 0x3Fu);
      low = 0x80;
      high = 0xBF;
    }
    code.push_back(tail == 0 ? c : kReplacementCharacter);
  }
  return code;
}

Code code_of(const TextView& text) {
  if (text.kind == TextView::kUtf8) {
    return decode_bytes(static_cast<const std::uint8_t*>(text.data), text.length);
  }
  Code code;
  with_text(text, [&](const auto& units) { code.assign(units.data, units.data + units.length); });
  return code;
}

WordList words_of(const Code& code) {
  WordList words;
  std::string word;
  for (std::size_t i = 0; i < code.size(); ++i) {
    char bytes[16];
    char* end = bytes;
    if (code[i] == kCapitalSigma) {
      std::size_t before = i, after = i + 1;
      while (before > 0 && is_case_ignorable(code[before - 1])) --before;
      while (after < code.size() && is_case_ignorable(code[after])) ++after;
      const bool final = before > 0 && is_cased(code[before - 1]) &&
                         !(after < code.size() && is_cased(code[after]));
      end = encode_utf8(final ? kFinalSigma : kSigma, bytes);
    } else if (!is_separator(code[i])) {
      end = write_lower(code[i], bytes);
    } else if (!word.empty()) {
      words.push_back(std::move(word));
      word.clear();
    }
    word.append(bytes, end);
  }
  if (!word.empty()) words.push_back(std::move(word));
  return words;
}

WordList words_of(const WordCounts& counts) {
  WordList words;
  std::size_t begin = 0;
  for (const std::size_t end : counts.ends) {
    words.push_back(counts.text.substr(begin, end - begin));
    begin = end;
  }
  return words;
}

std::u32string to_u32(const std::string& wtf8) {
  std::u32string text;
  for (const char* at = wtf8.data(); at < wtf8.data() + wtf8.size();) {
    text.push_back(decode_utf8(at));
  }
  return text;
}

// All words in order of first appearance, and their counts.
struct Found {
  std::vector<WordList> texts;
  WordList distinct;
  std::map<std::string, std::int64_t> counts;
};

Found find(const std::vector<TextView>& texts) {
  Found found;
  for (const TextView& text : texts) {
    found.texts.push_back(words_of(code_of(text)));
    for (const std::string& word : found.texts.back()) {
      if (++found.counts[word] == 1) found.distinct.push_back(word);
    }
  }
  return found;
}

void check_counting(const std::vector<TextView>& texts, const std::vector<TextPiece>& pieces,
                    int threads, const Found& found) {
  WordCounter counter;
  counter.add(texts, pieces, threads);
  const WordCounts items = counter.items();
  expect(words_of(items) == found.distinct, "the words or their order");
  for (std::size_t i = 0; i < found.distinct.size(); ++i) {
    expect(items.counts[i] == found.counts.at(found.distinct[i]), "a count");
  }
  const std::size_t half = (found.distinct.size() + 1) / 2;
  const WordCounts common = counter.most_common(half);
  expect(common.counts.size() == half, "how many are most common");
  for (std::size_t i = 1; i < half; ++i) {
    expect(common.counts[i - 1] >= common.counts[i], "the order of the most common");
  }
}

void check_decoding(const std::vector<std::uint16_t>& ids, const WordList& known) {
  std::vector<std::u32string> words = {U"<UNK>", U"<EOS>"};
  for (const std::string& word : known) words.push_back(to_u32(word));
  std::u32string expected;
  for (const std::uint16_t id : ids) expected += words[id] + U' ';
  const WordDecoder decoder(words, kUnk);
  const std::uint16_t *first = ids.data(), *last = first + ids.size();
  const WordDecoder::Size size = decoder.measure(first, last);
  expect(size.length == expected.size(), "the length of decoded text");
  const auto check_as = [&](auto sample) {
    using Unit = decltype(sample);
    if (size.bits > std::numeric_limits<Unit>::max()) return;
    std::vector<Unit> out(size.length);
    decoder.write(first, last, out.data(), out.data() + out.size());
    expect(std::equal(out.begin(), out.end(), expected.begin()), "decoded text");
  };
  check_as(std::uint8_t{});
  check_as(std::uint16_t{});
  check_as(std::uint32_t{});
}

void check_encoding(const std::vector<TextView>& texts, const std::vector<TextPiece>& pieces,
                    int threads, const Found& found) {
  // Half of the words are known.
  const auto half = static_cast<std::ptrdiff_t>((found.distinct.size() + 1) / 2);
  const WordList known(found.distinct.begin(), found.distinct.begin() + half);
  std::vector<std::uint32_t> ids;
  std::map<std::string, std::uint32_t> vocab;
  for (const std::string& word : known) {
    ids.push_back(static_cast<std::uint32_t>(ids.size()) + 2);
    vocab[word] = ids.back();
  }
  const WordEncoder encoder({known.begin(), known.end()}, ids, kUnk, kEos);
  std::vector<std::uint16_t> out(WordEncoder::max_ids(pieces, texts.size(), true));
  std::vector<std::int64_t> offsets(texts.size() + 1);
  encoder.encode(texts, pieces, true, threads, out.data(), offsets.data());
  std::size_t at = 0;
  for (std::size_t i = 0; i < texts.size(); ++i) {
    expect(offsets[i] == static_cast<std::int64_t>(at), "an offset");
    for (const std::string& word : found.texts[i]) {
      const auto entry = vocab.find(word);
      expect(out[at++] == (entry == vocab.end() ? kUnk : entry->second), "an id");
    }
    expect(out[at++] == kEos, "the end of a text");
  }
  expect(offsets.back() == static_cast<std::int64_t>(at), "the last offset");
  out.resize(at);
  check_decoding(out, known);
}

// Against decoding it all; the first replacement that is not in the text itself is the error.
void check_validation(const TextView& text) {
  const auto* data = static_cast<const std::uint8_t*>(text.data);
  const std::size_t at = find_invalid_utf8(data, text.length);
  std::size_t expected = 0;
  while (expected < text.length) {
    const Utf8Read read = read_utf8(data + expected, data + text.length);
    if (!read.valid) break;
    expected += read.bytes;
  }
  expect(at == expected, "where bytes are no UTF-8");
}

void check(const std::vector<TextView>& texts, std::size_t piece_length, int threads) {
  const Found found = find(texts);
  for (const TextView& text : texts) {
    if (text.kind == TextView::kUtf8) check_validation(text);
  }
  const std::vector<TextPiece> pieces = cut_texts(texts, piece_length);
  for (int set = 0; set <= static_cast<int>(best_instruction_set()); ++set) {
    use_instruction_set(static_cast<InstructionSet>(set));
    check_counting(texts, pieces, threads, found);
    check_encoding(texts, pieces, threads, found);
  }
}

}  // namespace
}  // namespace tinylm

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace tinylm;
  if (size < 3) return 0;
  const std::size_t piece_length = data[0] < 16 ? kPieceLength : data[0] % 32 + 1;
  const int threads = data[1] % 16 == 0 ? 3 : 1;  // threads are slow to start
  data += 3;
  size -= 3;
  // Two texts, so that something stands after the first.
  const std::size_t half = data[-1] * size / 256;
  const FuzzText first(data, half), second(data + half, size - half);
  check({{first.data(), first.length(), first.width()},
         {second.data(), second.length(), second.width()}},
        piece_length, threads);
  // The same as bytes, in memory that ends where they end.
  const std::vector<std::uint8_t> a(data, data + half), b(data + half, data + size);
  check({{a.data(), a.size(), TextView::kUtf8}, {b.data(), b.size(), TextView::kUtf8}},
        piece_length, threads);
  return 0;
}
