// Rows times weights in bf16, and their gradients, for the `Floats` and `Pairs` of the variant that
// includes this; see PackKernels and ProjectionKernels in training.hpp and training_matrices.hpp.
// Some rows at a time, what comes between stays in cache.

static_assert(kPanelStep == kBlock);

// Rows at a time: enough that sums over them, the weights' gradients, are not loaded and stored too
// often, few enough for the second cache.
constexpr std::size_t kRowsAtATime = 128;

// Panel `panel` of the rows of a matrix [rows][columns], transposed.
TINYLM_VARIANT void pack_transposed(const float* matrix, std::size_t, std::size_t columns,
                                    std::size_t panel, Word* panels) {
  const std::size_t steps = columns / 2;
  Scratch scratch(kBlock * steps);
  Word* const words = scratch.words(kBlock * steps);
  const float* const from = matrix + panel * kBlock * columns;
  auto* const rounded = reinterpret_cast<Bf16*>(words);
  for (std::size_t at = 0; at < kBlock * columns; at += kWidth)
    store(rounded + at, load(from + at));
  Word* const to = panels + panel * kBlock * steps;
  for (std::size_t step = 0; step < steps; ++step) {
    for (std::size_t row = 0; row < kBlock; ++row) {
      to[step * kBlock + row] = words[row * steps + step];
    }
  }
}

// Panel `panel` of its columns, interleaved.
TINYLM_VARIANT void pack_interleaved(const float* matrix, std::size_t rows, std::size_t columns,
                                     std::size_t panel, Word* panels) {
  const float* from = matrix + panel * kBlock;
  Word* to = panels + panel * kBlock * rows / 2;
  for (std::size_t row = 0; row < rows; row += 2, from += 2 * columns, to += kBlock) {
    for (std::size_t at = 0; at < kBlock; at += kWidth) {
      store_pairs(to + at, pairs_of(load(from + at), load(from + columns + at)));
    }
  }
}

// `count` rows of `width` numbers, rounded, zeros up to `padded`.
TINYLM_VARIANT inline void round_rows(const float* from, std::size_t count, std::size_t padded,
                                      std::size_t width, Bf16* to) {
  for (std::size_t at = 0; at < count * width; at += kWidth) store(to + at, load(from + at));
  std::memset(to + count * width, 0, (padded - count) * width * sizeof(Bf16));
}

// Rounded rows as panels, interleaved.
TINYLM_VARIANT inline void interleave_rows(const Bf16* from, std::size_t rows, std::size_t width,
                                           Word* panels) {
  for (std::size_t row = 0; row < rows; row += 2, from += 2 * width) {
    for (std::size_t at = 0; at < width; at += kWidth) {
      Word* const to = panels + at / kBlock * rows / 2 * kBlock + row / 2 * kBlock + at % kBlock;
      store_pairs(to, pairs_of(from + at, from + width + at));
    }
  }
}

// `count` rows as they are, zeros up to `padded`.
TINYLM_VARIANT inline void copy_rows(const Bf16* from, std::size_t count, std::size_t padded,
                                     std::size_t width, Bf16* to) {
  std::memcpy(to, from, count * width * sizeof(Bf16));
  std::memset(to + count * width, 0, (padded - count) * width * sizeof(Bf16));
}

// Their norms, rounded, zeros up to `padded`; and r of each.
TINYLM_VARIANT inline void normed_rows(const NormRows& norm, const float* x, std::size_t count,
                                       std::size_t padded, Bf16* to, float* r) {
  rms_norm<float, Bf16>(norm, x, to, r, 0, count);
  std::memset(to + count * norm.width, 0, (padded - count) * norm.width * sizeof(Bf16));
}

// to [padded][columns] = rows of words times panels.
TINYLM_VARIANT inline void multiply_rows(const Word* words, std::size_t steps, const Word* panels,
                                         std::size_t padded, float* to, std::size_t columns) {
  for (std::size_t column = 0; column < columns; column += kBlock) {
    multiply<false>({words, steps, 1}, {panels + column * steps, kBlock}, steps,
                    {to + column, columns}, padded, kBlock);
  }
}

// The same, rounded, and of `count` rows.
TINYLM_VARIANT inline void multiply_and_round(const Word* words, std::size_t steps,
                                              const Word* panels, std::size_t count, Bf16* to,
                                              std::size_t columns) {
  for (std::size_t column = 0; column < columns; column += kTileColumns) {
    const Right right{panels + column / kBlock * steps * kBlock + column % kBlock, kBlock};
    for (std::size_t row = 0; row < count; row += kTileRows) {
      const Tile tile = product({words + row * steps, steps, 1}, right, steps);
      for (std::size_t t = 0; t < std::min(kTileRows, count - row); ++t) {
        for (std::size_t i = 0; i < 2; ++i) {
          store(to + (row + t) * columns + column + i * kWidth, tile.sums[t][i]);
        }
      }
    }
  }
}

// out [left_width][right_width] (+)= leftᵀ right, of the panels of both interleaved.
TINYLM_VARIANT inline void sum_over_rows(const Word* left_panels, std::size_t left_width,
                                         const Word* right_panels, std::size_t right_width,
                                         std::size_t pairs, bool accumulate, Word* room,
                                         float* out) {
  for (std::size_t row = 0; row < left_width; row += kBlock) {
    const Left left = left_of(left_panels + row * pairs, kBlock, pairs, kBlock, room);
    for (std::size_t column = 0; column < right_width; column += kBlock) {
      const Right right{right_panels + column * pairs, kBlock};
      const Numbers to{out + row * right_width + column, right_width};
      if (accumulate) {
        multiply<true>(left, right, pairs, to, kBlock, kBlock);
      } else {
        multiply<false>(left, right, pairs, to, kBlock, kBlock);
      }
    }
  }
}

TINYLM_VARIANT void norm_linear(const NormRows& norm, std::size_t outputs, const float* x,
                                const Word* panels, std::size_t begin, std::size_t end, Bf16* y) {
  const std::size_t width = norm.width;
  const MatrixUnit unit;
  Scratch scratch(kRowsAtATime * (width / 2 + 1));
  Word* const normed = scratch.words(kRowsAtATime * width / 2);
  float* const r = scratch.numbers(kRowsAtATime);
  for (std::size_t start = begin; start < end; start += kRowsAtATime) {
    const std::size_t count = std::min(end - start, kRowsAtATime);
    normed_rows(norm, x + start * width, count, round_up(count), reinterpret_cast<Bf16*>(normed),
                r);
    multiply_and_round(normed, width / 2, panels, count, y + start * outputs, outputs);
  }
}

TINYLM_VARIANT void norm_linear_backward(const NormRows& norm, std::size_t outputs, const float* x,
                                         const Word* panels, const Bf16* dy, std::size_t begin,
                                         std::size_t end, float* dx, float* dweight,
                                         float* dnorm_weight) {
  const std::size_t width = norm.width, most_pairs = kRowsAtATime / 2;
  const MatrixUnit unit;
  Scratch scratch(most_pairs * (4 * width + 2 * outputs) + kRowsAtATime +
                  left_room(most_pairs * kBlock));
  Word* const normed = scratch.words(most_pairs * width);
  Word* const normed_pairs = scratch.words(most_pairs * width);
  Word* const dy_words = scratch.words(most_pairs * outputs);
  Word* const dy_pairs = scratch.words(most_pairs * outputs);
  float* const dnormed = scratch.numbers(kRowsAtATime * width);
  float* const r = scratch.numbers(kRowsAtATime);
  Word* const room = scratch.words(left_room(most_pairs * kBlock));
  std::memset(dnorm_weight, 0, width * sizeof(float));
  for (std::size_t start = begin; start < end; start += kRowsAtATime) {
    const std::size_t count = std::min(end - start, kRowsAtATime), padded = round_up(count);
    const float* const x_rows = x + start * width;
    normed_rows(norm, x_rows, count, padded, reinterpret_cast<Bf16*>(normed), r);
    interleave_rows(reinterpret_cast<Bf16*>(normed), padded, width, normed_pairs);
    copy_rows(dy + start * outputs, count, padded, outputs, reinterpret_cast<Bf16*>(dy_words));
    interleave_rows(reinterpret_cast<Bf16*>(dy_words), padded, outputs, dy_pairs);
    multiply_rows(dy_words, outputs / 2, panels, padded, dnormed, width);
    sum_over_rows(dy_pairs, outputs, normed_pairs, width, padded / 2, start > begin, room, dweight);
    for (std::size_t row = 0; row < count; ++row) {
      norm_vector_backward(x_rows + row * width, r[row], norm.weight, dnormed + row * width,
                           dx + (start + row) * width, dnorm_weight, width);
    }
  }
}

TINYLM_VARIANT void linear_residual(const LinearShape& shape, const Bf16* a, const Word* panels,
                                    const float* x, std::size_t begin, std::size_t end,
                                    float* out) {
  const auto [inputs, outputs] = shape;
  const MatrixUnit unit;
  Scratch scratch(kRowsAtATime * (inputs / 2 + outputs));
  Word* const words = scratch.words(kRowsAtATime * inputs / 2);
  float* const sums = scratch.numbers(kRowsAtATime * outputs);
  for (std::size_t start = begin; start < end; start += kRowsAtATime) {
    const std::size_t count = std::min(end - start, kRowsAtATime), padded = round_up(count);
    copy_rows(a + start * inputs, count, padded, inputs, reinterpret_cast<Bf16*>(words));
    multiply_rows(words, inputs / 2, panels, padded, sums, outputs);
    for (std::size_t at = 0; at < count * outputs; at += kWidth) {
      store(out + start * outputs + at, load(x + start * outputs + at) + load(sums + at));
    }
  }
}

TINYLM_VARIANT void linear_residual_backward(const LinearShape& shape, const Bf16* a,
                                             const Word* panels, const float* dout,
                                             std::size_t begin, std::size_t end, Bf16* da,
                                             float* dweight) {
  const auto [inputs, outputs] = shape;
  const std::size_t most_pairs = kRowsAtATime / 2;
  const MatrixUnit unit;
  Scratch scratch(most_pairs * 2 * (inputs + outputs) + left_room(most_pairs * kBlock));
  Word* const words = scratch.words(most_pairs * inputs);
  Word* const pairs = scratch.words(most_pairs * inputs);
  Word* const dout_words = scratch.words(most_pairs * outputs);
  Word* const dout_pairs = scratch.words(most_pairs * outputs);
  Word* const room = scratch.words(left_room(most_pairs * kBlock));
  for (std::size_t start = begin; start < end; start += kRowsAtATime) {
    const std::size_t count = std::min(end - start, kRowsAtATime), padded = round_up(count);
    copy_rows(a + start * inputs, count, padded, inputs, reinterpret_cast<Bf16*>(words));
    interleave_rows(reinterpret_cast<Bf16*>(words), padded, inputs, pairs);
    round_rows(dout + start * outputs, count, padded, outputs, reinterpret_cast<Bf16*>(dout_words));
    interleave_rows(reinterpret_cast<Bf16*>(dout_words), padded, outputs, dout_pairs);
    multiply_and_round(dout_words, outputs / 2, panels, count, da + start * inputs, inputs);
    sum_over_rows(dout_pairs, outputs, pairs, inputs, padded / 2, start > begin, room, dweight);
  }
}

constexpr PackKernels pack_kernels() { return {&pack_transposed, &pack_interleaved}; }

constexpr ProjectionKernels projection_kernels() {
  return {&norm_linear, &norm_linear_backward, &linear_residual, &linear_residual_backward};
}
