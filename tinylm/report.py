"""The result of an evaluation: one dictionary for programs, a few lines for people."""

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinylm.baselines import evaluate_baselines
from tinylm.data import Dataset, TokenFile, encode_documents, open_dataset, prepare
from tinylm.errors import InputError
from tinylm.evaluate import EvalText, Totals, bits_per_byte, evaluate
from tinylm.files import write_json
from tinylm.lm import LanguageModel

logger = logging.getLogger("tinylm")
BASELINE_COLUMNS = ("loss", "top1", "known_loss", "known_top1", "bits_per_byte")


def evaluate_dataset(
    lm: LanguageModel,
    dataset: Dataset,
    *,
    seq_len: int | None = None,
    limit: int | None = None,
    baselines_from: TokenFile | None = None,
) -> dict[str, Any]:
    """Every figure of a model on the validation split of a dataset, computed in fp32.

    All figures are honest: a model without causal mask is given the prefix only. What it scores
    with its usual leak stands beside them as ``leaked_loss`` and ``leaked_top1``.

    Args:
        baselines_from: the split to fit n-gram baselines on, see `tinylm.baselines`. They are
            evaluated on the same tokens and stand under ``baselines``, by name.

    Returns:
        ``loss`` (nats per token), ``perplexity``, ``top1``, ``top5``, ``bits_per_byte`` (see
        `tinylm.evaluate.bits_per_byte`), ``unk_share``, ``known_loss``, ``known_top1``,
        ``tokens``, ``bytes``, ``context`` and, where known, ``overlap``. ``bits_per_byte`` is
        None for a part of a text and where unknown words cannot be charged for.
    """
    if seq_len is not None and seq_len < 1:
        raise InputError(f"context is {seq_len}; it must be at least 1")
    seq_len = seq_len or lm.config.seq_len
    options: dict[str, Any] = {
        "eos_id": lm.tokenizer.eos_id,
        "unk_id": lm.tokenizer.unk_id,
        "seq_len": seq_len,
        "limit": limit,
    }
    ids = dataset.valid.ids
    totals = evaluate(lm.model, ids, **options)
    result = _rates(totals, dataset)
    size = dataset.meta["splits"]["valid"]["normalised_bytes"]
    result |= {"tokens": totals.tokens, "bytes": size, "context": seq_len}
    overlap = dataset.meta.get("overlap")
    if overlap is not None and overlap["share"] is not None:  # of a text not too short for it
        result["overlap"] = overlap["share"]
    if not lm.model.config.causal:
        leaked = evaluate(lm.model, ids, prefix_only=False, **options)
        result |= {"leaked_loss": leaked.loss, "leaked_top1": leaked.top1 / leaked.tokens}
    if baselines_from is not None:
        result["baselines"] = baseline_rates(baselines_from, dataset, seq_len=seq_len, limit=limit)
    return result


def baseline_rates(
    train: TokenFile, dataset: Dataset, *, seq_len: int = 1, limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Figures of n-gram models of ``train`` on the tokens that `evaluate_dataset` takes."""
    counted = evaluate_baselines(
        train.ids,
        dataset.valid.ids,
        vocab_size=dataset.tokenizer.vocab_size,
        eos_id=dataset.tokenizer.eos_id,
        unk_id=dataset.tokenizer.unk_id,
        seq_len=seq_len,
        limit=limit,
        say=logger.warning,
    )
    rates = {name: _rates(totals, dataset) for name, totals in counted.items()}
    return {name: {key: rates[name][key] for key in BASELINE_COLUMNS} for name in rates}


def _rates(totals: Totals, dataset: Dataset) -> dict[str, Any]:
    about = dataset.meta["splits"]["valid"]
    # Unknown words without a model to spell them with: their cost is unknown too, not nothing.
    payable = about["unk_bits"] is not None or not about["unk_tokens"]
    text = EvalText(bytes=about["normalised_bytes"], unk_bits=about["unk_bits"] or 0.0)
    defined = payable and totals.tokens == len(dataset.valid) and text.bytes > 0
    return totals.rates() | {"bits_per_byte": bits_per_byte(totals, text) if defined else None}


def evaluate_on(
    lm: LanguageModel,
    data: str | None = None,
    *,
    text_field: str = "text",
    errors: str = "strict",
    seq_len: int | None = None,
    baselines: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """`evaluate_dataset` of a loaded run on any text.

    Args:
        data: what to evaluate on, as in `tinylm.DataConfig`; None is the run's own validation
            split. The overlap with the training split is measured where the training data are
            still in the cache.
        baselines: also evaluate n-gram models of the run's training split. Those on the run's
            own validation split are added to its ``eval.json``.

    Raises:
        InputError: the text cannot be read, the model was loaded without its folder, or
            baselines are asked for and the training data are no longer in the cache.
    """
    folder = lm.path
    if folder is None:
        raise InputError("the model has no folder; load it with tinylm.load")
    if baselines and not folder.is_dir():
        raise InputError(f"{folder} holds weights only; baselines need the run's training text")
    own = training_data(folder)
    if own is None and (data is None or baselines):
        own = prepare(lm.config.data, progress=progress)
    if data is None:
        assert own is not None
        dataset = own
    else:
        assert lm.tokenizer_path is not None
        spelling = folder / "spelling.safetensors"
        dataset = encode_documents(
            data,
            lm.tokenizer_path,
            spelling=spelling if spelling.exists() else None,
            train=None if own is None else own.train,
            text_field=text_field,
            errors=errors,
            document_eos=lm.config.data.document_eos,
            progress=progress,
        )
    train = own.train if baselines and own is not None else None
    result = evaluate_dataset(lm, dataset, seq_len=seq_len, baselines_from=train)
    if baselines and data is None:
        _add_to_record(folder / "eval.json", result["baselines"])
    return result


def _add_to_record(path: Path, baselines: dict[str, Any]) -> None:
    """Writes baselines into the evaluation a run ended with, if it has ended."""
    if path.exists():
        with suppress(ValueError):
            write_json(path, json.loads(path.read_text("utf-8")) | {"baselines": baselines})


def training_data(folder: Path) -> Dataset | None:
    """The prepared data a run was trained on, if they are still where they were."""
    with suppress(InputError, OSError, ValueError, KeyError):
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return open_dataset(values["data"]["path"])
    return None


def result_lines(result: dict[str, Any]) -> list[str]:
    """The figures of `evaluate_dataset` as a person reads them."""
    lines = [
        f"loss            {result['loss']:.4f} nats per token (perplexity "
        f"{result['perplexity']:,.1f}), context {result['context']}",
        f"accuracy        top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}",
    ]
    if result["bits_per_byte"] is not None:
        lines.append(
            f"bits per byte   {result['bits_per_byte']:.4f} "
            f"({result['tokens']:,} tokens, {result['bytes']:,} bytes)"
        )
    else:
        lines.append("bits per byte   unknown: nothing here tells what unknown words cost")
    if result["unk_share"]:
        known = result["known_loss"]
        lines.append(
            f"unknown words   {result['unk_share']:.2%} of tokens; on known words "
            + (f"loss {known:.4f}, top-1 {result['known_top1']:.2%}" if known else "nothing")
        )
    if "overlap" in result:
        lines.append(f"overlap         {result['overlap']:.2%} of it also occurs in training")
    if "leaked_loss" in result:
        lines.append(
            f"leaked          loss {result['leaked_loss']:.4f}, top-1 "
            f"{result['leaked_top1']:.2%}: what the model scores when it sees the answer; "
            "not comparable with anything"
        )
    for name, rates in result.get("baselines", {}).items():
        lines.append(f"{name:15} {_baseline_text(rates)}")
    return lines


def _baseline_text(rates: dict[str, Any]) -> str:
    text = f"loss {rates['loss']:.4f}, top-1 {rates['top1']:.2%}"
    if rates["known_loss"] is not None and rates["known_loss"] != rates["loss"]:
        text += f", known words {rates['known_loss']:.4f} and {rates['known_top1']:.2%}"
    if rates["bits_per_byte"] is not None:
        text += f", bits per byte {rates['bits_per_byte']:.4f}"
    return text + " (counting alone)"
