// The passes over rows, for the `Floats` of the variant that includes this, which defines
// TINYLM_VARIANT for the functions of its instruction set. See training.hpp.

// 2^x for what exp() needs of it: degree 5, within 8e-8 (a fit by Chebyshev weights).
TINYLM_VARIANT inline Floats exp(Floats x) {
  // Beyond these the result is infinite or 0; a NaN stays one.
  x = largest(Floats::all(-110.0f), smallest(Floats::all(95.0f), x));
  const Floats magic = Floats::all(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
  const Floats shifted = fma(x, Floats::all(1.44269504f), magic);
  const Floats whole = shifted - magic;
  Floats f = fma(x, Floats::all(1.44269502f), Floats::all(0.0f) - whole);
  f = fma(x, Floats::all(1.92596303e-8f), f);
  Floats p = Floats::all(1.327647152e-03f);
  p = fma(p, f, Floats::all(9.675541331e-03f));
  p = fma(p, f, Floats::all(5.550713275e-02f));
  p = fma(p, f, Floats::all(2.402211972e-01f));
  p = fma(p, f, Floats::all(6.931469671e-01f));
  p = fma(p, f, Floats::all(1.0f));
  return times_power_of_two(p, whole, shifted);
}

TINYLM_VARIANT inline Floats sigmoid(Floats x) {
  return Floats::all(1.0f) / (Floats::all(1.0f) + exp(Floats::all(0.0f) - x));
}

// The first n of a vector's numbers, the others `rest`; and back.
template <class T>
TINYLM_VARIANT inline Floats load_some(const T* from, std::size_t n, float rest) {
  float numbers[kWidth];
  for (std::size_t i = 0; i < kWidth; ++i) numbers[i] = rest;
  for (std::size_t i = 0; i < n; ++i) numbers[i] = to_float(from[i]);
  return load(numbers);
}

template <class T>
TINYLM_VARIANT inline void store_some(T* to, std::size_t n, Floats x) {
  T numbers[kWidth];
  store(numbers, x);
  for (std::size_t i = 0; i < n; ++i) to[i] = numbers[i];
}

// Numbers [at, at + kWidth) of a row of `columns`, whose last vector may be a part of one.
template <class T>
TINYLM_VARIANT inline Floats load_at(const T* row, std::size_t at, std::size_t columns,
                                     float rest = 0.0f) {
  return at + kWidth <= columns ? load(row + at) : load_some(row + at, columns - at, rest);
}

template <class T>
TINYLM_VARIANT inline void store_at(T* row, std::size_t at, std::size_t columns, Floats x) {
  if (at + kWidth <= columns) {
    store(row + at, x);
  } else {
    store_some(row + at, columns - at, x);
  }
}

template <class T>
TINYLM_VARIANT void exponentials(T* x, std::size_t rows, std::size_t columns, float* top,
                                 float* sum) {
  const float lowest = -std::numeric_limits<float>::infinity();
  for (std::size_t row = 0; row < rows; ++row, x += columns) {
    Floats tops[2] = {Floats::all(lowest), Floats::all(lowest)};
    std::size_t at = 0;
    for (; at + 2 * kWidth <= columns; at += 2 * kWidth) {
      for (std::size_t i = 0; i < 2; ++i) tops[i] = largest(tops[i], load(x + at + i * kWidth));
    }
    for (; at < columns; at += kWidth) tops[0] = largest(tops[0], load_at(x, at, columns, lowest));
    top[row] = largest_of(largest(tops[0], tops[1]));
    const Floats shift = Floats::all(top[row]);
    Floats sums[2] = {Floats::all(0.0f), Floats::all(0.0f)};
    for (at = 0; at + 2 * kWidth <= columns; at += 2 * kWidth) {
      for (std::size_t i = 0; i < 2; ++i) {
        const Floats e = exp(load(x + at + i * kWidth) - shift);
        sums[i] = sums[i] + e;
        store(x + at + i * kWidth, e);
      }
    }
    for (; at < columns; at += kWidth) {
      const Floats e = exp(load_at(x, at, columns, lowest) - shift);
      sums[0] = sums[0] + e;
      store_at(x, at, columns, e);
    }
    sum[row] = sum_of(sums[0] + sums[1]);
  }
}

template <class T>
TINYLM_VARIANT void swiglu(const T* x, T* out, std::size_t rows, std::size_t width) {
  for (std::size_t row = 0; row < rows; ++row, x += 2 * width, out += width) {
    for (std::size_t at = 0; at < width; at += kWidth) {
      const Floats gate = load_at(x, at, width);
      store_at(out, at, width, gate * sigmoid(gate) * load_at(x + width, at, width));
    }
  }
}

// With s = sigmoid(gate): d silu / d gate = s (1 + gate (1 - s)).
template <class T>
TINYLM_VARIANT void swiglu_backward(const T* x, const T* dout, T* dx, std::size_t rows,
                                    std::size_t width) {
  const Floats one = Floats::all(1.0f);
  for (std::size_t row = 0; row < rows; ++row, x += 2 * width, dx += 2 * width, dout += width) {
    for (std::size_t at = 0; at < width; at += kWidth) {
      const Floats gate = load_at(x, at, width);
      const Floats d = load_at(dout, at, width);
      const Floats s = sigmoid(gate);
      const Floats slope = s * fma(gate, one - s, one);
      store_at(dx, at, width, d * load_at(x + width, at, width) * slope);
      store_at(dx + width, at, width, d * gate * s);
    }
  }
}

// Both halves of (low, high) turned by the angles at `at`, or back.
struct Turned {
  Floats low, high;
};

TINYLM_VARIANT inline Turned turn(Floats low, Floats high, const float* cos, const float* sin,
                                  std::size_t at, std::size_t half, bool back) {
  const Floats cos_low = load_at(cos, at, half), cos_high = load_at(cos + half, at, half);
  const Floats sin_low = load_at(sin, at, half), sin_high = load_at(sin + half, at, half);
  const Floats zero = Floats::all(0.0f);
  if (back) {
    return {fma(low, cos_low, high * sin_high), fma(high, cos_high, zero - low * sin_low)};
  }
  return {fma(low, cos_low, zero - high * sin_low), fma(high, cos_high, low * sin_high)};
}

template <class T>
TINYLM_VARIANT inline float inverse_length(const T* x, std::size_t width, float eps) {
  Floats squares = Floats::all(0.0f);
  for (std::size_t at = 0; at < width; at += kWidth) {
    const Floats number = load_at(x, at, width);
    squares = fma(number, number, squares);
  }
  return 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(width) + eps);
}

template <class T>
TINYLM_VARIANT void norm_rotary(const NormShape& shape, const T* x, T* out, float* r,
                                std::size_t begin, std::size_t end) {
  const std::size_t width = shape.width, half = width / 2;
  for (std::size_t row = begin; row < end; ++row) {
    for (std::size_t head = 0; head < shape.heads; ++head) {
      const T* const from = x + row * shape.stride + head * width;
      const std::size_t place = row * shape.heads + head;
      const float* const weight = shape.weight + head * width;
      T* const to = out + place * width;
      r[place] = inverse_length(from, width, shape.eps);
      const Floats scale = Floats::all(r[place]);
      const std::size_t angles = row % shape.rotation.positions * width;
      for (std::size_t at = 0; at < half; at += kWidth) {
        const Floats low = load_at(from, at, half) * scale * load_at(weight, at, half);
        const Floats high =
            load_at(from + half, at, half) * scale * load_at(weight + half, at, half);
        const Turned turned = turn(low, high, shape.rotation.cos + angles,
                                   shape.rotation.sin + angles, at, half, false);
        store_at(to, at, half, turned.low);
        store_at(to + half, at, half, turned.high);
      }
    }
  }
}

// One vector: with x̂ = x r and g = weight dy, dx = r (g - x̂ mean(g x̂)), dweight += dy x̂.
template <class T, class Out>
TINYLM_VARIANT inline void norm_vector_backward(const T* x, float r, const float* weight,
                                                const Out* dy, T* dx, float* dweight,
                                                std::size_t width) {
  const Floats scale = Floats::all(r);
  Floats sums = Floats::all(0.0f);
  for (std::size_t at = 0; at < width; at += kWidth) {
    const Floats both = load_at(x, at, width) * scale * load_at(dy, at, width);
    store_at(dweight, at, width, load_at(dweight, at, width) + both);
    sums = fma(both, load_at(weight, at, width), sums);
  }
  const Floats mean = Floats::all(sum_of(sums) / static_cast<float>(width));
  for (std::size_t at = 0; at < width; at += kWidth) {
    const Floats g = load_at(dy, at, width) * load_at(weight, at, width);
    const Floats x_hat = load_at(x, at, width) * scale;
    store_at(dx, at, width, scale * (g - x_hat * mean));
  }
}

template <class T>
TINYLM_VARIANT void norm_rotary_backward(const NormShape& shape, const T* x, const float* r,
                                         const T* dout, T* dx, float* dweight, std::size_t begin,
                                         std::size_t end) {
  const std::size_t width = shape.width, half = width / 2;
  const std::unique_ptr<float[]> dy(new float[width + kWidth]);
  for (std::size_t row = begin; row < end; ++row) {
    for (std::size_t head = 0; head < shape.heads; ++head) {
      const std::size_t place = row * shape.heads + head;
      const T* const d = dout + place * width;
      const std::size_t angles = row % shape.rotation.positions * width;
      for (std::size_t at = 0; at < half; at += kWidth) {
        const Turned turned =
            turn(load_at(d, at, half), load_at(d + half, at, half), shape.rotation.cos + angles,
                 shape.rotation.sin + angles, at, half, true);
        store_at(dy.get(), at, half, turned.low);
        store_at(dy.get() + half, at, half, turned.high);
      }
      norm_vector_backward(x + row * shape.stride + head * width, r[place],
                           shape.weight + head * width, dy.get(), dx + place * width,
                           dweight + head * width, width);
    }
  }
}

template <class T, class Out>
TINYLM_VARIANT void rms_norm(const NormRows& shape, const T* x, Out* out, float* r,
                             std::size_t begin, std::size_t end) {
  for (std::size_t row = begin; row < end; ++row) {
    const T* const from = x + row * shape.width;
    Out* const to = out + row * shape.width;
    r[row] = inverse_length(from, shape.width, shape.eps);
    const Floats scale = Floats::all(r[row]);
    for (std::size_t at = 0; at < shape.width; at += kWidth) {
      store_at(to, at, shape.width,
               load_at(from, at, shape.width) * scale * load_at(shape.weight, at, shape.width));
    }
  }
}

template <class T, class Out>
TINYLM_VARIANT void rms_norm_backward(const NormRows& shape, const T* x, const float* r,
                                      const Out* dout, T* dx, float* dweight, std::size_t begin,
                                      std::size_t end) {
  for (std::size_t row = begin; row < end; ++row) {
    const std::size_t at = row * shape.width;
    norm_vector_backward(x + at, r[row], shape.weight, dout + at, dx + at, dweight, shape.width);
  }
}

template <class T, class Out>
constexpr NormKernels<T, Out> norm_kernels() {
  return {&rms_norm<T, Out>, &rms_norm_backward<T, Out>};
}

template <class T>
constexpr RowKernels<T> row_kernels() {
  return {&exponentials<T>, &swiglu<T>, &swiglu_backward<T>, &norm_rotary<T>,
          &norm_rotary_backward<T>};
}
