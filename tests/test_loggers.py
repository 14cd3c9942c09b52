"""Loggers beside metrics.jsonl: what they are told, and that a run outlives their failures."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tinylm.config import TrainConfig
from tinylm.errors import InputError
from tinylm.loggers import open_loggers, require_loggers
from tinylm.metrics import MetricsFile
from tinylm.run import train

MakeConfig = Callable[..., TrainConfig]


class FakeWandb:
    """Stands in for the module and for its run."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.inits: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.finished = 0
        self.fails_at = fails_at

    def init(self, **options: Any) -> "FakeWandb":
        self.inits.append(options)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def Table(self, columns: list[str], rows: list[list[str]]) -> SimpleNamespace:
        return SimpleNamespace(columns=columns, rows=rows)

    def log(self, row: dict[str, Any]) -> None:
        if len(self.rows) == self.fails_at:
            raise ConnectionError("the network is gone\nand this is a long story")
        self.rows.append(row)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def records(folder: Path) -> list[dict[str, Any]]:
    return list(MetricsFile(folder / "metrics.jsonl").records())


def test_wandb_is_told_all_that_metrics_hold(
    small_run: MakeConfig, tmp_path: Path, wandb: FakeWandb
) -> None:
    train(small_run(logger="wandb", log_every=5), quiet=True)
    told = records(tmp_path / "run")
    assert [row["step"] for row in wandb.rows] == [r["step"] for r in told]
    for row, record in zip(wandb.rows, told, strict=True):
        assert row.keys() == record.keys()
        if "samples" in record:
            assert row["samples"].rows == [[text] for text in record["samples"]]
        else:
            assert row == record
    assert any("samples" in row for row in wandb.rows)
    (options,) = wandb.inits
    assert options["name"] == "run"
    assert options["config"]["model"]["d_model"] == 32
    assert options["id"] == (tmp_path / "run" / "wandb-id").read_text()
    assert wandb.finished == 1


def test_a_resumed_run_goes_on_in_the_same_place(tmp_path: Path, wandb: FakeWandb) -> None:
    config = TrainConfig()
    for step in (0, 7):
        with open_loggers("wandb", config, tmp_path, step) as log:
            log({"step": step, "loss": 1.0})
    assert wandb.inits[0]["id"] == wandb.inits[1]["id"]
    assert wandb.finished == 2


def test_a_run_outlives_its_logger(
    small_run: MakeConfig, tmp_path: Path, wandb: FakeWandb, caplog: Any
) -> None:
    wandb.fails_at = 2
    train(small_run(logger="wandb", log_every=1), quiet=True)
    assert len(wandb.rows) == 2
    assert len(records(tmp_path / "run")) > 20
    said = [r.getMessage() for r in caplog.records if "wandb" in r.getMessage()]
    assert said == ["wandb no longer logs: the network is gone"]


def test_a_logger_that_cannot_start_says_how_to_go_on(
    small_run: MakeConfig, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> None:
        raise RuntimeError("api_key not configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(InputError, match="api_key not configured; WANDB_MODE=offline needs no"):
        train(small_run(logger="wandb"), quiet=True)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_extra_is_named_before_anything_is_written(
    small_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # its import fails
    with pytest.raises(InputError, match=rf"pip install 'tinylm\[{name}\]'") as error:
        train(small_run(logger=name), quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_unknown_logger_is_refused() -> None:
    with pytest.raises(InputError, match="unknown logger 'mlflow'; choose tensorboard, wandb"):
        TrainConfig(logger="wandb, mlflow")
    require_loggers("")


def test_tensorboard_shows_a_resumed_run_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrainConfig()
    for first, last in ((0, 6), (3, 8)):  # killed after 6, resumed from the checkpoint of 3
        with open_loggers("tensorboard", config, tmp_path, first) as log:
            for step in range(first + 1, last + 1):
                log({"step": step, "loss": 10.0 * first + step, "samples": [f"text {step}"]})
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert shown == [(1, 1.0), (2, 2.0), (3, 3.0), *((s, 30.0 + s) for s in range(4, 9))]
    text = events.Tensors("sample 1/text_summary")[-1]
    assert text.tensor_proto.string_val == [b"text 8"]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_the_real_wandb_works_offline(
    small_run: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(small_run(logger="wandb", steps=3), quiet=True)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["loss"] > 0
