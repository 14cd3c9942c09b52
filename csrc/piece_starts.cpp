#include "piece_starts.hpp"

#include "bits.hpp"
#include "contractions.hpp"

namespace tinylm {

namespace {

constexpr BlockClasses kBeforeWindow = {0, 0, 0, ~std::uint64_t{0}, 0, 0, 0, 0};

std::uint64_t letters(const BlockClasses& block) { return block.upper | block.lower; }
std::uint64_t symbols(const BlockClasses& block) {
  return ~(block.upper | block.lower | block.number | block.space);
}
// White space that ends no line.
std::uint64_t blanks(const BlockClasses& block) { return block.space & ~block.newline; }

// The bits moved to the next byte, the first one from the last of the block before.
std::uint64_t shift(std::uint64_t bits, std::uint64_t bits_before) {
  return bits << 1 | bits_before >> 63;
}

// A block and its surroundings. `after_x` are the bytes behind one of class x.
struct Block {
  Block(const Window& window, std::size_t i)
      : here(window.classes[i]), letter(letters(here)), symbol(symbols(here)), blank(blanks(here)) {
    const BlockClasses& before = i == 0 ? kBeforeWindow : window.classes[i - 1];
    after_letter = shift(letter, letters(before));
    after_lower = shift(here.lower, before.lower);
    after_number = shift(here.number, before.number);
    after_symbol = shift(symbol, symbols(before));
    after_space = shift(here.space, before.space);
    after_newline = shift(here.newline, before.newline);
    after_plain_space = shift(here.blank, before.blank);
    after_blank = shift(blank, blanks(before));
    last_space = here.space & ~(here.space >> 1 | window.classes[i + 1].space << 63);
  }

  const BlockClasses& here;
  std::uint64_t letter, symbol, blank;
  std::uint64_t after_letter, after_lower, after_number, after_symbol, after_space, after_newline,
      after_plain_space, after_blank;
  std::uint64_t last_space;  // before something else
};

// Bits by position.
class Starts {
 public:
  explicit Starts(std::uint64_t* words) : words_(words) {}

  bool has(std::size_t at) const { return (words_[at / 64] >> at % 64 & 1) != 0; }
  void set(std::size_t at) { words_[at / 64] |= std::uint64_t{1} << at % 64; }
  void clear(std::size_t at) { words_[at / 64] &= ~(std::uint64_t{1} << at % 64); }
  void clear(std::size_t begin, std::size_t end) {
    for (std::size_t at = begin; at < end; ++at) clear(at);
  }

 private:
  std::uint64_t* words_;
};

// Calls function(position) for each bit, from left to right.
template <class Function>
void for_each_bit(std::uint64_t bits, std::size_t block, Function&& function) {
  for (; bits != 0; bits &= bits - 1) {
    function(block * kBlockBytes + static_cast<std::size_t>(lowest_bit(bits)));
  }
}

// Makes the pieces that start at an apostrophe end behind its contraction.
template <class ContractionEnd>
void cut_contractions(const Window& window, std::uint64_t* words, ContractionEnd&& end_of) {
  Starts starts(words);
  for (std::size_t i = 0; i < window.block_count(); ++i) {
    for_each_bit(words[i] & window.classes[i].apostrophe, i, [&](std::size_t at) {
      if (at >= window.bytes) return;
      const char* const end = end_of(window.text + at, window.text_end);
      if (end == nullptr) return;
      const auto next = static_cast<std::size_t>(end - window.text);
      if (next > window.bytes) return;
      starts.clear(at + 1, next);
      starts.set(next);
    });
  }
}

// Puts the start of a piece at the first byte of the white space that a piece's rule put at its
// last byte: "all white space but the last" means characters.
void mend_wide_spaces(const Window& window, std::uint64_t* words) {
  Starts starts(words);
  for (const WideChar& space : *window.wide_spaces) {
    const std::size_t last = space.position + space.bytes - 1;
    if (!starts.has(last)) continue;
    starts.clear(last);
    starts.set(space.position);
  }
}

void find_gpt2_starts(const Window& window, std::uint64_t* words) {
  for (std::size_t i = 0; i < window.block_count(); ++i) {
    const Block block(window, i);
    const std::uint64_t goes_on = (block.letter & block.after_letter) |
                                  (block.here.number & block.after_number) |
                                  (block.symbol & block.after_symbol) | block.after_plain_space;
    words[i] = (~block.here.space & ~goes_on) |
               (block.here.space & (~block.after_space | block.last_space));
  }
  cut_contractions(window, words, contraction_end);
}

void find_whitespace_starts(const Window& window, std::uint64_t* words) {
  for (std::size_t i = 0; i < window.block_count(); ++i) {
    const Block block(window, i);
    words[i] = (~block.here.space & block.after_space & ~block.after_plain_space) |
               (block.here.space & (~block.after_space | block.last_space));
  }
}

// Newlines behind symbols, which belong to them: [\r\n]* in ` ?[^\s\p{L}\p{N}]+[\r\n]*`.
std::uint64_t absorbed_newlines(const Block& block, std::uint64_t absorbed_before) {
  const std::uint64_t newline = block.here.newline;
  const std::uint64_t first = newline & (block.after_symbol | absorbed_before >> 63);
  // Adding the first bit of a run clears the run.
  return newline & ~(newline + first);
}

// White space up to its last newline is one piece, so a line of blanks does not start one:
// `after_newline` is set where it did.
class BlankLines {
 public:
  BlankLines(const Window& window, std::uint64_t* words) : window_(window), starts_(words) {}

  // Adding the first bit of a run of blanks sets the bit behind the run, across blocks.
  void join(const Block& block, std::size_t i) {
    const std::uint64_t first = block.blank & block.after_newline;
    const std::uint64_t sum = block.blank + first;
    const std::uint64_t behind = sum + carry_;
    carry_ = static_cast<std::uint64_t>(sum < block.blank || behind < sum);
    for_each_bit(behind & ~block.blank & block.here.newline, i,
                 [this](std::size_t newline) { join_before(newline); });
  }

 private:
  bool is_blank(std::size_t at) const { return (blanks(class_of(at)) >> at % 64 & 1) != 0; }
  bool is_newline(std::size_t at) const { return (class_of(at).newline >> at % 64 & 1) != 0; }
  bool is_symbol(std::size_t at) const { return (symbols(class_of(at)) >> at % 64 & 1) != 0; }
  const BlockClasses& class_of(std::size_t at) const { return window_.classes[at / kBlockBytes]; }

  void join_before(std::size_t newline) {
    std::size_t blank = newline;
    while (is_blank(blank - 1)) --blank;
    std::size_t first = blank;
    while (first > 0 && is_newline(first - 1)) --first;
    // Newlines that belong to a symbol are not of this white space, which then starts here.
    const bool is_absorbed = first > 0 && is_symbol(first - 1);
    if (!is_absorbed) starts_.clear(blank);
  }

  const Window& window_;
  Starts starts_;
  std::uint64_t carry_ = 0;
};

// \p{N}{1,3}: a piece starts at every third digit.
void cut_numbers(const Window& window, std::uint64_t* words) {
  Starts starts(words);
  const auto is_number = [&window](std::size_t at) {
    return at < window.bytes && (window.classes[at / 64].number >> at % 64 & 1) != 0;
  };
  const auto is_inside = [&window](std::size_t at) { return (window.text[at] & 0xC0) == 0x80; };
  for (std::size_t i = 0; i < window.block_count(); ++i) {
    const Block block(window, i);
    for_each_bit(block.here.number & ~block.after_number, i, [&](std::size_t first) {
      if (!is_number(first + 3)) return;
      int digits = 0;
      for (std::size_t at = first; is_number(at); ++at) {
        if (is_inside(at)) continue;
        if (digits == 3) {
          starts.set(at);
          digits = 0;
        }
        ++digits;
      }
    });
  }
}

// A symbol that starts a piece and has a letter behind it belongs to the letters. Those of one byte
// are found with the letters.
void join_wide_symbols(const Window& window, std::uint64_t* words) {
  Starts starts(words);
  for (const WideChar& symbol : *window.wide_symbols) {
    const std::size_t next = symbol.position + symbol.bytes;
    const bool is_before_letter =
        next < window.bytes && (letters(window.classes[next / 64]) >> next % 64 & 1) != 0;
    if (is_before_letter && starts.has(symbol.position)) starts.clear(next);
  }
}

// \s++$: white space at the end of the text is one piece, newlines behind a symbol apart.
void join_last_space(const Window& window, std::uint64_t* words) {
  if (!window.is_text_end()) return;
  const auto has = [&window](std::uint64_t BlockClasses::* field, std::size_t at) {
    return (window.classes[at / 64].*field >> at % 64 & 1) != 0;
  };
  std::size_t first = window.bytes;
  while (first > 0 && has(&BlockClasses::space, first - 1)) --first;
  if (first > 0 && (symbols(window.classes[(first - 1) / 64]) >> (first - 1) % 64 & 1) != 0) {
    while (first < window.bytes && has(&BlockClasses::newline, first)) ++first;
  }
  if (first < window.bytes) Starts(words).clear(first + 1, window.bytes);
}

// What cl100k and o200k have in common: letters with a character before them, numbers in threes,
// symbols with the newlines behind them, white space up to its last newline. With `kSplitAtCase`,
// an upper-case letter behind a lower-case one starts a piece. False if a slash is behind newlines
// that belong to symbols and kSplitAtCase is set: o200k takes it too.
template <bool kSplitAtCase>
bool find_word_starts(const Window& window, std::uint64_t* words) {
  BlankLines blank_lines(window, words);
  std::uint64_t absorbed_before = 0;
  std::uint64_t joined_before = 0;
  bool has_slash = false;
  for (std::size_t i = 0; i < window.block_count(); ++i) {
    const Block block(window, i);
    const std::uint64_t absorbed = absorbed_newlines(block, absorbed_before);
    const std::uint64_t after_absorbed = shift(absorbed, absorbed_before);
    const std::uint64_t symbol_start =
        block.symbol & ~block.after_symbol & ~block.after_plain_space;
    const std::uint64_t space = block.here.space & ~absorbed;
    const std::uint64_t after_own_space = block.after_space & ~after_absorbed;
    std::uint64_t letter_start = block.letter & ~block.after_letter & ~block.after_blank &
                                 ~shift(symbol_start, joined_before);
    if (kSplitAtCase) {
      letter_start |= block.here.upper & block.after_lower;
      for_each_bit(block.symbol & after_absorbed, i,
                   [&](std::size_t at) { has_slash |= window.text[at] == '/'; });
    }
    words[i] = letter_start | (block.here.number & ~block.after_number) | symbol_start |
               (space & ~after_own_space) |
               (block.blank & (block.after_newline | block.last_space));
    // A run of blanks that the last block ended with has its start there.
    blank_lines.join(block, i);
    absorbed_before = absorbed;
    joined_before = symbol_start;
  }
  join_wide_symbols(window, words);
  cut_numbers(window, words);
  return !has_slash;
}

// o200k's words end in a contraction, if one follows.
void join_contractions(const Window& window, std::uint64_t* words) {
  Starts starts(words);
  std::size_t last_end = 0;
  for (std::size_t i = 0; i < window.block_count(); ++i) {
    const Block block(window, i);
    for_each_bit(block.here.apostrophe & block.after_letter, i, [&](std::size_t at) {
      // Behind a contraction no word has ended, but one may begin.
      if (at == last_end || at >= window.bytes) return;
      const char* const end = caseless_contraction_end(window.text + at, window.text_end);
      if (end == nullptr) return;
      const auto next = static_cast<std::size_t>(end - window.text);
      if (next > window.bytes) return;
      starts.clear(at, next);
      starts.set(next);
      last_end = next;
    });
  }
}

}  // namespace

bool find_piece_starts(SplitPattern pattern, const Window& window, std::uint64_t* starts) {
  starts[window.block_count()] = 0;
  switch (pattern) {
    case SplitPattern::kGpt2:
      find_gpt2_starts(window, starts);
      break;
    case SplitPattern::kWhitespace:
      find_whitespace_starts(window, starts);
      break;
    case SplitPattern::kCl100k:
    case SplitPattern::kCl100kTiktoken:
      find_word_starts<false>(window, starts);
      cut_contractions(window, starts, caseless_contraction_end);
      break;
    case SplitPattern::kO200k:
      if (window.has_uncased || !find_word_starts<true>(window, starts)) return false;
      join_contractions(window, starts);
      break;
  }
  mend_wide_spaces(window, starts);
  if (pattern == SplitPattern::kCl100kTiktoken) join_last_space(window, starts);
  starts[0] |= 1;
  return true;
}

}  // namespace tinylm
