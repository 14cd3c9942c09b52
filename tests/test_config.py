"""Configurations: presets, overrides, validation, and the way to disk and back."""

import dataclasses
import json

import pytest

from tinylm.config import PRESETS, DataConfig, ModelConfig, TrainConfig, config_from_dict
from tinylm.errors import InputError


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_json(preset: str) -> None:
    config = TrainConfig.from_preset(preset, data="x.txt", minutes=5, d_model=64)
    assert config_from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_the_default_configuration_is_the_modern_preset() -> None:
    assert TrainConfig() == TrainConfig.from_preset() == TrainConfig.from_preset("modern")


def test_options_reach_the_class_that_has_them() -> None:
    config = TrainConfig.from_preset("causal", data="x", vocab_size=500, n_layers=3, lr=0.1)
    assert config.data == DataConfig(data="x", vocab_size=500, tokenizer="word")
    assert (config.model.n_layers, config.lr, config.preset) == (3, 0.1, "causal")
    with pytest.raises(InputError, match="unknown option 'speed'"):
        TrainConfig.from_preset("causal", speed=9)


def test_a_length_given_replaces_the_presets() -> None:
    assert TrainConfig.from_preset("notebook").epochs == 5
    config = TrainConfig.from_preset("notebook", minutes=2)
    assert (config.epochs, config.steps, config.minutes) == (None, None, 2)


def test_a_longer_window_makes_a_longer_context() -> None:
    assert TrainConfig.from_preset("causal", seq_len=64).model.max_seq_len == 64
    assert TrainConfig.from_preset("modern", seq_len=64).model.max_seq_len == 256
    assert TrainConfig.from_preset("modern", seq_len=512).model.max_seq_len == 512
    with pytest.raises(InputError, match="seq_len 64 is more than max_seq_len 32"):
        TrainConfig.from_preset("modern", seq_len=64, max_seq_len=32)


def test_the_notebook_is_as_it_was() -> None:
    config = TrainConfig.from_preset("notebook")
    assert (config.seq_len, config.stride, config.batch_size) == (32, 1, 16)
    assert (config.lr, config.beta1, config.beta2, config.weight_decay) == (1e-4, 0.9, 0.999, 0)
    assert (config.optimizer, config.schedule, config.clip) == ("adamw", "constant", 0)
    assert config.embedding_decay == 0
    assert not config.data.document_eos
    assert config.model == ModelConfig(
        d_model=128, n_layers=1, n_heads=4, d_ff=256, max_seq_len=32, causal=False,
        positions="none", norm="layer", norm_eps=1e-5, pre_norm=False, activation="relu",
        bias=True, qk_norm=False, tie_embeddings=False,
    )  # fmt: skip


@pytest.mark.parametrize("values", [{}, {"data": {}}, {"data": {}, "model": {"speed": 1}}, []])
def test_other_dictionaries_are_refused(values: object) -> None:
    with pytest.raises(InputError, match="not a configuration"):
        config_from_dict(values)  # type: ignore[arg-type]
