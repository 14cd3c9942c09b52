"""Evaluation figures against slow, plain computations of the same."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tinylm.config import TrainConfig
from tinylm.evaluate import IGNORE, EvalText, bits_per_byte, evaluate, windows
from tinylm.model import Transformer
from tinylm.report import result_lines

EOS, UNK = 1, 0


def make(preset: str, **options: Any) -> Transformer:
    preset_model = TrainConfig.from_preset(preset).model
    config = replace(preset_model, vocab_size=20, max_seq_len=16, **options)
    model = Transformer(config, seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


STREAM = np.random.default_rng(0).integers(0, 20, 75).astype(np.uint16)


def slow_losses(model: Transformer, stream: np.ndarray, seq_len: int) -> list[torch.Tensor]:
    """Logits of each token given the tokens before it in its window, one at a time."""
    out = []
    for i in range(len(stream)):
        start = i // seq_len * seq_len
        before = [EOS] if start == 0 else [int(stream[start - 1])]
        context = before + [int(t) for t in stream[start:i]]
        with torch.no_grad():
            out.append(model(torch.tensor([context]))[0, -1].double())
    return out


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("notebook", {}),  # one layer: a mask hides the future from it
        ("notebook", {"n_layers": 2}),  # two: the second sees it through the first
        ("notebook", {"positions": "rope", "qk_norm": True, "pre_norm": True}),
        ("causal", {}),
        ("modern", {}),
    ],
)
def test_evaluate_matches_one_token_at_a_time(preset: str, options: dict[str, Any]) -> None:
    model = make(preset, **options)
    totals = evaluate(model, STREAM, eos_id=EOS, unk_id=UNK, seq_len=8)
    logits = slow_losses(model, STREAM, 8)
    nats = [
        -torch.log_softmax(x, 0)[t].item() for x, t in zip(logits, STREAM.tolist(), strict=True)
    ]
    ranks = [int((x > x[t]).sum()) for x, t in zip(logits, STREAM.tolist(), strict=True)]
    known = [i for i, t in enumerate(STREAM.tolist()) if t != UNK]
    assert totals.tokens == 75
    assert totals.unk == 75 - len(known) > 0
    assert totals.nats == pytest.approx(sum(nats), rel=1e-5)
    assert totals.known_nats == pytest.approx(sum(nats[i] for i in known), rel=1e-5)
    assert totals.top1 == sum(r == 0 for r in ranks)
    assert totals.top5 == sum(r < 5 for r in ranks)
    assert totals.known_top1 == sum(ranks[i] == 0 for i in known)
    rates = totals.rates()
    assert rates["perplexity"] == pytest.approx(math.exp(sum(nats) / 75), rel=1e-5)
    assert rates["known_loss"] == pytest.approx(sum(nats[i] for i in known) / len(known), rel=1e-5)


def test_the_leaked_figure_of_the_notebook_differs_and_is_only_given_on_request() -> None:
    model = make("notebook")
    honest = evaluate(model, STREAM, eos_id=EOS, seq_len=8)
    leaked = evaluate(model, STREAM, eos_id=EOS, seq_len=8, prefix_only=False)
    assert abs(honest.loss - leaked.loss) > 1e-3
    causal = make("causal")
    assert evaluate(causal, STREAM, eos_id=EOS, prefix_only=False) == evaluate(
        causal, STREAM, eos_id=EOS
    )


def test_every_token_is_a_target_once() -> None:
    inputs, targets = windows(STREAM, 8, EOS, None)
    flat = targets.flatten()
    assert flat[flat != IGNORE].tolist() == STREAM.tolist()
    assert inputs.flatten()[0] == EOS
    assert inputs.flatten()[1:75].tolist() == STREAM[:-1].tolist()


def test_a_limit_takes_windows_from_everywhere() -> None:
    _, targets = windows(np.arange(1000), 10, EOS, limit=100)
    assert targets.shape == (10, 10)
    assert targets[0, 0] == 0
    assert targets[-1, -1] == 999
    totals = evaluate(make("modern"), STREAM, eos_id=EOS, seq_len=8, limit=16)
    assert totals.tokens < 75


def test_evaluate_leaves_the_mode_alone() -> None:
    model = make("modern").train()
    evaluate(model, STREAM, eos_id=EOS)
    assert model.training


def test_a_uniform_model_has_the_entropy_of_the_vocabulary() -> None:
    model = make("modern")
    with torch.no_grad():
        model.embedding.weight.zero_()
    totals = evaluate(model, STREAM, eos_id=EOS, unk_id=UNK)
    assert totals.loss == pytest.approx(math.log(20))
    assert totals.top1 == 0  # ties count against the model
    assert bits_per_byte(totals, EvalText(bytes=300)) == pytest.approx(75 * math.log2(20) / 300)
    charged = bits_per_byte(totals, EvalText(bytes=300, unk_bits=30.0))
    assert charged == pytest.approx((75 * math.log2(20) + 30) / 300)


def test_lines_for_people_name_the_leak() -> None:
    result = {
        "loss": 6.0, "perplexity": 403.4, "context": 32, "top1": 0.1, "top5": 0.2,
        "bits_per_byte": 2.5, "tokens": 10, "bytes": 50, "unk_share": 0.1, "known_loss": 6.5,
        "known_top1": 0.05, "overlap": 0.01, "leaked_loss": 2.69, "leaked_top1": 0.5,
    }  # fmt: skip
    text = "\n".join(result_lines(result))
    for part in ("6.0000 nats", "top-1 10.00%", "2.5000", "on known words loss 6.5000", "2.6900"):
        assert part in text
    assert "not comparable" in text
    assert "trigram" not in text
    rates = {"loss": 5.09, "top1": 0.22, "known_loss": 5.63, "known_top1": 0.15}
    text = "\n".join(
        result_lines(result | {"baselines": {"trigram": rates | {"bits_per_byte": 2.3}}})
    )
    assert "trigram         loss 5.0900, top-1 22.00%, known words 5.6300 and 15.00%" in text
    assert "bits per byte 2.3000 (counting alone)" in text
