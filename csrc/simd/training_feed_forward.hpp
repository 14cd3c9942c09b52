// A gated feed-forward layer with its norm and residual, for the `Floats` and `Pairs` of the
// variant that includes this; see FeedForwardKernels in training.hpp and training_projections.hpp.
// Some rows at a time, all that comes between x and the sum stays in cache.

TINYLM_VARIANT void feed_forward(const FeedForwardShape& shape, const float* x, const Word* up,
                                 const Word* down, std::size_t begin, std::size_t end, float* out,
                                 Bf16* h) {
  const std::size_t C = shape.width, F = shape.hidden;
  const NormRows norm{C, shape.norm_weight, shape.eps};
  const MatrixUnit unit;
  Scratch scratch(kRowsAtATime * (C / 2 + F / 2 + C + 1));
  Word* const normed = scratch.words(kRowsAtATime * C / 2);
  Word* const active = scratch.words(kRowsAtATime * F / 2);
  float* const sums = scratch.numbers(kRowsAtATime * C);
  float* const r = scratch.numbers(kRowsAtATime);
  for (std::size_t start = begin; start < end; start += kRowsAtATime) {
    const std::size_t count = std::min(end - start, kRowsAtATime), padded = round_up(count);
    normed_rows(norm, x + start * C, count, padded, reinterpret_cast<Bf16*>(normed), r);
    for (std::size_t column = 0; column < F; column += kTileColumns) {
      const auto panel = [&](std::size_t at) {
        return Right{up + at / kBlock * C / 2 * kBlock + at % kBlock, kBlock};
      };
      for (std::size_t row = 0; row < padded; row += kTileRows) {
        const Left left{normed + row * C / 2, C / 2, 1};
        const Tile gates = product(left, panel(column), C / 2);
        const Tile values = product(left, panel(F + column), C / 2);
        for (std::size_t t = 0; t < kTileRows; ++t) {
          for (std::size_t i = 0; i < 2; ++i) {
            const std::size_t at = column + i * kWidth;
            const Floats gate = gates.sums[t][i], value = values.sums[t][i];
            store(reinterpret_cast<Bf16*>(active) + (row + t) * F + at,
                  gate * sigmoid(gate) * value);
            if (row + t >= count) continue;
            Bf16* const kept = h + (start + row + t) * 2 * F + at;
            store(kept, gate);
            store(kept + F, value);
          }
        }
      }
    }
    multiply_rows(active, F / 2, down, padded, sums, C);
    for (std::size_t at = 0; at < count * C; at += kWidth) {
      store(out + start * C + at, load(x + start * C + at) + load(sums + at));
    }
  }
}

// With s = sigmoid(gate), a = gate s value: da / d gate = value s (1 + gate (1 - s)).
struct GatedBackward {
  const Bf16* h[2];  // of two rows: gates, and values `hidden` numbers further
  std::size_t hidden;
  Bf16* dh[2];
  Word *dgate_pairs, *dvalue_pairs, *active_pairs;
};

TINYLM_VARIANT inline void gated_backward(const GatedBackward& rows, Floats d_low, Floats d_high) {
  const Floats one = Floats::all(1.0f), d[2] = {d_low, d_high};
  Floats active[2], dgate[2], dvalue[2];
  for (std::size_t j = 0; j < 2; ++j) {
    const Floats gate = load(rows.h[j]), value = load(rows.h[j] + rows.hidden);
    const Floats s = sigmoid(gate), silu = gate * s;
    active[j] = silu * value;
    dvalue[j] = d[j] * silu;
    dgate[j] = d[j] * value * (s * fma(gate, one - s, one));
  }
  store_rows_and_pairs(dgate[0], dgate[1], rows.dh[0], rows.dh[1], rows.dgate_pairs);
  store_rows_and_pairs(dvalue[0], dvalue[1], rows.dh[0] + rows.hidden, rows.dh[1] + rows.hidden,
                       rows.dvalue_pairs);
  store_pairs(rows.active_pairs, pairs_of(active[0], active[1]));
}

TINYLM_VARIANT void feed_forward_backward(const FeedForwardShape& shape, const float* x,
                                          const Word* up, const Word* down, const Bf16* h,
                                          const float* dout, std::size_t begin, std::size_t end,
                                          float* dx, const FeedForwardSums& sums) {
  const std::size_t C = shape.width, F = shape.hidden, most_pairs = kRowsAtATime / 2;
  const NormRows norm{C, shape.norm_weight, shape.eps};
  const MatrixUnit unit;
  Scratch scratch(most_pairs * (4 * C + 5 * F + 2 * C) + kRowsAtATime + F +
                  left_room(most_pairs * kBlock));
  Word* const normed = scratch.words(most_pairs * C);
  Word* const normed_pairs = scratch.words(most_pairs * C);
  Word* const dout_words = scratch.words(most_pairs * C);
  Word* const dout_pairs = scratch.words(most_pairs * C);
  Word* const dh = scratch.words(most_pairs * 2 * F);
  Word* const dh_pairs = scratch.words(most_pairs * 2 * F);
  Word* const active_pairs = scratch.words(most_pairs * F);
  float* const dnormed = scratch.numbers(kRowsAtATime * C);
  float* const r = scratch.numbers(kRowsAtATime);
  Word* const nothing = scratch.words(F);  // h of rows beyond the last
  Word* const room = scratch.words(left_room(most_pairs * kBlock));
  std::memset(nothing, 0, F * sizeof(Word));
  std::memset(sums.dnorm_weight, 0, C * sizeof(float));
  for (std::size_t start = begin; start < end; start += kRowsAtATime) {
    const std::size_t count = std::min(end - start, kRowsAtATime), padded = round_up(count),
                      pairs = padded / 2;
    const float *const x_rows = x + start * C, *const dout_rows = dout + start * C;
    normed_rows(norm, x_rows, count, padded, reinterpret_cast<Bf16*>(normed), r);
    interleave_rows(reinterpret_cast<Bf16*>(normed), padded, C, normed_pairs);
    round_rows(dout_rows, count, padded, C, reinterpret_cast<Bf16*>(dout_words));
    interleave_rows(reinterpret_cast<Bf16*>(dout_words), padded, C, dout_pairs);
    const auto h_of = [&](std::size_t row) {
      return row < count ? h + (start + row) * 2 * F : reinterpret_cast<const Bf16*>(nothing);
    };
    const auto dh_of = [&](std::size_t row) { return reinterpret_cast<Bf16*>(dh) + row * 2 * F; };
    for (std::size_t column = 0; column < F; column += kTileColumns) {
      const Right right{down + column / kBlock * C / 2 * kBlock + column % kBlock, kBlock};
      for (std::size_t row = 0; row < padded; row += kTileRows) {
        const Tile d = product({dout_words + row * C / 2, C / 2, 1}, right, C / 2);
        for (std::size_t t = 0; t < kTileRows; t += 2) {
          for (std::size_t i = 0; i < 2; ++i) {
            const std::size_t low = row + t, at = column + i * kWidth,
                              place = (at / kBlock * pairs + low / 2) * kBlock + at % kBlock;
            gated_backward({{h_of(low) + at, h_of(low + 1) + at},
                            F,
                            {dh_of(low) + at, dh_of(low + 1) + at},
                            dh_pairs + place,
                            dh_pairs + place + F * pairs,
                            active_pairs + place},
                           d.sums[t][i], d.sums[t + 1][i]);
          }
        }
      }
    }
    multiply_rows(dh, F, up, padded, dnormed, C);
    const bool accumulate = start > begin;
    sum_over_rows(dh_pairs, 2 * F, normed_pairs, C, pairs, accumulate, room, sums.dup);
    sum_over_rows(dout_pairs, C, active_pairs, F, pairs, accumulate, room, sums.ddown);
    float* const dx_rows = dx + start * C;
    for (std::size_t row = 0; row < count; ++row) {
      norm_vector_backward(x_rows + row * C, r[row], shape.norm_weight, dnormed + row * C,
                           dx_rows + row * C, sums.dnorm_weight, C);
    }
    for (std::size_t at = 0; at < count * C; at += kWidth) {
      store(dx_rows + at, load(dx_rows + at) + load(dout_rows + at));
    }
  }
}

constexpr FeedForwardKernels feed_forward_kernels() {
  return {&feed_forward, &feed_forward_backward};
}
