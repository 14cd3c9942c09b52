#include "feed_forward.hpp"

#include <array>

#include "row_products.hpp"

namespace tinylm {
namespace {

std::array<Weight, 2> weights_of(const FeedForward& call) {
  const std::size_t width = call.shape.width, hidden = call.shape.hidden;
  return {Weight{call.up, 2 * hidden, width}, Weight{call.down, width, hidden}};
}

}  // namespace

void feed_forward(const FeedForward& call, float* out, Bf16* h, int threads) {
  const PackedWeights<2> packed(weights_of(call), true, threads);
  share_blocks(call.rows, threads, [&](std::size_t begin, std::size_t end) {
    training_kernels().feed_forward.forward(call.shape, call.x, packed[0], packed[1], begin, end,
                                            out, h);
  });
}

void feed_forward_backward(const FeedForward& call, const Bf16* h, const float* dout, float* dx,
                           const FeedForwardSums& gradients, int threads) {
  const auto weights = weights_of(call);
  const PackedWeights<2> packed(weights, false, threads);
  const std::array<Sum, 3> totals{Sum{gradients.dup, weights[0].rows * weights[0].columns},
                                  Sum{gradients.ddown, weights[1].rows * weights[1].columns},
                                  Sum{gradients.dnorm_weight, call.shape.width}};
  sum_over_groups(call.rows, totals, threads,
                  [&](std::size_t begin, std::size_t end, const std::array<float*, 3>& sums) {
                    training_kernels().feed_forward.backward(call.shape, call.x, packed[0],
                                                             packed[1], h, dout, begin, end, dx,
                                                             {sums[0], sums[1], sums[2]});
                  });
}

}  // namespace tinylm
