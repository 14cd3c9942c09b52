// How matrices of bf16 lie in memory for their products, which training_products.hpp makes of
// vectors and training_products_amx.hpp of tiles; included by each variant, see training.hpp.
//
// All multiply words of two bf16 that are neighbours along the dimension summed over. So each
// matrix is laid out once for each dimension that is summed over:
//   words       [row][pair of numbers]           as it is, the left factor of sums over its numbers
//   transposed  [pair of numbers][row]           the right factor of the same
//   interleaved [pair of rows][number]           to sum over its rows
// The last two, where they have more than a few columns, in panels: kBlock columns of all rows,
// then the next ones, so that a product walks through memory and not across it.

using Word = std::uint32_t;

// What lengths are rounded up to, and how many columns a panel has: a multiple of two vectors.
constexpr std::size_t kBlock = 32;
constexpr std::size_t kTileColumns = 2 * kWidth;
static_assert(kBlock % kTileColumns == 0 && kBlock % kTileRows == 0 && kTileRows % 2 == 0);

inline std::size_t round_up(std::size_t length) { return (length + kBlock - 1) / kBlock * kBlock; }

// The left factor: word (row, step) is data[row * row_stride + step * step_stride]; for tiles, with
// step rounded down to whole ones, in which words lie side by side.
struct Left {
  const Word* data;
  std::size_t row_stride, step_stride;

  Left from_row(std::size_t row) const {
    return {data + row * row_stride, row_stride, step_stride};
  }
  Left from_step(std::size_t step) const {
    return {data + step * step_stride, row_stride, step_stride};
  }
};

// The right factor: a vector of words (step, column) begins at data[step * stride + column].
struct Right {
  const Word* data;
  std::size_t stride;

  Right from_column(std::size_t column) const { return {data + column, stride}; }
};

struct Numbers {
  float* data;
  std::size_t stride;
};

// kTileRows × kTileColumns sums of products.
struct Tile {
  Floats sums[kTileRows][2];
};

// out (+)= left right, kTileRows × kTileColumns of it: of vectors or tiles.
template <bool accumulate>
TINYLM_VARIANT inline void multiply_tile(Left left, Right right, std::size_t steps, Numbers out);

// out (+)= left right; `rows` and `columns` are multiples of kTileRows and kTileColumns.
template <bool accumulate>
TINYLM_VARIANT void multiply(Left left, Right right, std::size_t steps, Numbers out,
                             std::size_t rows, std::size_t columns) {
  for (std::size_t column = 0; column < columns; column += kTileColumns) {
    for (std::size_t row = 0; row < rows; row += kTileRows) {
      multiply_tile<accumulate>(left.from_row(row), right.from_column(column), steps,
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
