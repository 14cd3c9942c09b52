// Products of matrices of bf16, for the `Floats` and `Pairs` of the variant that includes this; see
// training.hpp and training_rows.hpp.
//
// All multiply words of two bf16 that are neighbours along the dimension summed over: one such word
// of the left factor, in every lane, with a vector of them of the right. So each matrix is laid out
// once for each dimension that is summed over:
//   words       [row][pair of numbers]           as it is
//   transposed  [pair of numbers][row]           to sum over its numbers, as the right factor
//   interleaved [pair of rows][number]           to sum over its rows
// The last two, where they have more than a few columns, in panels: kBlock columns of all rows,
// then the next ones, so that a product walks through memory and not across it.

using Word = std::uint32_t;

// What lengths are rounded up to, and how many columns a panel has: a multiple of two vectors.
constexpr std::size_t kBlock = 32;
constexpr std::size_t kTileColumns = 2 * kWidth;
static_assert(kBlock % kTileColumns == 0 && kBlock % kTileRows == 0 && kTileRows % 2 == 0);

inline std::size_t round_up(std::size_t length) { return (length + kBlock - 1) / kBlock * kBlock; }

// The left factor: word (row, step) is data[row * row_stride + step * step_stride].
struct Left {
  const Word* data;
  std::size_t row_stride, step_stride;
};

// The right factor: a vector of words (step, column) begins at data[step * stride + column].
struct Right {
  const Word* data;
  std::size_t stride;
};

struct Numbers {
  float* data;
  std::size_t stride;
};

// kTileRows × kTileColumns sums of products, in registers.
struct Tile {
  Floats sums[kTileRows][2];
};

TINYLM_VARIANT inline Tile zeros() {
  Tile tile;
  for (auto& row : tile.sums) row[0] = row[1] = Floats::all(0.0f);
  return tile;
}

// The sum of `tile` and a product. By value: with a reference, compilers write every sum to memory
// at every step.
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

// out (+)= left right, kTileRows × kTileColumns of it.
template <bool accumulate>
TINYLM_VARIANT inline void multiply_tile(Left left, Right right, std::size_t steps, Numbers out) {
  Tile tile = zeros();
  if (accumulate) {
    for (std::size_t row = 0; row < kTileRows; ++row) {
      for (std::size_t i = 0; i < 2; ++i) {
        tile.sums[row][i] = load(out.data + row * out.stride + i * kWidth);
      }
    }
  }
  tile = plus_product(tile, left, right, steps);
  for (std::size_t row = 0; row < kTileRows; ++row) {
    for (std::size_t i = 0; i < 2; ++i) {
      store(out.data + row * out.stride + i * kWidth, tile.sums[row][i]);
    }
  }
}

template <bool accumulate>
TINYLM_VARIANT void multiply(Left left, Right right, std::size_t steps, Numbers out,
                             std::size_t rows, std::size_t columns) {
  for (std::size_t column = 0; column < columns; column += kTileColumns) {
    for (std::size_t row = 0; row < rows; row += kTileRows) {
      multiply_tile<accumulate>(
          {left.data + row * left.row_stride, left.row_stride, left.step_stride},
          {right.data + column, right.stride}, steps,
          {out.data + row * out.stride + column, out.stride});
    }
  }
}

// Memory on whole cache lines, given out piece by piece.
class Scratch {
 public:
  explicit Scratch(std::size_t words) : memory_(new Word[words + kLine]), next_(memory_.get()) {
    const auto address = reinterpret_cast<std::uintptr_t>(next_);
    next_ += (kLine - address / sizeof(Word) % kLine) % kLine;
  }
  Word* words(std::size_t count) { return std::exchange(next_, next_ + count); }
  float* numbers(std::size_t count) { return reinterpret_cast<float*>(words(count)); }

 private:
  static constexpr std::size_t kLine = 64 / sizeof(Word);
  std::unique_ptr<Word[]> memory_;
  Word* next_;
};
