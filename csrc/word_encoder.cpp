#include "word_encoder.hpp"

#include <algorithm>
#include <cstring>

#include "threads.hpp"

namespace tinylm {
namespace {

// Pieces that one thread encodes in one go, to one stretch of the output: it has room for their ids
// at most, from `room` on; `written` of it is used.
struct Run {
  std::size_t first_piece, last_piece;  // [first, last)
  std::size_t room, written;
};

std::size_t room_of(const std::vector<TextPiece>& pieces, std::size_t i, bool add_eos) {
  const bool ends_text = i + 1 == pieces.size() || pieces[i + 1].text != pieces[i].text;
  return max_words(pieces[i]) + (add_eos && ends_text ? 1 : 0);
}

// A few runs for each thread, so that a slow one is not waited for long.
std::vector<Run> cut_runs(const std::vector<TextPiece>& pieces, bool add_eos, std::size_t total,
                          int threads) {
  const std::size_t target = threads == 1 ? total : total / (4 * static_cast<std::size_t>(threads));
  std::vector<Run> runs;
  std::size_t room = 0;
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    if (runs.empty() || room - runs.back().room > target) runs.push_back({i, i, room, 0});
    runs.back().last_piece = i + 1;
    room += room_of(pieces, i, add_eos);
  }
  return runs;
}

}  // namespace

WordEncoder::WordEncoder(const std::vector<std::string_view>& vocab,
                         const std::vector<std::uint32_t>& ids, std::uint32_t unk_id,
                         std::uint32_t eos_id)
    : unk_id_(unk_id), eos_id_(eos_id), max_id_(std::max(unk_id, eos_id)) {
  for (std::size_t i = 0; i < vocab.size(); ++i) {
    const std::size_t size = vocab[i].size();
    max_id_ = std::max(max_id_, ids[i]);
    if (size > kMaxShortWord) {
      map_.find_or_add_long(vocab[i].data(), size, ids[i]);
    } else {
      char padded[kReadAhead] = {};
      std::memcpy(padded, vocab[i].data(), size);
      const ShortKey key = short_key(padded, size);
      map_.find_or_add_short(key, short_hash(key), ids[i]);
    }
  }
}

std::size_t WordEncoder::max_ids(const std::vector<TextPiece>& pieces, std::size_t texts,
                                 bool add_eos) {
  std::size_t ids = add_eos ? texts : 0;
  for (const TextPiece& piece : pieces) ids += max_words(piece);
  return ids;
}

template <class Id>
Id* WordEncoder::encode_words(const Words& words, Id* out) const {
  look_up_all(words, map_,
              [&](const char* word, std::size_t size, ShortKey key, std::uint64_t hash) {
                const std::uint32_t id =
                    size <= kMaxShortWord ? map_.find_short(key, hash) : map_.find_long(word, size);
                *out++ = static_cast<Id>(id == WordMap::kNone ? unk_id_ : id);
              });
  return out;
}

template <class Id>
void WordEncoder::encode(const std::vector<TextView>& texts, const std::vector<TextPiece>& pieces,
                         bool add_eos, int threads, Id* out, std::int64_t* offsets) const {
  const int workers = resolve_threads(threads, pieces.size());
  std::vector<Run> runs =
      cut_runs(pieces, add_eos, max_ids(pieces, texts.size(), add_eos), workers);
  Watch watch;
  parallel_for(runs.size(), workers, watch, [&](std::size_t task, int) {
    Run& run = runs[task];
    WordFinder finder;
    Id* end = out + run.room;
    for (std::size_t i = run.first_piece; i < run.last_piece; ++i) {
      watch.poll();
      const std::size_t text = pieces[i].text;
      end = encode_words(finder.find_words(texts[text], pieces[i]), end);
      const bool ends_text = i + 1 == pieces.size() || pieces[i + 1].text != text;
      if (ends_text && add_eos) *end++ = static_cast<Id>(eos_id_);
      // Counted from the start of the run until the runs before are complete.
      if (ends_text) offsets[text + 1] = end - (out + run.room);
    }
    run.written = static_cast<std::size_t>(end - (out + run.room));
  });
  offsets[0] = 0;
  std::size_t total = 0;
  for (const Run& run : runs) {
    if (total != run.room) std::memmove(out + total, out + run.room, run.written * sizeof(Id));
    for (std::size_t i = run.first_piece; i < run.last_piece; ++i) {
      const bool ends_text = i + 1 == pieces.size() || pieces[i + 1].text != pieces[i].text;
      if (ends_text) offsets[pieces[i].text + 1] += static_cast<std::int64_t>(total);
    }
    total += run.written;
  }
}

template void WordEncoder::encode(const std::vector<TextView>&, const std::vector<TextPiece>&, bool,
                                  int, std::uint16_t*, std::int64_t*) const;
template void WordEncoder::encode(const std::vector<TextView>&, const std::vector<TextPiece>&, bool,
                                  int, std::uint32_t*, std::int64_t*) const;

}  // namespace tinylm
