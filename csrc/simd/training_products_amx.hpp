// Products of matrices of bf16 by the processor's tiles (Intel AMX), 16 rows of 16 words each; see
// training_matrices.hpp and, for the same by vectors, training_products.hpp. Instructions are
// written out: of GCC's own functions those that read memory do not say so.

constexpr std::size_t kUnit = 16;  // rows, and words in a row, of a tile

// Four tiles of sums at once: each tile of a factor is multiplied twice, and a sum is not needed
// again until three others are under way.
static_assert(kTileRows == 2 * kUnit && kTileColumns == 2 * kUnit && kWidth == kUnit);

// A thread's tiles while it multiplies; at the end it gives them back, so that nobody saves them.
class MatrixUnit {
 public:
  TINYLM_VARIANT MatrixUnit() {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t bytes_in_row[16] = {};
      std::uint8_t rows[16] = {};
    } shapes;
    for (std::size_t tile = 0; tile < 8; ++tile) {
      shapes.bytes_in_row[tile] = kUnit * sizeof(Word);
      shapes.rows[tile] = kUnit;
    }
    asm volatile("ldtilecfg %0" : : "m"(shapes));
  }
  TINYLM_VARIANT ~MatrixUnit() { asm volatile("tilerelease" : : : "memory"); }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
};

// A left factor has the words of a tile's row side by side; interleaved it has not, and is copied:
// kUnit pairs of rows after the other, and in them [number][pair].
constexpr std::size_t kLeftRowStride = kUnit;
constexpr std::size_t left_room(std::size_t words) { return words; }

TINYLM_VARIANT inline void transpose_unit(const Word* from, std::size_t stride, Word* to) {
  __m512i a[kUnit], b[kUnit];
  for (std::size_t i = 0; i < kUnit; ++i) a[i] = _mm512_loadu_si512(from + i * stride);
  for (std::size_t i = 0; i < kUnit; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (std::size_t i = 0; i < kUnit; i += 4) {
    for (std::size_t j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  }
  // a[4 g + c] now holds, in its lane l, rows 4 g … 4 g + 3 of column 4 l + c.
  for (std::size_t c = 0; c < 4; ++c) {
    const __m512i low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88),
                  high = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88),
                  low_odd = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xDD),
                  high_odd = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xDD);
    _mm512_storeu_si512(to + c * kUnit, _mm512_shuffle_i32x4(low, high, 0x88));
    _mm512_storeu_si512(to + (4 + c) * kUnit, _mm512_shuffle_i32x4(low_odd, high_odd, 0x88));
    _mm512_storeu_si512(to + (8 + c) * kUnit, _mm512_shuffle_i32x4(low, high, 0xDD));
    _mm512_storeu_si512(to + (12 + c) * kUnit, _mm512_shuffle_i32x4(low_odd, high_odd, 0xDD));
  }
}

// `rows` numbers of `pairs` pairs of rows, `stride` words apart, as a left factor in `room`.
TINYLM_VARIANT inline Left left_of(const Word* interleaved, std::size_t stride, std::size_t pairs,
                                   std::size_t rows, Word* room) {
  for (std::size_t pair = 0; pair < pairs; pair += kUnit) {
    for (std::size_t row = 0; row < rows; row += kUnit) {
      transpose_unit(interleaved + pair * stride + row, stride, room + pair * rows + row * kUnit);
    }
  }
  return {room, kLeftRowStride, rows};
}

#define TINYLM_LOAD_TILE(tile, from, stride_in_words)                                     \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile                                         \
               :                                                                          \
               : "r"(from), "r"(static_cast<std::size_t>(stride_in_words) * sizeof(Word)) \
               : "memory")
#define TINYLM_STORE_TILE(tile, to, stride_in_words)                                    \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)"                                   \
               :                                                                        \
               : "r"(to), "r"(static_cast<std::size_t>(stride_in_words) * sizeof(Word)) \
               : "memory")

// `steps` is a multiple of kUnit.
template <bool accumulate>
TINYLM_VARIANT inline void multiply_tile(Left left, Right right, std::size_t steps, Numbers out) {
  float* const lower = out.data + kUnit * out.stride;
  if (accumulate) {
    TINYLM_LOAD_TILE(0, out.data, out.stride);
    TINYLM_LOAD_TILE(1, out.data + kUnit, out.stride);
    TINYLM_LOAD_TILE(2, lower, out.stride);
    TINYLM_LOAD_TILE(3, lower + kUnit, out.stride);
  } else {
    asm volatile("tilezero %%tmm0; tilezero %%tmm1; tilezero %%tmm2; tilezero %%tmm3" : :);
  }
  const Word *l = left.data, *r = right.data;
  for (std::size_t step = 0; step < steps; step += kUnit) {
    TINYLM_LOAD_TILE(4, l, left.row_stride);
    TINYLM_LOAD_TILE(6, r, right.stride);
    TINYLM_LOAD_TILE(7, r + kUnit, right.stride);
    TINYLM_LOAD_TILE(5, l + kUnit * left.row_stride, left.row_stride);
    asm volatile(
        "tdpbf16ps %%tmm6, %%tmm4, %%tmm0; tdpbf16ps %%tmm7, %%tmm4, %%tmm1;"
        "tdpbf16ps %%tmm6, %%tmm5, %%tmm2; tdpbf16ps %%tmm7, %%tmm5, %%tmm3"
        :
        :);
    l += kUnit * left.step_stride;
    r += kUnit * right.stride;
  }
  TINYLM_STORE_TILE(0, out.data, out.stride);
  TINYLM_STORE_TILE(1, out.data + kUnit, out.stride);
  TINYLM_STORE_TILE(2, lower, out.stride);
  TINYLM_STORE_TILE(3, lower + kUnit, out.stride);
}

#undef TINYLM_LOAD_TILE
#undef TINYLM_STORE_TILE

TINYLM_VARIANT inline Tile product(Left left, Right right, std::size_t steps) {
  Tile tile;
  multiply_tile<false>(left, right, steps, {reinterpret_cast<float*>(tile.sums), kTileColumns});
  return tile;
}
