"""Sampling rules, the cache, batches, streaming, prompts."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import WORDS
from hypothesis import given
from hypothesis import strategies as st

import tinylm
from tinylm.config import TrainConfig
from tinylm.errors import InputError
from tinylm.generate import Sampling, distribution, generate_ids
from tinylm.model import Transformer

EOS = 1


def make(preset: str = "modern", **options: object) -> Transformer:
    options = {"vocab_size": 20, "max_seq_len": 16} | options
    model = Transformer(replace(TrainConfig.from_preset(preset).model, **options), seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model.eval()


def run(model: Transformer, prompts: list[list[int]], **options: object) -> list[list[int]]:
    keywords = {"banned": options.pop("banned", ()), "use_cache": options.pop("use_cache", True)}
    out: list[list[int]] = [[] for _ in prompts]
    for step in generate_ids(model, prompts, Sampling(**options), eos_id=EOS, **keywords):
        for sequence, token in zip(out, step, strict=True):
            sequence += [] if token is None else [token]
    return out


LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])


def test_temperature() -> None:
    plain = distribution(LOGITS, [], Sampling(temperature=1.0))
    torch.testing.assert_close(plain, LOGITS.softmax(0))
    cold = distribution(LOGITS, [], Sampling(temperature=0.5))
    torch.testing.assert_close(cold, (LOGITS / 0.5).softmax(0))
    assert distribution(LOGITS, [], Sampling(temperature=0)).tolist() == [0, 0, 0, 0, 1]
    assert distribution(LOGITS, [], Sampling(temperature=1e-30)).tolist() == [0, 0, 0, 0, 1]


def test_top_k_and_top_p() -> None:
    k2 = distribution(LOGITS, [], Sampling(temperature=1.0, top_k=2))
    assert (k2 > 0).tolist() == [True, False, False, False, True]
    assert k2.sum().item() == pytest.approx(1)
    # Probabilities in order: 0.636, 0.234, 0.086, …
    for top_p, kept in [(0.6, 1), (0.7, 2), (0.9, 3), (1.0, 5), (1e-9, 1)]:
        assert (distribution(LOGITS, [], Sampling(temperature=1.0, top_p=top_p)) > 0).sum() == kept


def test_repetition_penalty_makes_what_occurred_less_likely() -> None:
    out = distribution(LOGITS, [4, 3, 4], Sampling(temperature=1.0, repetition_penalty=2.0))
    expected = torch.tensor([2.0, 1.0, 0.0, -2.0, 1.5]).softmax(0)
    torch.testing.assert_close(out, expected)


@given(
    logits=st.lists(st.floats(-50, 50), min_size=2, max_size=30),
    temperature=st.floats(0, 10),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.floats(0.01, 1),
    penalty=st.floats(0.5, 3),
)
def test_every_setting_gives_a_distribution(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None, penalty: float
) -> None:
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty
    )
    out = distribution(torch.tensor(logits), [0], sampling)
    assert out.sum().item() == pytest.approx(1, abs=1e-4)
    assert (out >= 0).all()
    assert out[(out > 0).nonzero()].numel() >= 1


@pytest.mark.parametrize("preset", ["notebook", "causal", "modern"])
def test_with_and_without_cache_give_the_same_text(preset: str) -> None:
    model = make(preset)
    options = {"max_new_tokens": 10, "temperature": 1.0, "seed": 3, "banned": (EOS,)}
    cached = run(model, [[2, 3, 4]], **options)
    assert cached == run(model, [[2, 3, 4]], use_cache=False, **options)
    assert len(cached[0]) == 10


@pytest.mark.parametrize("preset", ["notebook", "causal", "modern"])
def test_a_batch_gives_what_each_prompt_gives_alone(preset: str) -> None:
    model = make(preset)
    prompts = [[2, 3, 4, 5, 6], [7], [8, 9]]
    options = {"max_new_tokens": 8, "temperature": 1.0}
    together = run(model, prompts, seed=5, **options)
    alone = [run(model, [p], seed=5 + i, **options)[0] for i, p in enumerate(prompts)]
    assert together == alone


@pytest.mark.parametrize("preset", ["notebook", "causal", "modern"])
def test_text_goes_on_beyond_the_context(preset: str) -> None:
    model = make(preset)
    out = run(model, [[2, 3], list(range(2, 20)) * 2], max_new_tokens=60, seed=0, banned=(EOS,))
    assert [len(x) for x in out] == [60, 60]


def test_greedy_takes_the_most_likely_token() -> None:
    model = make()
    ids = [2, 3, 4]
    for token in run(model, [ids], max_new_tokens=5, temperature=0, banned=(EOS,))[0]:
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        logits[EOS] = -torch.inf
        assert token == logits.argmax()
        ids = [*ids, token]


def test_end_of_text_stops_a_sequence_and_not_the_others() -> None:
    model = make()
    prompts = [[2], [3], [4], [5]]
    out = run(model, prompts, max_new_tokens=200, temperature=1.5, seed=1)
    assert len({len(x) for x in out}) > 1
    assert all(EOS not in x for x in out)


def test_seeds() -> None:
    model = make()
    options = {"max_new_tokens": 12, "temperature": 1.0, "banned": (EOS,)}
    assert run(model, [[2]], seed=1, **options) == run(model, [[2]], seed=1, **options)
    assert run(model, [[2]], seed=1, **options) != run(model, [[2]], seed=2, **options)
    torch.manual_seed(0)
    first = run(model, [[2]], **options)
    torch.manual_seed(0)
    assert run(model, [[2]], **options) != first  # no seed: not repeatable


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ],
)
def test_settings_out_of_range_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**options)  # type: ignore[arg-type]


# --- a trained model, text in and out ------------------------------------------------------------


def test_generate_returns_prompt_and_continuation(trained: Path) -> None:
    lm = tinylm.load(trained)
    text = lm.generate("The people of", max_new_tokens=12, seed=0)
    assert text.startswith("The people of ")
    assert len(text) > len("The people of ")
    assert "<" not in text  # neither <UNK> nor <EOS>
    assert lm.generate("The people of", max_new_tokens=12, seed=0) == text
    pieces = list(lm.stream("The people of", max_new_tokens=12, seed=0))
    assert "The people of" + "".join(pieces) == text
    assert 1 < len(pieces) <= 12


def test_generate_takes_several_prompts(trained: Path) -> None:
    lm = tinylm.load(trained)
    texts = lm.generate(["they were", "it"], max_new_tokens=5, seed=3)
    assert [t.split()[0] for t in texts] == ["they", "it"]
    assert texts[0] == lm.generate("they were", max_new_tokens=5, seed=3)


def test_spaces_between_prompt_and_continuation(trained: Path) -> None:
    lm = tinylm.load(trained)
    assert "  " not in lm.generate("they were ", max_new_tokens=5, seed=3)
    assert not lm.generate("", max_new_tokens=5, seed=3).startswith(" ")


def test_the_model_has_learned_who_follows_whom(trained: Path) -> None:
    lm = tinylm.load(trained)
    hits = 0
    for word in WORDS:
        likely = {token for token, _ in lm.next_tokens(f"they {word}", k=3)}
        hits += len(likely & set(random.Random(word).sample(WORDS, 3)))
    assert hits > 2 * len(WORDS)  # of 3 each; by chance it would be about 0.15


def test_next_tokens_are_probabilities_in_order(trained: Path) -> None:
    lm = tinylm.load(trained)
    tokens = lm.next_tokens("they were", k=1000)
    assert len(tokens) == lm.tokenizer.vocab_size
    values = [p for _, p in tokens]
    assert values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(1, abs=1e-4)
    with pytest.raises(InputError, match="k is 0"):
        lm.next_tokens("they", k=0)


def test_a_prompt_without_a_known_word_is_refused(trained: Path) -> None:
    lm = tinylm.load(trained)
    with pytest.raises(InputError, match="'xyzzy plugh' has no word that the model knows"):
        lm.generate("xyzzy plugh")
    with pytest.raises(InputError, match=r"'\.\.\.' has no word"):
        lm.generate("...")
    assert lm.generate("xyzzy they", max_new_tokens=2, seed=0).startswith("xyzzy they ")


def test_the_prompt_is_not_ended_before_it_is_continued(trained: Path) -> None:
    lm = tinylm.load(trained)
    assert lm.tokenizer.eos_id not in lm.prompt_ids("they were")
