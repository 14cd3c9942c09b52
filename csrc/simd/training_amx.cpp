// The passes by vectors are those of training_avx512.cpp; the products are made of tiles.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

#include "simd/instruction_set.hpp"
#include "simd/training.hpp"

#if TINYLM_AMX_VARIANT
#if !defined(__clang__)
// GCC 12 warns of what its own header leaves undefined on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#define TINYLM_VARIANT \
  __attribute__((      \
      target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")))

namespace tinylm {
namespace {

#include "simd/training_vectors_avx512.hpp"

constexpr std::size_t kTileRows = 32, kHeadRows = 512;

// clang-format off: each uses those before it.
#include "simd/training_rows.hpp"
#include "simd/training_matrices.hpp"
#include "simd/training_products_amx.hpp"
#include "simd/training_attention.hpp"
#include "simd/training_head.hpp"
#include "simd/training_projections.hpp"
#include "simd/training_feed_forward.hpp"
#include "simd/training_muon.hpp"
// clang-format on

}  // namespace

const TrainingKernels kTrainingKernelsAmx = {row_kernels<float>(),
                                             row_kernels<Bf16>(),
                                             norm_kernels<float, float>(),
                                             norm_kernels<float, Bf16>(),
                                             norm_kernels<Bf16, Bf16>(),
                                             attention_kernels(),
                                             head_kernels(),
                                             pack_kernels(),
                                             projection_kernels(),
                                             feed_forward_kernels(),
                                             &muon_step};

}  // namespace tinylm
#endif
