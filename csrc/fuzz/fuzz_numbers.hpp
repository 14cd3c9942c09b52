// Numbers of bf16, and comparing results, for the fuzzers of a training step's kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "simd/training.hpp"

namespace tinylm {

inline float widened(Bf16 x) {
  const std::uint32_t bits = std::uint32_t{x} << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

// Cut off, not rounded: all that is asked of it is to be one.
inline Bf16 narrowed(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<Bf16>(bits >> 16);
}

// Errors up to `tolerance` of the largest number, and of 1.
inline void compare(const char* what, const std::vector<float>& actual,
                    const std::vector<float>& expected, float tolerance) {
  float error = 0.0f, largest = 1.0f;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const float difference = std::abs(actual[i] - expected[i]);
    error = difference <= error ? error : difference;  // a NaN is an error
    largest = std::max(largest, std::abs(expected[i]));
  }
  if (error <= tolerance * largest) return;
  std::fprintf(stderr, "%s is wrong by %g of %g\n", what, static_cast<double>(error),
               static_cast<double>(largest));
  std::abort();
}

}  // namespace tinylm
