"""Steps of Muon in C++."""

import pytest
import torch
from compiled_kernels import muon_matrices
from operators import assert_close, randn
from torch import Tensor

from tinylm import kernels
from tinylm.kernels import dispatch
from tinylm.kernels.muon import Matrix, MuonOptions

pytest.importorskip("tinylm._C")


@pytest.mark.usefixtures("own_products")
def test_muon(caplog: pytest.LogCaptureFixture) -> None:
    """Tall, wide and square ones, stacked or not, against products in fp64, for three steps."""
    sizes = [(32, 32, 1), (192, 64, 3), (64, 192, 1), (128, 32, 2), (32, 96, 1)]
    ours, theirs = muon_matrices(sizes, 0), muon_matrices(sizes, 0, torch.float64)
    options = MuonOptions(lr=0.1, momentum=0.7, weight_decay=0.2, dtype=torch.bfloat16)
    for step in range(3):
        for a, b in zip(ours, theirs, strict=True):
            before = b.weight.clone()
            a.gradient.copy_(randn(*a.gradient.shape, seed=step, dtype=torch.float32))
            b.gradient.copy_(a.gradient)
            kernels.muon_step([a], options, backend="c++")
            kernels.muon_step([b], options, backend="torch")
            assert_close(a.momentum, b.momentum, torch.float32, f"momentum {step}")
            change = (b.weight - before).abs().max()
            error = (a.weight.double() - b.weight).abs().max()
            # Five iterations in bf16 add up; a step is thus wrong by at most so much of itself.
            assert error <= (step + 1) * 0.04 * change, f"step {step}: {error / change:.3f}"
    assert not caplog.records


@pytest.mark.usefixtures("own_products")
def test_muon_is_as_exact_as_in_torch() -> None:
    """By the mean error against products in fp64."""
    errors: dict[str, Tensor] = {}
    for backend in ("c++", "torch"):
        matrices = muon_matrices([(96, 64, 1)] * 8, 5)
        exact = muon_matrices([(96, 64, 1)] * 8, 5, torch.float64)
        options = MuonOptions(lr=0.1, dtype=torch.bfloat16)
        kernels.muon_step(matrices, options, backend=backend)
        kernels.muon_step(exact, options, backend="torch")
        pairs = zip(matrices, exact, strict=True)
        errors[backend] = torch.stack([(a.weight - b.weight).square().mean() for a, b in pairs])
    assert errors["c++"].sum() <= 1.2 * errors["torch"].sum()


@pytest.mark.usefixtures("own_products")
def test_muon_of_zeros_and_of_what_is_not_finite() -> None:
    zero, bad, good = muon_matrices([(32, 64, 1)] * 3, 0)
    zero.gradient.zero_()
    zero.momentum.zero_()
    bad.gradient[3, 5] = float("nan")
    before = zero.weight.clone()
    kernels.muon_step([zero, bad, good], MuonOptions(0.1, dtype=torch.bfloat16), backend="c++")
    assert torch.equal(zero.weight, before)
    assert bad.weight.isnan().any()
    assert good.weight.isfinite().all()


@pytest.mark.usefixtures("own_products")
def test_other_matrices_are_left_to_torch(caplog: pytest.LogCaptureFixture) -> None:
    bf16 = MuonOptions(0.1, dtype=torch.bfloat16)
    on_device = bf16._replace(found_inf=torch.zeros(()))
    transposed = muon_matrices([(32, 64, 1)], 0)[0]
    transposed = Matrix(transposed.weight.t(), transposed.gradient.t(), transposed.momentum.t())
    calls = [
        (muon_matrices([(31, 32, 1)], 0), bf16, "of 1 matrices of 31 x 32"),
        (muon_matrices([(64, 32, 4)], 0), bf16, "of 4 matrices of 16 x 32"),
        (muon_matrices([(32, 32, 1)], 0), MuonOptions(0.1), "of products in fp32"),
        (muon_matrices([(32, 32, 1)], 0), on_device, "set off without a look"),
        ([transposed], bf16, "row after row"),
    ]
    for matrices, options, reason in calls:
        caplog.clear()
        dispatch.forget()
        before = matrices[0].weight.clone()
        kernels.muon_step(matrices, options, backend="c++")
        assert not torch.equal(matrices[0].weight, before)
        (record,) = caplog.records
        assert record.getMessage().startswith("muon runs as torch, not in C++: of ")
        assert reason in record.getMessage()
