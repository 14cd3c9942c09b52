"""Configurations: frozen, typed, keyword-only, validated when made; and the three presets.

A run's whole configuration is a `TrainConfig`, written to ``config.json`` beside its weights.
The command line is generated from the fields below, so every option is documented once, here.
"""

import dataclasses
import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from tinylm.data.config import DataConfig, option
from tinylm.errors import InputError
from tinylm.loggers import logger_names

__all__ = ["PRESETS", "DataConfig", "ModelConfig", "TrainConfig", "config_from_dict", "with_fields"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a model is. The presets are named points in this space."""

    vocab_size: int = 10_000
    d_model: int = option(128, "width C of the model")
    n_layers: int = option(4, "number of transformer blocks")
    n_heads: int = option(2, "number of query heads H")
    n_kv_heads: int | None = option(
        None, "number of key and value heads; the same as heads if unset"
    )
    d_ff: int = option(384, "width of the feed-forward layer")
    max_seq_len: int = option(256, "longest context in tokens")
    causal: bool = True
    positions: Literal["none", "learned", "rope"] = "rope"
    norm: Literal["layer", "rms"] = "rms"
    pre_norm: bool = True
    activation: Literal["relu", "swiglu"] = "swiglu"
    bias: bool = False
    qk_norm: bool = True
    tie_embeddings: bool = True
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _positive(self, "vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "max_seq_len")
        if self.d_model % self.n_heads:
            raise InputError(
                f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}; "
                f"choose a multiple, such as {self.n_heads * max(1, self.d_model // self.n_heads)}"
            )
        if self.n_kv_heads is not None and (self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads):
            raise InputError(
                f"n_heads {self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}"
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise InputError(
                f"head dimension {self.head_dim} (d_model / n_heads) is odd; "
                "rotary positions need an even one"
            )
        _one_of(self, "positions", "none", "learned", "rope")
        _one_of(self, "norm", "layer", "rms")
        _one_of(self, "activation", "relu", "swiglu")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run: which data, which model, how long, and how.

    One of ``steps``, ``epochs`` and ``minutes`` sets the length; without any it is one epoch.
    Raises `InputError` for values that cannot work.
    """

    preset: str = "modern"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    out: str = option("", "run folder; runs/PRESET if unset")

    steps: int | None = option(None, "train for this many optimizer steps")
    epochs: float | None = option(None, "train for this many passes over the training split")
    minutes: float | None = option(None, "train for this many minutes; the schedule fits the time")

    seq_len: int = option(256, "tokens in a training window T")
    stride: int | None = option(None, "distance between window starts; seq_len if unset")
    batch_size: int = option(16, "windows in a batch B")
    micro_batch_size: int | None = option(
        None,
        "windows computed at once; with fewer, less memory and the same result but for rounding",
    )

    invented_scripts: float = option(
        0.03, "share of text in invented scripts that is added to the training text (BPE only)"
    )
    embedding_init: Literal["cooccurrence", "random"] = option(
        "cooccurrence", "cooccurrence: start from which tokens stand beside which; or random"
    )
    optimizer: Literal["muon", "adamw"] = option(
        "muon", "muon: Muon on matrices, AdamW on the rest; adamw: AdamW on everything"
    )
    lr: float = option(5e-3, "peak learning rate of AdamW")
    muon_lr: float = option(0.01, "peak learning rate of Muon")
    beta1: float = option(0.9, "AdamW's first-moment decay")
    beta2: float = option(0.999, "AdamW's second-moment decay")
    weight_decay: float | None = option(
        None, "decoupled weight decay of the blocks' matrices; by the length of an epoch if unset"
    )
    embedding_decay: float | None = option(
        None, "the same of the embedding, and of a head that is not tied to it"
    )
    schedule: Literal["wsd", "constant"] = option(
        "wsd", "wsd: warm up, stay, decay linearly to zero; constant: always the peak rate"
    )
    warmup: float = option(0.02, "share of the run spent warming up (wsd)")
    decay: float = option(0.4, "share of the run spent decaying (wsd)")
    clip: float = option(1.0, "largest norm of the whole gradient; 0 for no clipping")

    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "arithmetic of matrix products; auto chooses by the device"
    )
    seed: int = option(0, "seed of initial weights, order of data and samples")
    deterministic: bool = option(
        False, "the same bits each time on a GPU too, or an error; a resume checks for what differs"
    )
    cuda_graph: bool = option(
        True, "on one GPU, capture steps and evaluations as CUDA graphs; the results stay the same"
    )
    on_nan: Literal["stop", "skip"] = option(
        "stop", "what to do when loss or gradient is not finite: stop, or skip the step"
    )

    logger: str = option("", "also log to tensorboard, wandb, or both (a comma between)")
    log_every: int = option(10, "steps between records in metrics.jsonl")
    eval_every: int | None = option(
        None, "steps between evaluations; 20 in a run if unset, fewer if its minutes are few"
    )
    eval_tokens: int = option(32_768, "validation tokens used while training; all at the end")
    sample_every: int | None = option(
        None, "steps between samples; 4 in a run if unset, and one before it"
    )
    checkpoint_seconds: float = option(60.0, "seconds between checkpoints")
    keep_checkpoints: int = option(2, "newest checkpoints kept")

    def __post_init__(self) -> None:
        _one_of(self, "preset", *PRESETS)
        _one_of(self, "embedding_init", "cooccurrence", "random")
        _one_of(self, "optimizer", "muon", "adamw")
        _one_of(self, "schedule", "wsd", "constant")
        _one_of(self, "precision", "auto", "fp32", "bf16", "fp16")
        _one_of(self, "on_nan", "stop", "skip")
        _positive(
            self, "steps", "epochs", "minutes", "seq_len", "stride", "batch_size",
            "micro_batch_size", "lr", "muon_lr", "log_every", "eval_every", "eval_tokens",
            "sample_every", "keep_checkpoints",
        )  # fmt: skip
        if not 0 <= self.invented_scripts <= 1:
            raise InputError(
                f"invented_scripts is {self.invented_scripts}; it is a share, between 0 and 1"
            )
        _not_negative(self, "weight_decay", "embedding_decay", "clip", "checkpoint_seconds")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 0, below 1")
        check_seed(self.seed)
        logger_names(self.logger)
        lengths = [n for n in ("steps", "epochs", "minutes") if getattr(self, n) is not None]
        if len(lengths) > 1:
            raise InputError(f"give one of steps, epochs and minutes, not {' and '.join(lengths)}")
        if self.deterministic and self.minutes is not None:
            raise InputError(
                "a deterministic run cannot be limited by minutes, since its learning rate would "
                "follow the clock; give steps or epochs"
            )
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise InputError(
                f"batch_size {self.batch_size} is not divisible by "
                f"micro_batch_size {self.micro_batch_size}"
            )
        if self.seq_len > self.model.max_seq_len:
            raise InputError(
                f"seq_len {self.seq_len} is more than max_seq_len {self.model.max_seq_len}"
            )
        if not (self.warmup >= 0 and self.decay >= 0 and self.warmup + self.decay <= 1):
            raise InputError(
                f"warmup {self.warmup} and decay {self.decay} are shares of the run: "
                "each at least 0, together at most 1"
            )

    @classmethod
    def from_preset(cls, name: str = "modern", **options: Any) -> "TrainConfig":
        """The preset ``name`` with ``options`` (fields of any of the three classes) changed.

        ``vocab_size`` means the tokenizer's; the model's follows it.
        """
        if name not in PRESETS:
            raise InputError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
        merged = PRESETS[name] | {k: v for k, v in options.items() if v is not None}
        if options.get("seq_len") and not options.get("max_seq_len"):
            default = merged.get("max_seq_len", ModelConfig.max_seq_len)
            merged["max_seq_len"] = max(default, merged["seq_len"])
        if any(options.get(k) is not None for k in ("steps", "epochs", "minutes")):
            for k in ("steps", "epochs", "minutes"):
                merged[k] = options.get(k)
        return with_fields(cls(preset=name), merged)

    @property
    def run_folder(self) -> str:
        return self.out or f"runs/{self.preset}"


_NOTEBOOK_MODEL: dict[str, Any] = {
    "d_model": 128, "n_layers": 1, "n_heads": 4, "d_ff": 256, "max_seq_len": 32,
    "norm": "layer", "norm_eps": 1e-5, "pre_norm": False, "activation": "relu", "bias": True,
    "qk_norm": False, "tie_embeddings": False,
}  # fmt: skip

# What each preset changes from the defaults of the classes above.
PRESETS: dict[str, dict[str, Any]] = {
    "modern": {},
    "causal": _NOTEBOOK_MODEL
    | {
        "positions": "learned", "tokenizer": "word", "seq_len": 32, "batch_size": 64,
        "invented_scripts": 0.0, "embedding_init": "random", "optimizer": "adamw", "lr": 1e-3,
        "beta2": 0.95, "weight_decay": 0.0, "embedding_decay": 0.0,
    },
    "notebook": _NOTEBOOK_MODEL
    | {
        "positions": "none", "causal": False, "tokenizer": "word", "document_eos": False,
        "seq_len": 32, "stride": 1, "batch_size": 16, "epochs": 5.0,
        "invented_scripts": 0.0, "embedding_init": "random", "optimizer": "adamw", "lr": 1e-4,
        "beta2": 0.999, "weight_decay": 0.0, "embedding_decay": 0.0,
        "schedule": "constant", "clip": 0.0, "log_every": 1000, "precision": "fp32",
    },
}  # fmt: skip


def with_fields(config: TrainConfig, options: dict[str, Any]) -> TrainConfig:
    """``config`` with each option set in the class that has a field of that name."""
    parts: dict[type, dict[str, Any]] = {DataConfig: {}, ModelConfig: {}, TrainConfig: {}}
    for name, value in options.items():
        for cls, chosen in parts.items():
            if name in {f.name for f in fields(cls)}:
                chosen[name] = value
                break
        else:
            raise InputError(f"unknown option {name!r}")
    return replace(
        config,
        data=replace(config.data, **parts[DataConfig]),
        model=replace(config.model, **parts[ModelConfig]),
        **parts[TrainConfig],
    )


def config_from_dict(values: dict[str, Any]) -> TrainConfig:
    """The inverse of ``dataclasses.asdict``; unknown names raise `InputError`."""
    values = dict(values)
    try:
        data = DataConfig(**values.pop("data"))
        model = ModelConfig(**values.pop("model"))
        return TrainConfig(data=data, model=model, **values)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"not a configuration of this version of tinylm: {error}") from error


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name} is {value}; it must be more than 0, and finite")


def _not_negative(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 <= value < math.inf:
            raise InputError(f"{name} is {value}; it must be at least 0, and finite")


def check_seed(seed: int) -> None:
    """Raises `InputError` for a seed that torch's generators do not take."""
    if not 0 <= seed < 1 << 62:
        raise InputError(f"seed is {seed}; it must be at least 0 and below 2**62")


def _one_of(config: Any, name: str, *allowed: str) -> None:
    value = getattr(config, name)
    if value not in allowed:
        raise InputError(f"unknown {name} {value!r}; choose one of {', '.join(allowed)}")
