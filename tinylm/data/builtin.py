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
        # Each module is read twice.
        self.total_bytes = 2 * sum(path.stat().st_size for path in self._modules)

    def documents(self) -> Iterator[str]:
        self._position = position = Position()
        yield from self._topics()
        for extract in (_documentation, _source_alone):
            for path in self._modules:
                if text := extract(path):
                    yield text
                position.finish_file(path.stat().st_size)

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


def _parse(path: Path) -> tuple[str, ast.Module] | None:
    try:
        with tokenize.open(path) as file:
            text = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in old code
            return text, ast.parse(text)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return None


def _documented(tree: ast.Module) -> Iterator[tuple[_Documented, ast.Expr]]:
    """Nodes that have a documentation string, and the statement that holds it, by position."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, _Documented) and ast.get_docstring(node, clean=False) is not None:
            statement = node.body[0]
            assert isinstance(statement, ast.Expr)
            found.append((node, statement))
    return iter(sorted(found, key=lambda pair: pair[1].lineno))


def _documentation(path: Path) -> str:
    """The documentation strings of a module, each under the name of what it documents."""
    parsed = _parse(path)
    if parsed is None:
        return ""
    parts = []
    for node, statement in _documented(parsed[1]):
        assert isinstance(statement.value, ast.Constant)
        text = inspect.cleandoc(str(statement.value.value))
        # One word, such as a name again, is no prose.
        if len(text.split()) > 1:
            name = path.stem if isinstance(node, ast.Module) else node.name
            parts.append(f"{name}\n\n{text}\n")
    return "\n".join(parts)


def _source_alone(path: Path) -> str:
    """A module's source without its documentation strings."""
    parsed = _parse(path)
    if parsed is None:
        return ""
    text, tree = parsed
    lines = text.split("\n")
    for _, statement in _documented(tree):
        first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
        if not lines[first].lstrip().startswith(("'", '"', "r", "R", "u", "U")):
            continue  # behind other code in one line
        lines[first : last + 1] = [""] * (last + 1 - first)
    return "\n".join(lines)
