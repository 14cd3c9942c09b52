// A gated feed-forward layer with its norm and residual, x + down (silu(gate) value) with (gate,
// value) = up norm(x), on a CPU, with the kernels of simd/training.hpp.
#pragma once

#include <cstddef>

#include "simd/training.hpp"

namespace tinylm {

struct FeedForward {
  std::size_t rows;
  FeedForwardShape shape;  // both widths are multiples of kPanelStep
  const float* x;          // [rows][width]
  const float* up;         // [2 hidden][width]
  const float* down;       // [width][hidden]
};

// Writes out [rows][width], and h [rows][2 hidden], of which the gradient is made.
void feed_forward(const FeedForward& call, float* out, Bf16* h, int threads);

// Writes dx [rows][width], and the gradients of the weights. The same bits on any number of
// threads.
void feed_forward_backward(const FeedForward& call, const Bf16* h, const float* dout, float* dx,
                           const FeedForwardSums& gradients, int threads);

}  // namespace tinylm
