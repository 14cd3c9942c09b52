"""From a corpus to memory-mapped token files and batches."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinylm.data.config import DataConfig
    from tinylm.data.preparation import encode_documents, prepare
    from tinylm.data.sources import Source, open_source
    from tinylm.data.text_files import encode_files
    from tinylm.data.tokens import Dataset, TokenFile, open_dataset

# Loaded on first use: `tinylm.config` needs only DataConfig, and must not wait for the rest.
_HOME = {
    "DataConfig": "config",
    "Dataset": "tokens",
    "Source": "sources",
    "TokenFile": "tokens",
    "encode_documents": "preparation",
    "encode_files": "text_files",
    "open_dataset": "tokens",
    "open_source": "sources",
    "prepare": "preparation",
}

__all__ = [
    "DataConfig",
    "Dataset",
    "Source",
    "TokenFile",
    "encode_documents",
    "encode_files",
    "open_dataset",
    "open_source",
    "prepare",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
