"""From raw text to a trained, honestly evaluated small language model.

Nothing heavy is imported until it is used: the names below load their modules on first access.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tinylm import kernels as kernels
    from tinylm.config import PRESETS, DataConfig, ModelConfig, TrainConfig
    from tinylm.data import prepare
    from tinylm.errors import InputError, TrainingError
    from tinylm.lm import LanguageModel, load
    from tinylm.model import Transformer
    from tinylm.run import train
    from tinylm.tokenizer import BPETokenizer, WordTokenizer, load_tokenizer

_HOME = {
    "PRESETS": "config",
    "BPETokenizer": "tokenizer",
    "DataConfig": "config",
    "InputError": "errors",
    "LanguageModel": "lm",
    "ModelConfig": "config",
    "TrainConfig": "config",
    "TrainingError": "errors",
    "Transformer": "model",
    "WordTokenizer": "tokenizer",
    "load": "lm",
    "load_tokenizer": "tokenizer",
    "prepare": "data",
    "train": "run",
}

__all__ = [
    "PRESETS",
    "BPETokenizer",
    "DataConfig",
    "InputError",
    "LanguageModel",
    "ModelConfig",
    "TrainConfig",
    "TrainingError",
    "Transformer",
    "WordTokenizer",
    "__version__",
    "kernels",
    "load",
    "load_tokenizer",
    "prepare",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return import_module("tinylm.kernels")
    if name not in _HOME:
        raise AttributeError(f"module 'tinylm' has no attribute {name!r}")
    return getattr(import_module(f"tinylm.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
