"""Which implementation of the tokenizers runs, and why."""

import logging
import sys
import unicodedata

import pytest
from word_texts import _C

from tinylm.errors import InputError
from tinylm.tokenizer import WordTokenizer, backend, implementation
from tinylm.tokenizer import word_reference as reference


def test_the_compiled_one_runs_by_default(monkeypatch):
    monkeypatch.delenv("TINYLM_TOKENIZER", raising=False)
    assert implementation()[0] == "c++"
    assert isinstance(WordTokenizer.counter(), _C.WordCounter)


def test_the_environment_decides(monkeypatch):
    monkeypatch.setenv("TINYLM_TOKENIZER", "python")
    assert implementation() == ("python", "TINYLM_TOKENIZER=python")
    assert isinstance(WordTokenizer.counter(), reference.WordCounter)
    monkeypatch.setenv("TINYLM_TOKENIZER", "rust")
    with pytest.raises(InputError, match="'rust'; it must be one of auto, c\\+\\+, python"):
        implementation()


@pytest.fixture
def fresh_choice():
    """Forgets what was chosen, before and after."""
    backend._choose.cache_clear()
    yield
    backend._choose.cache_clear()


@pytest.mark.usefixtures("fresh_choice")
class TestFallback:
    def test_another_unicode_version(self, monkeypatch, caplog):
        monkeypatch.delenv("TINYLM_TOKENIZER", raising=False)
        monkeypatch.setattr(_C, "unicode_version", "1.1.5")
        self.assert_falls_back(caplog, f"1.1.5, this Python {unicodedata.unidata_version}")

    def test_no_extension(self, monkeypatch, caplog):
        monkeypatch.delenv("TINYLM_TOKENIZER", raising=False)
        monkeypatch.delattr("tinylm._C")
        monkeypatch.setitem(sys.modules, "tinylm._C", None)
        self.assert_falls_back(caplog, "does not import")

    def assert_falls_back(self, caplog, reason):
        with caplog.at_level(logging.WARNING, logger="tinylm"):
            assert isinstance(WordTokenizer.counter(), reference.WordCounter)
            assert WordTokenizer(["a"]).encode("A b") == [2, 0, 1]
        assert implementation()[0] == "python"
        assert reason in implementation()[1]
        assert [reason in record.getMessage() for record in caplog.records] == [True]

    def test_insisting_fails(self, monkeypatch):
        monkeypatch.setenv("TINYLM_TOKENIZER", "c++")
        monkeypatch.setattr(_C, "unicode_version", "1.1.5")
        with pytest.raises(InputError, match=r"is 'c\+\+', but .* Unicode 1\.1\.5"):
            WordTokenizer(["a"])
