// Products of matrices of bf16 by vectors, for the `Floats` and `Pairs` of the variant that
// includes this; see training_matrices.hpp. A word of the left factor, in every lane, is multiplied
// with a vector of words of the right.

// What products need of a thread; nothing here (the constructor keeps it from being called unused).
struct MatrixUnit {
  MatrixUnit() {}
};

// How far apart two rows are in an interleaved matrix that is a left factor, and the words that
// copying one for that takes: here it is one as it is.
constexpr std::size_t kLeftRowStride = 1;
constexpr std::size_t left_room(std::size_t) { return 0; }

// `rows` numbers of `pairs` pairs of rows, `stride` words apart, as a left factor.
inline Left left_of(const Word* interleaved, std::size_t stride, std::size_t, std::size_t, Word*) {
  return {interleaved, kLeftRowStride, stride};
}

// The sum of `tile` and a product, in registers. By value: with a reference, compilers write every
// sum to memory at every step.
TINYLM_VARIANT inline Tile plus_product(Tile tile, Left left, Right right, std::size_t steps) {
  for (std::size_t step = 0; step < steps; ++step) {
    const Word* const r = right.data + step * right.stride;
    const Pairs b[2] = {load_pairs(r), load_pairs(r + kWidth)};
    const Word* l = left.data + step * left.step_stride;
    for (std::size_t row = 0; row < kTileRows; ++row, l += left.row_stride) {
      const Pairs a = all_pairs(*l);
      for (std::size_t i = 0; i < 2; ++i) {
        tile.sums[row][i] = add_products(tile.sums[row][i], a, b[i]);
      }
    }
  }
  return tile;
}

TINYLM_VARIANT inline Tile product(Left left, Right right, std::size_t steps) {
  Tile tile;
  for (auto& row : tile.sums) row[0] = row[1] = Floats::all(0.0f);
  return plus_product(tile, left, right, steps);
}

template <bool accumulate>
TINYLM_VARIANT inline void multiply_tile(Left left, Right right, std::size_t steps, Numbers out) {
  Tile tile;
  if (accumulate) {
    for (std::size_t row = 0; row < kTileRows; ++row) {
      for (std::size_t i = 0; i < 2; ++i) {
        tile.sums[row][i] = load(out.data + row * out.stride + i * kWidth);
      }
    }
    tile = plus_product(tile, left, right, steps);
  } else {
    tile = product(left, right, steps);
  }
  for (std::size_t row = 0; row < kTileRows; ++row) {
    for (std::size_t i = 0; i < 2; ++i) {
      store(out.data + row * out.stride + i * kWidth, tile.sums[row][i]);
    }
  }
}
