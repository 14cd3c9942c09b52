"""Text that is on every machine with Python: the standard library's documentation and sources."""

import ast
import inspect
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from tinylm.data.cache import content_hash
from tinylm.data.formats import Position
from tinylm.data.sources import Source
from tinylm.errors import InputError

# Tests repeat themselves, `encodings` is mostly tables, and the topics are read as documents.
_SKIPPED = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages"}

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class BuiltinSource(Source):
    """About 10 MB, prose first: language topics, documentation strings, then sources.

    The order is the topics of ``pydoc`` by name, one document of documentation strings for each
    module by path, and one document of source for each module, documentation strings taken out,
    so that no text comes twice. Modules that do not parse are passed over. The text depends on
    the Python version, and its fingerprint says so.
    """

    name = "builtin"

    def __init__(self, library: Path | None = None) -> None:
        super().__init__()
        self._library = library or Path(sysconfig.get_paths()["stdlib"])
        self._modules = sorted(self._find_modules(), key=lambda path: path.as_posix())
        if not self._modules:
            raise InputError(
                f"builtin: no Python sources in {self._library}; use a local text file instead"
            )
        self._documents: list[str] | None = None
        self.total_bytes = sum(path.stat().st_size for path in self._modules)

    def documents(self) -> Iterator[str]:
        self._position = position = Position()
        if self._documents is None:
            # Parsing costs seconds and every corpus is read twice, so the text is kept: 10 MB.
            prose, code = list(self._topics()), []
            for path in self._modules:
                documentation, source = _split_module(path)
                prose.append(documentation)
                code.append(source)
                position.finish_file(path.stat().st_size)
            self._documents = [text for text in prose + code if text]
        yield from self._documents

    def fingerprint(self, cache_dir: Path) -> str:
        digest = blake2b(digest_size=32)
        for text in self._topics():
            digest.update(text.encode())
        for path in self._modules:
            name = path.relative_to(self._library).as_posix()
            digest.update(f"{name} {content_hash(path, cache_dir)}\n".encode())
        return f"builtin:{platform.python_version()}:{digest.hexdigest()}"

    def _find_modules(self) -> Iterator[Path]:
        for path in self._library.rglob("*.py"):
            if not _SKIPPED.intersection(path.relative_to(self._library).parts):
                yield path

    @staticmethod
    def _topics() -> Iterator[str]:
        try:
            from pydoc_data.topics import topics
        except ImportError:  # some distributions package it apart
            return
        for name in sorted(topics):
            yield topics[name]


def _split_module(path: Path) -> tuple[str, str]:
    """The documentation strings of a module, and its source without them."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in old code
            tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return "", ""
    documented = _documented(tree)
    return _documentation(path.stem, documented), _source_alone(text, documented)


def _documented(tree: ast.Module) -> list[tuple[_Documented, ast.Constant]]:
    """What has a documentation string, and that string, by position."""
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Module() | ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                match node.body:
                    case [ast.Expr(value=ast.Constant(value=str()) as string), *_]:
                        found.append((node, string))
    return sorted(found, key=lambda pair: pair[1].lineno)


def _documentation(module: str, documented: list[tuple[_Documented, ast.Constant]]) -> str:
    """The documentation strings, each under the name of what it documents."""
    parts = []
    for node, string in documented:
        text = inspect.cleandoc(str(string.value))
        # One word, such as the name again, is no prose.
        if len(text.split()) > 1:
            name = module if isinstance(node, ast.Module) else node.name
            parts.append(f"{name}\n\n{text}\n")
    return "\n".join(parts)


def _source_alone(text: str, documented: list[tuple[_Documented, ast.Constant]]) -> str:
    """``text`` without the lines of its documentation strings."""
    lines: list[str | None] = list(text.split("\n"))
    for _, string in documented:
        first, last = string.lineno - 1, (string.end_lineno or string.lineno) - 1
        # A string behind other code in its line stays.
        if str(lines[first])[: string.col_offset].strip() == "":
            lines[first : last + 1] = [None] * (last + 1 - first)
    return "\n".join(line for line in lines if line is not None)
