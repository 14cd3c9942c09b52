#include "cross_entropy.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "memory.hpp"
#include "team.hpp"

namespace tinylm {
namespace {

// Tokens that a thread takes at a time, and whose sums stand by themselves until they are added up
// in order: so the number of threads changes no bit.
constexpr std::size_t kBlockTokens = 1024;

// A sum of exponentials beyond these may have lost some that count.
constexpr float kLeastSum = 1e-20f, kLargestSum = 1e20f;

std::size_t rounded_up(std::size_t n, std::size_t step) { return (n + step - 1) / step * step; }

// Memory that is written before it is read, on huge pages: on others, most of a quarter of the
// time went to finding where these megabytes are.
template <class T>
using Memory = std::vector<T, UninitializedAllocator<T>>;

class Head {
 public:
  Head(const CrossEntropy& call, int threads)
      : call_(call),
        kernels_(training_kernels().head),
        blocks_((call.vocabulary + kBlockTokens - 1) / kBlockTokens),
        threads_(std::min(threads, static_cast<int>(blocks_))),
        largest_chunk_(std::min(kernels_.rows, rounded_up(call.rows, kHeadStep))) {
    const std::size_t tokens = rounded_up(call.vocabulary, kHeadStep), chunk = largest_chunk_;
    words_.resize(tokens * call.width / 2);
    pairs_.resize(tokens * call.width / 2);
    exponentials_.resize(tokens * chunk);
    sums_.resize(blocks_ * chunk);
    dh_blocks_.resize(blocks_ * chunk * call.width);
    h_panels_.resize(chunk * call.width / 2);
    scaled_panels_.resize(chunk * call.width / 2);
    factors_.resize(chunk);
    corrections_.resize(chunk);
    own_logits_.resize(chunk);
    targets_.resize(chunk);
  }

  bool run() {
    if (call_.dbias != nullptr) std::fill_n(call_.dbias, call_.vocabulary, 0.0f);
    for (std::size_t start = 0; start < call_.rows; start += largest_chunk_) {
      if (!chunk(start, std::min(largest_chunk_, call_.rows - start))) return false;
    }
    return true;
  }

 private:
  bool chunk(std::size_t start, std::size_t count) {
    const HeadShape shape{rounded_up(count, kHeadStep), call_.width, call_.vocabulary};
    const Bf16* const h = call_.h + start * call_.width;
    kernels_.pack_rows(shape, h, count, h_panels_.data());
    for_blocks([&](std::size_t block, std::size_t begin, std::size_t end) {
      if (start == 0) {
        kernels_.pack_weight(shape, call_.weight, begin, end, words_.data(), pairs_.data());
      }
      kernels_.forward(shape, words_.data(), pairs_.data(), call_.bias, h_panels_.data(), begin,
                       end, exponentials_.data(), sums_.data() + block * shape.rows,
                       dh_blocks_.data() + block * shape.rows * shape.width);
    });
    if (!find_losses(shape, start, count)) return false;
    kernels_.pack_scaled(shape, h, factors_.data(), count, scaled_panels_.data());
    for_blocks([&](std::size_t, std::size_t begin, std::size_t end) {
      kernels_.weight_gradient(shape, exponentials_.data(), scaled_panels_.data(), begin, end,
                               start > 0, call_.dweight);
      if (call_.dbias == nullptr) return;
      kernels_.bias_gradient(shape, exponentials_.data(), factors_.data(), begin, end, call_.dbias);
    });
    find_dh(shape, start, count);
    return true;
  }

  // Losses of the rows, and the factors of their exponentials: of a row, with s its sum of them,
  // d loss / d logits = factor (exp(z) - own), of its target exp(z) - s / (1 + 2 z_loss log s).
  bool find_losses(const HeadShape& shape, std::size_t start, std::size_t count) {
    for (std::size_t row = 0; row < count; ++row) {
      const std::int64_t target = call_.targets[start + row];
      targets_[row] = target == call_.ignored ? 0 : target;
    }
    float* const own = own_logits_.data();
    kernels_.target_logits(shape, words_.data(), call_.bias, call_.h + start * call_.width,
                           targets_.data(), count, own);
    std::fill(factors_.data() + count, factors_.data() + shape.rows, 0.0f);
    for (std::size_t row = 0; row < count; ++row) {
      float sum = 0.0f;
      for (std::size_t block = 0; block < blocks_; ++block) {
        sum += sums_[block * shape.rows + row];
      }
      if (!(sum > kLeastSum && sum < kLargestSum)) return false;
      const bool counts = call_.targets[start + row] != call_.ignored;
      const float weight = !counts                        ? 0.0f
                           : call_.row_weights == nullptr ? 1.0f
                                                          : call_.row_weights[start + row];
      const float lse = std::log(sum), slope = 1.0f + 2.0f * call_.z_loss * lse;
      // No loss is below 0, nor off by the rounding of the target's own term.
      const float loss = std::max(lse - own[row], 0.0f) + call_.z_loss * lse * lse;
      call_.loss[start + row] = counts ? loss : 0.0f;
      factors_[row] = weight * slope / sum;
      const float exact = std::exp(own[row]) - sum / slope;
      Bf16& stored = exponentials_[static_cast<std::size_t>(targets_[row]) * shape.rows + row];
      corrections_[row] = factors_[row] * (exact - to_float(stored));
      if (counts) stored = to_bf16(exact);
    }
    return true;
  }

  void find_dh(const HeadShape& shape, std::size_t start, std::size_t count) {
    const std::size_t width = shape.width;
    const auto* const weight = reinterpret_cast<const Bf16*>(words_.data());
    const std::size_t panels = shape.rows / kHeadStep;
    share_items(panels, threads_, [&](std::size_t panel) {
      float* const sums = dh_blocks_.data() + panel * width * kHeadStep;
      for (std::size_t block = 1; block < blocks_; ++block) {
        const float* const more = sums + block * shape.rows * width;
        for (std::size_t i = 0; i < width * kHeadStep; ++i) sums[i] += more[i];
      }
      const std::size_t begin = panel * kHeadStep;
      for (std::size_t row = begin; row < std::min(begin + kHeadStep, count); ++row) {
        float* const dh = call_.dh + (start + row) * width;
        const Bf16* const own = weight + static_cast<std::size_t>(targets_[row]) * width;
        for (std::size_t c = 0; c < width; ++c) {
          dh[c] = factors_[row] * sums[c * kHeadStep + row - begin] +
                  corrections_[row] * to_float(own[c]);
        }
      }
    });
  }

  static float to_float(Bf16 x) {
    const std::uint32_t bits = std::uint32_t{x} << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
  }
  // To the nearest, ties to even, of what is finite.
  static Bf16 to_bf16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return static_cast<Bf16>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }

  template <class Function>
  void for_blocks(Function&& function) {
    share_items(blocks_, threads_, [&](std::size_t block) {
      const std::size_t begin = block * kBlockTokens;
      function(block, begin, std::min(begin + kBlockTokens, call_.vocabulary));
    });
  }

  const CrossEntropy& call_;
  const HeadKernels& kernels_;
  const std::size_t blocks_;
  const int threads_;
  const std::size_t largest_chunk_;
  Memory<std::uint32_t> words_, pairs_, h_panels_, scaled_panels_;
  Memory<Bf16> exponentials_;
  Memory<float> sums_, dh_blocks_, factors_, corrections_, own_logits_;
  Memory<std::int64_t> targets_;
};

}  // namespace

bool targets_are_known(const CrossEntropy& call) {
  const auto known = [&](std::int64_t target) {
    return target == call.ignored ||
           (target >= 0 && static_cast<std::size_t>(target) < call.vocabulary);
  };
  return std::all_of(call.targets, call.targets + call.rows, known);
}

bool cross_entropy(const CrossEntropy& call, int threads) { return Head(call, threads).run(); }

}  // namespace tinylm
