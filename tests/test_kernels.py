"""Every implementation of every operator against a float64 reference, forwards and gradients."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tinylm import kernels
from tinylm.errors import InputError
from tinylm.kernels import dispatch

# Largest error relative to the largest value, by dtype of the inputs. One table for all tests.
# fp32: rounding of scores or logits of size s moves their exponentials by s · 1.2e-7.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1.6e-2}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
LENGTHS = [1, 7, 31, 33, 63, 100]
# The Triton kernels have their own tests, in test_triton_kernels.py.
TORCH = {
    operator: [name for name in names if name != "triton"]
    for operator, names in dispatch.IMPLEMENTATIONS.items()
}


def assert_close(
    actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str = "", floor: float = 1e-3
) -> None:
    """``floor``: the size of what cancels, where little or nothing is left of it."""
    assert actual.shape == expected.shape, name
    error = (actual.double() - expected.double()).abs().max()
    scale = expected.double().abs().max().clamp(min=floor)
    assert error <= TOLERANCE[dtype] * scale, f"{name}: error {error:.3g}, scale {scale:.3g}"


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def slow_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """Position by position, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    offset = k.shape[2] - q.shape[2]
    for t in range(q.shape[2]):
        end = offset + t + 1 if causal else k.shape[2]
        scores = torch.einsum("bhd,bhsd->bhs", q[:, :, t], k[:, :, :end]) / math.sqrt(q.shape[-1])
        out[:, :, t] = torch.einsum("bhs,bhsd->bhd", scores.softmax(-1), v[:, :, :end])
    return out


def gradients(out: Tensor, *inputs: Tensor) -> list[Tensor]:
    weights = randn(*out.shape, dtype=out.dtype, seed=99)
    return list(torch.autograd.grad((out * weights).sum(), inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("backend", TORCH["causal_attention"])
def test_attention_matches_reference(backend: str, length: int, dtype: torch.dtype) -> None:
    q, k, v = (randn(2, 3, length, 16, dtype=dtype, seed=i).requires_grad_() for i in range(3))
    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    out, expected = (
        kernels.causal_attention(q, k, v, backend=backend),
        slow_attention(q64, k64, v64),
    )
    assert out.dtype == dtype
    assert_close(out, expected, dtype, "out")
    pairs = zip(gradients(out, q, k, v), gradients(expected, q64, k64, v64), strict=True)
    for name, (actual, wanted) in zip("qkv", pairs, strict=True):
        assert_close(actual, wanted, dtype, f"d{name}", floor=1.0)


@pytest.mark.parametrize("length", [64, 65, 200])
def test_attention_in_several_blocks_under_autocast(length: int) -> None:
    """fp32 queries and keys, as after a norm, and a value in bf16; strides of a packed tensor."""
    qkv = randn(2, length, 9, 32, dtype=torch.float32).requires_grad_()
    qkv64 = qkv.detach().double().requires_grad_()
    outs = []
    for packed, backend in ((qkv, "blocked"), (qkv64, "matmul")):
        q, k, v = (x.transpose(1, 2) for x in packed.split(3, dim=2))
        with torch.autocast("cpu", torch.bfloat16, enabled=packed is qkv):
            outs.append(
                kernels.causal_attention(
                    q, k, v.to(torch.bfloat16) if packed is qkv else v, backend=backend
                )
            )
    assert outs[0].dtype == torch.bfloat16
    assert_close(outs[0], outs[1], torch.bfloat16, "out")
    (actual,), (wanted,) = gradients(outs[0], qkv), gradients(outs[1], qkv64)
    assert_close(actual, wanted, torch.bfloat16, "gradient")


@pytest.mark.parametrize("backend", TORCH["causal_attention"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 33), (5, 33), (31, 63)])
def test_attention_of_the_last_queries(backend: str, queries: int, keys: int) -> None:
    q, k, v = (randn(2, 3, keys, 16, dtype=torch.float32, seed=i) for i in range(3))
    whole = slow_attention(q, k, v)[:, :, keys - queries :]
    part = kernels.causal_attention(q[:, :, keys - queries :], k, v, backend=backend)
    assert_close(part, whole, torch.float32)


@pytest.mark.parametrize("backend", TORCH["causal_attention"])
def test_attention_without_mask(backend: str) -> None:
    q, k, v = (randn(2, 3, 9, 16, dtype=torch.float32, seed=i) for i in range(3))
    out = kernels.causal_attention(q, k, v, causal=False, backend=backend)
    assert_close(out, slow_attention(q, k, v, causal=False), torch.float32)


@pytest.mark.parametrize("backend", TORCH["causal_attention"])
def test_attention_with_fewer_key_heads(backend: str) -> None:
    q = randn(2, 6, 9, 16, dtype=torch.float32)
    k, v = (randn(2, 2, 9, 16, dtype=torch.float32, seed=i) for i in (1, 2))
    out = kernels.causal_attention(q, k, v, backend=backend)
    wide = (x.repeat_interleave(3, dim=1) for x in (k, v))
    assert_close(out, slow_attention(q, *wide), torch.float32)


@pytest.mark.parametrize("backend", TORCH["causal_attention"])
def test_no_gradient_flows_from_a_position_to_later_inputs(backend: str) -> None:
    q, k, v = (randn(1, 2, 12, 16, dtype=torch.float32, seed=i).requires_grad_() for i in range(3))
    out = kernels.causal_attention(q, k, v, backend=backend)
    for t in range(12):
        dk, dv = torch.autograd.grad(out[:, :, t].sum(), (k, v), retain_graph=True)
        assert (dk[:, :, t + 1 :] == 0).all()
        assert (dv[:, :, t + 1 :] == 0).all()
        assert (dv[:, :, : t + 1] != 0).all()


@pytest.mark.parametrize("backend", TORCH["causal_attention"])
def test_attention_ignores_left_padding(backend: str) -> None:
    q, k, v = (randn(2, 3, 9, 16, dtype=torch.float32, seed=i) for i in range(3))
    out = kernels.causal_attention(q, k, v, start_BT=torch.tensor([[0], [4]]), backend=backend)
    assert_close(out[:1], slow_attention(q[:1], k[:1], v[:1]), torch.float32)
    real = (x[1:, :, 4:] for x in (q, k, v))
    assert_close(out[1:, :, 4:], slow_attention(*real), torch.float32)
    assert (out[1, :, :4] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", TORCH["causal_attention"])
def test_attention_within_documents(backend: str, dtype: torch.dtype) -> None:
    """Is the attention to each document by itself, gradients too."""
    lengths = [1, 7, 31, 24]
    q, k, v = (randn(2, 3, 63, 16, dtype=dtype, seed=i).requires_grad_() for i in range(3))
    ids = torch.ones(2, 63, dtype=torch.long)
    ids[:, [0, 7, 38]] = 0  # each document's end
    start_BT = kernels.document_starts(ids, end_id=0)
    assert start_BT.tolist() == [[0] + [1] * 7 + [8] * 31 + [39] * 24] * 2
    out = kernels.causal_attention(q, k, v, start_BT=start_BT, backend=backend)
    inputs64 = [x.detach().double().requires_grad_() for x in (q, k, v)]
    parts = zip(*(x.split(lengths, dim=2) for x in inputs64), strict=True)
    expected = torch.cat([slow_attention(*part) for part in parts], dim=2)
    assert_close(out, expected, dtype, "out")
    pairs = zip(gradients(out, q, k, v), gradients(expected, *inputs64), strict=True)
    for actual, wanted in pairs:
        assert_close(actual, wanted, dtype, "gradient", floor=1.0)


@pytest.mark.parametrize("backend", TORCH["causal_attention"])
def test_no_gradient_crosses_a_document_boundary(backend: str) -> None:
    q, k, v = (randn(1, 2, 12, 16, dtype=torch.float32, seed=i).requires_grad_() for i in range(3))
    start = torch.tensor([0] * 5 + [5] * 7)
    out = kernels.causal_attention(q, k, v, start_BT=start, backend=backend)
    for t in range(12):
        dv = torch.autograd.grad(out[:, :, t].sum(), v, retain_graph=True)[0]
        seen = (torch.arange(12) >= start[t]) & (torch.arange(12) <= t)
        assert ((dv != 0).all(dim=(0, 1, 3)) == seen).all()
        assert ((dv != 0).any(dim=3).any(dim=1)[0] == seen).all()


@pytest.mark.parametrize(
    ("q", "k", "options", "message"),
    [
        ((1, 2, 5, 8), (1, 2, 4, 8), {}, "5 queries on 4 keys"),
        ((1, 3, 4, 8), (1, 2, 4, 8), {}, "3 query heads on 2 key heads"),
        ((1, 2, 4, 8), (2, 2, 4, 8), {}, "batch and head dimension must be the same"),
        ((2, 4, 8), (2, 4, 8), {}, r"needs \(B, H, T, D\)"),
        ((3, 2, 4, 8), (3, 2, 4, 8), {"start_BT": torch.zeros(2)}, r"expand to \(3, 4\)"),
    ],
)
def test_attention_refuses_shapes_that_do_not_belong_together(
    q: tuple[int, ...], k: tuple[int, ...], options: dict[str, Tensor], message: str
) -> None:
    keys = randn(*k)
    with pytest.raises(InputError, match=message):
        kernels.causal_attention(randn(*q), keys, keys, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("width", [1, 31, 128])
@pytest.mark.parametrize("backend", TORCH["layer_norm"])
def test_layer_norm(backend: str, width: int, residual: bool, dtype: torch.dtype) -> None:
    x, other = (randn(5, 3, width, dtype=dtype, seed=i).requires_grad_() for i in range(2))
    weight, bias = (randn(width, dtype=dtype, seed=i).requires_grad_() for i in (2, 3))
    total = x + other if residual else x
    out = kernels.layer_norm(x, weight, bias, residual=other if residual else None, backend=backend)
    normed = out
    if isinstance(out, tuple):
        normed, summed = out
        assert torch.equal(summed, total)
    inputs64 = [t.detach().double().requires_grad_() for t in (total, weight, bias)]
    expected = F.layer_norm(inputs64[0], (width,), *inputs64[1:])
    assert_close(normed, expected, dtype, "out")
    if width > 1:  # at width 1 the gradient is 0 and only rounding is left
        pairs = zip(gradients(normed, x, weight, bias), gradients(expected, *inputs64), strict=True)
        for actual, wanted in pairs:
            assert_close(actual, wanted, dtype, "gradient")


@pytest.mark.parametrize("backend", TORCH["layer_norm"])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_gradients_of_layer_norm_over_many_rows(parameters: torch.dtype, backend: str) -> None:
    """torch by itself adds up 2,048 rows of bf16 in bf16, and is off by 7 %."""
    x = randn(2048, 16, dtype=torch.bfloat16)
    weight = randn(16, dtype=parameters, seed=1).requires_grad_()
    bias = randn(16, dtype=parameters, seed=2).requires_grad_()
    out = kernels.layer_norm(x, weight, bias, backend=backend)
    inputs64 = [t.detach().double().requires_grad_() for t in (weight, bias)]
    expected = F.layer_norm(x.double(), (16,), *inputs64)
    pairs = zip(gradients(out, weight, bias), gradients(expected, *inputs64), strict=True)
    for actual, wanted in pairs:
        assert_close(actual, wanted, torch.bfloat16, "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("width", [1, 31, 128])
@pytest.mark.parametrize("backend", TORCH["rms_norm"])
def test_rms_norm(backend: str, width: int, residual: bool, dtype: torch.dtype) -> None:
    x, other = (randn(5, 3, width, dtype=dtype, seed=i).requires_grad_() for i in range(2))
    weight = randn(width, dtype=dtype, seed=2).requires_grad_()
    total = x + other if residual else x
    out = kernels.rms_norm(x, weight, residual=other if residual else None, backend=backend)
    normed = out
    if isinstance(out, tuple):
        normed, summed = out
        assert torch.equal(summed, total)
    wide, weight64 = (t.detach().double().requires_grad_() for t in (total, weight))
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight64
    assert_close(normed, expected, dtype, "out")
    if width > 1:
        pairs = zip(gradients(normed, x, weight), gradients(expected, wide, weight64), strict=True)
        for actual, wanted in pairs:
            assert_close(actual, wanted, dtype, "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", TORCH["rms_norm"])
def test_rms_norm_of_heads_scaled_apart(backend: str, dtype: torch.dtype) -> None:
    x = randn(2, 7, 9, 16, dtype=dtype).requires_grad_()
    heads = x[:, :, 2:5]  # neither contiguous nor all of it
    weight = randn(3, 16, dtype=dtype, seed=1).requires_grad_()
    out = kernels.rms_norm(heads, weight, backend=backend)
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    heads64 = x64[:, :, 2:5]
    expected = heads64 / (heads64.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight64
    assert_close(out, expected, dtype, "out")
    pairs = zip(gradients(out, x, weight), gradients(expected, x64, weight64), strict=True)
    for actual, wanted in pairs:
        assert_close(actual, wanted, dtype, "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_rotary_is_the_rotation_back(dtype: torch.dtype) -> None:
    cos, sin = kernels.rotary_tables(9, 6, theta=100.0)
    x = randn(2, 9, 3, 6, dtype=dtype).transpose(1, 2).requires_grad_()
    out = kernels.apply_rotary(x, cos, sin)
    first, second = x.detach().double().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    assert_close(out, x.detach().double() * cos.double() + turned * sin.double(), dtype, "out")
    (back,) = torch.autograd.grad(out, x, out.detach())
    assert_close(back, x, torch.float32 if dtype == torch.float64 else dtype)


def test_rotary_turns_pairs_by_their_position() -> None:
    cos, sin = kernels.rotary_tables(8, 6, theta=100.0)
    x = randn(1, 1, 8, 6, dtype=torch.float32)
    out = kernels.apply_rotary(x, cos, sin)
    for t in range(8):
        for d in range(3):
            angle = t * 100.0 ** (-2 * d / 6)
            a, b = x[0, 0, t, d], x[0, 0, t, d + 3]
            expected = a * math.cos(angle) - b * math.sin(angle)
            assert abs(out[0, 0, t, d] - expected) < 1e-5


@pytest.mark.parametrize("rows", [1, 31, 100, 600])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", TORCH["linear_cross_entropy"])
def test_linear_cross_entropy(backend: str, dtype: torch.dtype, with_bias: bool, rows: int) -> None:
    h = (randn(rows, 24) / 4).to(dtype).requires_grad_()  # logits of a usual size, 1 to 5
    weight = randn(97, 24, dtype=dtype, seed=1).requires_grad_()
    bias = randn(97, dtype=dtype, seed=2).requires_grad_() if with_bias else None
    targets = torch.arange(rows) * 7 % 97
    targets[1::5] = -100
    loss = kernels.linear_cross_entropy(h, weight, targets, bias_V=bias, backend=backend)
    inputs = [h, weight] + ([bias] if bias is not None else [])
    inputs64 = [t.detach().double().requires_grad_() for t in inputs]
    expected = F.cross_entropy(F.linear(*inputs64[:2], *inputs64[2:]), targets)
    assert_close(loss, expected, dtype, "loss")
    actual = torch.autograd.grad(loss * 3, inputs)
    wanted = torch.autograd.grad(expected * 3, inputs64)
    for name, a, b in zip(("h", "weight", "bias"), actual, wanted, strict=False):
        assert_close(a, b, dtype, f"d{name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("softcap", "z_loss"), [(None, 0.0), (3.0, 0.0), (None, 0.1), (3.0, 0.1)])
@pytest.mark.parametrize("backend", TORCH["linear_cross_entropy"])
def test_linear_cross_entropy_with_more_terms(
    backend: str, softcap: float | None, z_loss: float, reduction: str, dtype: torch.dtype
) -> None:
    """Logits of about 5, so that a cap of 3 bends them; 300 rows are more than one chunk."""
    h, weight, bias = (
        randn(*s, dtype=dtype, seed=i) for i, s in enumerate([(300, 24), (97, 24), (97,)])
    )
    inputs = [x.requires_grad_() for x in (h, weight, bias)]
    targets = torch.arange(300) * 7 % 97
    targets[1::5] = 3
    loss = kernels.linear_cross_entropy(
        h, weight, targets, bias_V=bias,
        ignore_index=3, softcap=softcap, z_loss=z_loss, reduction=reduction, backend=backend,
    )  # fmt: skip
    inputs64 = [x.detach().double().requires_grad_() for x in inputs]
    logits = F.linear(*inputs64)
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    picked = logits.softmax(-1).gather(1, targets[:, None]).squeeze(1)
    expected = -picked.log() + z_loss * logits.exp().sum(-1).log() ** 2
    expected = torch.where(targets == 3, 0.0, expected)
    if reduction != "none":
        expected = expected.sum() / ((targets != 3).sum() if reduction == "mean" else 1)
    assert_close(loss, expected, dtype, "loss")
    pairs = zip(gradients(loss, *inputs), gradients(expected, *inputs64), strict=True)
    for name, (actual, wanted) in zip(("h", "weight", "bias"), pairs, strict=True):
        assert_close(
            actual, wanted, dtype, f"d{name}", floor=1.0 if dtype == torch.bfloat16 else 1e-3
        )


def test_gradients_of_a_mean_of_row_losses_do_not_underflow() -> None:
    """A probability over a million rows is 0 in fp16."""
    h = randn(64, 16, dtype=torch.float16)
    weight = randn(97, 16, dtype=torch.float32, seed=1).requires_grad_()
    loss_N = kernels.linear_cross_entropy(
        h, weight, torch.arange(64), reduction="none", backend="chunked"
    )
    (dweight,) = torch.autograd.grad(loss_N.sum() / 1e6, weight)
    weight64 = weight.detach().double().requires_grad_()
    expected = F.cross_entropy(h.double() @ weight64.T, torch.arange(64), reduction="sum")
    assert_close(dweight * 1e6, torch.autograd.grad(expected, weight64)[0], torch.bfloat16, "dw")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 0.0}, r"softcap is 0\.0; it must be above 0"),
        ({"reduction": "max"}, "reduction is 'max'; choose mean, sum or none"),
        ({"bias_V": torch.zeros(3)}, "one bias per token"),
        ({"targets_N": torch.zeros(3, dtype=torch.long)}, "one target per row"),
        ({"weight_VC": torch.zeros(9, 5)}, r"shapes \(4, 8\) and \(9, 5\)"),
    ],
)
def test_linear_cross_entropy_refuses_what_does_not_belong_together(
    options: dict[str, Any], message: str
) -> None:
    call = {"h_NC": torch.zeros(4, 8), "weight_VC": torch.zeros(9, 8)}
    call["targets_N"] = torch.zeros(4, dtype=torch.long)
    with pytest.raises(InputError, match=message):
        kernels.linear_cross_entropy(**call | options)


def test_linear_cross_entropy_under_autocast_computes_in_bf16() -> None:
    h, weight = randn(300, 24, dtype=torch.float32), randn(97, 24, dtype=torch.float32, seed=1)
    h.requires_grad_(), weight.requires_grad_()
    targets = torch.arange(300) % 97
    with torch.autocast("cpu", torch.bfloat16):
        loss = kernels.linear_cross_entropy(h, weight, targets, backend="chunked")
    exact = F.cross_entropy(F.linear(h.double(), weight.double()), targets)
    assert loss.dtype == torch.float32
    assert 0 < abs(loss.item() - exact.item()) < 1e-2
    dh, dweight = torch.autograd.grad(loss, (h, weight))
    dh64, dweight64 = torch.autograd.grad(exact, (h, weight))
    assert dh.dtype == dweight.dtype == torch.float32
    assert_close(dh, dh64, torch.bfloat16)
    assert_close(dweight, dweight64, torch.bfloat16)


@pytest.mark.parametrize("size", [1e-3, 1.0, 40.0, 300.0, -300.0])
def test_linear_cross_entropy_of_any_size_of_logits(size: float) -> None:
    """In bf16, exponentials without a shift would overflow, or all vanish, beyond 88."""
    h = torch.full((300, 16), size, dtype=torch.bfloat16).requires_grad_()
    weight = (1 + randn(97, 16, dtype=torch.float32) / 10).bfloat16().requires_grad_()
    targets = torch.arange(300) % 97
    loss = kernels.linear_cross_entropy(h, weight / 16, targets, backend="chunked")
    h64, weight64 = (t.detach().double().requires_grad_() for t in (h, weight))
    logits = F.linear(h64, weight64 / 16)
    rounded = logits + (logits.bfloat16().double() - logits).detach()  # as products in bf16 are
    expected = F.cross_entropy(rounded, targets)
    assert_close(loss, expected, torch.bfloat16, "loss")
    wanted = torch.autograd.grad(expected, (h64, weight64))
    for actual, exact in zip(torch.autograd.grad(loss, (h, weight)), wanted, strict=True):
        assert_close(actual, exact, torch.bfloat16, "gradient", floor=1e-2)


def test_linear_cross_entropy_of_what_is_certain_is_not_negative() -> None:
    h = torch.eye(9, 16, dtype=torch.bfloat16).mul(30).requires_grad_()
    loss_N = kernels.linear_cross_entropy(
        h, torch.eye(97, 16, dtype=torch.bfloat16), torch.arange(9), backend="chunked"
    )
    assert 0 <= loss_N.item() < 1e-6


def test_linear_cross_entropy_computes_only_the_gradients_asked_for() -> None:
    h, weight = randn(9, 24, dtype=torch.float32), randn(97, 24, dtype=torch.float32, seed=1)
    h.requires_grad_()
    loss = kernels.linear_cross_entropy(h, weight, torch.arange(9), backend="chunked")
    loss.backward()
    assert h.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("backend", TORCH["causal_attention"])
@pytest.mark.parametrize("shape", [(0, 2, 5, 16), (2, 2, 0, 16)], ids=str)
def test_attention_of_nothing(shape: tuple[int, ...], backend: str) -> None:
    q = torch.zeros(shape, requires_grad=True)
    k = torch.zeros(shape[0], 2, *shape[2:], requires_grad=True)
    for start_BT in (None, torch.zeros(shape[0], 1, dtype=torch.int32)):
        out = kernels.causal_attention(q, k, k, start_BT=start_BT, backend=backend)
        assert out.shape == shape
        out.sum().backward()
        assert (k.grad == 0).all()


@pytest.mark.parametrize("backend", TORCH["layer_norm"])
def test_norms_of_nothing(backend: str) -> None:
    x, weight = torch.zeros(0, 16, requires_grad=True), torch.ones(16, requires_grad=True)
    norms = [kernels.layer_norm(x, weight, weight, backend=backend), kernels.rms_norm(x, weight)]
    for out in norms:
        assert out.shape == (0, 16)
        assert (torch.autograd.grad(out.sum(), weight)[0] == 0).all()


@pytest.mark.parametrize("backend", TORCH["linear_cross_entropy"])
def test_linear_cross_entropy_of_nothing(backend: str) -> None:
    """As in torch: a mean over nothing is NaN, a sum 0."""
    h, weight = torch.zeros(0, 8, requires_grad=True), torch.ones(9, 8, requires_grad=True)
    for reduction in ("none", "sum", "mean"):
        loss = kernels.linear_cross_entropy(
            h, weight, torch.zeros(0, dtype=torch.long), reduction=reduction, backend=backend
        )
        assert loss.shape == ((0,) if reduction == "none" else ())
        assert (loss.sum() == 0) != (reduction == "mean")
        assert torch.autograd.grad(loss.sum(), weight)[0].shape == weight.shape


@pytest.fixture
def chosen_by(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets the environment variable; what it chose is forgotten afterwards."""

    def choose(setting: str) -> None:
        monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, setting)
        dispatch.forget()

    yield choose
    choose("auto")


def test_environment_variable_chooses_the_reference(chosen_by: Callable[[str], None]) -> None:
    chosen_by("reference")
    assert dispatch.select("linear_cross_entropy", "cpu").implementation == "reference"
    assert dispatch.select("causal_attention", "cuda").implementation == "matmul"
    chosen_by("fastest")
    with pytest.raises(InputError, match=r"TINYLM_KERNELS is 'fastest'.*auto .*triton .*torch"):
        dispatch.select("causal_attention", "cpu")


def test_triton_is_not_chosen_by_itself_but_on_request(
    chosen_by: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "find_spec", lambda name: name)  # as if triton were installed
    chosen_by("auto")
    selection = dispatch.select("causal_attention", "cuda")
    assert selection.implementation == "sdpa"
    assert "not checked on this GPU yet" in selection.reason
    chosen_by("torch")
    assert dispatch.select("causal_attention", "cuda").implementation == "sdpa"
    chosen_by("triton")
    for operator, names in dispatch.IMPLEMENTATIONS.items():
        expected = "triton" if "triton" in names else dispatch.torch_choice(operator, "cuda")[0]
        assert dispatch.select(operator, "cuda").implementation == expected


def test_triton_that_cannot_run_is_replaced_and_named_once(
    chosen_by: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    chosen_by("triton")
    x = randn(1, 1, 2, 16, dtype=torch.float32)
    for _ in range(2):
        out = kernels.causal_attention(x, x, x)
        assert torch.equal(out, kernels.causal_attention(x, x, x, backend="blocked"))
    assert "triton is not installed" in dispatch.select("causal_attention", "cpu").reason
    (record,) = caplog.records
    assert record.getMessage() == (
        "causal_attention runs as blocked, not as a Triton kernel: triton is not installed"
    )


def test_unknown_backend_is_named() -> None:
    x = randn(1, 1, 2, 16, dtype=torch.float32)
    with pytest.raises(InputError, match="no backend 'flash'"):
        kernels.causal_attention(x, x, x, backend="flash")
