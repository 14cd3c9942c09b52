"""Documents of a data set on the Hugging Face Hub, through the package ``datasets``."""

import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinylm.data.formats import Position, ReadOptions, missing_field, text_of_record
from tinylm.data.sources import Source
from tinylm.errors import InputError

_WAYS_ON = "use --data builtin (Python's own texts), or a local .txt, .jsonl or .parquet file"


class HubSource(Source):
    """``owner/name[:config[:split]]``, split ``train`` if not named.

    The data set is downloaded once into the cache of ``datasets`` and memory-mapped from there,
    so a later run needs no network and memory stays bounded.
    """

    def __init__(self, name: str, options: ReadOptions) -> None:
        super().__init__()
        self.name = name
        self._options = options
        repository, _, rest = name.partition(":")
        config, _, split = rest.partition(":")
        self._what = (repository, config or None, split or "train")
        self._data = _load(*self._what)
        if options.text_field not in self._data.column_names:
            raise missing_field(name, options.text_field, list(self._data.column_names))
        self._data = self._data.select_columns([options.text_field])
        self.total_bytes = int(self._data.data.nbytes)

    def documents(self) -> Iterator[str]:
        self._position = position = Position()
        field, row, rows = self._options.text_field, 0, max(len(self._data), 1)
        for batch in self._data.iter(batch_size=64):
            for text in batch[field]:
                yield text_of_record({field: text}, f"{self.name}, row {row}", self._options)
                row += 1
            position.at(self.total_bytes * row // rows)

    def fingerprint(self, cache_dir: Path) -> str:
        # Derived by `datasets` from the repository's revision, the configuration and the split.
        return f"hub:{':'.join(map(str, self._what))}:{self._data._fingerprint}"


def _go_offline_if_cut_off() -> None:
    """Where the Hub's name cannot be resolved, tells its libraries so, before they are imported.

    They would try six times over half a minute, with a warning each, before they look at what
    is in their cache. Behind a proxy names need not resolve, so there they are left alone.
    """
    if "HF_HUB_OFFLINE" in os.environ or urllib.request.getproxies():
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(endpoint).hostname, None)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _load(repository: str, config: str | None, split: str) -> Any:
    _go_offline_if_cut_off()
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{repository}: reading a data set needs the package datasets; install it with"
            f" `pip install datasets`, or {_WAYS_ON}"
        ) from None
    try:
        return datasets.load_dataset(repository, config, split=split)
    except Exception as error:  # its many layers raise many types, all about the same request
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(error, (ConnectionError, TimeoutError)):
            raise InputError(
                f"cannot load {repository}: no network, and no copy in the cache ({reason});"
                f" {_WAYS_ON}"
            ) from error
        raise InputError(
            f"cannot load {repository}: neither a file here nor a data set that can be loaded from"
            f" the Hub ({type(error).__name__}: {reason}); check the name, or {_WAYS_ON}"
        ) from error
