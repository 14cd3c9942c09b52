"""The order of training windows: a permutation, the same for every run with the same seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm.data.windows import WindowSampler, shuffled
from tinylm.errors import InputError


@given(n=st.integers(1, 3000), key=st.integers(0, 2**70))
def test_shuffled_is_a_permutation(n: int, key: int) -> None:
    assert sorted(shuffled(np.arange(n), n, key)) == list(range(n))


def test_shuffled_looks_random() -> None:
    order = shuffled(np.arange(100_000), 100_000, key=7)
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.01
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.01
    assert (order != shuffled(np.arange(100_000), 100_000, key=8)).mean() > 0.99


def test_shuffled_takes_billions() -> None:
    index = np.arange(10) * 10**8
    out = shuffled(index, 10**10, key=1)
    assert len(set(out.tolist())) == 10
    assert ((out >= 0) & (out < 10**10)).all()


@pytest.mark.parametrize("stride", [None, 1, 3, 16])
def test_an_epoch_holds_every_window_once(stride: int | None) -> None:
    sampler = WindowSampler(np.arange(500), 16, batch_size=4, stride=stride)
    for epoch in range(3):
        first = epoch * sampler.windows
        samples = np.concatenate([sampler.starts(s) for s in range(3 * sampler.windows // 4 + 1)])
        starts = np.sort(samples[first : first + sampler.windows])
        assert (np.diff(starts) == sampler.stride).all()
        assert starts[0] < max(sampler.stride, sampler.shifts)
        assert starts[-1] + 16 < 500


def test_stride_one_has_the_notebooks_number_of_windows() -> None:
    assert WindowSampler(np.arange(1000), 32, batch_size=16, stride=1).windows == 1000 - 32


def test_targets_are_the_next_tokens() -> None:
    sampler = WindowSampler(np.arange(500, dtype=np.uint16), 16, batch_size=4)
    inputs, targets = sampler.batch(3)
    assert inputs.shape == targets.shape == (4, 16)
    assert inputs.dtype == targets.dtype == np.int64
    assert (targets == inputs + 1).all()


def test_epochs_cut_the_text_in_different_places() -> None:
    sampler = WindowSampler(np.arange(5000), 16, batch_size=1)
    offsets = {int(sampler.starts(e * sampler.windows)[0] % 16) for e in range(40)}
    assert len(offsets) > 8


def test_the_seed_decides() -> None:
    def starts(seed: int) -> list[int]:
        sampler = WindowSampler(np.arange(500), 16, 4, seed=seed)
        return [int(x) for x in sampler.starts(0)]

    assert starts(1) == starts(1)
    assert starts(1) != starts(2)


def test_exactly_one_window_is_enough() -> None:
    sampler = WindowSampler(np.arange(17), 16, batch_size=2)
    assert sampler.starts(0).tolist() == [0, 0]
    with pytest.raises(InputError, match="has 16 tokens, fewer than one window of 16"):
        WindowSampler(np.arange(16), 16, batch_size=2)
