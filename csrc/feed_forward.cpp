#include "feed_forward.hpp"

#include <algorithm>
#include <memory>

#include "team.hpp"

namespace tinylm {
namespace {

// Rows that a thread takes at a time forwards; a multiple of it backwards.
constexpr std::size_t kBlockRows = 128;
// Backwards, each group of rows has sums of its own, added up in order: so the number of threads
// changes no bit. More groups than threads cost memory only.
constexpr std::size_t kMostGroups = 8;

std::unique_ptr<std::uint32_t[]> words_of(std::size_t count) {
  return std::unique_ptr<std::uint32_t[]>(new std::uint32_t[count]);
}

using Pack = void (*)(const float*, std::size_t, std::size_t, std::size_t, std::uint32_t*);

// Both weights in panels: of their rows where they are packed transposed, else of their columns.
struct Packed {
  std::unique_ptr<std::uint32_t[]> up, down;

  Packed(const FeedForward& call, Pack pack, bool by_rows, int threads)
      : up(words_of(call.shape.hidden * call.shape.width)),
        down(words_of(call.shape.hidden * call.shape.width / 2)) {
    const std::size_t width = call.shape.width, hidden = call.shape.hidden;
    const std::size_t up_panels = (by_rows ? 2 * hidden : width) / kFeedForwardStep,
                      down_panels = (by_rows ? width : hidden) / kFeedForwardStep;
    share_items(up_panels + down_panels, threads, [&](std::size_t panel) {
      if (panel < up_panels) {
        pack(call.up, 2 * hidden, width, panel, up.get());
      } else {
        pack(call.down, width, hidden, panel - up_panels, down.get());
      }
    });
  }
};

// The sums of all groups, one after the other: the first is the total.
class GroupSums {
 public:
  GroupSums(const FeedForwardShape& shape, std::size_t groups, const FeedForwardSums& total)
      : up_(2 * shape.hidden * shape.width),
        down_(shape.hidden * shape.width),
        size_(up_ + down_ + shape.width),
        groups_(groups),
        total_(total),
        memory_(new float[size_ * (groups - 1)]) {}

  FeedForwardSums of_group(std::size_t group) const {
    if (group == 0) return total_;
    float* const first = memory_.get() + size_ * (group - 1);
    return {first, first + up_, first + up_ + down_};
  }

  void add_up(int threads) const {
    const std::size_t parts = static_cast<std::size_t>(std::max(threads, 1));
    share_items(parts, threads, [&](std::size_t part) {
      for (std::size_t group = 1; group < groups_; ++group) {
        const FeedForwardSums more = of_group(group);
        add(total_.dup, more.dup, up_, part, parts);
        add(total_.ddown, more.ddown, down_, part, parts);
        add(total_.dnorm_weight, more.dnorm_weight, size_ - up_ - down_, part, parts);
      }
    });
  }

 private:
  static void add(float* to, const float* from, std::size_t count, std::size_t part,
                  std::size_t parts) {
    const std::size_t end = count * (part + 1) / parts;
    for (std::size_t i = count * part / parts; i < end; ++i) to[i] += from[i];
  }

  const std::size_t up_, down_, size_, groups_;
  const FeedForwardSums& total_;
  const std::unique_ptr<float[]> memory_;
};

}  // namespace

void feed_forward(const FeedForward& call, float* out, Bf16* h, int threads) {
  const FeedForwardKernels& kernels = training_kernels().feed_forward;
  const Packed packed(call, kernels.pack_transposed, true, threads);
  share_items((call.rows + kBlockRows - 1) / kBlockRows, threads, [&](std::size_t block) {
    const std::size_t begin = block * kBlockRows;
    kernels.forward(call.shape, call.x, packed.up.get(), packed.down.get(), begin,
                    std::min(begin + kBlockRows, call.rows), out, h);
  });
}

void feed_forward_backward(const FeedForward& call, const Bf16* h, const float* dout, float* dx,
                           const FeedForwardSums& gradients, int threads) {
  const FeedForwardKernels& kernels = training_kernels().feed_forward;
  const Packed packed(call, kernels.pack_interleaved, false, threads);
  const std::size_t blocks = (call.rows + kBlockRows - 1) / kBlockRows,
                    rows = (blocks + kMostGroups - 1) / kMostGroups * kBlockRows,
                    groups = (call.rows + rows - 1) / rows;
  const GroupSums sums(call.shape, groups, gradients);
  share_items(groups, threads, [&](std::size_t group) {
    const std::size_t begin = group * rows;
    kernels.backward(call.shape, call.x, packed.up.get(), packed.down.get(), h, dout, begin,
                     std::min(begin + rows, call.rows), dx, sums.of_group(group));
  });
  sums.add_up(threads);
}

}  // namespace tinylm
