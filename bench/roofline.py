"""Estimates, not measurements: the least time that a T4 needs for the operators and for a step.

    python bench/roofline.py

Each line counts the bytes that must go over the memory bus and the operations of the matrix
products, and divides them by what NVIDIA's data sheet promises a T4: 320 GB/s and 65 TFLOP/s in
fp16. Real kernels reach perhaps two thirds of either; nothing is faster than this. Tensors larger
than the 4 MB cache are taken to be read and written in every pass over them.
"""

from tinylm.config import TrainConfig
from tinylm.model import Transformer

BANDWIDTH, PEAK = 320e9, 65e12
BATCHES = [(16, 32), (512, 32), (64, 256), (8, 1024)]  # as in bench_kernels.py
HEADS, WIDTH, HALF = 4, 128, 2

# Bytes per logit of the chunked cross-entropy, forward and gradients in its one pass: logits in
# fp16 and again in fp32, maximum, shift, exponential, sum, division, fp16, two products.
CHUNKED_LOGIT = 2 + 6 + 4 + 8 + 8 + 4 + 8 + 6 + 4
# Bytes per element or parameter, forward and backward: in plain torch (fp16 in and out, fp32
# inside; the stream that norms read is fp32), counted pass by pass; with the kernels there are;
# and if one kernel did it all, which reads and writes each tensor once.
QK_NORM_ROTARY = 32 + 82 + 2 * 18, 4 + 6, 4 + 6
SWIGLU = 10 + 26, 6 + 10, 6 + 10
NORM_RESIDUAL = 20 + 64 + 24, 8 + 12 + 24, 8 + 12 + 24
OPTIMIZER = 6 + 4 + 8 + 8 + 28, 6 + 4 + 8 + 8 + 28, 4 + 30


def milliseconds(moved: float, products: float = 0.0) -> float:
    return 1e3 * max(moved / BANDWIDTH, products / PEAK)


def attention(B: int, T: int, D: int) -> tuple[float, float]:
    """Bytes and operations of our kernels, forward and backward: 2 products, then 5 or 7."""
    product = B * HEADS * T * (T + 1) * D
    return 12 * B * HEADS * T * D * HALF, product * (7 if T <= 64 else 9)


def cross_entropy(N: int, V: int, C: int = WIDTH) -> tuple[float, float]:
    """Of our kernels: four products of N × C × V, two of them because logits are not kept."""
    return 3 * N * C * HALF + 2 * V * C * (HALF + 4), 8 * N * V * C


def chunked(N: int, V: int, C: int = WIDTH) -> float:
    """Milliseconds of three products and the passes over the logits between them."""
    return milliseconds(CHUNKED_LOGIT * N * V) + milliseconds(0, 6 * N * V * C)


def operators() -> None:
    print(
        "| forward and backward, ms at least | "
        + " | ".join(f"{b} × {t}" for b, t in BATCHES)
        + " |"
    )
    print("|---|" + "--:|" * len(BATCHES))
    rows = {
        f"attention, D {D}": [milliseconds(*attention(B, T, D)) for B, T in BATCHES]
        for D in (32, 64)
    }
    rows["layer norm, RMS norm"] = [milliseconds(5 * B * T * WIDTH * HALF) for B, T in BATCHES]
    for V in (10_000, 32_768):
        name = f"linear cross-entropy, V {V:,}"
        rows[name] = [milliseconds(*cross_entropy(B * T, V)) for B, T in BATCHES]
        rows[f"{name}, chunked in torch"] = [chunked(B * T, V) for B, T in BATCHES]
    for name, times in rows.items():
        print(f"| {name} | " + " | ".join(f"{ms:.3f}" for ms in times) + " |")


def step(preset: str = "modern") -> None:
    config = TrainConfig.from_preset(preset)
    model, N = config.model, config.batch_size * config.seq_len
    C, F, L, V = model.d_model, model.d_ff, model.n_layers, model.vocab_size
    parameters = Transformer(model).parameter_count()
    weights = C * (4 * C + 3 * F)
    heads = 2 * C * N * L  # elements of queries and keys
    product = N * (config.seq_len + 1) * C * L
    matmuls = milliseconds(3 * N * L * (6 * C + 4 * F) * HALF, 6 * N * L * weights)
    fused = milliseconds(*cross_entropy(N, V, C))
    parts = {
        "head and cross-entropy": [chunked(N, V, C), fused, fused],
        "projections, feed-forward products": [matmuls] * 3,
        "attention": [milliseconds(12 * N * C * L * HALF, 9 * product)] * 3,
        "QK-norm and rotary": [milliseconds(b * heads) for b in QK_NORM_ROTARY],
        "SwiGLU": [milliseconds(b * N * F * L) for b in SWIGLU],
        "norms, residual sums": [milliseconds(b * N * C * 2 * L) for b in NORM_RESIDUAL],
        "clipping, AdamW": [milliseconds(b * parameters) for b in OPTIMIZER],
    }
    parts["whole step"] = [sum(times[i] for times in parts.values()) for i in range(3)]
    size = f"{config.batch_size} × {config.seq_len}"
    print(f"\n| a step of `{preset}`, {size}, ms at least | torch | our kernels | all fused |")
    print("|---|--:|--:|--:|")
    for name, times in parts.items():
        print(f"| {name} | " + " | ".join(f"{ms:.2f}" for ms in times) + " |")


if __name__ == "__main__":
    operators()
    step()
