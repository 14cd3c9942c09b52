// The cross-entropy of a model's head, and its gradients, on a CPU, without its logits ever being
// in memory: a chunk of rows with a block of tokens after the other (the idea of Cut Your Losses,
// Wijmans et al. 2024), with the kernels of simd/training.hpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd/training.hpp"

namespace tinylm {

struct CrossEntropy {
  std::size_t rows, width, vocabulary;  // width is a multiple of kHeadStep
  const Bf16* h;                        // [rows][width]
  const float* weight;                  // [vocabulary][width]
  const float* bias;                    // [vocabulary], or none
  const std::int64_t* targets;          // [rows]
  const float* row_weights;             // [rows], what each loss counts; or none, for 1
  std::int64_t ignored;                 // the target of rows that do not count
  float z_loss;                         // each loss grows by z_loss (log Σ exp z)²

  // Written: each row's loss, and the gradients of their weighted sum.
  float* loss;     // [rows]
  float* dh;       // [rows][width]
  float* dweight;  // [vocabulary][width]
  float* dbias;    // [vocabulary], or none
};

// Every target is `ignored` or a token.
bool targets_are_known(const CrossEntropy& call);

// False, with nothing of use written, where logits are so large, or not finite, that sums of their
// exponentials pass 1e±20: they are not shifted by the largest, for which there would have to be
// two passes. The same bits on any number of threads.
bool cross_entropy(const CrossEntropy& call, int threads);

}  // namespace tinylm
