// The passes over memory of a training step on a CPU, each of several of torch's in one:
// exponentials of logits, SwiGLU, norm and rotary of heads; and as wholes causal attention, the
// feed-forward layer, the head with its cross-entropy, and a step of Muon. Numbers are fp32 or
// bf16, a bf16 as the upper half of the fp32; sums are fp32. Every variant for an instruction set
// computes the same, but for rounding.
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

// Rows of `width` numbers x, each becoming weight x / sqrt(mean(x²) + eps).
struct NormRows {
  std::size_t width;
  const float* weight;  // [width]
  float eps;
};

// For rows [begin, end), as those of heads above, without a rotation.
template <class T, class Out>
struct NormKernels {
  void (*rms_norm)(const NormRows& shape, const T* x, Out* out, float* r, std::size_t begin,
                   std::size_t end);
  void (*rms_norm_backward)(const NormRows& shape, const T* x, const float* r, const Out* dout,
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

// A model's head, with the exponentials of its logits: all of a chunk of rows of hidden states with
// a range of tokens [begin, end). Logits are products of bf16, with sums in fp32. How matrices are
// laid out: training_matrices.hpp. `rows`, padded with zeros, and `width` are multiples of
// kHeadStep, `begin` as well, and memory of tokens goes up to the next one from `end`.
struct HeadShape {
  std::size_t rows, width, vocabulary;
};

constexpr std::size_t kHeadStep = 32;

struct HeadKernels {
  // Rows that are best taken at a time: their exponentials, of all tokens, are in memory together
  // (5 MB of 256 and 10,000), and more rows write dweight less often.
  std::size_t rows;
  // The weights of tokens [begin, end), rounded to bf16, as words [token][width / 2] and as the
  // left factor of sums over tokens, as much, zeros beyond the vocabulary.
  void (*pack_weight)(const HeadShape& shape, const float* weight, std::size_t begin,
                      std::size_t end, std::uint32_t* words, std::uint32_t* pairs);
  // `count` rows as panels of transposed words, zeros beyond them.
  void (*pack_rows)(const HeadShape& shape, const Bf16* h, std::size_t count,
                    std::uint32_t* panels);
  // The same rows, times their factors, as panels of interleaved words.
  void (*pack_scaled)(const HeadShape& shape, const Bf16* h, const float* factors,
                      std::size_t count, std::uint32_t* panels);
  // With z = weight h + bias (if any): exponentials[token][row] = exp(z), sum[row] of them over
  // these tokens, before they are rounded, and the panels dh[row / 32][width][row % 32] of the sums
  // of exp(z) weight[token].
  void (*forward)(const HeadShape& shape, const std::uint32_t* words, const std::uint32_t* pairs,
                  const float* bias, const std::uint32_t* h_panels, std::size_t begin,
                  std::size_t end, Bf16* exponentials, float* sum, float* dh);
  // The logits of the rows' own targets.
  void (*target_logits)(const HeadShape& shape, const std::uint32_t* words, const float* bias,
                        const Bf16* h, const std::int64_t* targets, std::size_t count,
                        float* logits);
  // dweight[token] (+)= the sum over rows of exponentials · scaled h.
  void (*weight_gradient)(const HeadShape& shape, const Bf16* exponentials,
                          const std::uint32_t* scaled_panels, std::size_t begin, std::size_t end,
                          bool accumulate, float* dweight);
  // dbias[token] += the sum over rows of exponentials · factor.
  void (*bias_gradient)(const HeadShape& shape, const Bf16* exponentials, const float* factors,
                        std::size_t begin, std::size_t end, float* dbias);
};

// A weight matrix of a multiple of kPanelStep rows and columns, rounded to bf16: one panel of it,
// of its rows, transposed, or of its columns, interleaved (training_matrices.hpp).
struct PackKernels {
  void (*transposed)(const float* matrix, std::size_t rows, std::size_t columns, std::size_t panel,
                     std::uint32_t* panels);
  void (*interleaved)(const float* matrix, std::size_t rows, std::size_t columns, std::size_t panel,
                      std::uint32_t* panels);
};

constexpr std::size_t kPanelStep = 32;

struct LinearShape {
  std::size_t inputs, outputs;
};

// norm(x) weightᵀ in bf16, and x + a weightᵀ, for rows [begin, end); see projections.hpp. Weights
// are packed transposed forwards, interleaved backwards. Backwards write the sums over these rows
// to dweight and dnorm_weight.
struct ProjectionKernels {
  void (*norm_linear)(const NormRows& norm, std::size_t outputs, const float* x,
                      const std::uint32_t* panels, std::size_t begin, std::size_t end, Bf16* y);
  void (*norm_linear_backward)(const NormRows& norm, std::size_t outputs, const float* x,
                               const std::uint32_t* panels, const Bf16* dy, std::size_t begin,
                               std::size_t end, float* dx, float* dweight, float* dnorm_weight);
  void (*linear_residual)(const LinearShape& shape, const Bf16* a, const std::uint32_t* panels,
                          const float* x, std::size_t begin, std::size_t end, float* out);
  void (*linear_residual_backward)(const LinearShape& shape, const Bf16* a,
                                   const std::uint32_t* panels, const float* dout,
                                   std::size_t begin, std::size_t end, Bf16* da, float* dweight);
};

struct FeedForwardShape {
  std::size_t width, hidden;
  const float* norm_weight;  // [width]
  float eps;
};

// Gradients, as sums over rows.
struct FeedForwardSums {
  float *dup, *ddown;   // [2 hidden][width], [width][hidden]
  float* dnorm_weight;  // [width]
};

// A gated feed-forward layer with its norm and residual, x + down (silu(gate) value) with (gate,
// value) = up norm(x); see feed_forward.hpp. Sizes are multiples of kPanelStep but for rows;
// weights are packed transposed for forward, interleaved for backward.
struct FeedForwardKernels {
  // For rows [begin, end). Also writes h = (gate, value).
  void (*forward)(const FeedForwardShape& shape, const float* x, const std::uint32_t* up,
                  const std::uint32_t* down, std::size_t begin, std::size_t end, float* out,
                  Bf16* h);
  // Writes dx, and to `sums` those over these rows.
  void (*backward)(const FeedForwardShape& shape, const float* x, const std::uint32_t* up,
                   const std::uint32_t* down, const Bf16* h, const float* dout, std::size_t begin,
                   std::size_t end, float* dx, const FeedForwardSums& sums);
};

struct MuonOptions {
  float lr, momentum, weight_decay;
  float coefficients[3];  // of the iterations by which a matrix becomes orthogonal
  int iterations;
};

// A weight matrix, its gradient, and the moving average of that; both sizes are multiples of
// kMuonStep.
struct MuonMatrix {
  float* weight;
  const float* gradient;
  float* momentum;
  std::size_t rows, columns;
};

constexpr std::size_t kMuonStep = 32;

struct TrainingKernels {
  RowKernels<float> fp32;
  RowKernels<Bf16> bf16;
  NormKernels<float, float> norm_fp32;
  NormKernels<float, Bf16> norm_to_bf16;
  NormKernels<Bf16, Bf16> norm_bf16;
  AttentionKernels attention;
  HeadKernels head;
  PackKernels pack;
  ProjectionKernels projections;
  FeedForwardKernels feed_forward;
  void (*muon_step)(const MuonMatrix& matrix, const MuonOptions& options);
};

extern const TrainingKernels kTrainingKernelsPortable, kTrainingKernelsAvx2, kTrainingKernelsAvx512,
    kTrainingKernelsAmx;

// Those of instruction_set(), of AVX-512 only where it has products of bf16.
const TrainingKernels& training_kernels();

// Whether these multiply bf16 by instructions of the processor.
bool multiplies_bf16(const TrainingKernels& kernels);

}  // namespace tinylm
