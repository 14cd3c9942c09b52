// A step of Muon (Jordan et al. 2024) for the `Floats` and `Pairs` of the variant that includes
// this; see MuonMatrix in training.hpp and training_matrices.hpp. A matrix stays in cache from its
// gradient to its update.

static_assert(kMuonStep == kBlock);

// A matrix [rows][columns] as [columns][rows], in blocks that the first cache holds.
TINYLM_VARIANT inline void transpose_matrix(const float* from, std::size_t rows,
                                            std::size_t columns, float* to) {
  for (std::size_t row = 0; row < rows; row += kBlock) {
    for (std::size_t column = 0; column < columns; ++column) {
      for (std::size_t i = 0; i < kBlock; ++i) {
        to[column * rows + row + i] = from[(row + i) * columns + column];
      }
    }
  }
}

// out = xᵀ x of the panels of x interleaved, `pairs` pairs of rows: a pair of rows at a column is
// the word of either factor. It is symmetric: what is below the diagonal is copied. `room` is for
// one panel as a left factor.
TINYLM_VARIANT inline void multiply_by_itself(const Word* panels, std::size_t pairs,
                                              std::size_t columns, Word* room, float* out) {
  for (std::size_t left = 0; left < columns; left += kBlock) {
    const Left factor = left_of(panels + left * pairs, kBlock, pairs, kBlock, room);
    for (std::size_t right = left; right < columns; right += kBlock) {
      multiply<false>(factor, {panels + right * pairs, kBlock}, pairs,
                      {out + left * columns + right, columns}, kBlock, kBlock);
      if (left == right) continue;
      for (std::size_t j = 0; j < kBlock; ++j) {
        for (std::size_t i = 0; i < kBlock; ++i) {
          out[(right + j) * columns + left + i] = out[(left + i) * columns + right + j];
        }
      }
    }
  }
}

// Numbers `at` of two neighbouring rows, and where their pair lies in the panels.
struct RowPair {
  float *low, *high;
  Word* pair;
};

TINYLM_VARIANT inline RowPair row_pair(float* x, Word* panels, std::size_t row, std::size_t at,
                                       std::size_t rows, std::size_t columns) {
  float* const low = x + row * columns + at;
  return {low, low + columns, panels + (at / kBlock * rows + row) / 2 * kBlock + at % kBlock};
}

TINYLM_VARIANT inline Floats rounded_to_bf16(Floats x) {
  Bf16 numbers[kWidth];
  store(numbers, x);
  return load(numbers);
}

// One of the iterations by which x of `rows` >= `columns` comes near U Vᵀ of U S Vᵀ:
// a x + x (b g + c g²), g = xᵀx. What a product rounds to bf16 is rounded in the other terms too:
// then the iteration sees a matrix that is a little different, and draws it back; with x or g in
// fp32 beside their products, the error is 1.6 times as large.
struct NewtonSchulz {
  std::size_t rows, columns;
  Floats a, b, c;
  Word *words, *pairs, *gram_pairs, *room;
  float *gram, *gram_squared;
};

TINYLM_VARIANT inline void iterate(const NewtonSchulz& run, float* x) {
  const std::size_t rows = run.rows, columns = run.columns;
  auto* const words = reinterpret_cast<Bf16*>(run.words);
  for (std::size_t row = 0; row < rows; row += 2) {
    for (std::size_t at = 0; at < columns; at += kWidth) {
      const RowPair place = row_pair(x, run.pairs, row, at, rows, columns);
      const Floats low = rounded_to_bf16(load(place.low)), high = rounded_to_bf16(load(place.high));
      store_pairs(place.pair, pairs_of(low, high));
      store(words + row * columns + at, low);
      store(words + (row + 1) * columns + at, high);
      store(place.low, low * run.a);
      store(place.high, high * run.a);
    }
  }
  multiply_by_itself(run.pairs, rows / 2, columns, run.room, run.gram);
  for (std::size_t row = 0; row < columns; row += 2) {
    for (std::size_t at = 0; at < columns; at += kWidth) {
      const RowPair place = row_pair(run.gram, run.gram_pairs, row, at, columns, columns);
      const Floats low = rounded_to_bf16(load(place.low)), high = rounded_to_bf16(load(place.high));
      store_pairs(place.pair, pairs_of(low, high));
      store(place.low, low);
      store(place.high, high);
    }
  }
  multiply_by_itself(run.gram_pairs, columns / 2, columns, run.room, run.gram_squared);
  for (std::size_t row = 0; row < columns; row += 2) {
    for (std::size_t at = 0; at < columns; at += kWidth) {
      const RowPair place = row_pair(run.gram, run.gram_pairs, row, at, columns, columns);
      const float* const squared = run.gram_squared + (place.low - run.gram);
      const Floats low = fma(load(place.low), run.b, load(squared) * run.c);
      const Floats high = fma(load(place.high), run.b, load(squared + columns) * run.c);
      store_pairs(place.pair, pairs_of(low, high));
    }
  }
  for (std::size_t column = 0; column < columns; column += kBlock) {
    multiply<true>({run.words, columns / 2, 1}, {run.gram_pairs + column * columns / 2, kBlock},
                   columns / 2, {x + column, columns}, rows, kBlock);
  }
}

// Momentum moves towards the gradient; `ahead` is the gradient drawn towards it (Nesterov's).
// Returns the sum of its squares.
TINYLM_VARIANT inline float follow(const MuonMatrix& matrix, float momentum, float* ahead) {
  const Floats rest = Floats::all(1.0f - momentum);
  Floats squares[2] = {Floats::all(0.0f), Floats::all(0.0f)};
  for (std::size_t at = 0; at < matrix.rows * matrix.columns; at += kWidth) {
    const Floats gradient = load(matrix.gradient + at), before = load(matrix.momentum + at);
    const Floats after = fma(rest, gradient - before, before);
    const Floats drawn = fma(rest, gradient - after, after);
    store(matrix.momentum + at, after);
    store(ahead + at, drawn);
    Floats& sum = squares[at / kWidth % 2];
    sum = fma(drawn, drawn, sum);
  }
  return sum_of(squares[0] + squares[1]);
}

TINYLM_VARIANT void muon_step(const MuonMatrix& matrix, const MuonOptions& options) {
  const bool wide = matrix.rows < matrix.columns;
  const std::size_t rows = std::max(matrix.rows, matrix.columns),
                    columns = std::min(matrix.rows, matrix.columns), count = rows * columns,
                    square = columns * columns, room = left_room(rows / 2 * kBlock);
  const MatrixUnit unit;
  Scratch scratch(3 * count + 5 * square / 2 + room);
  float* const ahead = scratch.numbers(count);
  float* const x = wide ? scratch.numbers(count) : ahead;
  const NewtonSchulz run{rows,
                         columns,
                         Floats::all(options.coefficients[0]),
                         Floats::all(options.coefficients[1]),
                         Floats::all(options.coefficients[2]),
                         scratch.words(count / 2),
                         scratch.words(count / 2),
                         scratch.words(square / 2),
                         scratch.words(room),
                         scratch.numbers(square),
                         scratch.numbers(square)};
  const float length = std::sqrt(follow(matrix, options.momentum, ahead)) + 1e-7f;
  const Floats scale = Floats::all(1.0f / length);
  for (std::size_t at = 0; at < count; at += kWidth) store(ahead + at, load(ahead + at) * scale);
  if (wide) transpose_matrix(ahead, matrix.rows, matrix.columns, x);
  for (int i = 0; i < options.iterations; ++i) iterate(run, x);
  if (wide) transpose_matrix(x, rows, columns, ahead);
  const auto aspect = static_cast<float>(matrix.rows) / static_cast<float>(matrix.columns);
  const Floats kept = Floats::all(1.0f - options.lr * options.weight_decay),
               size = Floats::all(-options.lr * std::sqrt(std::max(1.0f, aspect)));
  for (std::size_t at = 0; at < count; at += kWidth) {
    store(matrix.weight + at, fma(size, load(ahead + at), load(matrix.weight + at) * kept));
  }
}
