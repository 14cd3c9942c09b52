// A model's head for the `Floats` and `Pairs` of the variant that includes this; see HeadKernels in
// training.hpp and training_matrices.hpp. Tokens are the rows of every product and rows of hidden
// states its columns: so the weights are left factors, which need no panels, and sums over the
// vocabulary are sums of vectors.

static_assert(kHeadStep == kBlock);

// Tokens whose exponentials go into the gradient of the rows while they are in the first cache.
constexpr std::size_t kTokens = 128;

// Pairs of rows whose sums the gradient of the weights takes at a time, for as many tokens as a
// panel has columns: both factors are in the first cache then.
constexpr std::size_t kRowPairs = 128;

TINYLM_VARIANT void pack_weight(const HeadShape& shape, const float* weight, std::size_t begin,
                                std::size_t end, Word* words, Word* pairs) {
  const std::size_t width = shape.width, block = kBlock / 2 * width;  // words of kBlock tokens
  const std::unique_ptr<float[]> zeros(new float[width]());
  Scratch scratch(left_room(block));
  Word* const room = scratch.words(left_room(block));
  for (std::size_t token = begin; token < round_up(end); token += kBlock) {
    Word* const packed = pairs + token / 2 * width;
    Word* const interleaved = left_room(block) == 0 ? packed : room;
    for (std::size_t t = 0; t < kBlock; t += 2) {
      const float* rows[2];
      for (std::size_t i = 0; i < 2; ++i) {
        const std::size_t own = token + t + i;
        rows[i] = own < shape.vocabulary ? weight + own * width : zeros.get();
        auto* const to = reinterpret_cast<Bf16*>(words + own * width / 2);
        for (std::size_t at = 0; at < width; at += kWidth) store(to + at, load(rows[i] + at));
      }
      Word* const to = interleaved + t / 2 * width;
      for (std::size_t at = 0; at < width; at += kWidth) {
        store_pairs(to + at, pairs_of(load(rows[0] + at), load(rows[1] + at)));
      }
    }
    left_of(interleaved, width, kBlock / 2, width, packed);
  }
}

TINYLM_VARIANT void pack_rows(const HeadShape& shape, const Bf16* h, std::size_t count,
                              Word* panels) {
  const std::size_t steps = shape.width / 2;
  for (std::size_t row = 0; row < shape.rows; ++row) {
    Word* const to = panels + row / kBlock * steps * kBlock + row % kBlock;
    for (std::size_t step = 0; step < steps; ++step) {
      Word word = 0;
      if (row < count) std::memcpy(&word, h + row * shape.width + 2 * step, sizeof word);
      to[step * kBlock] = word;
    }
  }
}

TINYLM_VARIANT void pack_scaled(const HeadShape& shape, const Bf16* h, const float* factors,
                                std::size_t count, Word* panels) {
  const std::size_t width = shape.width, pairs = shape.rows / 2;
  const std::unique_ptr<Bf16[]> zeros(new Bf16[width]());
  const auto row_at = [&](std::size_t row) { return row < count ? h + row * width : zeros.get(); };
  for (std::size_t pair = 0; pair < pairs; ++pair) {
    const Bf16 *const low = row_at(2 * pair), *const high = row_at(2 * pair + 1);
    const Floats of_low = Floats::all(factors[2 * pair]),
                 of_high = Floats::all(factors[2 * pair + 1]);
    for (std::size_t at = 0; at < width; at += kWidth) {
      store_pairs(panels + (at / kBlock * pairs + pair) * kBlock + at % kBlock,
                  pairs_of(load(low + at) * of_low, load(high + at) * of_high));
    }
  }
}

// The exponentials of a tile of logits: to `exponentials` [token][rows], to `local`, the pairs of
// tokens of one panel, and added to sum. Tokens from `known` on, of those in the tile, are none;
// `plain` tiles have only known ones, and no bias.
template <bool plain>
TINYLM_VARIANT inline void exponentials_of(const Tile& tile, const float* bias, std::size_t known,
                                           std::size_t rows, Bf16* exponentials, Word* local,
                                           float* sum) {
  for (std::size_t i = 0; i < 2; ++i) {
    Floats totals[2] = {load(sum + i * kWidth), Floats::all(0.0f)};
    for (std::size_t row = 0; row < kTileRows; row += 2) {
      Floats e[2];
      for (std::size_t j = 0; j < 2; ++j) {
        Floats z = tile.sums[row + j][i];
        const bool is_known = plain || row + j < known;
        if (!plain && bias != nullptr && is_known) z = z + Floats::all(bias[row + j]);
        e[j] = is_known ? exp(z) : Floats::all(0.0f);
        totals[j] = totals[j] + e[j];
      }
      Bf16* const to = exponentials + row * rows + i * kWidth;
      store_rows_and_pairs(e[0], e[1], to, to + rows, local + row / 2 * kBlock + i * kWidth);
    }
    store(sum + i * kWidth, totals[0] + totals[1]);
  }
}

TINYLM_VARIANT void head_forward(const HeadShape& shape, const Word* words, const Word* pairs,
                                 const float* bias, const Word* h_panels, std::size_t begin,
                                 std::size_t end, Bf16* exponentials, float* sum, float* dh) {
  const std::size_t width = shape.width, rows = shape.rows, steps = width / 2;
  const MatrixUnit unit;
  Scratch scratch(kTokens / 2 * kBlock);
  Word* const local = scratch.words(kTokens / 2 * kBlock);
  std::memset(sum, 0, rows * sizeof(float));
  for (std::size_t token = begin; token < end; token += kTokens) {
    const std::size_t count = round_up(std::min(end - token, kTokens));
    for (std::size_t row = 0; row < rows; row += kBlock) {
      for (std::size_t t = 0; t < count; t += kTileRows) {
        const std::size_t own = token + t;
        const std::size_t known = own < shape.vocabulary ? shape.vocabulary - own : 0;
        for (std::size_t column = 0; column < kBlock; column += kTileColumns) {
          const Left left{words + own * steps, steps, 1};
          const Right right{h_panels + row * steps + column, kBlock};
          const Tile tile = product(left, right, steps);
          Bf16* const to = exponentials + own * rows + row + column;
          Word* const local_to = local + t / 2 * kBlock + column;
          float* const sum_to = sum + row + column;
          if (bias == nullptr && known >= kTileRows) {
            exponentials_of<true>(tile, nullptr, known, rows, to, local_to, sum_to);
          } else {
            const float* const own_bias = bias == nullptr ? nullptr : bias + own;
            exponentials_of<false>(tile, own_bias, known, rows, to, local_to, sum_to);
          }
        }
      }
      const Left left{pairs + token / 2 * width, kLeftRowStride, width};
      const Numbers out{dh + row * width, kBlock};
      if (token == begin) {
        multiply<false>(left, {local, kBlock}, count / 2, out, width, kBlock);
      } else {
        multiply<true>(left, {local, kBlock}, count / 2, out, width, kBlock);
      }
    }
  }
}

TINYLM_VARIANT void target_logits(const HeadShape& shape, const Word* words, const float* bias,
                                  const Bf16* h, const std::int64_t* targets, std::size_t count,
                                  float* logits) {
  const auto* const weight = reinterpret_cast<const Bf16*>(words);
  for (std::size_t row = 0; row < count; ++row) {
    const auto token = static_cast<std::size_t>(targets[row]);
    Floats sums = Floats::all(0.0f);
    for (std::size_t at = 0; at < shape.width; at += kWidth) {
      sums = fma(load(h + row * shape.width + at), load(weight + token * shape.width + at), sums);
    }
    logits[row] = sum_of(sums) + (bias == nullptr ? 0.0f : bias[token]);
  }
}

TINYLM_VARIANT void weight_gradient(const HeadShape& shape, const Bf16* exponentials,
                                    const Word* scaled_panels, std::size_t begin, std::size_t end,
                                    bool accumulate, float* dweight) {
  const std::size_t width = shape.width, steps = shape.rows / 2;
  const std::size_t whole = end - (end - begin) % kTileRows;  // below it, tokens in whole tiles
  const Left left{reinterpret_cast<const Word*>(exponentials), steps, 1};
  const MatrixUnit unit;
  const auto panel_at = [&](std::size_t column, std::size_t step) {
    return Right{scaled_panels + (column / kBlock * steps + step) * kBlock + column % kBlock,
                 kBlock};
  };
  for (std::size_t token = begin; token < whole; token += kBlock) {
    const std::size_t tokens = std::min(kBlock, whole - token);
    for (std::size_t column = 0; column < width; column += kTileColumns) {
      const Numbers out{dweight + token * width + column, width};
      for (std::size_t step = 0; step < steps; step += kRowPairs) {
        const Left own = left.from_row(token).from_step(step);
        const std::size_t count = std::min(kRowPairs, steps - step);
        if (accumulate || step > 0) {
          multiply<true>(own, panel_at(column, step), count, out, tokens, kTileColumns);
        } else {
          multiply<false>(own, panel_at(column, step), count, out, tokens, kTileColumns);
        }
      }
    }
  }
  if (whole == end) return;
  for (std::size_t column = 0; column < width; column += kTileColumns) {
    float last[kTileRows * kTileColumns];
    multiply_tile<false>(left.from_row(whole), panel_at(column, 0), steps, {last, kTileColumns});
    for (std::size_t row = 0; row < end - whole; ++row) {
      for (std::size_t i = 0; i < kTileColumns; ++i) {
        float& number = dweight[(whole + row) * width + column + i];
        number = last[row * kTileColumns + i] + (accumulate ? number : 0.0f);
      }
    }
  }
}

TINYLM_VARIANT void bias_gradient(const HeadShape& shape, const Bf16* exponentials,
                                  const float* factors, std::size_t begin, std::size_t end,
                                  float* dbias) {
  for (std::size_t token = begin; token < end; ++token) {
    Floats sums = Floats::all(0.0f);
    for (std::size_t row = 0; row < shape.rows; row += kWidth) {
      sums = fma(load(exponentials + token * shape.rows + row), load(factors + row), sums);
    }
    dbias[token] += sum_of(sums);
  }
}

constexpr HeadKernels head_kernels() {
  return {kHeadRows,     &pack_weight,   &pack_rows,       &pack_scaled,
          &head_forward, &target_logits, &weight_gradient, &bias_gradient};
}
