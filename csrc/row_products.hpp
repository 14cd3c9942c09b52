// What layers that multiply rows with weights share, with the kernels of simd/training.hpp: weights
// in panels, and sums over rows; see feed_forward.hpp and projections.hpp.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "simd/training.hpp"
#include "team.hpp"

namespace tinylm {

// Rows that a thread takes at a time forwards; a multiple of it backwards.
constexpr std::size_t kBlockRows = 128;
// Backwards, each group of rows has sums of its own, added up in order: so the number of threads
// changes no bit. More groups than threads cost memory only.
constexpr std::size_t kMostGroups = 8;

struct Weight {
  const float* data;  // [rows][columns], multiples of kPanelStep
  std::size_t rows, columns;
};

// Each of them in panels: of their rows where they are packed transposed, else of their columns.
template <std::size_t kCount>
class PackedWeights {
 public:
  PackedWeights(const std::array<Weight, kCount>& weights, bool by_rows, int threads) {
    const PackKernels& kernels = training_kernels().pack;
    const auto pack = by_rows ? kernels.transposed : kernels.interleaved;
    std::array<std::size_t, kCount + 1> first{};  // panels of each, numbered together
    for (std::size_t i = 0; i < kCount; ++i) {
      const auto& [data, rows, columns] = weights[i];
      first[i + 1] = first[i] + (by_rows ? rows : columns) / kPanelStep;
      panels_[i].reset(new std::uint32_t[rows * columns / 2]);
    }
    share_items(first[kCount], threads, [&](std::size_t panel) {
      std::size_t i = 0;
      while (panel >= first[i + 1]) ++i;
      pack(weights[i].data, weights[i].rows, weights[i].columns, panel - first[i],
           panels_[i].get());
    });
  }

  const std::uint32_t* operator[](std::size_t i) const { return panels_[i].get(); }

 private:
  std::array<std::unique_ptr<std::uint32_t[]>, kCount> panels_;
};

// Calls function(begin, end) for blocks of rows.
template <class Function>
void share_blocks(std::size_t rows, int threads, Function&& function) {
  share_items((rows + kBlockRows - 1) / kBlockRows, threads, [&](std::size_t block) {
    const std::size_t begin = block * kBlockRows;
    function(begin, std::min(begin + kBlockRows, rows));
  });
}

struct Sum {
  float* total;
  std::size_t count;  // of numbers
};

// Calls function(begin, end, sums) for groups of rows; it writes sums over them, which are added
// up.
template <std::size_t kCount, class Function>
void sum_over_groups(std::size_t rows, const std::array<Sum, kCount>& totals, int threads,
                     Function&& function) {
  const std::size_t blocks = (rows + kBlockRows - 1) / kBlockRows,
                    group_rows = (blocks + kMostGroups - 1) / kMostGroups * kBlockRows,
                    groups = (rows + group_rows - 1) / group_rows;
  std::size_t size = 0;
  for (const Sum& sum : totals) size += sum.count;
  const std::unique_ptr<float[]> memory(new float[size * (groups - 1)]);
  const auto sums_of = [&](std::size_t group) {  // those of the first are the totals
    std::array<float*, kCount> sums;
    float* next = group == 0 ? nullptr : memory.get() + size * (group - 1);
    for (std::size_t i = 0; i < kCount; ++i) {
      sums[i] = group == 0 ? totals[i].total : next;
      if (group > 0) next += totals[i].count;
    }
    return sums;
  };
  share_items(groups, threads, [&](std::size_t group) {
    const std::size_t begin = group * group_rows;
    function(begin, std::min(begin + group_rows, rows), sums_of(group));
  });
  const auto parts = static_cast<std::size_t>(std::max(threads, 1));
  share_items(parts, threads, [&](std::size_t part) {
    for (std::size_t group = 1; group < groups; ++group) {
      const auto more = sums_of(group);
      for (std::size_t i = 0; i < kCount; ++i) {
        const auto& [total, count] = totals[i];
        const std::size_t end = count * (part + 1) / parts;
        for (std::size_t at = count * part / parts; at < end; ++at) total[at] += more[i][at];
      }
    }
  });
}

}  // namespace tinylm
