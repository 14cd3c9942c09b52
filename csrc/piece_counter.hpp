// Counting the pieces of texts, which is all that BPE learns from.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "piece_runs.hpp"
#include "piece_table.hpp"
#include "pretokenize.hpp"
#include "watch.hpp"

namespace tinylm {

// Takes texts in batches; each worker counts in a table of its own. A table that would outgrow its
// share of the memory is written to disk as a sorted run, so that memory is bounded whatever the
// texts are, and no count is ever lost. Callers that may run at once hold a `Lock` around what they
// do.
class PieceCounter {
 public:
  // Throws std::logic_error in a thread that holds one already: what it calls meanwhile to show
  // progress may come back here.
  class Lock {
   public:
    explicit Lock(PieceCounter& counter) : counter_(counter) {
      if (counter.holder_ == std::this_thread::get_id()) {
        throw std::logic_error("this counter is in the middle of another call");
      }
      counter.mutex_.lock();
      counter.holder_ = std::this_thread::get_id();
    }
    ~Lock() {
      counter_.holder_ = std::thread::id();
      counter_.mutex_.unlock();
    }
    Lock(const Lock&) = delete;
    Lock& operator=(const Lock&) = delete;

   private:
    PieceCounter& counter_;
  };

  // The tables take `memory` bytes at most (some kilobytes at least, and whatever it takes to hold
  // a single piece); runs are written to `folder`.
  PieceCounter(SplitPattern pattern, std::size_t memory, std::string folder)
      : pattern_(pattern), memory_(memory), runs_(std::move(folder)) {}

  // Makes room for workers 0 .. threads - 1; call it before they start.
  void reserve_workers(int threads);

  // Counts the pieces of `text`, valid UTF-8, in the table of `worker`. Stopped by `watch`, it has
  // counted some of them.
  void add(std::string_view text, int worker, Watch& watch);

  // How many distinct pieces there are.
  std::size_t size(Watch& watch);

  // Calls function(PieceCount) for all pieces, in an order that means nothing; each is valid during
  // the call.
  void for_each(const std::function<void(const PieceCount&)>& function, Watch& watch);

  // The same in the order of their bytes.
  void for_each_sorted(const std::function<void(const PieceCount&)>& function, Watch& watch);

 private:
  class Batch;

  void spill(PieceTable& table, Watch& watch);
  // Brings everything together: into the first table or, if anything was spilled, into one run.
  void join(Watch& watch);

  std::mutex mutex_;
  std::atomic<std::thread::id> holder_{};
  SplitPattern pattern_;
  std::size_t memory_;
  std::vector<PieceTable> workers_ = std::vector<PieceTable>(1);
  std::mutex runs_mutex_;  // of the workers
  PieceRuns runs_;
};

}  // namespace tinylm
