// The passes over memory of a training step on a CPU, each of several of torch's in one:
// exponentials of logits, SwiGLU, norm and rotary of heads, and all of causal attention. Numbers
// are fp32 or bf16, a bf16 as the upper half of the fp32; sums are fp32. Every variant for an
// instruction set computes the same, but for rounding.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tinylm {

using Bf16 = std::uint16_t;

// A rotation of the pairs (d, d + width / 2) of row t by angles of its position t % positions.
struct Rotation {
  const float* cos;  // [positions][width]
  const float* sin;
  std::size_t positions;
};

// Rows of `heads` vectors of `width` numbers, `stride` numbers from row to row. Each vector x
// becomes weight[head] x / sqrt(mean(x²) + eps), and is then rotated.
struct NormShape {
  std::size_t heads, width;
  std::size_t stride;   // of x; what is written is dense
  const float* weight;  // [heads][width]
  float eps;
  Rotation rotation;
};

template <class T>
struct RowKernels {
  // In place, exp(x - top) with top[row] = max(x); sum[row] of them before they are rounded.
  void (*exponentials)(T* x, std::size_t rows, std::size_t columns, float* top, float* sum);

  // out[row] = silu(gate) value with x[row] = (gate, value), `width` numbers each.
  void (*swiglu)(const T* x, T* out, std::size_t rows, std::size_t width);
  void (*swiglu_backward)(const T* x, const T* dout, T* dx, std::size_t rows, std::size_t width);

  // For rows [begin, end). Also writes r = 1 / sqrt(mean(x²) + eps) of each head.
  void (*norm_rotary)(const NormShape& shape, const T* x, T* out, float* r, std::size_t begin,
                      std::size_t end);
  // Writes dx, and adds to dweight [heads][width].
  void (*norm_rotary_backward)(const NormShape& shape, const T* x, const float* r, const T* dout,
                               T* dx, float* dweight, std::size_t begin, std::size_t end);
};

// Where [batch][head][time] vectors of one head dimension lie, in numbers; those of a vector are
// side by side.
struct HeadStrides {
  std::size_t batch, head, time;
};

template <class T>
struct HeadVectors {
  T* data;
  HeadStrides stride;

  T* at(std::size_t b, std::size_t h) const { return data + b * stride.batch + h * stride.head; }
};

struct AttentionShape {
  std::size_t heads, length, width;  // width is a multiple of kAttentionWidthStep
  float scale;
};

constexpr std::size_t kAttentionWidthStep = 32;

// softmax(q kᵀ scale) v of the heads [begin, end) of batch × heads, each query seeing the keys up
// to its own position; lse[head][query] is the logarithm of the sum of exponentials.
struct AttentionKernels {
  void (*forward)(const AttentionShape& shape, HeadVectors<const Bf16> q, HeadVectors<const Bf16> k,
                  HeadVectors<const Bf16> v, HeadVectors<Bf16> out, float* lse, std::size_t begin,
                  std::size_t end);
  void (*backward)(const AttentionShape& shape, HeadVectors<const Bf16> q,
                   HeadVectors<const Bf16> k, HeadVectors<const Bf16> v, const float* lse,
                   HeadVectors<const Bf16> dout, HeadVectors<Bf16> dq, HeadVectors<Bf16> dk,
                   HeadVectors<Bf16> dv, std::size_t begin, std::size_t end);
};

struct TrainingKernels {
  RowKernels<float> fp32;
  RowKernels<Bf16> bf16;
  AttentionKernels attention;
};

extern const TrainingKernels kTrainingKernelsPortable, kTrainingKernelsAvx2, kTrainingKernelsAvx512;

// Those of instruction_set(), of AVX-512 only where it has products of bf16.
const TrainingKernels& training_kernels();

}  // namespace tinylm
