// The order in which the pairs of a long piece are merged.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

namespace tinylm {

// A priority queue of (rank, position): lowest rank first, then leftmost. One bucket for each rank.
// Positions mostly arrive in rising order, as a rank is worked through from left to right, so a
// bucket is a plain queue, constant time for each entry; it turns into a heap where an entry does
// arrive late, and back into a queue once empty. So a run of one letter takes linear time, and the
// worst case is n log n as with one heap for all.
class MergeQueue {
 public:
  struct Entry {
    std::uint32_t rank, position;
  };

  // `ranks` is more than any rank that will be pushed.
  explicit MergeQueue(std::size_t ranks) : bucket_of_rank_(ranks, kNone) {}

  bool empty() const { return ranks_.empty(); }

  void push(Entry entry) {
    Bucket& bucket = bucket_of(entry.rank);
    std::vector<std::uint32_t>& positions = bucket.positions;
    if (bucket.empty()) {
      bucket.restart();
      ranks_.push_back(entry.rank);
      std::push_heap(ranks_.begin(), ranks_.end(), std::greater<>());
    } else if (!bucket.is_heap && entry.position < positions.back()) {
      // Rising numbers are a heap already.
      positions.erase(positions.begin(), positions.begin() + bucket.begin);
      bucket.begin = 0;
      bucket.is_heap = true;
    }
    positions.push_back(entry.position);
    if (bucket.is_heap) std::push_heap(positions.begin(), positions.end(), std::greater<>());
  }

  // Removes and returns the first entry; there is one.
  Entry pop() {
    const std::uint32_t rank = ranks_.front();
    Bucket& bucket = buckets_[bucket_of_rank_[rank]];
    std::vector<std::uint32_t>& positions = bucket.positions;
    std::uint32_t position;
    if (bucket.is_heap) {
      std::pop_heap(positions.begin(), positions.end(), std::greater<>());
      position = positions.back();
      positions.pop_back();
    } else {
      position = positions[static_cast<std::size_t>(bucket.begin++)];
    }
    if (bucket.empty()) {
      std::pop_heap(ranks_.begin(), ranks_.end(), std::greater<>());
      ranks_.pop_back();
    }
    return {rank, position};
  }

  // Makes it ready for the next piece; it is empty.
  void reset() {
    for (std::size_t i = 0; i < used_; ++i) bucket_of_rank_[buckets_[i].rank] = kNone;
    used_ = 0;
  }

 private:
  static constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();

  struct Bucket {
    std::uint32_t rank = 0;
    bool is_heap = false;
    std::ptrdiff_t begin = 0;  // what is before has been taken; 0 in a heap
    std::vector<std::uint32_t> positions;

    bool empty() const { return begin == static_cast<std::ptrdiff_t>(positions.size()); }
    void restart() {
      positions.clear();
      begin = 0;
      is_heap = false;
    }
  };

  Bucket& bucket_of(std::uint32_t rank) {
    std::uint32_t& index = bucket_of_rank_[rank];
    if (index == kNone) {
      index = static_cast<std::uint32_t>(used_++);
      if (used_ > buckets_.size()) buckets_.emplace_back();
      buckets_[index].rank = rank;
      buckets_[index].restart();
    }
    return buckets_[index];
  }

  std::vector<std::uint32_t> bucket_of_rank_;
  std::vector<Bucket> buckets_;  // the first `used_` of them; the others keep their memory
  std::size_t used_ = 0;
  std::vector<std::uint32_t> ranks_;  // heap of the ranks whose buckets are not empty
};

}  // namespace tinylm
