// A feed-forward layer with its norm and residual, the projections around attention, and their
// gradients, against plain sums in double, of sizes that the input chooses, in each variant for an
// instruction set and on several threads.
#include <random>

#include "feed_forward.hpp"
#include "fuzz_numbers.hpp"
#include "projections.hpp"
#include "simd/instruction_set.hpp"

namespace tinylm {
namespace {

constexpr float kEps = 1e-6f;

struct Problem {
  std::size_t rows, width, hidden;
  std::vector<float> x, norm_weight, up, down, dout;
  std::vector<float> a, dy;  // what is projected to the sum, and the gradient of what is made of up

  Problem(const std::uint8_t* data, std::size_t size) {
    std::uint64_t seed = 0;
    std::memcpy(&seed, data, std::min(size, sizeof seed));
    std::mt19937_64 random(seed);
    const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
    rows = 1 + below(below(8) ? 70 : 1200);
    width = kPanelStep * (1 + below(3)), hidden = kPanelStep * (1 + below(4));
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& numbers, std::size_t count, std::size_t inputs) {
      const float scale = 1.0f / std::sqrt(static_cast<float>(inputs));
      // Exact in bf16, so that rounding them changes nothing.
      numbers.resize(count);
      for (float& number : numbers) {
        number = widened(narrowed(scale * normal(random)));
      }
    };
    fill(x, rows * width, 1), fill(norm_weight, width, 1), fill(dout, rows * width, 1);
    fill(up, 2 * hidden * width, width), fill(down, width * hidden, hidden);
    fill(a, rows * hidden, 1), fill(dy, rows * 2 * hidden, 1);
  }

  FeedForward layer() const {
    return {rows, {width, hidden, norm_weight.data(), kEps}, x.data(), up.data(), down.data()};
  }
  NormLinear before() const {
    return {rows, {width, norm_weight.data(), kEps}, 2 * hidden, x.data(), up.data()};
  }
  LinearResidual after(const Bf16* narrow) const {
    return {rows, {hidden, width}, narrow, down.data()};
  }
};

struct Result {
  std::vector<float> out, dx, dup, ddown, dnorm_weight;

  bool operator==(const Result& other) const {
    return out == other.out && dx == other.dx && dup == other.dup && ddown == other.ddown &&
           dnorm_weight == other.dnorm_weight;
  }
};

Result computed(const Problem& p, int threads) {
  Result r{std::vector<float>(p.x.size()), std::vector<float>(p.x.size()),
           std::vector<float>(p.up.size()), std::vector<float>(p.down.size()),
           std::vector<float>(p.width)};
  std::vector<Bf16> h(p.rows * 2 * p.hidden);
  feed_forward(p.layer(), r.out.data(), h.data(), threads);
  const FeedForwardSums sums{r.dup.data(), r.ddown.data(), r.dnorm_weight.data()};
  feed_forward_backward(p.layer(), h.data(), p.dout.data(), r.dx.data(), sums, threads);
  return r;
}

Result plain(const Problem& p) {
  const std::size_t C = p.width, F = p.hidden;
  Result r;
  std::vector<double> dup(p.up.size()), ddown(p.down.size()), dnorm_weight(C);
  for (std::size_t row = 0; row < p.rows; ++row) {
    const float *const x = p.x.data() + row * C, *const dout = p.dout.data() + row * C;
    double squares = 0.0;
    for (std::size_t c = 0; c < C; ++c) squares += double{x[c]} * x[c];
    const double length = 1.0 / std::sqrt(squares / static_cast<double>(C) + kEps);
    std::vector<double> out(x, x + C), dnormed(C);
    const auto normed = [&](std::size_t c) { return x[c] * length * p.norm_weight[c]; };
    for (std::size_t f = 0; f < F; ++f) {
      double gate = 0.0, value = 0.0, dactive = 0.0;
      for (std::size_t c = 0; c < C; ++c) {
        gate += normed(c) * p.up[f * C + c], value += normed(c) * p.up[(F + f) * C + c];
        dactive += double{dout[c]} * p.down[c * F + f];
      }
      const double s = 1.0 / (1.0 + std::exp(-gate)), active = gate * s * value;
      const double dvalue = dactive * gate * s, dgate = dactive * value * s * (1 + gate * (1 - s));
      for (std::size_t c = 0; c < C; ++c) {
        out[c] += active * p.down[c * F + f];
        ddown[c * F + f] += dout[c] * active;
        dup[f * C + c] += dgate * normed(c), dup[(F + f) * C + c] += dvalue * normed(c);
        dnormed[c] += dgate * p.up[f * C + c] + dvalue * p.up[(F + f) * C + c];
      }
    }
    double mean = 0.0;
    for (std::size_t c = 0; c < C; ++c) {
      dnorm_weight[c] += dnormed[c] * x[c] * length;
      mean += dnormed[c] * normed(c) / static_cast<double>(C);
    }
    for (std::size_t c = 0; c < C; ++c) {
      const double dx = length * (dnormed[c] * p.norm_weight[c] - x[c] * length * mean);
      r.out.push_back(static_cast<float>(out[c])), r.dx.push_back(static_cast<float>(dout[c] + dx));
    }
  }
  r.dup.assign(dup.begin(), dup.end()), r.ddown.assign(ddown.begin(), ddown.end());
  r.dnorm_weight.assign(dnorm_weight.begin(), dnorm_weight.end());
  return r;
}

// Of both projections.
struct Projected {
  std::vector<float> y, dx, dup, dnorm_weight, out, da, ddown;

  bool operator==(const Projected& other) const {
    return y == other.y && dx == other.dx && dup == other.dup &&
           dnorm_weight == other.dnorm_weight && out == other.out && da == other.da &&
           ddown == other.ddown;
  }
};

std::vector<Bf16> all_narrowed(const std::vector<float>& numbers) {
  std::vector<Bf16> out;
  for (float number : numbers) out.push_back(narrowed(number));
  return out;
}

std::vector<float> all_widened(const std::vector<Bf16>& numbers) {
  std::vector<float> out;
  for (Bf16 number : numbers) out.push_back(widened(number));
  return out;
}

Projected projected(const Problem& p, int threads) {
  const std::vector<Bf16> a = all_narrowed(p.a), dy = all_narrowed(p.dy);
  std::vector<Bf16> y(p.dy.size()), da(p.a.size());
  Projected r{{},
              std::vector<float>(p.x.size()),
              std::vector<float>(p.up.size()),
              std::vector<float>(p.width),
              std::vector<float>(p.x.size()),
              {},
              std::vector<float>(p.down.size())};
  norm_linear(p.before(), y.data(), threads);
  norm_linear_backward(p.before(), dy.data(), r.dx.data(), r.dup.data(), r.dnorm_weight.data(),
                       threads);
  linear_residual(p.after(a.data()), p.x.data(), r.out.data(), threads);
  linear_residual_backward(p.after(a.data()), p.dout.data(), da.data(), r.ddown.data(), threads);
  r.y = all_widened(y), r.da = all_widened(da);
  return r;
}

Projected plainly_projected(const Problem& p) {
  const std::size_t C = p.width, M = 2 * p.hidden, K = p.hidden;
  Projected r;
  std::vector<double> dup(p.up.size()), ddown(p.down.size()), dnorm_weight(C);
  for (std::size_t row = 0; row < p.rows; ++row) {
    const float *const x = p.x.data() + row * C, *const dout = p.dout.data() + row * C;
    const float *const a = p.a.data() + row * K, *const dy = p.dy.data() + row * M;
    double squares = 0.0, mean = 0.0;
    for (std::size_t c = 0; c < C; ++c) squares += double{x[c]} * x[c];
    const double length = 1.0 / std::sqrt(squares / static_cast<double>(C) + kEps);
    const auto normed = [&](std::size_t c) { return x[c] * length * p.norm_weight[c]; };
    std::vector<double> dnormed(C), da(K);
    for (std::size_t m = 0; m < M; ++m) {
      double y = 0.0;
      for (std::size_t c = 0; c < C; ++c) {
        y += normed(c) * p.up[m * C + c], dup[m * C + c] += dy[m] * normed(c);
        dnormed[c] += double{dy[m]} * p.up[m * C + c];
      }
      r.y.push_back(static_cast<float>(y));
    }
    for (std::size_t c = 0; c < C; ++c) {
      dnorm_weight[c] += dnormed[c] * x[c] * length;
      mean += dnormed[c] * normed(c) / static_cast<double>(C);
    }
    for (std::size_t c = 0; c < C; ++c) {
      const double dx = length * (dnormed[c] * p.norm_weight[c] - x[c] * length * mean);
      double out = x[c];
      for (std::size_t k = 0; k < K; ++k) {
        out += double{a[k]} * p.down[c * K + k], ddown[c * K + k] += double{dout[c]} * a[k];
        da[k] += double{dout[c]} * p.down[c * K + k];
      }
      r.dx.push_back(static_cast<float>(dx)), r.out.push_back(static_cast<float>(out));
    }
    for (double number : da) r.da.push_back(static_cast<float>(number));
  }
  r.dup.assign(dup.begin(), dup.end()), r.ddown.assign(ddown.begin(), ddown.end());
  r.dnorm_weight.assign(dnorm_weight.begin(), dnorm_weight.end());
  return r;
}

void expect_equal(bool equal) {
  if (equal) return;
  std::fprintf(stderr, "three threads have another result than one\n");
  std::abort();
}

}  // namespace
}  // namespace tinylm

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace tinylm;
  const Problem problem(data, size);
  const Result expected = plain(problem);
  const Projected expected_projected = plainly_projected(problem);
  for (int set = 0; set <= static_cast<int>(best_instruction_set()); ++set) {
    use_instruction_set(static_cast<InstructionSet>(set));
    const Result layer = computed(problem, 1);
    compare("out", layer.out, expected.out, 1.6e-2f);
    compare("dx", layer.dx, expected.dx, 1.6e-2f);
    compare("dup", layer.dup, expected.dup, 1.6e-2f);
    compare("ddown", layer.ddown, expected.ddown, 1.6e-2f);
    compare("dnorm_weight", layer.dnorm_weight, expected.dnorm_weight, 1.6e-2f);
    expect_equal(computed(problem, 3) == layer);
    const Projected both = projected(problem, 1);
    compare("y", both.y, expected_projected.y, 1.6e-2f);
    compare("dx of y", both.dx, expected_projected.dx, 1.6e-2f);
    compare("dup of y", both.dup, expected_projected.dup, 1.6e-2f);
    compare("dnorm_weight of y", both.dnorm_weight, expected_projected.dnorm_weight, 1.6e-2f);
    compare("x + down a", both.out, expected_projected.out, 1.6e-2f);
    compare("da", both.da, expected_projected.da, 1.6e-2f);
    compare("ddown of a", both.ddown, expected_projected.ddown, 1.6e-2f);
    expect_equal(projected(problem, 3) == both);
  }
  return 0;
}
