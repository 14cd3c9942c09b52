#include "projections.hpp"

#include <array>

#include "row_products.hpp"

namespace tinylm {

void norm_linear(const NormLinear& call, Bf16* y, int threads) {
  const PackedWeights<1> packed({Weight{call.weight, call.outputs, call.norm.width}}, true,
                                threads);
  share_blocks(call.rows, threads, [&](std::size_t begin, std::size_t end) {
    training_kernels().projections.norm_linear(call.norm, call.outputs, call.x, packed[0], begin,
                                               end, y);
  });
}

void norm_linear_backward(const NormLinear& call, const Bf16* dy, float* dx, float* dweight,
                          float* dnorm_weight, int threads) {
  const std::size_t width = call.norm.width;
  const PackedWeights<1> packed({Weight{call.weight, call.outputs, width}}, false, threads);
  const std::array<Sum, 2> totals{Sum{dweight, call.outputs * width}, Sum{dnorm_weight, width}};
  sum_over_groups(call.rows, totals, threads,
                  [&](std::size_t begin, std::size_t end, const std::array<float*, 2>& sums) {
                    training_kernels().projections.norm_linear_backward(
                        call.norm, call.outputs, call.x, packed[0], dy, begin, end, dx, sums[0],
                        sums[1]);
                  });
}

void linear_residual(const LinearResidual& call, const float* x, float* out, int threads) {
  const auto [inputs, outputs] = call.shape;
  const PackedWeights<1> packed({Weight{call.weight, outputs, inputs}}, true, threads);
  share_blocks(call.rows, threads, [&](std::size_t begin, std::size_t end) {
    training_kernels().projections.linear_residual(call.shape, call.a, packed[0], x, begin, end,
                                                   out);
  });
}

void linear_residual_backward(const LinearResidual& call, const float* dout, Bf16* da,
                              float* dweight, int threads) {
  const auto [inputs, outputs] = call.shape;
  const PackedWeights<1> packed({Weight{call.weight, outputs, inputs}}, false, threads);
  const std::array<Sum, 1> totals{Sum{dweight, outputs * inputs}};
  sum_over_groups(call.rows, totals, threads,
                  [&](std::size_t begin, std::size_t end, const std::array<float*, 1>& sums) {
                    training_kernels().projections.linear_residual_backward(
                        call.shape, call.a, packed[0], dout, begin, end, da, sums[0]);
                  });
}

}  // namespace tinylm
