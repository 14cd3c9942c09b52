"""A training run from its configuration to its folder: prepare, train, evaluate, draw."""

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinylm import __version__
from tinylm.config import TrainConfig, config_from_dict
from tinylm.data import Dataset, prepare
from tinylm.device import choose_device
from tinylm.errors import InputError
from tinylm.files import atomic_write, disk_errors, write_json
from tinylm.lm import LanguageModel, load
from tinylm.loggers import open_loggers, require_loggers
from tinylm.progress import TrainingProgress, duration
from tinylm.report import evaluate_dataset, result_lines
from tinylm.trainer import Trainer

# Options that may differ when a run is resumed: they change what is seen, not what is learned.
MAY_DIFFER = ("out", "logger", "log_every", "checkpoint_seconds", "keep_checkpoints")


def train(config: TrainConfig, *, fresh: bool = False, quiet: bool = False) -> LanguageModel:
    """Trains a model and returns it, evaluated on the whole validation split.

    The run folder (``config.out``) then holds ``config.json``, ``tokenizer.json``,
    ``model.safetensors`` (the best on validation), ``metrics.jsonl``, ``eval.json``,
    ``samples.txt``, ``loss.png`` and ``checkpoints/``. Called again with the same configuration,
    it goes on from the newest checkpoint, or returns the finished model at once.

    Args:
        fresh: delete what the run folder holds and start again.
        quiet: print nothing.

    Raises:
        InputError: bad input, or the folder belongs to another configuration.
        TrainingError: the loss is not finite, or memory ran out.
        tinylm.trainer.Interrupted: SIGINT or SIGTERM; everything has been saved.
    """
    folder = Path(config.run_folder)
    progress = TrainingProgress(quiet)
    try:
        device = choose_device(config.device, config.precision)
        require_loggers(config.logger)
        _check_folder(folder, config, fresh)
        dataset = prepare(config.data, progress=not quiet)
        vocab_size = dataset.tokenizer.vocab_size
        requested, config = (
            config,
            replace(config, model=replace(config.model, vocab_size=vocab_size)),
        )
        # Built before anything is written: what cannot work leaves no folder behind.
        trainer = Trainer(config, dataset, folder, device, progress)
        _open_folder(folder, requested, config, dataset, fresh)
        if (folder / "eval.json").exists():
            progress.say(f"{folder} is already trained; --fresh trains it again")
            return load(folder, device=config.device)
        _introduce(trainer, progress)
        if trainer.resume():
            progress.say(f"resuming from the checkpoint of step {trainer.state.step:,}")
        step = trainer.state.step
        with open_loggers(config.logger, config, folder, step) as trainer.metrics.follow:
            trainer.run()
        progress.close()
        trainer.finish()
        return _conclude(trainer, progress)
    finally:
        progress.close()


def resume_config(folder: Path) -> TrainConfig:
    """The configuration to go on with a run folder exactly as it began."""
    path = folder / "config.json"
    if not path.exists():
        raise InputError(f"{folder} is not a run folder: it has no config.json")
    return replace(config_from_dict(_read_config(path)["requested"]), out=str(folder))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {key: values[key] for key in ("config", "requested", "data")}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}; start again with --fresh") from error


def _check_folder(folder: Path, config: TrainConfig, fresh: bool) -> None:
    """Refuses, before any work, a folder that another configuration made."""
    if fresh or not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another --out")
    path = folder / "config.json"
    if not path.exists():
        if any(folder.iterdir()):
            raise InputError(f"{folder} holds files but is not a run folder; choose another --out")
        return
    differences = _differences(
        dataclasses.asdict(config_from_dict(_read_config(path)["requested"])),
        dataclasses.asdict(config),
    )
    if differences:
        raise InputError(
            f"{folder} belongs to another configuration ({'; '.join(differences)}); "
            "choose another --out, or --fresh to replace it"
        )


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    out = []
    for name, value in here.items():
        if isinstance(value, dict):
            out += _differences(there[name], value)
        elif name not in MAY_DIFFER and there[name] != value:
            out.append(f"{name} is {there[name]} there and {value} here")
    return out


def _open_folder(
    folder: Path, requested: TrainConfig, config: TrainConfig, dataset: Dataset, fresh: bool
) -> None:
    with disk_errors(folder):
        if fresh and folder.exists():
            if not (folder / "config.json").exists() and any(folder.iterdir()):
                raise InputError(f"{folder} is not a run folder; it is not deleted")
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
    if (folder / "config.json").exists():
        known = _read_config(folder / "config.json")["data"]
        if known["sources"] != dataset.meta["sources"]:
            raise InputError(
                f"the data have changed since {folder} began; choose another --out, or --fresh"
            )
        return
    for name in ("tokenizer.json", "spelling.safetensors"):
        if (dataset.path / name).exists():
            with atomic_write(folder / name) as file:
                file.write((dataset.path / name).read_bytes())
    write_json(
        folder / "config.json",
        {
            "tinylm": __version__,
            "config": dataclasses.asdict(config),
            "requested": dataclasses.asdict(requested),
            "data": {"path": str(dataset.path.resolve()), "sources": dataset.meta["sources"]},
        },
    )


def _introduce(trainer: Trainer, progress: TrainingProgress) -> None:
    config, data = trainer.config, trainer.dataset
    model = trainer.model
    progress.say(f"model   {config.preset}: {model.parameter_count():,} parameters")
    progress.say(
        f"data    {len(data.train.ids):,} training and {len(data.valid.ids):,} validation tokens, "
        f"{data.tokenizer.kind} vocabulary of {data.tokenizer.vocab_size:,}"
    )
    progress.say(f"device  {trainer.device}")
    if trainer.total_steps is None:
        assert config.minutes is not None
        length = duration(config.minutes * 60)
    else:
        length = f"{trainer.total_steps:,} steps"
    progress.say(f"length  {length}, {config.batch_size} windows of {config.seq_len} tokens a step")
    if not config.model.causal:
        progress.say(
            "warning: this model has no causal mask. Each position sees the token it is to "
            "predict, so its own loss is leaked; the loss given the prefix only stands beside it"
        )


def _conclude(trainer: Trainer, progress: TrainingProgress) -> LanguageModel:
    """Evaluates the best weights on the whole validation split, in fp32."""
    lm = load(trainer.folder, device=trainer.device.name)
    progress.say("evaluating on the whole validation split")
    result = evaluate_dataset(lm, trainer.dataset, seq_len=trainer.config.seq_len)
    write_json(trainer.folder / "eval.json", result)
    for line in result_lines(result):
        progress.say(line)
    state = trainer.state
    progress.say(
        f"trained on {state.tokens:,} tokens in {duration(state.elapsed)}; "
        f"kept the weights of step {state.best_step:,}"
    )
    return lm
