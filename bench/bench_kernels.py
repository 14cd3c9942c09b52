"""The operators, forward and with their gradients, next to what else computes the same.

    pytest bench/bench_kernels.py --benchmark-json=kernels.json
    python bench/plot_kernels.py kernels.json kernels.png

On a GPU: our Triton kernels and torch fallbacks against SDPA's backends, FlexAttention,
torch.compile of the plain reference, and Liger if it is installed. On a CPU: the C++ kernels, the
fallbacks, SDPA and torch.compile, at small shapes. Every side first shows that it is right, against
fp64. A measured call is CALLS calls and one wait for the device; with ``TINYLM_BENCH_GRAPH=1`` they
are one CUDA graph, so that the time of launching them is not in it. ``extra_info`` has the time of
one call, the bytes it must at least move and the products it must at least compute, per second and
as a share of what a copy and a large matrix product reach on this device, and its peak memory.
"""

import os
import time
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tinylm import kernels
from tinylm.device import choose_device
from tinylm.kernels import dispatch
from tinylm.kernels.check import TOLERANCE, relative_error

pytestmark = pytest.mark.filterwarnings("ignore")  # of the peers

DEVICE = choose_device()
CUDA = DEVICE.type == "cuda"
DTYPE = DEVICE.dtype
CALLS = 20 if CUDA else 1
GRAPH = CUDA and os.environ.get("TINYLM_BENCH_GRAPH") == "1"
PASSES = ["forward", "forward+backward"]
BATCHES = [(16, 32), (512, 32), (64, 256), (8, 1024)] if CUDA else [(16, 32), (8, 256)]
VOCABULARIES = [10_000, 32_768] if CUDA else [10_000]
HEADS, WIDTH = 4, 128
NORM_SIDES = ["triton", "torch", "compile", "liger"]


# --- what each side runs -------------------------------------------------------------------------


def sdpa(backend, q, k, v):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@cache
def flex():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend = torch.compile(flex_attention)
    mask = cache(
        lambda length: create_block_mask(
            lambda b, h, query, key: query >= key, None, None, length, length, DEVICE.name
        )
    )
    return lambda q, k, v: attend(q, k, v, block_mask=mask(q.shape[2]))


@cache
def compiled(operator, backend):
    def call(*inputs, **options):
        return operator(*inputs, backend=backend, **options)

    return torch.compile(call, dynamic=False)


def attention_sides():
    attention = kernels.causal_attention
    sides = {name: partial(attention, backend=name) for name in usable("causal_attention")}
    sides["compile"] = compiled(attention, "matmul")
    if CUDA:
        for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
            sides[f"sdpa-{name.split('_')[0].lower()}"] = partial(sdpa, name)
        sides["flex"] = flex()
    return sides


def norm_sides(operator, reference, liger_name):
    name = operator.__name__
    sides = {side: partial(operator, backend=side) for side in usable(name) if side != "reference"}
    sides["compile"] = compiled(operator, reference)
    if liger := liger_function(liger_name):
        sides["liger"] = liger
    return sides


def cross_entropy_sides():
    operator = kernels.linear_cross_entropy
    sides = {name: partial(operator, backend=name) for name in usable("linear_cross_entropy")}
    sides["compile"] = compiled(operator, "reference")
    if liger := liger_function("fused_linear_cross_entropy"):
        sides["liger"] = lambda h, weight, targets: liger(h, weight, targets)
    return sides


def liger_function(name):
    """Liger's function of a name, or None where it is not installed or cannot run."""
    if not CUDA:
        return None
    try:
        from liger_kernel.transformers import functional
    except ImportError:
        return None
    function = getattr(functional, f"liger_{name}")
    return (lambda *inputs: function(*inputs, 1e-6)) if "norm" in name else function


def liger_added_rms_norm(x, weight, residual):
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    return liger_fused_add_rms_norm(x, residual, weight, 1e-6)


def usable(operator):
    names = dispatch.IMPLEMENTATIONS[operator]
    return [n for n in names if dispatch.kernel_refusal(n, DEVICE.type) is None]


# --- measuring -----------------------------------------------------------------------------------


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def fastest(function, seconds=0.5):
    function()
    synchronize()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        function()
        synchronize()
        best = min(best, time.perf_counter() - start)
    return best


@pytest.fixture(scope="session")
def copy_bandwidth():
    """Bytes per second read and written by a copy that no cache holds."""
    x = torch.ones((2**28 if CUDA else 2**26) // 4, device=DEVICE.name)
    y = torch.empty_like(x)
    return 2 * x.nbytes / fastest(lambda: y.copy_(x))


@pytest.fixture(scope="session")
def matmul_peak():
    """Floating-point operations per second of a large product in the dtype of the benchmark."""
    n = 8192 if CUDA else 1024
    a, b = (torch.randn(n, n, device=DEVICE.name).to(DTYPE) for _ in range(2))
    return 2 * n**3 / fastest(lambda: a @ b)


def captured(call):
    """CALLS calls as one CUDA graph, after some on another stream, as capturing wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph.replay


def gradient_call(function, inputs, backward, dout=None):
    """A call that gives a list of the output and, if asked for, of the inputs' gradients."""
    inputs = [x.detach().requires_grad_(x.is_floating_point() and backward) for x in inputs]
    wanted = [x for x in inputs if x.requires_grad]

    def call():
        out = function(*inputs)
        out = out[0] if isinstance(out, tuple) else out
        if not backward:
            return [out]
        weights = torch.ones_like(out) if dout is None else dout.to(out.dtype)
        return [out, *torch.autograd.grad(out, wanted, weights)]

    return call


@pytest.fixture
def measure(benchmark, copy_bandwidth, matmul_peak):
    def run(group, side, function, reference, inputs, direction, work, dout=None):
        backward = direction == "forward+backward"
        wide = [x.double() if x.is_floating_point() else x for x in inputs]
        wide_dout = None if dout is None else dout.double()
        call = gradient_call(function, inputs, backward, dout)
        expected = gradient_call(reference, wide, backward, wide_dout)()
        for actual, wanted in zip(call(), expected, strict=True):
            assert relative_error(actual.detach(), wanted.detach()) <= TOLERANCE[DTYPE], side
        del wide, expected
        memory = peak_memory(call)

        def calls():
            for _ in range(CALLS):
                call()

        repeat = captured(call) if GRAPH else calls

        def timed():
            repeat()
            synchronize()

        benchmark.group = f"{group} {direction}"
        benchmark.pedantic(timed, rounds=20 if CUDA else 5, warmup_rounds=3 if CUDA else 1)
        if benchmark.stats is None:  # --benchmark-disable
            return
        seconds = benchmark.stats.stats.min / CALLS
        moved, products = work[backward]
        benchmark.extra_info.update(
            side=side,
            milliseconds=round(1e3 * seconds, 5),
            gigabytes_per_second=round(moved / seconds / 1e9, 2),
            of_copy_bandwidth=round(moved / seconds / copy_bandwidth, 4),
            teraflops=round(products / seconds / 1e12, 4),
            of_matmul_peak=round(products / seconds / matmul_peak, 4),
            peak_megabytes=memory,
            graph=GRAPH,
            dtype=str(DTYPE),
            device=torch.cuda.get_device_name() if CUDA else "cpu",
            torch=torch.__version__,
        )

    return run


def peak_memory(call):
    """Of one call beyond its inputs, in MB; None where it is not counted."""
    if not CUDA:
        return None
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 3)


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE.name, DTYPE)


def side_of(sides, name):
    if name not in sides:
        pytest.skip(f"{name} is not there")
    torch._dynamo.reset()  # else it gives up compiling after eight shapes, and says nothing
    return sides[name]


# --- the benchmarks ------------------------------------------------------------------------------

SDPA_SIDES = ["sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "sdpa-math", "flex"]
ATTENTION_SIDES = ["triton", "c++", "sdpa", "blocked", "matmul", "compile", *SDPA_SIDES]


@pytest.mark.parametrize("side", ATTENTION_SIDES)
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize(("batch", "length"), BATCHES)
def test_attention(measure, batch, length, head_dim, direction, side):
    function = side_of(attention_sides(), side)
    # Views of one packed projection, as the model passes them.
    packed = randn(batch, length, 3 * HEADS, head_dim)
    q, k, v = (x.transpose(1, 2) for x in packed.split(HEADS, dim=2))
    if "cudnn" in side or side == "flex":  # do not take such views at every length
        q, k, v = (x.contiguous() for x in (q, k, v))
    products = 2 * batch * HEADS * length * (length + 1) * head_dim
    work = {False: (4 * q.nbytes, products), True: (12 * q.nbytes, 3.5 * products)}
    group = f"attention {batch}x{length} D {head_dim}"
    reference = partial(kernels.causal_attention, backend="matmul")
    dout = randn(*q.shape, seed=1)
    measure(group, side, function, reference, (q, k, v), direction, work, dout)


@pytest.mark.parametrize("side", NORM_SIDES)
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("operator", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize(("batch", "length"), BATCHES)
def test_norm(measure, batch, length, operator, residual, direction, side):
    rms = operator == "rms_norm"
    best = "torch" if rms else "reference"
    function = side_of(norm_sides(getattr(kernels, operator), best, operator), side)
    if side == "liger" and residual:
        if not rms or not liger_function("fused_add_rms_norm"):
            pytest.skip("Liger's layer norm adds no residual")
        function = liger_added_rms_norm
    x, other = randn(batch * length, WIDTH), randn(batch * length, WIDTH, seed=1)
    # In fp32, as the model's; Liger takes them in the dtype of what they normalise.
    parameters = [randn(WIDTH, seed=2 + i) for i in range(1 if rms else 2)]
    if side != "liger":
        parameters = [p.float() for p in parameters]
    own = getattr(kernels, operator)
    reference = partial(own, backend=best)
    if residual:
        function = partial(function, residual=other)
        reference = partial(reference, residual=other.double())
    rows = x.nbytes
    work = {False: ((4 if residual else 2) * rows, 0), True: ((7 if residual else 5) * rows, 0)}
    group = f"{operator}{' + residual' if residual else ''} {batch}x{length} C {WIDTH}"
    dout = randn(*x.shape, seed=9)
    measure(group, side, function, reference, (x, *parameters), direction, work, dout)


@pytest.mark.parametrize("side", ["c++", "separate", "compile"])
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize(("batch", "length"), BATCHES)
def test_norm_rotary(measure, batch, length, head_dim, direction, side):
    """Queries and keys at once, as the model passes them."""
    tables = [t.to(DEVICE.name) for t in kernels.rotary_tables(length, head_dim, 10_000.0)]

    def call(backend, x, weight):
        return kernels.norm_rotary(x, weight, *(t.to(x.device) for t in tables), backend=backend)

    sides = {name: partial(call, name) for name in usable("norm_rotary")}
    sides["compile"] = torch.compile(partial(call, "separate"), dynamic=False)
    x = randn(batch, length, 2 * HEADS, head_dim)
    weight = randn(2 * HEADS, head_dim, seed=1).float()
    work = {False: (2 * x.nbytes, 0), True: (5 * x.nbytes, 0)}
    group, dout = f"norm, rotary {batch}x{length} D {head_dim}", randn(*x.shape, seed=2)
    reference = partial(call, "separate")
    measure(group, side, side_of(sides, side), reference, (x, weight), direction, work, dout)


@pytest.mark.parametrize("side", ["c++", "torch", "compile"])
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize(("batch", "length"), BATCHES)
def test_swiglu(measure, batch, length, direction, side):
    operator = kernels.swiglu
    sides = {name: partial(operator, backend=name) for name in usable("swiglu")}
    sides["compile"] = compiled(operator, "torch")
    x = randn(batch * length, 2 * 3 * WIDTH)
    dout = randn(batch * length, 3 * WIDTH, seed=1)
    work = {False: (1.5 * x.nbytes, 0), True: (4 * x.nbytes, 0)}
    group, reference = f"SwiGLU {batch}x{length} F {3 * WIDTH}", partial(operator, backend="torch")
    measure(group, side, side_of(sides, side), reference, (x,), direction, work, dout)


def as_in_a_model(operator):
    """Of fp32 but for the products, which are under autocast."""

    def call(backend, *inputs):
        half = DTYPE in (torch.float16, torch.bfloat16) and inputs[0].dtype == torch.float32
        with torch.autocast(inputs[0].device.type, DTYPE, enabled=half):
            return operator(*inputs, backend=backend)

    return call


@pytest.mark.parametrize("side", ["c++", "separate", "compile"])
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("operator", ["norm_linear", "linear_residual"])
@pytest.mark.parametrize(("batch", "length"), BATCHES)
def test_projections(measure, batch, length, operator, direction, side):
    """Queries, keys and values, and what becomes of their attention."""
    rows, first = batch * length, operator == "norm_linear"
    outputs = 3 * WIDTH if first else WIDTH
    second = randn(WIDTH, seed=1).float() if first else randn(rows, WIDTH, seed=1)
    weight, dout = randn(outputs, WIDTH, seed=2).float() / 8, randn(rows, outputs, seed=3)
    inputs = randn(rows, WIDTH).float(), second, weight
    call = as_in_a_model(getattr(kernels, operator))
    sides = {name: partial(call, name) for name in usable(operator)}
    sides["compile"] = torch.compile(partial(call, "separate"), dynamic=False)
    product, read = 2 * rows * WIDTH * outputs, sum(x.nbytes for x in inputs)
    work = {False: (read, product), True: (3 * read, 3 * product)}
    dout = dout if first else dout.float()
    group, reference = f"{operator} {batch}x{length} to {outputs}", partial(call, "separate")
    measure(group, side, side_of(sides, side), reference, inputs, direction, work, dout)


@pytest.mark.parametrize("side", ["c++", "separate", "compile"])
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize(("batch", "length"), BATCHES)
def test_feed_forward(measure, batch, length, direction, side):
    """With its norm and residual, in fp32 but for the products, as under autocast in a model."""
    call = as_in_a_model(kernels.feed_forward)
    sides = {name: partial(call, name) for name in usable("feed_forward")}
    sides["compile"] = torch.compile(partial(call, "separate"), dynamic=False)
    rows, hidden = batch * length, 3 * WIDTH
    shapes = (rows, WIDTH), (WIDTH,), (2 * hidden, WIDTH), (WIDTH, hidden)
    inputs = [randn(*shape, seed=i).float() / (1, 1, 8, 16)[i] for i, shape in enumerate(shapes)]
    product = 2 * rows * 3 * hidden * WIDTH
    read = sum(x.nbytes for x in inputs)
    work = {False: (read, product), True: (3 * read, 3 * product)}
    group, dout = f"feed-forward {batch}x{length} F {hidden}", randn(rows, WIDTH, seed=4).float()
    reference = partial(call, "separate")
    measure(group, side, side_of(sides, side), reference, inputs, direction, work, dout)


@pytest.mark.parametrize("side", ["triton", "c++", "chunked", "reference", "compile", "liger"])
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize(("batch", "length"), BATCHES)
def test_linear_cross_entropy(measure, batch, length, vocabulary, direction, side):
    function = side_of(cross_entropy_sides(), side)
    rows = batch * length
    h, weight = randn(rows, WIDTH), randn(vocabulary, WIDTH, seed=1) / 8
    targets = (torch.arange(rows, device=DEVICE.name) * 7919) % vocabulary
    product = 2 * rows * WIDTH * vocabulary
    read = h.nbytes + weight.nbytes
    work = {False: (read, product), True: (2 * read, 3 * product)}
    group = f"linear cross-entropy {batch}x{length} V {vocabulary}"
    # As by a loss scale, so that the gradients are of a usual size.
    dout = torch.full((), float(rows), device=DEVICE.name)
    measure(group, side, function, mean_loss, (h, weight, targets), direction, work, dout)


def part_loss(h, weight, targets):
    return F.cross_entropy(F.linear(h, weight), targets, reduction="sum")


def mean_loss(h, weight, targets):
    """The plain one, a part at a time, for in fp64 all logits would take gigabytes."""
    step = max(1, 2**25 // len(weight))
    total = 0
    for start in range(0, len(h), step):
        part = slice(start, start + step)
        total = total + checkpoint(part_loss, h[part], weight, targets[part], use_reentrant=False)
    return total / len(h)
