// Causal attention by blocks of queries (Dao et al. 2022), for the `Floats` and `Pairs` of the
// variant that includes this; see training.hpp and training_matrices.hpp. Scores are never in
// memory beyond one block of queries (kBlock of them); backward computes them again.

static_assert(kAttentionWidthStep % kTileColumns == 0);

// One head's vectors, in rows of `width` numbers, zeros beyond the last.
TINYLM_VARIANT inline void copy_words(const Bf16* from, std::size_t stride, std::size_t length,
                                      std::size_t padded, std::size_t width, Word* words) {
  for (std::size_t t = 0; t < length; ++t) {
    std::memcpy(words + t * width / 2, from + t * stride, width * sizeof(Bf16));
  }
  std::memset(words + length * width / 2, 0, (padded - length) * width * sizeof(Bf16));
}

TINYLM_VARIANT inline void transpose(const Word* words, std::size_t padded, std::size_t width,
                                     Word* transposed) {
  const std::size_t pairs = width / 2;
  constexpr std::size_t kTile = 16;  // rows and pairs whose cache lines stay in the first cache
  for (std::size_t t = 0; t < padded; t += kTile) {
    for (std::size_t p = 0; p < pairs; ++p) {
      for (std::size_t i = 0; i < kTile; ++i) {
        transposed[p * padded + t + i] = words[(t + i) * pairs + p];
      }
    }
  }
}

TINYLM_VARIANT inline void interleave(const Word* words, std::size_t padded, std::size_t width,
                                      Word* interleaved) {
  const auto* numbers = reinterpret_cast<const Bf16*>(words);
  for (std::size_t t = 0; t < padded; t += 2, numbers += 2 * width, interleaved += width) {
    for (std::size_t at = 0; at < width; at += kWidth) {
      store_pairs(interleaved + at, pairs_of(numbers + at, numbers + width + at));
    }
  }
}

// exp((s - top) scale) of the first `seen` scores, 0 beyond them, as bf16; returns their sum.
struct Softmax {
  float top, sum;
};

TINYLM_VARIANT inline Softmax softmax_row(const float* scores, std::size_t seen, std::size_t end,
                                          float scale, Bf16* weights) {
  const float lowest = -std::numeric_limits<float>::infinity();
  Floats tops = Floats::all(lowest);
  for (std::size_t j = 0; j < seen; j += kWidth) {
    tops = largest(tops, first(load(scores + j), seen - j, lowest));
  }
  const float top = largest_of(tops) * scale;
  Floats sums = Floats::all(0.0f);
  const Floats factor = Floats::all(scale), shift = Floats::all(-top);
  for (std::size_t j = 0; j < end; j += kWidth) {
    Floats e = exp(fma(load(scores + j), factor, shift));
    if (j + kWidth > seen) e = first(e, seen > j ? seen - j : 0, 0.0f);
    sums = sums + e;
    store(weights + j, e);
  }
  return {top, sum_of(sums)};
}

TINYLM_VARIANT inline void store_row(const float* from, float factor, Bf16* to, std::size_t width) {
  for (std::size_t at = 0; at < width; at += kWidth) {
    store(to + at, load(from + at) * Floats::all(factor));
  }
}

TINYLM_VARIANT void attention_forward(const AttentionShape& shape, HeadVectors<const Bf16> q,
                                      HeadVectors<const Bf16> k, HeadVectors<const Bf16> v,
                                      HeadVectors<Bf16> out, float* lse, std::size_t begin,
                                      std::size_t end) {
  const std::size_t T = shape.length, D = shape.width, padded = round_up(T);
  const std::size_t matrix = padded * D / 2;
  const MatrixUnit unit;
  Scratch scratch(4 * matrix + kBlock * (padded + padded / 2 + D));
  Word* const words = scratch.words(matrix);  // of k, then of v, then of q
  Word* const k_transposed = scratch.words(matrix);
  Word* const v_interleaved = scratch.words(matrix);
  float* const scores = scratch.numbers(kBlock * padded);
  Word* const weights = scratch.words(kBlock * padded / 2);
  float* const sums = scratch.numbers(kBlock * D);
  for (std::size_t place = begin; place < end; ++place) {
    const std::size_t b = place / shape.heads, h = place % shape.heads;
    copy_words(k.at(b, h), k.stride.time, T, padded, D, words);
    transpose(words, padded, D, k_transposed);
    copy_words(v.at(b, h), v.stride.time, T, padded, D, words);
    interleave(words, padded, D, v_interleaved);
    copy_words(q.at(b, h), q.stride.time, T, padded, D, words);
    for (std::size_t start = 0; start < T; start += kBlock) {
      const std::size_t keys = start + kBlock;
      multiply<false>({words + start * D / 2, D / 2, 1}, {k_transposed, padded}, D / 2,
                      {scores, padded}, kBlock, keys);
      Softmax rows[kBlock];
      for (std::size_t i = 0; i < kBlock; ++i) {
        rows[i] = softmax_row(scores + i * padded, start + i + 1, keys, shape.scale,
                              reinterpret_cast<Bf16*>(weights + i * padded / 2));
      }
      multiply<false>({weights, padded / 2, 1}, {v_interleaved, D}, keys / 2, {sums, D}, kBlock, D);
      for (std::size_t i = 0; i < kBlock && start + i < T; ++i) {
        store_row(sums + i * D, 1.0f / rows[i].sum, out.at(b, h) + (start + i) * out.stride.time,
                  D);
        lse[place * T + start + i] = rows[i].top + std::log(rows[i].sum);
      }
    }
  }
}

// With p the softmax, dp = dout vᵀ: ds = p (dp - Σ p dp), of two neighbouring queries, of which
// the first sees `seen` keys. Writes p and ds in words of both queries, ds also as rows.
struct TwoRows {
  const float *scores, *dp;  // the second row is `stride` further
  std::size_t stride;
  float lse[2];
};

TINYLM_VARIANT inline void softmax_rows_backward(TwoRows rows, std::size_t seen, std::size_t end,
                                                 float scale, float* p, Word* p_pairs,
                                                 Word* ds_pairs, Bf16* ds) {
  Floats delta[2];
  for (std::size_t row = 0; row < 2; ++row) {
    const Floats factor = Floats::all(scale), shift = Floats::all(-rows.lse[row]);
    Floats sums = Floats::all(0.0f);
    for (std::size_t j = 0; j < end; j += kWidth) {
      const std::size_t at = row * rows.stride + j;
      Floats e = exp(fma(load(rows.scores + at), factor, shift));
      if (j + kWidth > seen + row) e = first(e, seen + row > j ? seen + row - j : 0, 0.0f);
      sums = fma(e, load(rows.dp + at), sums);
      store(p + at, e);
    }
    delta[row] = Floats::all(sum_of(sums));
  }
  for (std::size_t j = 0; j < end; j += kWidth) {
    const Floats low = load(p + j), high = load(p + rows.stride + j);
    store_pairs(p_pairs + j, pairs_of(low, high));
    const Floats ds_low = low * (load(rows.dp + j) - delta[0]);
    const Floats ds_high = high * (load(rows.dp + rows.stride + j) - delta[1]);
    store_pairs(ds_pairs + j, pairs_of(ds_low, ds_high));
    store(ds + j, ds_low);
    store(ds + rows.stride + j, ds_high);
  }
}

TINYLM_VARIANT void attention_backward(const AttentionShape& shape, HeadVectors<const Bf16> q,
                                       HeadVectors<const Bf16> k, HeadVectors<const Bf16> v,
                                       const float* lse, HeadVectors<const Bf16> dout,
                                       HeadVectors<Bf16> dq, HeadVectors<Bf16> dk,
                                       HeadVectors<Bf16> dv, std::size_t begin, std::size_t end) {
  const std::size_t T = shape.length, D = shape.width, padded = round_up(T);
  const std::size_t matrix = padded * D / 2;
  const MatrixUnit unit;
  Scratch scratch(12 * matrix + kBlock * (2 * padded + 3 * padded / 2 + D) +
                  left_room(kBlock * padded / 2));
  Word* const words = scratch.words(matrix);  // of k and v
  Word* const k_transposed = scratch.words(matrix);
  Word* const k_interleaved = scratch.words(matrix);
  Word* const v_transposed = scratch.words(matrix);
  Word* const q_words = scratch.words(matrix);
  Word* const q_interleaved = scratch.words(matrix);
  Word* const dout_words = scratch.words(matrix);
  Word* const dout_interleaved = scratch.words(matrix);
  float* const dk_sums = scratch.numbers(2 * matrix);
  float* const dv_sums = scratch.numbers(2 * matrix);
  float* const scores = scratch.numbers(kBlock * padded);  // then the softmax
  float* const dp = scratch.numbers(kBlock * padded);
  Word* const p_pairs = scratch.words(kBlock * padded / 2);
  Word* const ds_pairs = scratch.words(kBlock * padded / 2);
  Word* const ds_words = scratch.words(kBlock * padded / 2);
  float* const sums = scratch.numbers(kBlock * D);
  Word* const left = scratch.words(left_room(kBlock * padded / 2));
  for (std::size_t place = begin; place < end; ++place) {
    const std::size_t b = place / shape.heads, h = place % shape.heads;
    copy_words(v.at(b, h), v.stride.time, T, padded, D, words);
    transpose(words, padded, D, v_transposed);
    copy_words(k.at(b, h), k.stride.time, T, padded, D, words);
    transpose(words, padded, D, k_transposed);
    interleave(words, padded, D, k_interleaved);
    copy_words(q.at(b, h), q.stride.time, T, padded, D, q_words);
    interleave(q_words, padded, D, q_interleaved);
    copy_words(dout.at(b, h), dout.stride.time, T, padded, D, dout_words);
    interleave(dout_words, padded, D, dout_interleaved);
    std::memset(dk_sums, 0, 2 * matrix * sizeof(float));
    std::memset(dv_sums, 0, 2 * matrix * sizeof(float));
    for (std::size_t start = 0; start < T; start += kBlock) {
      const std::size_t keys = start + kBlock;
      multiply<false>({q_words + start * D / 2, D / 2, 1}, {k_transposed, padded}, D / 2,
                      {scores, padded}, kBlock, keys);
      multiply<false>({dout_words + start * D / 2, D / 2, 1}, {v_transposed, padded}, D / 2,
                      {dp, padded}, kBlock, keys);
      for (std::size_t i = 0; i < kBlock; i += 2) {
        // Queries beyond the last have dout 0 and add nothing, whatever their scores are.
        const auto lse_of = [&](std::size_t t) { return t < T ? lse[place * T + t] : 0.0f; };
        softmax_rows_backward({scores + i * padded,
                               dp + i * padded,
                               padded,
                               {lse_of(start + i), lse_of(start + i + 1)}},
                              start + i + 1, keys, shape.scale, scores + i * padded,
                              p_pairs + i / 2 * padded, ds_pairs + i / 2 * padded,
                              reinterpret_cast<Bf16*>(ds_words) + i * padded);
      }
      multiply<false>({ds_words, padded / 2, 1}, {k_interleaved, D}, keys / 2, {sums, D}, kBlock,
                      D);
      for (std::size_t i = 0; i < kBlock && start + i < T; ++i) {
        store_row(sums + i * D, shape.scale, dq.at(b, h) + (start + i) * dq.stride.time, D);
      }
      const std::size_t queries = start / 2 * D;  // where those of the block begin
      multiply<true>(left_of(ds_pairs, padded, kBlock / 2, keys, left),
                     {q_interleaved + queries, D}, kBlock / 2, {dk_sums, D}, keys, D);
      multiply<true>(left_of(p_pairs, padded, kBlock / 2, keys, left),
                     {dout_interleaved + queries, D}, kBlock / 2, {dv_sums, D}, keys, D);
    }
    for (std::size_t t = 0; t < T; ++t) {
      store_row(dk_sums + t * D, shape.scale, dk.at(b, h) + t * dk.stride.time, D);
      store_row(dv_sums + t * D, 1.0f, dv.at(b, h) + t * dv.stride.time, D);
    }
  }
}

constexpr AttentionKernels attention_kernels() { return {&attention_forward, &attention_backward}; }
