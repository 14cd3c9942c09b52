"""The result of an evaluation: one dictionary for programs, a few lines for people."""

from typing import Any

from tinylm.data import Dataset
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
        ``tokens``, ``bytes``, ``context`` and, where known, ``overlap``.
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
    text = EvalText(bytes=about["normalised_bytes"], unk_bits=about["unk_bits"] or 0.0)
    result: dict[str, Any] = totals.rates()
    result |= {
        "bits_per_byte": bits_per_byte(totals, text) if limit is None else None,
        "tokens": totals.tokens,
        "bytes": text.bytes,
        "context": seq_len,
    }
    if dataset.meta.get("overlap") is not None:
        result["overlap"] = dataset.meta["overlap"]
    if not lm.model.config.causal:
        leaked = evaluate(lm.model, ids, prefix_only=False, **options)
        result |= {"leaked_loss": leaked.loss, "leaked_top1": leaked.top1 / leaked.tokens}
    return result


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
