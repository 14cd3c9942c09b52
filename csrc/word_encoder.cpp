#include "word_encoder.hpp"

#include <algorithm>
#include <cstring>
#include <deque>
#include <mutex>

#include "threads.hpp"

namespace tinylm {
namespace {

// Pieces [first, last), which one thread encodes in one go. They may have `room` ids.
struct Run {
  std::size_t first, last;
  std::size_t room;
};

bool ends_text(const std::vector<TextPiece>& pieces, std::size_t i) {
  return i + 1 == pieces.size() || pieces[i + 1].text != pieces[i].text;
}

// Small enough for a run's ids to stay in the cache. Short inputs are to make several runs.
#ifdef TINYLM_FUZZING
constexpr std::size_t kRunRoom = 4;
#else
constexpr std::size_t kRunRoom = 1 << 16;
#endif

std::vector<Run> cut_runs(const std::vector<TextPiece>& pieces, bool add_eos) {
  std::vector<Run> runs;
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    if (runs.empty() || runs.back().room > kRunRoom) runs.push_back({i, i, 0});
    runs.back().last = i + 1;
    runs.back().room += max_words(pieces[i]) + (add_eos && ends_text(pieces, i) ? 1 : 0);
  }
  return runs;
}

// Where each run's output starts in that of all, known as soon as all runs before it are done.
class RunStarts {
 public:
  static constexpr std::size_t kUnknown = static_cast<std::size_t>(-1);

  explicit RunStarts(std::size_t runs) : sizes_(runs, kUnknown), starts_(runs + 1) {}

  std::size_t of(std::size_t run) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return run <= done_ ? starts_[run] : kUnknown;
  }

  void set_size(std::size_t run, std::size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    sizes_[run] = size;
    for (; done_ < sizes_.size() && sizes_[done_] != kUnknown; ++done_) {
      starts_[done_ + 1] = starts_[done_] + sizes_[done_];
    }
  }

 private:
  std::mutex mutex_;
  std::vector<std::size_t> sizes_, starts_;
  std::size_t done_ = 0;  // so many runs, from the first, are done
};

// One worker's: encodes runs to their places in the output where these are known, else to memory of
// its own, from where they are brought there later.
template <class Id>
class RunWriter {
 public:
  // Calls encode(out) for where to write `room` ids at most; it returns the end of what it wrote.
  template <class Encode>
  void write(std::size_t run, std::size_t room, RunStarts& starts, Id* out, Encode&& encode) {
    const std::size_t start = starts.of(run);
    if (start != RunStarts::kUnknown) {
      Id* const begin = out + start;
      starts.set_size(run, static_cast<std::size_t>(encode(begin) - begin));
    } else {
      if (spare_.empty()) spare_.emplace_back();
      std::vector<Id> ids = std::move(spare_.back());
      spare_.pop_back();
      if (ids.size() < room) ids.resize(room);
      const auto size = static_cast<std::size_t>(encode(ids.data()) - ids.data());
      waiting_.push_back({run, size, std::move(ids)});
      starts.set_size(run, size);
    }
    settle(starts, out);
  }

  // Writes all that waits for a place which is known by now.
  void settle(RunStarts& starts, Id* out) {
    while (!waiting_.empty()) {
      Waiting& next = waiting_.front();
      const std::size_t start = starts.of(next.run);
      if (start == RunStarts::kUnknown) return;
      std::memcpy(out + start, next.ids.data(), next.size * sizeof(Id));
      spare_.push_back(std::move(next.ids));
      waiting_.pop_front();
    }
  }

 private:
  struct Waiting {
    std::size_t run, size;
    std::vector<Id> ids;
  };
  std::deque<Waiting> waiting_;
  std::vector<std::vector<Id>> spare_;
};

}  // namespace

WordEncoder::WordEncoder(const std::vector<std::string_view>& vocab,
                         const std::vector<std::uint32_t>& ids, std::uint32_t unk_id,
                         std::uint32_t eos_id)
    : unk_id_(unk_id), eos_id_(eos_id), max_id_(std::max(unk_id, eos_id)) {
  for (std::size_t i = 0; i < vocab.size(); ++i) {
    const std::size_t size = vocab[i].size();
    max_id_ = std::max(max_id_, ids[i]);
    if (size == 0) continue;  // no text has it
    const std::uint32_t value = ids[i] - unk_id;
    if (size > kMaxShortKey) {
      const std::uint64_t hash = long_hash(vocab[i].data(), size);
      table_.find_or_add_long(vocab[i].data(), size, hash).id = value;
    } else {
      const ShortKey key = short_key_exactly(vocab[i].data(), size);
      table_.find_or_add_short(key, key_hash(key)).id = value;
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
void WordEncoder::encode_words(const Words& words, Id* out) const {
  look_up_all(
      words, table_,
      [&](std::size_t i, ShortKey key, std::uint64_t hash) {
        out[i] = static_cast<Id>(unk_id_ + table_.find_short(key, hash).id);
      },
      [&](std::size_t i, const char* word, std::size_t size, std::uint64_t hash) {
        out[i] = static_cast<Id>(unk_id_ + table_.find_long(word, size, hash).id);
      });
}

template <class Id>
void WordEncoder::encode(const std::vector<TextView>& texts, const std::vector<TextPiece>& pieces,
                         bool add_eos, int threads, Id* out, std::int64_t* offsets) const {
  const std::vector<Run> runs = cut_runs(pieces, add_eos);
  const int workers = resolve_threads(threads, runs.size());
  RunStarts starts(runs.size());
  std::vector<RunWriter<Id>> writers(static_cast<std::size_t>(workers));
  std::vector<WordFinder> finders(static_cast<std::size_t>(workers));
  Watch watch;
  parallel_for(runs.size(), workers, watch, [&](std::size_t run, int worker) {
    WordFinder& finder = finders[static_cast<std::size_t>(worker)];
    const auto encode_run = [&](Id* const begin) {
      Id* end = begin;
      for (std::size_t i = runs[run].first; i < runs[run].last; ++i) {
        watch.poll();
        const std::size_t text = pieces[i].text;
        const Words words = finder.find_words(texts[text], pieces[i]);
        encode_words(words, end);
        end += words.count;
        if (!ends_text(pieces, i)) continue;
        if (add_eos) *end++ = static_cast<Id>(eos_id_);
        offsets[text + 1] = end - begin;  // in the run
      }
      return end;
    };
    writers[static_cast<std::size_t>(worker)].write(run, runs[run].room, starts, out, encode_run);
  });
  for (RunWriter<Id>& writer : writers) writer.settle(starts, out);
  offsets[0] = 0;
  for (std::size_t run = 0; run < runs.size(); ++run) {
    const auto start = static_cast<std::int64_t>(starts.of(run));
    for (std::size_t i = runs[run].first; i < runs[run].last; ++i) {
      if (ends_text(pieces, i)) offsets[pieces[i].text + 1] += start;
    }
  }
}

template void WordEncoder::encode(const std::vector<TextView>&, const std::vector<TextPiece>&, bool,
                                  int, std::uint16_t*, std::int64_t*) const;
template void WordEncoder::encode(const std::vector<TextView>&, const std::vector<TextPiece>&, bool,
                                  int, std::uint32_t*, std::int64_t*) const;

}  // namespace tinylm
