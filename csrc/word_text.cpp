#include "word_text.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "utf8.hpp"

// TINYLM_PORTABLE leaves vector instructions out, to test what other processors run.
#if (defined(__SSE2__) || defined(_M_X64)) && !defined(TINYLM_PORTABLE)
#include <emmintrin.h>
#define TINYLM_SSE2 1
#endif

// How it is done: a piece is first written out as lower-case WTF-8 in which every separator is a
// space; splitting is then a search for spaces, 64 bytes at a time. Both passes stay in the cache.
namespace tinylm {
namespace {

#include "case_tables.inc"

constexpr std::size_t kBlock = 16;           // code points normalised at once where all are ASCII
constexpr std::size_t kScan = 64;            // bytes searched for spaces at once
constexpr std::size_t kPadding = 2 * kScan;  // spaces after the text; at least kReadAhead remain
constexpr std::size_t kMaxPiece = std::size_t{1} << 30;
constexpr std::uint32_t kCapitalSigma = 0x3A3, kSigma = 0x3C3, kFinalSigma = 0x3C2;

const CaseRecord& case_record(std::uint32_t c) {
  return kCaseRecords[kCaseStage2[kCaseStage1[c / kCaseBlock] * kCaseBlock + c % kCaseBlock]];
}

bool is_separator_mark(std::uint32_t c) {
  switch (c) {
    case '.':
    case ',':
    case '!':
    case '?':
    case ';':
    case ':':
    case '"':
    case '\'':
    case '(':
    case ')':
      return true;
    default:
      return false;
  }
}

bool is_separator(std::uint32_t c) {
  return is_separator_mark(c) || (case_record(c).flags & kSpace) != 0;
}

// Each ASCII character in lower case, separators as spaces.
struct AsciiMap {
  char to[128];
  AsciiMap() {
    for (std::uint32_t c = 0; c < 128; ++c) {
      to[c] = is_separator(c)
                  ? ' '
                  : static_cast<char>(c + static_cast<std::uint32_t>(case_record(c).delta));
    }
  }
};
const AsciiMap kAscii;

// ---- A block of kBlock code points, if all are ASCII -------------------------------------------

#ifdef TINYLM_SSE2

__m128i load(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

// The block as bytes; meaningful only if `ascii` is set.
struct Block {
  __m128i bytes;
  bool ascii;
};

Block load_block(const std::uint8_t* p) {
  const __m128i v = load(p);
  return {v, _mm_movemask_epi8(v) == 0};
}

Block load_block(const std::uint16_t* p) {
  const __m128i a = load(p), b = load(p + 8);
  const __m128i high = _mm_and_si128(_mm_or_si128(a, b), _mm_set1_epi16(-0x80));
  const bool ascii = _mm_movemask_epi8(_mm_cmpeq_epi8(high, _mm_setzero_si128())) == 0xFFFF;
  return {_mm_packus_epi16(a, b), ascii};
}

Block load_block(const std::uint32_t* p) {
  const __m128i a = load(p), b = load(p + 4), c = load(p + 8), d = load(p + 12);
  const __m128i any = _mm_or_si128(_mm_or_si128(a, b), _mm_or_si128(c, d));
  const __m128i high = _mm_and_si128(any, _mm_set1_epi32(-0x80));
  const bool ascii = _mm_movemask_epi8(_mm_cmpeq_epi8(high, _mm_setzero_si128())) == 0xFFFF;
  return {_mm_packus_epi16(_mm_packs_epi32(a, b), _mm_packs_epi32(c, d)), ascii};
}

// All bits set in the bytes of `v` that lie in [first, last].
__m128i in_range(__m128i v, int first, int last) {
  const __m128i offset = _mm_sub_epi8(v, _mm_set1_epi8(static_cast<char>(first)));
  const __m128i limit = _mm_set1_epi8(static_cast<char>(last - first));
  return _mm_cmpeq_epi8(_mm_min_epu8(offset, limit), offset);
}

// The same as kAscii; the tests compare the two on every character.
inline __m128i map_ascii(__m128i v) {
  const __m128i space = _mm_set1_epi8(' ');
  const __m128i upper = in_range(v, 'A', 'Z');
  const __m128i comma_or_stop =
      _mm_cmpeq_epi8(_mm_and_si128(v, _mm_set1_epi8(~0x02)), _mm_set1_epi8(','));
  const __m128i marks =
      _mm_or_si128(_mm_or_si128(in_range(v, '\'', ')'), comma_or_stop),
                   _mm_or_si128(in_range(v, ':', ';'), _mm_cmpeq_epi8(v, _mm_set1_epi8('?'))));
  const __m128i spaces = _mm_or_si128(in_range(v, 0x09, 0x0D), in_range(v, 0x1C, '"'));
  const __m128i separator = _mm_or_si128(marks, spaces);
  const __m128i lower = _mm_or_si128(v, _mm_and_si128(upper, space));  // bit 0x20 is a space, too
  return _mm_or_si128(_mm_andnot_si128(separator, lower), _mm_and_si128(separator, space));
}

template <class Unit>
bool normalize_block(const Unit* in, char* out) {
  const Block block = load_block(in);
  if (!block.ascii) return false;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), map_ascii(block.bytes));
  return true;
}

std::uint64_t spaces_in_64(const char* p) {
  std::uint64_t bits = 0;
  for (int i = 0; i < 4; ++i) {
    const __m128i equal = _mm_cmpeq_epi8(load(p + 16 * i), _mm_set1_epi8(' '));
    bits |= static_cast<std::uint64_t>(_mm_movemask_epi8(equal)) << (16 * i);
  }
  return bits;
}

#else

template <class Unit>
bool normalize_block(const Unit* in, char* out) {
  Unit any = 0;
  for (std::size_t i = 0; i < kBlock; ++i) any |= in[i];
  if (any >= 0x80) return false;
  for (std::size_t i = 0; i < kBlock; ++i) out[i] = kAscii.to[in[i]];
  return true;
}

std::uint64_t spaces_in_64(const char* p) {
  std::uint64_t bits = 0;
  for (std::size_t i = 0; i < 64; ++i) bits |= static_cast<std::uint64_t>(p[i] == ' ') << i;
  return bits;
}

#endif

int lowest_bit(std::uint64_t bits) {
#if defined(__GNUC__)
  return __builtin_ctzll(bits);
#else
  int position = 0;
  for (; (bits & 1) == 0; bits >>= 1) ++position;
  return position;
#endif
}

// ---- Lower-casing ------------------------------------------------------------------------------

// The sigma at `at` is a final one if, case-ignorable characters skipped, a cased letter stands
// before it and none after it. The whole text counts, across separators and pieces. Every sigma
// ends the search of its neighbours, so this is linear over a text.
template <class Unit>
std::uint32_t lower_sigma(const Unit* text, std::size_t length, std::size_t at) {
  const auto flags = [text](std::size_t i) { return case_record(text[i]).flags; };
  std::size_t before = at;
  while (before > 0 && (flags(before - 1) & kCaseIgnorable) != 0) --before;
  if (before == 0 || (flags(before - 1) & kCased) == 0) return kSigma;
  std::size_t after = at + 1;
  while (after < length && (flags(after) & kCaseIgnorable) != 0) ++after;
  return after < length && (flags(after) & kCased) != 0 ? kSigma : kFinalSigma;
}

char* write_expansion(std::uint32_t c, char* out) {
  for (const Expansion& expansion : kExpansions) {
    if (expansion.from != c) continue;
    for (int i = 0; i < expansion.length; ++i) out = encode_utf8(expansion.to[i], out);
  }
  return out;
}

template <class Unit>
inline char* normalize_one(const Unit* text, std::size_t length, std::size_t at, char* out) {
  const std::uint32_t c = text[at];
  if (c < 0x80) {
    *out = kAscii.to[c];
    return out + 1;
  }
  const CaseRecord& record = case_record(c);
  if ((record.flags & (kSpace | kExpands)) != 0) {
    if ((record.flags & kExpands) != 0) return write_expansion(c, out);
    *out = ' ';
    return out + 1;
  }
  if (c == kCapitalSigma) return encode_utf8(lower_sigma(text, length, at), out);
  return encode_utf8(c + static_cast<std::uint32_t>(record.delta), out);
}

// Writes [begin, end) of `text` as lower-case WTF-8 with separators as spaces; returns the end.
template <class Unit>
char* normalize(const Unit* text, std::size_t length, std::size_t begin, std::size_t end,
                char* out) {
  std::size_t at = begin;
  while (at + kBlock <= end) {
    if (normalize_block(text + at, out)) {
      at += kBlock;
      out += kBlock;
      continue;
    }
    for (const std::size_t stop = at + kBlock; at < stop; ++at) {
      out = normalize_one(text, length, at, out);
    }
  }
  for (; at < end; ++at) out = normalize_one(text, length, at, out);
  return out;
}

// ---- Splitting ---------------------------------------------------------------------------------

// Writes the starts and ends of the runs without spaces in [text, text + size), which spaces follow
// up to a multiple of kScan. Returns the end of what it wrote: two numbers a word.
std::uint32_t* find_bounds(const char* text, std::size_t size, std::uint32_t* out) {
  std::uint64_t before = 1;  // whether a space precedes the block
  for (std::size_t block = 0; block <= size; block += kScan) {
    const std::uint64_t spaces = spaces_in_64(text + block);
    std::uint64_t changes = spaces ^ (spaces << 1 | before);
    before = spaces >> 63;
    for (; changes != 0; changes &= changes - 1) {
      *out++ = static_cast<std::uint32_t>(block) + static_cast<std::uint32_t>(lowest_bit(changes));
    }
  }
  return out;
}

template <class Unit>
void cut_text(const Unit* data, std::size_t text, std::size_t length,
              std::vector<TextPiece>& pieces) {
  std::size_t begin = 0;
  do {
    std::size_t end = std::min(begin + kPieceLength, length);
    while (end < length && !is_separator(data[end])) ++end;
    pieces.push_back({text, begin, end});
    begin = end;
  } while (begin < length);
}

template <class Function>
auto with_units(const TextView& text, Function function) {
  switch (text.kind) {
    case 1:
      return function(static_cast<const std::uint8_t*>(text.data));
    case 2:
      return function(static_cast<const std::uint16_t*>(text.data));
    default:
      return function(static_cast<const std::uint32_t*>(text.data));
  }
}

}  // namespace

std::vector<TextPiece> cut_texts(const std::vector<TextView>& texts) {
  std::vector<TextPiece> pieces;
  pieces.reserve(texts.size());
  for (std::size_t i = 0; i < texts.size(); ++i) {
    with_units(texts[i], [&](const auto* data) { cut_text(data, i, texts[i].length, pieces); });
  }
  return pieces;
}

void WordFinder::reserve(std::size_t code_points) {
  if (code_points <= capacity_) return;
  if (code_points >= kMaxPiece) throw std::length_error("a word of more than 2^30 characters");
  buffer_.reset(new char[code_points * kMaxUtf8Bytes + kPadding]);
  bounds_.reset(new std::uint32_t[code_points + 2]);
  capacity_ = code_points;
}

Words WordFinder::find_words(const TextView& text, const TextPiece& piece) {
  reserve(std::max(piece.end - piece.begin, std::size_t{1}));
  char* end = with_units(text, [&](const auto* data) {
    return normalize(data, text.length, piece.begin, piece.end, buffer_.get());
  });
  std::memset(end, ' ', kPadding);
  const std::uint32_t* last =
      find_bounds(buffer_.get(), static_cast<std::size_t>(end - buffer_.get()), bounds_.get());
  return {buffer_.get(), bounds_.get(), static_cast<std::size_t>(last - bounds_.get()) / 2};
}

}  // namespace tinylm
