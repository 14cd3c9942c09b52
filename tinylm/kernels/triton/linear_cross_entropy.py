"""Cross-entropy of a linear layer without its logits: attention with the weight as keys and values.

    y = h weightᵀ + bias    z = cap tanh(y / cap)    lse = log Σ exp z
    loss = lse - z[target] + ζ lse²
    dy = g (softmax(z) (1 + 2 ζ lse) - onehot) (1 - (z / cap)²)
    dh = dy weight          dweight = Σ dyᵀ h        dbias = Σ dy

The cap is Gemma's (2024), ζ the z-loss of PaLM (Chowdhery et al. 2022); without them z = y, ζ = 0.
A row's softmax over the vocabulary is a running one, as in attention, so one pass over the weight
gives the loss and, rescaling what was summed so far, dh for g = 1. A second kernel gives dweight
and dbias, a program per tile of the vocabulary over all rows. No logits in memory (Wijmans et al.
2024), no atomics.

A target outside the vocabulary gives NaN: to see it costs nothing, to raise would wait for the GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinylm.kernels.triton.common import (
    LN2,
    LOG2E,
    MASKED,
    MOST_REGISTERS,
    Tile,
    capability,
    dtype_refusal,
    load_rows,
    matmul_refusal,
    on_device,
    power_of_two,
    store_rows,
)

WIDEST = 256


@triton.jit
def _bounded(y):
    """tanh; the hardware's exp2 gives it to within 1e-7, at both ends too."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(y * (2.0 * LOG2E)))


@triton.jit(do_not_specialize=["rows", "softcap", "z_loss"])
def tinylm_linear_cross_entropy_forward(
    H, WEIGHT, BIAS, TARGET, LOSS, LSE, DH, rows, vocabulary, ignore_index, softcap, z_loss,
    CAPPED: tl.constexpr,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per tile of rows. LSE is in base 2; BIAS and DH may be None."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = load_rows(H, row, rows, C, C, BLOCK_C)
    top = tl.full([BLOCK_N], MASKED, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    mean = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)  # of the weight, under the softmax
    for start in range(0, vocabulary, BLOCK_V):
        token = start + tl.arange(0, BLOCK_V)
        weight = load_rows(WEIGHT, token, vocabulary, C, C, BLOCK_C)
        z = tl.dot(h, tl.trans(weight), input_precision="ieee")
        if BIAS is not None:
            bias = tl.load(BIAS + token, mask=token < vocabulary, other=0.0)
            z += bias.to(tl.float32)[None, :]
        if CAPPED:
            bounded = _bounded(z / softcap)
            z = bounded * softcap
        z = tl.where((token < vocabulary)[None, :], z * LOG2E, MASKED)
        new_top = tl.maximum(top, tl.max(z, 1))
        p = tl.exp2(z - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        if DH is not None:
            if CAPPED:
                p *= 1.0 - bounded * bounded
            mean = tl.dot(
                p.to(weight.dtype), weight, mean * shrink[:, None], input_precision="ieee"
            )
        top = new_top

    lse = top + tl.log2(total)
    target = tl.load(TARGET + row, mask=row < rows, other=ignore_index)
    kept = target != ignore_index
    known = kept & (target >= 0) & (target < vocabulary)
    column = tl.arange(0, BLOCK_C)
    own_weight = tl.load(
        WEIGHT + target.to(tl.int32)[:, None] * C + column[None, :],
        mask=known[:, None] & (column < C)[None, :],
        other=0.0,
    ).to(tl.float32)
    own = tl.sum(h.to(tl.float32) * own_weight, 1)
    if BIAS is not None:
        own += tl.load(BIAS + target, mask=known, other=0.0).to(tl.float32)
    slope = 1.0
    if CAPPED:
        bounded_own = _bounded(own / softcap)
        own = bounded_own * softcap
        slope = (1.0 - bounded_own * bounded_own)[:, None]
    nats = lse * LN2
    loss = tl.where(known, nats - own + nats * nats * z_loss, float("nan"))
    tl.store(LOSS + row, tl.where(kept, loss, 0.0), mask=row < rows)
    tl.store(LSE + row, lse, mask=row < rows)
    if DH is not None:
        mean *= ((1.0 + nats * (2.0 * z_loss)) / total)[:, None]
        dh = tl.where(kept[:, None], mean - own_weight * slope, 0.0)
        store_rows(DH, row, rows, C, dh, C, BLOCK_C)


@triton.jit(do_not_specialize=["rows", "softcap", "z_loss"])
def tinylm_linear_cross_entropy_dweight(
    H, WEIGHT, BIAS, TARGET, LSE, G, DWEIGHT, DBIAS, SCALE,
    rows, vocabulary, ignore_index, softcap, z_loss,
    CAPPED: tl.constexpr,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per tile of the vocabulary, over all rows.

    G holds each row's gradient over SCALE, their largest: between -1 and 1, it does not underflow
    where the products are fp16.
    """
    token = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    weight = load_rows(WEIGHT, token, vocabulary, C, C, BLOCK_C)
    if BIAS is not None:
        bias = tl.load(BIAS + token, mask=token < vocabulary, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_V, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, rows, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        h = load_rows(H, row, rows, C, C, BLOCK_C)
        target = tl.load(TARGET + row, mask=row < rows, other=ignore_index)
        lse = tl.load(LSE + row, mask=row < rows, other=0.0)
        g = tl.load(G + row, mask=row < rows, other=0.0)
        g = tl.where(target == ignore_index, 0.0, g)
        # 32 bits, since it lives through the product, where registers are scarce.
        own = tl.where((target >= 0) & (target < vocabulary), target, -1).to(tl.int32)
        z = tl.dot(weight, tl.trans(h), input_precision="ieee")
        if BIAS is not None:
            z += bias[:, None]
        if CAPPED:
            bounded = _bounded(z / softcap)
            z = bounded * softcap
        p = tl.exp2(tl.where((row < rows)[None, :], z * LOG2E - lse[None, :], MASKED))
        p *= (1.0 + lse * LN2 * (2.0 * z_loss))[None, :]
        p = tl.where(token[:, None] == own[None, :], p - 1.0, p) * g[None, :]
        if CAPPED:
            p *= 1.0 - bounded * bounded
        dweight = tl.dot(p.to(h.dtype), h, dweight, input_precision="ieee")
        if DBIAS is not None:
            dbias += tl.sum(p, 1)
    scale = tl.load(SCALE)
    store_rows(DWEIGHT, token, vocabulary, C, dweight * scale, C, BLOCK_C)
    if DBIAS is not None:
        tl.store(DBIAS + token, dbias * scale, mask=token < vocabulary)


def tile_for(capability: tuple[int, int], dtype: torch.dtype, width: int) -> Tile:
    """Tiles of what a program keeps × what it walks over: rows × tokens forwards.

    With these the compiled code spills nothing on any architecture (the sums are rows × width in
    fp32) and fits into the 64 KB of shared memory that there are below capability 8.0.
    """
    if dtype == torch.float32:
        return Tile(32, 32, warps=8)
    modern = capability >= (8, 0)
    if width <= 128:
        return Tile(64, 32, warps=8 if width > 64 else 4, stages=2 if modern else 1)
    return Tile(32, 64, warps=8, stages=2) if modern else Tile(32, 32, warps=8)


@torch.library.custom_op("tinylm::linear_cross_entropy_forward", mutates_args=())
def linear_cross_entropy_forward(
    h_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, target_N: Tensor,
    ignore_index: int, softcap: float | None, z_loss: float, dtype: torch.dtype, need_dh: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss_N, lse_N in base 2, dh_NC for gradients of 1). Products are computed in ``dtype``."""
    N, C = h_NC.shape
    loss_N, lse_N = (h_NC.new_empty(N, dtype=torch.float32) for _ in range(2))
    dh_NC = h_NC.new_empty((N, C) if need_dh else (0, C), dtype=dtype)
    tile = tile_for(capability(h_NC), dtype, C)
    with on_device(h_NC):
        tinylm_linear_cross_entropy_forward[(triton.cdiv(N, tile.rows),)](
            _dense(h_NC, dtype), _dense(weight_VC, dtype), bias_V, target_N.contiguous(),
            loss_N, lse_N, dh_NC if need_dh else None, N, weight_VC.shape[0], ignore_index,
            softcap or 1.0, z_loss, CAPPED=softcap is not None,
            C=C, BLOCK_C=power_of_two(C), BLOCK_N=tile.rows, BLOCK_V=tile.columns, **tile.launch,
            maxnreg=None if 64 < C <= 128 else MOST_REGISTERS,
        )  # fmt: skip
    return loss_N, lse_N, dh_NC


@torch.library.custom_op("tinylm::linear_cross_entropy_backward_weight", mutates_args=())
def linear_cross_entropy_backward_weight(
    dloss_N: Tensor, h_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, target_N: Tensor,
    lse_N: Tensor, ignore_index: int, softcap: float | None, z_loss: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dweight_VC, dbias_V) in the dtypes of weight and bias; dbias is empty without a bias."""
    (V, C), N = weight_VC.shape, h_NC.shape[0]
    dweight_VC = weight_VC.new_empty(V, C)
    dbias_V = weight_VC.new_empty(0) if bias_V is None else torch.empty_like(bias_V)
    scale = dloss_N.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    # Here a program keeps tokens and walks over rows.
    tile = tile_for(capability(h_NC), dtype, C)
    with on_device(h_NC):
        tinylm_linear_cross_entropy_dweight[(triton.cdiv(V, tile.rows),)](
            _dense(h_NC, dtype), _dense(weight_VC, dtype), bias_V, target_N.contiguous(), lse_N,
            dloss_N / scale, dweight_VC, None if bias_V is None else dbias_V, scale,
            N, V, ignore_index, softcap or 1.0, z_loss, CAPPED=softcap is not None,
            C=C, BLOCK_C=power_of_two(C), BLOCK_N=tile.columns, BLOCK_V=tile.rows, **tile.launch,
            maxnreg=MOST_REGISTERS if C <= 64 or dtype == torch.float32 else None,
        )  # fmt: skip
    return dweight_VC, dbias_V


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous()


@linear_cross_entropy_forward.register_fake
def _(
    h_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, target_N: Tensor,
    ignore_index: int, softcap: float | None, z_loss: float, dtype: torch.dtype, need_dh: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    N, C = h_NC.shape
    loss_N, lse_N = (h_NC.new_empty(N, dtype=torch.float32) for _ in range(2))
    return loss_N, lse_N, h_NC.new_empty((N, C) if need_dh else (0, C), dtype=dtype)


@linear_cross_entropy_backward_weight.register_fake
def _(
    dloss_N: Tensor, h_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    dbias_V = weight_VC.new_empty(0) if bias_V is None else torch.empty_like(bias_V)
    return weight_VC.new_empty(weight_VC.shape), dbias_V


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h_NC, weight_VC, bias_V, target_N, *ctx.terms, _ = inputs
    _, lse_N, dh_NC = output
    ctx.save_for_backward(h_NC, weight_VC, bias_V, target_N, lse_N, dh_NC)
    ctx.set_materialize_grads(False)


@once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
def _backward(ctx: Any, dloss_N: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dloss_N is None:
        return (None,) * 9
    h_NC, weight_VC, bias_V, target_N, lse_N, dh_NC = ctx.saved_tensors
    need_h, need_weight, need_bias = ctx.needs_input_grad[:3]
    dh = dweight = dbias = None
    if need_h:
        dh = (dh_NC * dloss_N[:, None]).to(h_NC.dtype)
    if need_weight or need_bias:
        dweight, dbias = linear_cross_entropy_backward_weight(
            dloss_N, h_NC, weight_VC, bias_V, target_N, lse_N, *ctx.terms
        )
    return dh, dweight, None if bias_V is None else dbias, *[None] * 6


linear_cross_entropy_forward.register_autograd(_backward, setup_context=_setup_context)


def loss_N(
    h_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, target_N: Tensor,
    ignore_index: int, softcap: float | None, z_loss: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The loss of each row, for inputs that `refusal` has nothing against."""
    terms = ignore_index, softcap, z_loss, dtype
    need_dh = h_NC.requires_grad and torch.is_grad_enabled()
    loss: Tensor
    loss, _, _ = linear_cross_entropy_forward(h_NC, weight_VC, bias_V, target_N, *terms, need_dh)
    return loss


def refusal(
    h_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, dtype: torch.dtype
) -> str | None:
    """Why these kernels do not take a call; None if they do."""
    given = [t for t in (h_NC, weight_VC, bias_V) if t is not None]
    compute = h_NC.new_empty(0, dtype=dtype)
    if why := dtype_refusal(*given, compute) or matmul_refusal(compute):
        return why
    if h_NC.numel() == 0 or weight_VC.numel() == 0:
        return "empty input"
    if h_NC.shape[1] > WIDEST:
        return f"width {h_NC.shape[1]} is above {WIDEST}"
    if max(h_NC.numel(), weight_VC.numel()) >= 2**31:
        return "more than 2³¹ elements"
    return None
