// The kernels of a training step for tinylm/kernels/compiled/, which checks what it passes:
// memory of tensors as addresses, since neither torch nor its tensors are known here.
#include "simd/training.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "bindings.hpp"
#include "cross_entropy.hpp"
#include "feed_forward.hpp"
#include "memory.hpp"
#include "projections.hpp"
#include "simd/instruction_set.hpp"
#include "team.hpp"

namespace py = pybind11;

namespace tinylm {
namespace {

using Address = std::uintptr_t;

template <class T>
T* memory(Address address) {
  return reinterpret_cast<T*>(address);
}

std::optional<std::string> faster_than_own_products() {
  if (has_matrix_unit() && best_instruction_set() < InstructionSet::kAmx) {
    return "the processor multiplies bf16 in AMX, which torch may use and this build does not";
  }
  if (multiplies_bf16(training_kernels())) return std::nullopt;
  return "the processor has no products of bf16";
}

// What a thread has to do, in operations on one number each, to be worth waking.
constexpr std::size_t kLeastWork = 1 << 16;

int parts_for(std::size_t work, int threads) {
  return static_cast<int>(std::clamp<std::size_t>(work / kLeastWork, 1,
                                                  static_cast<std::size_t>(std::max(threads, 1))));
}

// Calls function(part, begin, end) for the ranges of `rows` rows that the parts have.
template <class Function>
void share_rows(std::size_t rows, int parts, Function&& function) {
  const py::gil_scoped_release release;
  const auto bound = [&](int part) { return rows * static_cast<std::size_t>(part) / parts; };
  run_parts(parts, [&](int part) { function(part, bound(part), bound(part + 1)); });
}

template <class T>
const RowKernels<T>& kernels();
template <>
const RowKernels<float>& kernels() {
  return training_kernels().fp32;
}
template <>
const RowKernels<Bf16>& kernels() {
  return training_kernels().bf16;
}

template <class T>
void exponentials(Address x, std::size_t rows, std::size_t columns, Address top, Address sum,
                  int threads) {
  share_rows(rows, parts_for(4 * rows * columns, threads),
             [&](int, std::size_t begin, std::size_t end) {
               kernels<T>().exponentials(memory<T>(x) + begin * columns, end - begin, columns,
                                         memory<float>(top) + begin, memory<float>(sum) + begin);
             });
}

template <class T>
void swiglu(Address x, Address out, std::size_t rows, std::size_t width, int threads) {
  share_rows(rows, parts_for(4 * rows * width, threads),
             [&](int, std::size_t begin, std::size_t end) {
               kernels<T>().swiglu(memory<T>(x) + begin * 2 * width, memory<T>(out) + begin * width,
                                   end - begin, width);
             });
}

template <class T>
void swiglu_backward(Address x, Address dout, Address dx, std::size_t rows, std::size_t width,
                     int threads) {
  share_rows(rows, parts_for(8 * rows * width, threads),
             [&](int, std::size_t begin, std::size_t end) {
               kernels<T>().swiglu_backward(memory<T>(x) + begin * 2 * width,
                                            memory<T>(dout) + begin * width,
                                            memory<T>(dx) + begin * 2 * width, end - begin, width);
             });
}

// Addresses of the tables, and how many positions they have.
using Angles = std::tuple<Address, Address, std::size_t>;
// (rows, heads, width, stride)
using Sizes = std::array<std::size_t, 4>;

NormShape norm_shape(const Sizes& sizes, Address weight, const Angles& angles, float eps) {
  const auto& [cos, sin, positions] = angles;
  return {sizes[1], sizes[2],
          sizes[3], memory<const float>(weight),
          eps,      {memory<const float>(cos), memory<const float>(sin), positions}};
}

template <class T>
void norm_rotary(Address x, Address out, Address r, const Sizes& sizes, Address weight,
                 const Angles& angles, float eps, int threads) {
  const NormShape shape = norm_shape(sizes, weight, angles, eps);
  share_rows(sizes[0], parts_for(2 * sizes[0] * sizes[1] * sizes[2], threads),
             [&](int, std::size_t begin, std::size_t end) {
               kernels<T>().norm_rotary(shape, memory<const T>(x), memory<T>(out), memory<float>(r),
                                        begin, end);
             });
}

// Rows whose sums are added up by themselves: a sum of many rounds its last terms away.
constexpr std::size_t kSumRows = 64;

// total = the sums over rows that function(sums, begin, end) adds, `count` each, for ranges of
// rows. The sums of kSumRows rows each are added up in order, so that threads change no bit.
template <class Function>
void sum_over_rows(std::size_t rows, std::size_t count, int threads, float* total,
                   Function&& function) {
  const std::size_t blocks = (rows + kSumRows - 1) / kSumRows;
  std::vector<float> sums(count * blocks);
  share_rows(blocks, parts_for(4 * rows * count, threads),
             [&](int, std::size_t begin, std::size_t end) {
               for (std::size_t block = begin; block < end; ++block) {
                 function(sums.data() + block * count, block * kSumRows,
                          std::min((block + 1) * kSumRows, rows));
               }
             });
  std::fill_n(total, count, 0.0f);
  for (std::size_t at = 0; at < sums.size(); at += count) {
    for (std::size_t i = 0; i < count; ++i) total[i] += sums[at + i];
  }
}

template <class T>
void norm_rotary_backward(Address x, Address r, Address dout, Address dx, Address dweight,
                          const Sizes& sizes, Address weight, const Angles& angles, int threads) {
  const NormShape shape = norm_shape(sizes, weight, angles, 0.0f);
  sum_over_rows(sizes[0], sizes[1] * sizes[2], threads, memory<float>(dweight),
                [&](float* sums, std::size_t begin, std::size_t end) {
                  kernels<T>().norm_rotary_backward(shape, memory<T>(x), memory<const float>(r),
                                                    memory<const T>(dout), memory<T>(dx), sums,
                                                    begin, end);
                });
}

template <auto kernels_of_norm, class T, class Out>
void rms_norm(Address x, Address out, Address r, std::size_t rows, std::size_t width,
              Address weight, float eps, int threads) {
  const NormRows shape{width, memory<const float>(weight), eps};
  share_rows(
      rows, parts_for(2 * rows * width, threads), [&](int, std::size_t begin, std::size_t end) {
        (training_kernels().*kernels_of_norm)
            .rms_norm(shape, memory<const T>(x), memory<Out>(out), memory<float>(r), begin, end);
      });
}

template <auto kernels_of_norm, class T, class Out>
void rms_norm_backward(Address x, Address r, Address dout, Address dx, Address dweight,
                       std::size_t rows, std::size_t width, Address weight, int threads) {
  const NormRows shape{width, memory<const float>(weight), 0.0f};
  sum_over_rows(rows, width, threads, memory<float>(dweight),
                [&](float* sums, std::size_t begin, std::size_t end) {
                  (training_kernels().*kernels_of_norm)
                      .rms_norm_backward(shape, memory<const T>(x), memory<const float>(r),
                                         memory<const Out>(dout), memory<T>(dx), sums, begin, end);
                });
}

template <auto kernels_of_norm, class T, class Out>
void bind_norm(py::module_& m, const std::string& dtypes) {
  m.def(("rms_norm_" + dtypes).c_str(), &rms_norm<kernels_of_norm, T, Out>);
  m.def(("rms_norm_backward_" + dtypes).c_str(), &rms_norm_backward<kernels_of_norm, T, Out>);
}

// (address, and strides of batch, head, time)
using Vectors = std::tuple<Address, std::size_t, std::size_t, std::size_t>;

template <class T>
HeadVectors<T> heads_of(const Vectors& vectors) {
  const auto& [address, batch, head, time] = vectors;
  return {memory<T>(address), {batch, head, time}};
}

// Shape is (batch, heads, length, width).
int attention_parts(const Sizes& shape, int threads) {
  const std::size_t heads = shape[0] * shape[1];
  const std::size_t work = heads * shape[2] * shape[2] * shape[3] / 8;
  return std::min(parts_for(work, threads), static_cast<int>(std::max<std::size_t>(heads, 1)));
}

void attention(const Sizes& shape, float scale, const Vectors& q, const Vectors& k,
               const Vectors& v, const Vectors& out, Address lse, int threads) {
  const AttentionShape attention{shape[1], shape[2], shape[3], scale};
  share_rows(shape[0] * shape[1], attention_parts(shape, threads),
             [&](int, std::size_t begin, std::size_t end) {
               training_kernels().attention.forward(
                   attention, heads_of<const Bf16>(q), heads_of<const Bf16>(k),
                   heads_of<const Bf16>(v), heads_of<Bf16>(out), memory<float>(lse), begin, end);
             });
}

void attention_backward(const Sizes& shape, float scale, const Vectors& q, const Vectors& k,
                        const Vectors& v, Address lse, const Vectors& dout, const Vectors& dq,
                        const Vectors& dk, const Vectors& dv, int threads) {
  const AttentionShape attention{shape[1], shape[2], shape[3], scale};
  share_rows(shape[0] * shape[1], attention_parts(shape, threads),
             [&](int, std::size_t begin, std::size_t end) {
               training_kernels().attention.backward(
                   attention, heads_of<const Bf16>(q), heads_of<const Bf16>(k),
                   heads_of<const Bf16>(v), memory<const float>(lse), heads_of<const Bf16>(dout),
                   heads_of<Bf16>(dq), heads_of<Bf16>(dk), heads_of<Bf16>(dv), begin, end);
             });
}

// (rows, width, vocabulary); (bias, row_weights, dbias) may be 0.
bool head_cross_entropy(const std::array<std::size_t, 3>& sizes, Address h, Address weight,
                        Address bias, Address targets, Address row_weights, std::int64_t ignored,
                        float z_loss, Address loss, Address dh, Address dweight, Address dbias,
                        int threads) {
  const CrossEntropy call{sizes[0],
                          sizes[1],
                          sizes[2],
                          memory<const Bf16>(h),
                          memory<const float>(weight),
                          memory<const float>(bias),
                          memory<const std::int64_t>(targets),
                          memory<const float>(row_weights),
                          ignored,
                          z_loss,
                          memory<float>(loss),
                          memory<float>(dh),
                          memory<float>(dweight),
                          memory<float>(dbias)};
  const py::gil_scoped_release release;
  if (!targets_are_known(call)) throw py::index_error("a target is outside the vocabulary");
  return cross_entropy(call, std::max(threads, 1));
}

// (rows, width, hidden), and x, norm_weight, up, down
FeedForward feed_forward_call(const std::array<std::size_t, 3>& sizes,
                              const std::array<Address, 4>& inputs, float eps) {
  const auto [x, norm_weight, up, down] = inputs;
  return {sizes[0],
          {sizes[1], sizes[2], memory<const float>(norm_weight), eps},
          memory<const float>(x),
          memory<const float>(up),
          memory<const float>(down)};
}

void feed_forward_of(const std::array<std::size_t, 3>& sizes, const std::array<Address, 4>& inputs,
                     float eps, Address out, Address h, int threads) {
  const py::gil_scoped_release release;
  feed_forward(feed_forward_call(sizes, inputs, eps), memory<float>(out), memory<Bf16>(h), threads);
}

// gradients: dup, ddown, dnorm_weight
void feed_forward_backward_of(const std::array<std::size_t, 3>& sizes,
                              const std::array<Address, 4>& inputs, float eps, Address h,
                              Address dout, Address dx, const std::array<Address, 3>& gradients,
                              int threads) {
  const py::gil_scoped_release release;
  const auto [dup, ddown, dnorm_weight] = gradients;
  const FeedForwardSums sums{memory<float>(dup), memory<float>(ddown), memory<float>(dnorm_weight)};
  feed_forward_backward(feed_forward_call(sizes, inputs, eps), memory<const Bf16>(h),
                        memory<const float>(dout), memory<float>(dx), sums, threads);
}

// (rows, inputs, outputs), and x, norm_weight, weight
NormLinear norm_linear_call(const std::array<std::size_t, 3>& sizes,
                            const std::array<Address, 3>& inputs, float eps) {
  const auto [x, norm_weight, weight] = inputs;
  return {sizes[0],
          {sizes[1], memory<const float>(norm_weight), eps},
          sizes[2],
          memory<const float>(x),
          memory<const float>(weight)};
}

void norm_linear_of(const std::array<std::size_t, 3>& sizes, const std::array<Address, 3>& inputs,
                    float eps, Address y, int threads) {
  const py::gil_scoped_release release;
  norm_linear(norm_linear_call(sizes, inputs, eps), memory<Bf16>(y), threads);
}

void norm_linear_backward_of(const std::array<std::size_t, 3>& sizes,
                             const std::array<Address, 3>& inputs, float eps, Address dy,
                             Address dx, Address dweight, Address dnorm_weight, int threads) {
  const py::gil_scoped_release release;
  norm_linear_backward(norm_linear_call(sizes, inputs, eps), memory<const Bf16>(dy),
                       memory<float>(dx), memory<float>(dweight), memory<float>(dnorm_weight),
                       threads);
}

// (rows, inputs, outputs)
LinearResidual linear_residual_call(const std::array<std::size_t, 3>& sizes, Address a,
                                    Address weight) {
  return {sizes[0], {sizes[1], sizes[2]}, memory<const Bf16>(a), memory<const float>(weight)};
}

void linear_residual_of(const std::array<std::size_t, 3>& sizes, Address a, Address weight,
                        Address x, Address out, int threads) {
  const py::gil_scoped_release release;
  linear_residual(linear_residual_call(sizes, a, weight), memory<const float>(x),
                  memory<float>(out), threads);
}

void linear_residual_backward_of(const std::array<std::size_t, 3>& sizes, Address a, Address weight,
                                 Address dout, Address da, Address dweight, int threads) {
  const py::gil_scoped_release release;
  linear_residual_backward(linear_residual_call(sizes, a, weight), memory<const float>(dout),
                           memory<Bf16>(da), memory<float>(dweight), threads);
}

// (weight, gradient, momentum, rows, columns)
using Matrix = std::tuple<Address, Address, Address, std::size_t, std::size_t>;

void muon(const std::vector<Matrix>& matrices, float lr, float momentum, float weight_decay,
          const std::array<float, 3>& coefficients, int iterations, int threads) {
  const MuonOptions options{
      lr, momentum, weight_decay, {coefficients[0], coefficients[1], coefficients[2]}, iterations};
  const py::gil_scoped_release release;
  share_items(matrices.size(), threads, [&](std::size_t item) {
    const auto& [weight, gradient, average, rows, columns] = matrices[item];
    training_kernels().muon_step({memory<float>(weight), memory<const float>(gradient),
                                  memory<float>(average), rows, columns},
                                 options);
  });
}

template <class T>
void bind_rows(py::module_& m, const std::string& dtype) {
  const auto name = [&](const char* kernel) { return kernel + ("_" + dtype); };
  m.def(name("exponentials").c_str(), &exponentials<T>);
  m.def(name("swiglu").c_str(), &swiglu<T>);
  m.def(name("swiglu_backward").c_str(), &swiglu_backward<T>);
  m.def(name("norm_rotary").c_str(), &norm_rotary<T>);
  m.def(name("norm_rotary_backward").c_str(), &norm_rotary_backward<T>);
}

}  // namespace

void bind_training(py::module_& m) {
  bind_rows<float>(m, "fp32");
  bind_rows<Bf16>(m, "bf16");
  bind_norm<&TrainingKernels::norm_fp32, float, float>(m, "fp32_fp32");
  bind_norm<&TrainingKernels::norm_to_bf16, float, Bf16>(m, "fp32_bf16");
  bind_norm<&TrainingKernels::norm_bf16, Bf16, Bf16>(m, "bf16_bf16");
  m.def("keep_freed_memory", &keep_freed_memory, py::arg("keep"),
        "Whether malloc keeps what is freed for what comes next; False if that cannot be set.");
  m.def(
      "faster_than_own_products", &faster_than_own_products,
      "What multiplies matrices of bf16 faster than the kernels here, in words; None if nothing.");
  m.def("attention", &attention);
  m.def("attention_backward", &attention_backward);
  m.def("head_cross_entropy", &head_cross_entropy);
  m.def("norm_linear", &norm_linear_of);
  m.def("norm_linear_backward", &norm_linear_backward_of);
  m.def("linear_residual", &linear_residual_of);
  m.def("linear_residual_backward", &linear_residual_backward_of);
  m.def("feed_forward", &feed_forward_of);
  m.def("feed_forward_backward", &feed_forward_backward_of);
  m.def("muon", &muon);
}

}  // namespace tinylm
