"""A training run from its configuration to its folder: prepare, train, evaluate, draw."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinylm import __version__, kernels
from tinylm.config import TrainConfig, config_from_dict
from tinylm.data import Dataset, prepare
from tinylm.data.cache import LOCK_NAME, locked, remove_leftovers
from tinylm.device import Device, choose_device, determinism
from tinylm.distributed import World, joined
from tinylm.errors import InputError
from tinylm.files import atomic_write, disk_errors, write_json
from tinylm.lm import LanguageModel, load
from tinylm.loggers import open_loggers, require_loggers
from tinylm.progress import TrainingProgress, duration
from tinylm.report import evaluate_dataset, result_lines
from tinylm.trainer import Trainer

CHECKPOINTS = "checkpoints"
# Options that may differ when a run is resumed: they change what is seen, not what is learned.
MAY_DIFFER = (
    "out", "logger", "log_every", "checkpoint_seconds", "keep_checkpoints", "micro_batch_size",
    "on_nan", "cuda_graph",
)  # fmt: skip


def train(config: TrainConfig, *, fresh: bool = False, quiet: bool = False) -> LanguageModel:
    """Trains a model and returns it, evaluated on the whole validation split.

    The run folder (``config.out``) then holds ``config.json``, ``tokenizer.json``,
    ``model.safetensors`` (the best on validation), ``metrics.jsonl``, ``eval.json``,
    ``samples.txt``, ``loss.png`` and ``checkpoints/``. Called again with the same configuration,
    it goes on from the newest checkpoint, or returns the finished model at once. Under
    ``torchrun`` each process calls it and computes its share of every batch; rank 0 writes.

    Args:
        fresh: delete what the run folder holds and start again.
        quiet: print nothing.

    Raises:
        InputError: bad input, or the folder belongs to another configuration.
        TrainingError: the loss is not finite, memory ran out, or another process has ended.
        tinylm.signals.Interrupted: SIGINT or SIGTERM; everything has been saved.
    """
    with joined() as world, determinism(config.deterministic), ExitStack() as held:
        progress = TrainingProgress(quiet or not world.is_main)
        try:
            device = choose_device(world.device_name(config.device), config.precision)
            trainer = world.main_first(
                lambda: _begin(config, fresh and world.is_main, device, progress, world, held)
            )
            return _train(trainer, progress)
        finally:
            progress.close()


def _begin(
    requested: TrainConfig,
    fresh: bool,
    device: Device,
    progress: TrainingProgress,
    world: World,
    held: ExitStack,
) -> Trainer:
    """Checks everything, prepares the data, and opens the run folder, which is ``held`` then."""
    folder = Path(requested.run_folder)
    loggers = requested.logger if world.is_main else ""
    require_loggers(loggers)
    _check_folder(folder, requested, fresh)
    dataset = prepare(requested.data, progress=not progress.quiet)
    kernels.prepare(device.torch_device, progress.say)
    vocab_size = dataset.tokenizer.vocab_size
    config = replace(requested, model=replace(requested.model, vocab_size=vocab_size))
    # Built before anything is written: what cannot work leaves no folder behind.
    trainer = Trainer(config, dataset, folder, device, progress, world)
    if world.is_main:
        held.enter_context(_opened_folder(folder, requested, config, dataset, fresh))
    return trainer


def _train(trainer: Trainer, progress: TrainingProgress) -> LanguageModel:
    folder, world = trainer.folder, trainer.world
    if (folder / "eval.json").exists():
        progress.say(f"{folder} is already trained; --fresh trains it again")
        return load(folder, device=trainer.device.name)
    _introduce(trainer, progress)
    if trainer.resume():
        progress.say(f"resuming from the checkpoint of step {trainer.state.step:,}")
    world.require_same("step of the newest checkpoint", trainer.state.step)
    loggers, step = trainer.config.logger if world.is_main else "", trainer.state.step
    with open_loggers(loggers, trainer.config, folder, step) as trainer.metrics.follow:
        trainer.run()
    progress.close()
    if world.is_main:
        trainer.finish()
        lm = _conclude(trainer, progress)
    world.wait()
    return lm if world.is_main else load(folder, device=trainer.device.name)


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
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another --out")
    if fresh or not folder.exists():
        return
    path = folder / "config.json"
    if not path.exists():
        if _is_foreign(folder):
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


def _is_foreign(folder: Path) -> bool:
    """Whether a folder holds files, but no run's.

    A run's first file is its lock, so that one killed before its ``config.json`` is known too.
    """
    ours = (folder / "config.json").exists() or (folder / CHECKPOINTS / LOCK_NAME).exists()
    return not ours and any(not path.is_dir() for path in folder.rglob("*"))


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    out = []
    for name, value in here.items():
        if isinstance(value, dict):
            out += _differences(there[name], value)
        elif name not in MAY_DIFFER and there[name] != value:
            out.append(f"{name} is {there[name]} there and {value} here")
    return out


@contextmanager
def _opened_folder(
    folder: Path, requested: TrainConfig, config: TrainConfig, dataset: Dataset, fresh: bool
) -> Iterator[None]:
    """The run folder with all that is known before training, for this process alone."""
    checkpoints = folder / CHECKPOINTS
    if fresh and folder.exists() and _is_foreign(folder):
        raise InputError(f"{folder} is not a run folder; it is not deleted")
    with locked(checkpoints, wait=False):
        with disk_errors(folder):
            if fresh:
                _clear(folder)
            remove_leftovers(folder)
            remove_leftovers(checkpoints)
        _write_beginning(folder, requested, config, dataset)
        yield


def _clear(folder: Path) -> None:
    """Deletes a run but for its lock; what a kill leaves of it is a run that has not begun."""
    for path in [folder / "eval.json", *(folder / CHECKPOINTS).glob("step-*")]:
        path.unlink(missing_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            if path.name != CHECKPOINTS:
                shutil.rmtree(path)
        else:
            path.unlink()


def _write_beginning(
    folder: Path, requested: TrainConfig, config: TrainConfig, dataset: Dataset
) -> None:
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
    invented = trainer.invented_tokens
    tokens = len(data.train) - invented
    progress.say(
        f"data    {tokens:,} training and {len(data.valid):,} validation tokens, "
        f"{data.tokenizer.kind} vocabulary of {data.tokenizer.vocab_size:,}"
    )
    if invented:
        progress.say(f"        and {invented:,} training tokens of text in invented scripts")
    progress.say(f"device  {trainer.device}")
    progress.say(f"steps   {trainer.step.about}")
    if trainer.total_steps is None:
        assert config.minutes is not None
        length = duration(config.minutes * 60)
    else:
        length = f"{trainer.total_steps:,} steps"
    progress.say(f"length  {length}, {config.batch_size} windows of {config.seq_len} tokens a step")
    if any(decay := trainer.optimizer.decay):
        parts = f"{decay.matrices:.3g} of matrices, {decay.embeddings:.3g} of embeddings"
        progress.say(f"decay   of weights: {parts}")
    if trainer.world.size > 1:
        progress.say(f"shared  by {trainer.world.size} processes")
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
