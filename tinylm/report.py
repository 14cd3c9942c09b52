"""The result of an evaluation: one dictionary for programs, a few lines for people."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinylm.data import Dataset, encode_documents, open_dataset, prepare
from tinylm.errors import InputError
from tinylm.evaluate import EvalText, bits_per_byte, evaluate
from tinylm.lm import LanguageModel


def evaluate_dataset(
    lm: LanguageModel, dataset: Dataset, *, seq_len: int | None = None, limit: int | None = None
) -> dict[str, Any]:
    """Every figure of a model on the validation split of a dataset, computed in fp32.

    All figures are honest: a model without causal mask is given the prefix only. What it scores
    with its usual leak stands beside them as ``leaked_loss`` and ``leaked_top1``.

    Returns:
        ``loss`` (nats per token), ``perplexity``, ``top1``, ``top5``, ``bits_per_byte`` (see
        `tinylm.evaluate.bits_per_byte`), ``unk_share``, ``known_loss``, ``known_top1``,
        ``tokens``, ``bytes``, ``context`` and, where known, ``overlap``. ``bits_per_byte`` is
        None for a part of a text and where unknown words cannot be charged for.
    """
    seq_len = seq_len or lm.config.seq_len
    options: dict[str, Any] = {
        "eos_id": lm.tokenizer.eos_id,
        "unk_id": lm.tokenizer.unk_id,
        "seq_len": seq_len,
        "limit": limit,
    }
    ids, about = dataset.valid.ids, dataset.meta["splits"]["valid"]
    totals = evaluate(lm.model, ids, **options)
    # Unknown words without a model to spell them with: their cost is unknown too, not nothing.
    payable = about["unk_bits"] is not None or not about["unk_tokens"]
    text = EvalText(bytes=about["normalised_bytes"], unk_bits=about["unk_bits"] or 0.0)
    defined = payable and limit is None and text.bytes > 0
    result: dict[str, Any] = totals.rates()
    result |= {
        "bits_per_byte": bits_per_byte(totals, text) if defined else None,
        "tokens": totals.tokens,
        "bytes": text.bytes,
        "context": seq_len,
    }
    if dataset.meta.get("overlap") is not None:
        result["overlap"] = dataset.meta["overlap"]["share"]
    if not lm.model.config.causal:
        leaked = evaluate(lm.model, ids, prefix_only=False, **options)
        result |= {"leaked_loss": leaked.loss, "leaked_top1": leaked.top1 / leaked.tokens}
    return result


def evaluate_on(
    lm: LanguageModel,
    data: str | None = None,
    *,
    text_field: str = "text",
    errors: str = "strict",
    seq_len: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """`evaluate_dataset` of a loaded run on any text.

    Args:
        data: what to evaluate on, as in `tinylm.DataConfig`; None is the run's own validation
            split. The overlap with the training split is measured where the training data are
            still in the cache.

    Raises:
        InputError: the text cannot be read, or the model was loaded without its folder.
    """
    folder = lm.path
    if folder is None:
        raise InputError("the model has no folder; load it with tinylm.load")
    own = training_data(folder)
    if data is None:
        dataset = own or prepare(lm.config.data, progress=progress)
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
    return evaluate_dataset(lm, dataset, seq_len=seq_len)


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
    return lines
