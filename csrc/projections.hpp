// What stands before and after attention, on a CPU, with the kernels of simd/training.hpp: a norm
// and a projection of what it gives, and a projection with a residual.
#pragma once

#include <cstddef>

#include "simd/training.hpp"

namespace tinylm {

// norm(x) weightᵀ, in bf16.
struct NormLinear {
  std::size_t rows;
  NormRows norm;
  std::size_t outputs;  // with norm.width, a multiple of kPanelStep
  const float* x;       // [rows][norm.width]
  const float* weight;  // [outputs][norm.width]
};

// Writes y [rows][outputs].
void norm_linear(const NormLinear& call, Bf16* y, int threads);

// Writes dx, and the gradients of the weights. The same bits on any number of threads.
void norm_linear_backward(const NormLinear& call, const Bf16* dy, float* dx, float* dweight,
                          float* dnorm_weight, int threads);

// x + a weightᵀ.
struct LinearResidual {
  std::size_t rows;
  LinearShape shape;
  const Bf16* a;        // [rows][inputs]
  const float* weight;  // [outputs][inputs]
};

// Writes out [rows][outputs].
void linear_residual(const LinearResidual& call, const float* x, float* out, int threads);

// Writes da, and dweight. The same bits on any number of threads.
void linear_residual_backward(const LinearResidual& call, const float* dout, Bf16* da,
                              float* dweight, int threads);

}  // namespace tinylm
