"""From text to a trained model: ``prepare``, ``train`` and ``reproduce``."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from tinylm.cli.options import add_fields, command, given
from tinylm.config import PRESETS, DataConfig, ModelConfig, TrainConfig
from tinylm.errors import InputError


def add_prepare(verbs: Any) -> None:
    text = "turn text into a tokenizer and memory-mapped token files"
    parser = command(verbs, "prepare", _prepare, text)
    add_fields(parser, DataConfig)
    parser.add_argument("--out", metavar="FOLDER", help="data folder; the cache if unset")


def _prepare(arguments: argparse.Namespace) -> None:
    from tinylm.data import prepare

    dataset = prepare(DataConfig(**given(arguments, DataConfig)), out=arguments.out)
    for name, split in dataset.meta["splits"].items():
        print(
            f"{name:6} {split['documents']:>10,} documents {split['tokens']:>14,} tokens "
            f"{split['text_bytes']:>16,} bytes"
        )
    print(f"vocabulary of {dataset.tokenizer.vocab_size:,} ({dataset.tokenizer.kind})")
    print(dataset.path)


def add_train(verbs: Any) -> None:
    parser = command(verbs, "train", _train, "train a model; prepares the data if needed")
    parser.add_argument("--preset", metavar="NAME", help=f"{', '.join(PRESETS)} (default modern)")
    parser.epilog = "Defaults are those of modern; the other presets change some."
    parser.add_argument("--resume", metavar="RUN", help="go on with a run as it began")
    parser.add_argument("--fresh", action="store_true", help="replace what the run folder holds")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the run folder")
    add_fields(parser.add_argument_group("data"), DataConfig)
    add_fields(parser.add_argument_group("model"), ModelConfig)
    add_fields(parser.add_argument_group("training"), TrainConfig)


def _train(arguments: argparse.Namespace) -> int:
    options = given(arguments, DataConfig, ModelConfig, TrainConfig)
    preset = options.pop("preset", "modern")
    if arguments.resume:
        from tinylm.run import MAY_DIFFER, resume_config

        if arguments.preset or arguments.fresh or not options.keys() <= set(MAY_DIFFER) - {"out"}:
            allowed = ", ".join("--" + n.replace("_", "-") for n in MAY_DIFFER if n != "out")
            raise InputError(f"--resume goes on with a run as it began; it takes only {allowed}")
        config = dataclasses.replace(resume_config(Path(arguments.resume)), **options)
    else:
        config = TrainConfig.from_preset(preset, **options)
    from tinylm.distributed import is_main
    from tinylm.run import train
    from tinylm.signals import Interrupted

    folder = config.run_folder
    try:
        train(config, fresh=arguments.fresh, quiet=arguments.quiet)
    except Interrupted as stop:
        if is_main():
            print(f"{stop}; go on with: tinylm train --resume {folder}", file=sys.stderr)
        return 128 + stop.signum
    if not is_main():  # of several processes one speaks
        return 0
    print(folder)
    if not arguments.quiet:
        print(f"  plot      {folder}/loss.png", file=sys.stderr)
        print(f"  samples   {folder}/samples.txt", file=sys.stderr)
        print(f'  try       tinylm generate {folder} "Once upon a time"', file=sys.stderr)
        print(f'            tinylm next {folder} "the end of the"', file=sys.stderr)
        print(f"            tinylm chat {folder}", file=sys.stderr)
    return 0


SHARED_BY_PRESETS = ("device", "seed", "logger")


def add_reproduce(verbs: Any) -> None:
    text = "train the presets under an equal budget and compare them in one table"
    parser = command(verbs, "reproduce", _reproduce, text)
    parser.add_argument("--minutes", type=float, metavar="X", help="to train each preset for")
    parser.add_argument("--tokens", type=int, metavar="N", help="or tokens to train each on")
    parser.add_argument(
        "--presets", default="notebook,causal,modern", metavar="NAMES", help="default %(default)s"
    )
    parser.add_argument("--out", default="runs/reproduce", metavar="FOLDER")
    parser.add_argument("--fresh", action="store_true", help="train again what is finished")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the table")
    add_fields(parser.add_argument_group("data"), DataConfig, tokenizer="word")
    add_fields(parser.add_argument_group("training"), TrainConfig, only=SHARED_BY_PRESETS)


def _reproduce(arguments: argparse.Namespace) -> int:
    from tinylm.reproduce import reproduce, table
    from tinylm.signals import Interrupted

    data = DataConfig(**{"tokenizer": "word"} | given(arguments, DataConfig))
    shared = given(arguments, TrainConfig)
    try:
        report = reproduce(
            data,
            arguments.out,
            minutes=arguments.minutes,
            tokens=arguments.tokens,
            presets=arguments.presets.replace(",", " ").split(),
            fresh=arguments.fresh,
            quiet=arguments.quiet,
            **{name: shared[name] for name in SHARED_BY_PRESETS if name in shared},
        )
    except Interrupted as stop:
        print(f"{stop}; the same command goes on from there", file=sys.stderr)
        return 128 + stop.signum
    print(table(report))
    print(f"{arguments.out}/report.md, report.json, report.png", file=sys.stderr)
    return 0
