#include "word_text.hpp"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "simd/words.hpp"
#include "threads.hpp"
#include "word_case.hpp"

// How it is done: a piece is first written out as lower-case WTF-8 in which every separator is a
// space; splitting is then a search for spaces. Both passes stay in the cache.
namespace tinylm {
namespace {

constexpr std::size_t kMaxPiece = std::size_t{1} << 30;

// Vector code is tried again after so many units that are not all ASCII, the fewer the more of them
// it managed the last time.
constexpr std::size_t kMinPatience = 16, kMaxPatience = 128;

// The sigma in [begin, end) is a final one if, case-ignorable characters skipped, a cased letter
// stands before it and none after it. The whole text counts, across separators and pieces. Every
// sigma ends the search of its neighbours, so this is linear over a text.
template <class Text>
std::uint32_t lower_sigma(const Text& text, std::size_t begin, std::size_t end) {
  std::uint32_t c = 0;
  do {
    if (begin == 0) return kSigma;
    c = text.previous(begin);
  } while (is_case_ignorable(c));
  if (!is_cased(c)) return kSigma;
  do {
    if (end == text.length) return kFinalSigma;
    c = text.next(end);
  } while (is_case_ignorable(c));
  return is_cased(c) ? kSigma : kFinalSigma;
}

std::size_t map_ascii(const WordKernels& kernels, const std::uint8_t* in, std::size_t n,
                      char* out) {
  return kernels.map_ascii8(in, n, out);
}
std::size_t map_ascii(const WordKernels& kernels, const std::uint16_t* in, std::size_t n,
                      char* out) {
  return kernels.map_ascii16(in, n, out);
}
std::size_t map_ascii(const WordKernels& kernels, const std::uint32_t* in, std::size_t n,
                      char* out) {
  return kernels.map_ascii32(in, n, out);
}

// Writes the code point at `at`, which is moved past it.
template <class Text>
inline char* lower_one(const Text& text, const LowerTable& table, std::size_t& at, char* out) {
  const std::size_t begin = at;
  const std::uint32_t c = text.next(at);
  if (c < table.size()) {
    const Lowered lowered = table[c];
    std::memcpy(out, &lowered, sizeof lowered);  // the size too, to be written over
    if (lowered.size != 0) return out + lowered.size;
    if (c == kCapitalSigma) return encode_utf8(lower_sigma(text, begin, at), out);
  }
  return write_lower(c, out);
}

// Writes [begin, end) of `text` as lower-case WTF-8 with separators as spaces; returns the end.
template <class Text>
char* lower_piece(const Text& text, std::size_t begin, std::size_t end, char* out) {
  const WordKernels& kernels = word_kernels();
  std::size_t patience = kMinPatience;
  for (std::size_t at = begin;;) {
    const std::size_t mapped = map_ascii(kernels, text.data + at, end - at, out);
    at += mapped;
    out += mapped;
    if (at >= end) return out;  // beyond it if the bytes have changed meanwhile
    patience = mapped > kMinPatience ? kMinPatience : std::min(2 * patience, kMaxPatience);
    const LowerTable& table = lower_table();
    for (const std::size_t stop = std::min(end, at + patience); at < stop;) {
      out = lower_one(text, table, at, out);
    }
  }
}

template <class Text>
void cut_text(const Text& text, std::size_t index, std::size_t length,
              std::vector<TextPiece>& pieces) {
  std::size_t begin = 0;
  do {
    std::size_t end = text.length - begin > length ? begin + length : text.length;
    while (end < text.length) {
      std::size_t next = end;
      if (Text::is_start(text.data[end]) && is_separator(text.next(next))) break;
      ++end;
    }
    pieces.push_back({index, begin, end});
    begin = end;
  } while (begin < text.length);
}

}  // namespace

std::vector<TextPiece> cut_texts(const std::vector<TextView>& texts, std::size_t length) {
  std::vector<TextPiece> pieces;
  pieces.reserve(texts.size());
  for (std::size_t i = 0; i < texts.size(); ++i) {
    with_text(texts[i], [&](const auto& text) { cut_text(text, i, length, pieces); });
  }
  return pieces;
}

InvalidUtf8 find_invalid(const std::vector<TextView>& texts, const std::vector<TextPiece>& pieces,
                         int threads) {
  InvalidUtf8 first{texts.size(), 0};
  std::mutex mutex;
  parallel_for(pieces.size(), resolve_threads(threads, pieces.size()), [&](std::size_t i, int) {
    const TextPiece& piece = pieces[i];
    const TextView& text = texts[piece.text];
    if (text.kind != TextView::kUtf8) return;
    const std::size_t size = piece.end - piece.begin;
    const std::size_t at =
        find_invalid_utf8(static_cast<const std::uint8_t*>(text.data) + piece.begin, size);
    if (at == size) return;
    const std::size_t position = piece.begin + at;
    const std::lock_guard<std::mutex> lock(mutex);
    if (piece.text < first.text || (piece.text == first.text && position < first.position)) {
      first = {piece.text, position};
    }
  });
  return first;
}

void WordFinder::reserve(std::size_t units, std::size_t bytes) {
  if (units >= kMaxPiece) throw std::length_error("a word has 2**30 characters or more");
  if (bytes > bytes_) {
    bytes_ = 0;
    buffer_.reset(new char[bytes]);
    bytes_ = bytes;
  }
  if (units > units_) {
    units_ = 0;
    bounds_.reset(new std::uint32_t[units + 1 + kWordSlack]);
    units_ = units;
  }
}

Words WordFinder::find_words(const TextView& view, const TextPiece& piece) {
  return with_text(view, [&](const auto& text) -> Words {
    const std::size_t units = std::max(piece.end - piece.begin, std::size_t{1});
    // Room for what the vector code writes too much, and for the spaces after the text.
    reserve(units, units * text.kMaxLowerBytes + 2 * kWordSlack);
    char* end = lower_piece(text, piece.begin, piece.end, buffer_.get());
    std::memset(end, ' ', kWordSlack);
    const std::uint32_t* last = word_kernels().find_bounds(
        buffer_.get(), static_cast<std::size_t>(end - buffer_.get()), bounds_.get());
    return {buffer_.get(), bounds_.get(), static_cast<std::size_t>(last - bounds_.get()) / 2};
  });
}

}  // namespace tinylm
