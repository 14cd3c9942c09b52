"""From a corpus to memory-mapped token files."""

from tinylm.data.config import DataConfig
from tinylm.data.prepare import encode_documents, prepare
from tinylm.data.sources import Source, open_source
from tinylm.data.tokens import Dataset, TokenFile, open_dataset

__all__ = [
    "DataConfig",
    "Dataset",
    "Source",
    "TokenFile",
    "encode_documents",
    "open_dataset",
    "open_source",
    "prepare",
]
