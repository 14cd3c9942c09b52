"""The notebook beside honest models: one budget, one text, one table.

Each preset is an ordinary run in a folder of its own, so a stopped report goes on where it was:
what is finished is kept, what is half done is resumed.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinylm.config import PRESETS, DataConfig, TrainConfig
from tinylm.data import Dataset, prepare
from tinylm.errors import InputError
from tinylm.evaluate import evaluate_full_prefix
from tinylm.files import atomic_write, write_json
from tinylm.lm import LanguageModel
from tinylm.metrics import MetricsFile, plot_runs
from tinylm.progress import duration
from tinylm.report import baseline_rates
from tinylm.run import train

ORDER = ("notebook", "causal", "modern")
# Tokens whose loss is measured given a whole window before each: one window a token is slow.
FULL_PREFIX_TOKENS = 4096
# Evaluated now and then while training. To hide the future from the notebook's model takes a
# computation for each prefix length: more tokens would use up a good part of its minutes.
EVAL_TOKENS = 8192

COLUMNS = {
    "parameters": ("parameters", "{:,}"),
    "tokens": ("tokens seen", "{:,}"),
    "seconds": ("time", "{}"),
    "leaked_loss": ("leaked loss", "{:.2f}"),
    "full_prefix_loss": ("prefix-only loss", "{:.2f}"),
    "loss": ("honest loss", "{:.2f}"),
    "top1": ("top-1", "{:.1%}"),
    "bits_per_byte": ("bits per byte", "{:.2f}"),
}
EXPLANATION = """\
- **leaked loss**: what the notebook reported. Each position may see the token it is to predict.
- **prefix-only loss**: of {full_prefix_tokens:,} validation tokens, each predicted from a whole
  window before it, with nothing after it in sight.
- **honest loss**, top-1 and bits per byte: of all {valid_tokens:,} validation tokens, each
  predicted from what stands before it in its window, with the weights that did best. Windows
  are of {windows} tokens.
- Time is that of training, with the evaluations on the way. Losses are nats per token.
"""


def reproduce(
    data: DataConfig,
    out: str | Path,
    *,
    minutes: float | None = None,
    tokens: int | None = None,
    presets: Sequence[str] = ORDER,
    fresh: bool = False,
    quiet: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Trains the presets under an equal budget and writes ``report.md``, ``.json`` and ``.png``.

    All presets read the same tokens: unlike in the notebook, every document ends with ``<EOS>``
    for all of them.

    Args:
        data: the text and the tokenizer, for all presets.
        out: folder of the report; the run of each preset is a folder in it.
        minutes: time to train for, of each preset.
        tokens: or the number of tokens to train on, rounded to whole batches.
        presets: which of `tinylm.config.PRESETS`.
        fresh: train again what is finished.
        options: fields of `TrainConfig` that are the same for all, such as ``device`` or ``seed``.

    Returns:
        What ``report.json`` holds.

    Raises:
        InputError, TrainingError, tinylm.signals.Interrupted: as in `tinylm.run.train`.
    """
    folder = Path(out)
    configs = _configs(data, folder, minutes, tokens, presets, options)
    runs = {name: train(config, fresh=fresh, quiet=quiet) for name, config in configs.items()}
    dataset = prepare(next(iter(configs.values())).data, progress=not quiet)
    longest = max(config.seq_len for config in configs.values())
    baselines = baseline_rates(dataset.train, dataset)
    report = {
        "budget": {"minutes": minutes} if minutes is not None else {"tokens": tokens},
        "data": data.data,
        "vocabulary": f"{dataset.tokenizer.kind}, {dataset.tokenizer.vocab_size:,} entries",
        "valid_tokens": len(dataset.valid),
        "full_prefix_tokens": min(FULL_PREFIX_TOKENS, max(0, len(dataset.valid) - longest)),
        "presets": {name: _row(lm, dataset, longest) for name, lm in runs.items()},
        "baselines": baselines,
    }
    write_json(folder / "report.json", report)
    with atomic_write(folder / "report.md") as file:
        file.write(markdown(report).encode("utf-8", "replace"))
    plot_runs(
        {name: MetricsFile(folder / name / "metrics.jsonl") for name in runs},
        folder / "report.png",
        f"Equal budget: {_budget(report)}",
        levels={f"{n}, counting alone": r["loss"] for n, r in baselines.items()},
    )
    return report


def _configs(
    data: DataConfig,
    folder: Path,
    minutes: float | None,
    tokens: int | None,
    presets: Sequence[str],
    options: dict[str, Any],
) -> dict[str, TrainConfig]:
    """The run of each preset; every one is made before the first is trained."""
    if (minutes is None) == (tokens is None):
        raise InputError("give a budget for each preset: either minutes or tokens")
    if not presets or len(set(presets)) != len(presets):
        raise InputError(f"name each preset once: {', '.join(PRESETS)}")
    if not (minutes or tokens or 0) > 0:
        raise InputError(f"a budget of {minutes or tokens or 0} trains nothing")
    configs = {}
    for name in presets:
        config = TrainConfig.from_preset(name, **({"eval_tokens": EVAL_TOKENS} | options))
        steps = None
        if tokens is not None:
            steps = max(1, round(tokens / (config.batch_size * config.seq_len)))
        configs[name] = replace(
            config, data=data, out=str(folder / name), minutes=minutes, steps=steps, epochs=None
        )
    return configs


def _row(lm: LanguageModel, dataset: Dataset, longest: int) -> dict[str, Any]:
    """One preset's figures: from its folder, but for the loss given a full prefix."""
    assert lm.path is not None
    records = list(MetricsFile(lm.path / "metrics.jsonl").records())
    evaluation = json.loads((lm.path / "eval.json").read_text(encoding="utf-8"))
    full = evaluate_full_prefix(
        lm.model,
        dataset.valid.ids,
        seq_len=lm.config.seq_len,
        first=longest,
        limit=FULL_PREFIX_TOKENS,
    )
    samples = [record["samples"] for record in records if "samples" in record]
    return {
        "parameters": lm.model.parameter_count(),
        "tokens": records[-1]["tokens"],
        "seconds": records[-1]["elapsed"],
        "leaked_loss": evaluation.get("leaked_loss"),
        "full_prefix_loss": full.loss if full.tokens else None,
        **{name: evaluation[name] for name in ("loss", "top1", "known_loss", "bits_per_byte")},
        "context": lm.config.seq_len,
        "samples": samples[-1] if samples else [],
    }


# --- the report as text --------------------------------------------------------------------------


def _budget(report: dict[str, Any]) -> str:
    budget = report["budget"]
    if "minutes" in budget:
        return f"{budget['minutes']:g} minutes each"
    return f"{budget['tokens']:,} tokens each"


def table(report: dict[str, Any]) -> str:
    """The Markdown table: a row for each preset and each baseline."""
    heads = [head for head, _ in COLUMNS.values()]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
    for name, row in (report["presets"] | report["baselines"]).items():
        label = f"`{name}`" if name in report["presets"] else f"{name} (counting alone)"
        lines.append(f"| {label} | " + " | ".join(_cells(row)) + " |")
    return "\n".join(lines)


def _windows(report: dict[str, Any]) -> str:
    return ", ".join(f"{row['context']} (`{name}`)" for name, row in report["presets"].items())


def _cells(row: dict[str, Any]) -> list[str]:
    cells = []
    for key, (_, form) in COLUMNS.items():
        value = row.get(key)
        if key == "seconds" and value is not None:
            value = duration(value)
        cells.append("–" if value is None else form.format(value))
    return cells


def markdown(report: dict[str, Any]) -> str:
    """``report.md``: the table, what it says, the plot, and what the models write."""
    parts = [
        f"# The notebook and honest models: {_budget(report)}",
        f"Text: {report['data']}; vocabulary: {report['vocabulary']}.",
        table(report),
        EXPLANATION.format(windows=_windows(report), **report).strip(),
        "![validation losses](report.png)",
        "## Samples at the end of training",
    ]
    for name, row in report["presets"].items():
        parts.append(f"`{name}`")
        parts += ["> " + " ".join(text.split()) for text in row["samples"]]
    return "\n\n".join(parts) + "\n"
