// The head's cross-entropy and its gradients against plain sums in double, of sizes and options
// that the input chooses, in each variant for an instruction set and on several threads.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cross_entropy.hpp"
#include "fuzz_numbers.hpp"
#include "simd/instruction_set.hpp"

namespace tinylm {
namespace {

struct Result {
  std::vector<float> loss, dh, dweight, dbias;
};

struct Problem {
  std::size_t rows, width, vocabulary;
  bool with_bias, with_row_weights;
  float z_loss;
  std::vector<Bf16> h;
  std::vector<float> weight, bias, row_weights;
  std::vector<std::int64_t> targets;

  Problem(const std::uint8_t* data, std::size_t size) {
    std::uint64_t seed = 0;
    std::memcpy(&seed, data, std::min(size, sizeof seed));
    std::mt19937_64 random(seed);
    const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
    rows = 1 + below(below(8) ? 40 : 600);
    width = kHeadStep * (1 + below(3));
    vocabulary = 1 + below(below(4) ? 70 : 2200);
    with_bias = below(2), with_row_weights = below(2);
    z_loss = below(2) ? 0.0f : 0.01f;
    std::normal_distribution<float> normal;
    const float size_of_weights = 1.0f / std::sqrt(static_cast<float>(width));
    h.resize(rows * width), weight.resize(vocabulary * width);
    for (Bf16& x : h) x = narrowed(normal(random));
    // Exact in bf16, so that rounding them changes nothing.
    for (float& x : weight) x = widened(narrowed(size_of_weights * normal(random)));
    bias.resize(vocabulary), row_weights.resize(rows), targets.resize(rows);
    for (float& x : bias) x = normal(random);
    for (float& x : row_weights) x = normal(random);
    for (auto& x : targets) x = below(5) ? static_cast<std::int64_t>(below(vocabulary)) : -100;
  }
};

Result computed(const Problem& p, int threads) {
  Result r{std::vector<float>(p.rows), std::vector<float>(p.h.size()),
           std::vector<float>(p.weight.size()), std::vector<float>(p.vocabulary)};
  const CrossEntropy call{p.rows,
                          p.width,
                          p.vocabulary,
                          p.h.data(),
                          p.weight.data(),
                          p.with_bias ? p.bias.data() : nullptr,
                          p.targets.data(),
                          p.with_row_weights ? p.row_weights.data() : nullptr,
                          -100,
                          p.z_loss,
                          r.loss.data(),
                          r.dh.data(),
                          r.dweight.data(),
                          p.with_bias ? r.dbias.data() : nullptr};
  if (!targets_are_known(call) || !cross_entropy(call, threads)) std::abort();
  return r;
}

Result plain(const Problem& p) {
  std::vector<double> dh(p.h.size()), dweight(p.weight.size()), dbias(p.vocabulary);
  Result r;
  for (std::size_t row = 0; row < p.rows; ++row) {
    std::vector<double> z(p.vocabulary);
    double sum = 0.0;
    for (std::size_t token = 0; token < p.vocabulary; ++token) {
      for (std::size_t c = 0; c < p.width; ++c) {
        z[token] += double{widened(p.h[row * p.width + c])} * p.weight[token * p.width + c];
      }
      if (p.with_bias) z[token] += p.bias[token];
      sum += std::exp(z[token]);
    }
    const bool counts = p.targets[row] != -100;
    const std::size_t own = counts ? static_cast<std::size_t>(p.targets[row]) : 0;
    const double lse = std::log(sum), slope = 1.0 + 2.0 * p.z_loss * lse;
    r.loss.push_back(static_cast<float>(counts ? lse - z[own] + p.z_loss * lse * lse : 0.0));
    if (!counts) continue;
    for (std::size_t token = 0; token < p.vocabulary; ++token) {
      const double weight = p.with_row_weights ? p.row_weights[row] : 1.0;
      const double dz = weight * (slope * std::exp(z[token] - lse) - (token == own));
      dbias[token] += p.with_bias ? dz : 0.0;
      for (std::size_t c = 0; c < p.width; ++c) {
        dh[row * p.width + c] += dz * p.weight[token * p.width + c];
        dweight[token * p.width + c] += dz * widened(p.h[row * p.width + c]);
      }
    }
  }
  r.dh.assign(dh.begin(), dh.end()), r.dweight.assign(dweight.begin(), dweight.end());
  r.dbias.assign(dbias.begin(), dbias.end());
  return r;
}

}  // namespace
}  // namespace tinylm

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace tinylm;
  const Problem problem(data, size);
  const Result expected = plain(problem);
  for (int set = 0; set <= static_cast<int>(best_instruction_set()); ++set) {
    use_instruction_set(static_cast<InstructionSet>(set));
    const Result actual = computed(problem, 1), shared = computed(problem, 3);
    compare("loss", actual.loss, expected.loss, 5e-6f);
    compare("dh", actual.dh, expected.dh, 1.6e-2f);
    compare("dweight", actual.dweight, expected.dweight, 1.6e-2f);
    compare("dbias", actual.dbias, expected.dbias, 1.6e-2f);
    if (actual.loss != shared.loss || actual.dh != shared.dh || actual.dweight != shared.dweight ||
        actual.dbias != shared.dbias) {
      std::fprintf(stderr, "three threads have another result than one\n");
      std::abort();
    }
  }
  return 0;
}
