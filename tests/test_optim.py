"""Optimizers against plain computations, and the schedule's shape."""

import math
from dataclasses import replace

import pytest
import torch

from tinylm.config import TrainConfig
from tinylm.kernels.muon import orthogonalise
from tinylm.model import Transformer
from tinylm.optim import Muon, Optimizer, lr_factor, weight_decay


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 20), (2, 20, 8), (1, 1, 5)])
def test_orthogonalise_flattens_singular_values(shape: tuple[int, ...]) -> None:
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = orthogonalise(g)
    assert out.shape == g.shape
    values = torch.linalg.svdvals(out)
    assert (values > 0.6).all()
    assert (values < 1.3).all()
    # The singular vectors stay: out = U f(S) Vᵀ, so gᵀ out is symmetric.
    product = g.mT @ out
    torch.testing.assert_close(product, product.mT, rtol=1e-3, atol=1e-3)


def test_orthogonalise_keeps_zero() -> None:
    assert (orthogonalise(torch.zeros(1, 4, 4)) == 0).all()


def test_muon_sees_stacked_matrices_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    stacked = torch.nn.Parameter(torch.randn(24, 8, generator=generator))
    apart = [torch.nn.Parameter(p.detach().clone()) for p in stacked.chunk(3)]
    grad = torch.randn(24, 8, generator=generator)
    stacked.grad = grad
    for p, g in zip(apart, grad.chunk(3), strict=True):
        p.grad = g
    Muon([(stacked, 3)], lr=0.1).step()
    Muon([(p, 1) for p in apart], lr=0.1).step()
    torch.testing.assert_close(stacked.detach(), torch.cat([p.detach() for p in apart]))


def test_gradients_may_lie_in_memory_as_they_like() -> None:
    plain, turned = (torch.nn.Parameter(torch.zeros(12, 4)) for _ in range(2))
    plain.grad = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    turned.grad = plain.grad.T.contiguous().T
    for p in (plain, turned):
        Muon([(p, 3)], lr=0.1).step()
    torch.testing.assert_close(plain, turned)


def test_equal_shapes_are_orthogonalised_as_if_alone() -> None:
    shapes = [(12, 4), (6, 4), (12, 4), (4, 4), (8, 3)]  # of the last, two maps turned
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(s)) for s in shapes]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    alone = [torch.nn.Parameter(torch.zeros(s)) for s in shapes]
    for p, other in zip(alone, parameters, strict=True):
        p.grad = other.grad
        Muon([(p, 2)], lr=0.1).step()
    Muon([(p, 2) for p in parameters], lr=0.1).step()
    for p, other in zip(alone, parameters, strict=True):
        torch.testing.assert_close(p, other)
        assert p.abs().max() > 0.01


@pytest.mark.parametrize("preset", ["modern", "causal"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_matrices_and_embeddings_decay_and_nothing_else(preset: str, optimizer: str) -> None:
    """What is left of them after a step without gradients; positions, norms and biases stay."""
    rates = {"lr": 0.1, "muon_lr": 0.2, "weight_decay": 0.5, "embedding_decay": 0.25}
    config = TrainConfig.from_preset(preset, optimizer=optimizer, **rates)
    model = Transformer(replace(config.model, vocab_size=20))
    for parameter in model.parameters():
        parameter.data.fill_(2.0)
        parameter.grad = torch.zeros_like(parameter)
    Optimizer(model, config).step(lr_factor=1.0)
    decayed = set()
    for name, parameter in model.named_parameters():
        kept = 1.0
        if name in model.matrices():
            kept = 1 - 0.5 * (0.2 if optimizer == "muon" else 0.1)
        elif name in ("embedding.weight", "head.weight"):
            kept = 1 - 0.25 * 0.1
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 2 * kept))
        decayed |= {name} if kept < 1 else set()
    assert len(decayed) == len(model.matrices()) + 1 + (preset == "causal")


def test_decay_left_open_fits_the_length_of_an_epoch() -> None:
    config = TrainConfig.from_preset("modern", lr=0.005, muon_lr=0.01)
    matrices, embeddings = weight_decay(config, steps_per_epoch=1000)
    after_an_epoch = (1 - 0.01 * matrices) ** 1000, (1 - 0.005 * embeddings) ** 1000
    assert after_an_epoch == pytest.approx((math.exp(-1), math.exp(-0.5)), rel=1e-3)
    # The same whatever the learning rates are.
    other = weight_decay(replace(config, lr=0.01, optimizer="adamw"), 1000)
    assert other == pytest.approx((0.1, 0.05))
    # Text so short that an epoch is less than a step does not wipe out the weights.
    assert weight_decay(config, steps_per_epoch=0.1) == pytest.approx((1.0, 2.0))
    # What is asked for stands; and there is none where no epoch ever ends.
    asked = replace(config, weight_decay=0.0, embedding_decay=0.25)
    assert weight_decay(asked, 1000) == (0.0, 0.25)
    assert weight_decay(config, math.inf) == (0.0, 0.0)


def test_muon_follows_nesterov_momentum_and_decays() -> None:
    p = torch.nn.Parameter(torch.eye(4))
    muon = Muon([(p, 1)], lr=0.1, momentum=0.5, weight_decay=0.2)
    momentum, expected = torch.zeros(4, 4), torch.eye(4)
    for seed in range(3):
        p.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
        momentum = 0.5 * momentum + 0.5 * p.grad
        ahead = 0.5 * p.grad + 0.5 * momentum
        expected = expected * (1 - 0.1 * 0.2) - 0.1 * orthogonalise(ahead[None])[0]
        muon.step()
        torch.testing.assert_close(p.detach(), expected)


def make(preset: str, **options: object) -> tuple[Transformer, Optimizer, TrainConfig]:
    config = TrainConfig.from_preset(preset, d_model=16, d_ff=24, n_heads=2, steps=10, **options)
    model = Transformer(replace(config.model, vocab_size=30))
    return model, Optimizer(model, config), config


def test_notebook_optimizer_is_adam() -> None:
    model, optimizer, config = make("notebook")
    theirs = Transformer(model.config)
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-4)
    ids = torch.arange(30).view(2, 15)
    for _ in range(3):
        for m in (model, theirs):
            m.loss(ids, ids.roll(1)).backward()
        optimizer.step(lr_factor(config, 0.5))
        adam.step()
        adam.zero_grad()
    others = dict(theirs.named_parameters())
    for name, ours in model.named_parameters():
        other = others[name]
        if name.endswith("qkv.bias"):  # the keys' has no gradient but rounding; Adam magnifies it
            ours, other = (torch.cat(x.chunk(3)[::2]) for x in (ours, other))
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=5e-7)


def test_every_parameter_is_trained_by_exactly_one_optimizer() -> None:
    model, optimizer, _ = make("modern")
    trained = [p for part in optimizer._parts for g in part.param_groups for p in g["params"]]
    assert len(trained) == len(set(trained)) == len(list(model.parameters()))
    muon = {p for g in optimizer._parts[1].param_groups for p in g["params"]}
    assert muon == {p for n, p in model.named_parameters() if n in model.matrices()}
    assert model.embedding.weight not in muon


def test_state_survives_a_round_trip() -> None:
    ids = torch.arange(30).view(2, 15)

    def run(model: Transformer, optimizer: Optimizer, steps: int) -> None:
        for _ in range(steps):
            model.loss(ids, ids.roll(1)).backward()
            optimizer.step(0.7)

    model, optimizer, _ = make("modern")
    run(model, optimizer, 3)
    again, other, _ = make("modern")
    again.load_state_dict(model.state_dict())
    other.load_state_tensors({n: t.clone() for n, t in optimizer.state_tensors().items()})
    run(model, optimizer, 3)
    run(again, other, 3)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_schedule() -> None:
    config = TrainConfig.from_preset("modern", warmup=0.1, decay=0.4)
    factors = [lr_factor(config, x / 100) for x in range(101)]
    assert factors[0] == 0.01
    assert factors[5] == pytest.approx(0.5)
    assert set(factors[10:60]) == {1.0}
    assert factors[80] == pytest.approx(0.5)
    assert factors[100] == 0
    assert lr_factor(replace(config, schedule="constant"), 0.99) == 1.0
    assert lr_factor(replace(config, warmup=0.0, decay=0.0), 0.0) == 1.0
