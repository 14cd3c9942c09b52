"""What `auto` chooses on a GPU: the table, the process that fills it, and when that is started.

No test here needs a GPU: programs print what a check would, and a device that is none has a name.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinylm import kernels
from tinylm.cli import main
from tinylm.kernels import dispatch, first_check, table
from tinylm.kernels.table import Result, Table, decide

GPU = torch.device("cuda", 0)
ENVIRONMENT = {
    "gpu": "Tesla T4", "capability": "7.5", "torch": "2.13.0", "triton": "3.7.1", "tinylm": "0.1",
}  # fmt: skip
TRITON = Result("layer_norm", "N 9", "fp16, C <= 256", "fp16", "triton", 1e-3, 4e-3, 0.1)
TORCH = dataclasses.replace(TRITON, implementation="torch", milliseconds=0.3)
OTHER = dataclasses.replace(TRITON, kind="fp32, C <= 256", dtype="fp32")
KEY = "layer_norm", TRITON.kind


def chosen(*results: Result) -> tuple[bool, str]:
    choice = decide(results)[KEY]
    return choice.triton, choice.reason


# --- the decision --------------------------------------------------------------------------------


def test_triton_where_it_is_right_and_faster() -> None:
    assert chosen(TRITON, TORCH) == (True, "measured here: triton 0.100 ms, torch 0.300 ms")
    slow = dataclasses.replace(TRITON, milliseconds=0.4)
    assert chosen(TORCH, slow) == (False, "measured here: torch 0.300 ms, triton 0.400 ms")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"error": 5e-3}, "wrong here: N 9, error 5.0e-03 of 4e-03"),
        ({"error": math.inf, "failure": "raised OutOfResources: no"}, "N 9, raised OutOfRes"),
        ({"error": math.nan}, "wrong here"),
        ({"refusal": "bf16 needs compute capability 8.0"}, "bf16 needs compute capability 8.0"),
    ],
)
def test_torch_where_triton_is_not_right_or_did_not_run(change: Any, reason: str) -> None:
    triton, why = chosen(dataclasses.replace(TRITON, **change), TORCH)
    assert not triton
    assert reason in why


def test_an_operator_that_is_wrong_once_is_never_chosen() -> None:
    """Also where the wrong call decides nothing by its time, and comes last."""
    wrong = dataclasses.replace(OTHER, case="N 1", kind="", error=1.0)
    assert "wrong here: N 1" in chosen(TRITON, TORCH, wrong)[1]
    rms = [dataclasses.replace(r, operator="rms_norm") for r in (TRITON, TORCH)]
    choices = decide([TRITON, TORCH, wrong, *rms])
    assert not choices[KEY].triton
    assert choices["rms_norm", TRITON.kind].triton


@pytest.mark.parametrize("alone", [TRITON, TORCH])
def test_torch_where_nothing_was_compared(alone: Result) -> None:
    assert chosen(alone) == (False, "the check compared nothing")


def test_a_wrong_torch_is_no_reason_for_triton() -> None:
    """Its kernel is judged by itself; torch is where everything falls back to."""
    slow = dataclasses.replace(TRITON, milliseconds=0.4)
    assert not chosen(slow, dataclasses.replace(TORCH, error=1.0))[0]


results = st.builds(
    Result,
    st.sampled_from(["layer_norm", "rms_norm"]),
    st.just("N 9"),
    st.sampled_from(["", "a", "b"]),
    st.just("fp16"),
    st.sampled_from(["triton", "torch"]),
    st.sampled_from([1e-3, 1.0, math.inf, math.nan]),
    st.just(4e-3),
    st.floats(0, 9),
    st.sampled_from([None, "refused"]),
    st.sampled_from([None, "raised"]),
)


@given(st.lists(results, max_size=12))
def test_any_results_choose_only_kernels_that_were_right_and_fastest(found: list[Result]) -> None:
    for (operator, kind), choice in decide(found).items():
        own = [r for r in found if r.operator == operator and r.implementation == "triton"]
        if choice.triton:
            assert all(r.error <= r.tolerance for r in own)
            last = {r.implementation: r for r in found if (r.operator, r.kind) == (operator, kind)}
            assert last["triton"].milliseconds <= last["torch"].milliseconds
            assert last["triton"].refusal is None


# --- the table -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def gpu(_own_cache: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """As if this machine had a T4 and Triton; what a test changes in the result changes the GPU."""
    here = dict(ENVIRONMENT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(table, "environment", lambda device: here)
    monkeypatch.setattr(dispatch, "find_spec", lambda name: name)
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    forget()
    yield here
    monkeypatch.undo()
    forget()


def forget() -> None:
    """As a new process."""
    table.forget()
    dispatch.forget()


def test_a_table_is_remembered() -> None:
    assert table.remembered(GPU) is None
    assert dispatch.select("layer_norm", "cuda:0", TRITON.kind).implementation == "torch"
    table.remember(GPU, Table(ENVIRONMENT, [TRITON, TORCH]))
    forget()
    found = table.remembered(torch.device("cuda"))
    assert found is not None
    assert list(found.results) == [TRITON, TORCH]
    selection = dispatch.select("layer_norm", "cuda:0", TRITON.kind)
    assert selection.implementation == "triton"
    assert selection.reason == "measured here: triton 0.100 ms, torch 0.300 ms"
    other = dispatch.select("layer_norm", "cuda:0", "fp32, C <= 256")
    assert (other.implementation, other.reason) == ("torch", dispatch._OTHER_KIND)
    assert dispatch.select("layer_norm", "cpu", TRITON.kind).implementation == "torch"


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_a_table_of_another_gpu_or_version_is_none(name: str, gpu: dict[str, str]) -> None:
    table.remember(GPU, Table(dict(gpu), [TRITON, TORCH]))
    gpu[name] = "other/one"
    forget()
    assert table.remembered(GPU) is None
    table.path(GPU).write_bytes(next(table.path(GPU).parent.iterdir()).read_bytes())
    assert table.remembered(GPU) is None
    gpu[name] = ENVIRONMENT[name]
    forget()
    assert table.remembered(GPU) is not None


VALUES = {"environment": ENVIRONMENT, "results": [dataclasses.asdict(TRITON)], "failure": None}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff", b"[]", b"7", b"null", b"{}", b'{"results": 7}', b'{"results": [7]}',
        json.dumps(VALUES | {"results": [{"operator": "layer_norm"}]}).encode(),
        json.dumps(VALUES | {"speed": 9}).encode(),
        json.dumps(VALUES | {"results": [VALUES["results"][0] | {"error": "x"}]}).encode(),  # type: ignore[index]
    ],
)  # fmt: skip
def test_a_damaged_table_is_none(content: bytes) -> None:
    table.path(GPU).parent.mkdir(parents=True)
    table.path(GPU).write_bytes(content)
    assert table.remembered(GPU) is None
    assert dispatch.select("layer_norm", "cuda:0", TRITON.kind).implementation == "torch"


def test_doctor_shows_the_choice_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = dataclasses.replace(OTHER, milliseconds=0.4)
    table.remember(GPU, Table(ENVIRONMENT, [TRITON, TORCH, slow]))
    found = [s for s in dispatch.selections("cuda:0") if s.operator == "layer_norm"]
    assert [(s.kind, s.implementation) for s in found] == [
        ("fp16, C <= 256", "triton"), ("fp32, C <= 256", "torch")
    ]  # fmt: skip
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "torch")
    forget()
    assert [s.implementation for s in dispatch.selections("cuda:0")][1] == "torch"


def test_other_choices_have_another_fingerprint() -> None:
    """By which a deterministic run sees that it would go on with other kernels."""
    before = kernels.fingerprint("cuda:0")
    table.remember(GPU, Table(ENVIRONMENT, [TRITON, TORCH]))
    forget()
    chosen = kernels.fingerprint("cuda:0")
    faster = dataclasses.replace(TORCH, milliseconds=0.2)
    table.remember(GPU, Table(ENVIRONMENT, [TRITON, faster]))
    forget()
    assert before != chosen == kernels.fingerprint("cuda:0")
    assert kernels.fingerprint("cpu") != chosen


# --- the process ---------------------------------------------------------------------------------


def program(body: str, *found: Result) -> tuple[str, ...]:
    """Prints results, as the check does, and then does something else."""
    lines = [json.dumps(dataclasses.asdict(r)) for r in found]
    code = f"import os, signal, sys, time\nfor x in {lines!r}: print(x, flush=True)\n{body}"
    return sys.executable, "-c", code


def test_a_process_gives_its_results_one_by_one() -> None:
    body = "print('some library talks'); print('{}'); print('{\"operator\": 1}')"
    assert list(first_check.run(program(body, TRITON, TORCH), 60)) == [TRITON, TORCH]
    wrong = dataclasses.replace(TRITON, error=math.inf)
    assert list(first_check.run(program("", wrong), 60)) == [wrong]
    # As they come, not at the end.
    running = first_check.run(program("time.sleep(60)", TRITON), 60)
    assert next(running) == TRITON
    running.close()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise ValueError('no\\nsuch thing')", "ValueError: no"),
        ("sys.stderr.write('CUDAError: illegal memory\\nhint\\n'); sys.exit(1)", "CUDAError: ille"),
        ("sys.exit('what now?')", "what now?"),
        ("sys.exit(3)", "it ended with exit code 3"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "it was ended by SIGSEGV"),
        ("os.abort()", "it was ended by SIGABRT"),
    ],
)
def test_a_process_that_fails_says_why_in_a_line(body: str, reason: str) -> None:
    seen: list[Result] = []
    with pytest.raises(RuntimeError, match=f"^{reason}") as raised:
        seen.extend(first_check.run(program(body, TRITON), 60))
    assert seen == [TRITON]
    assert "\n" not in str(raised.value)


def test_a_process_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    """Also one that ignores what it is told, and whose children hold what it prints to."""
    pids = tmp_path / "pids"
    body = f"""
import subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "60"])
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
time.sleep(60)"""
    start = time.monotonic()
    seen: list[Result] = []
    with pytest.raises(TimeoutError):
        seen.extend(first_check.run(program(body, TRITON), 1.5))
    assert seen == [TRITON]
    assert time.monotonic() - start < 20
    for pid in map(int, pids.read_text().split()):
        assert not running(pid)


def running(pid: int) -> bool:
    """Whether a process exists and is not a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_ends_the_process_too() -> None:
    running_check = first_check.run(program("time.sleep(60)", TRITON), 60)
    next(running_check)
    process = running_check.gi_frame.f_locals["process"]  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        running_check.throw(KeyboardInterrupt)
    assert process.returncode == -9


# --- when it is started --------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Replaces the check by a program; gives the list of what was said, and counts the starts."""

    def by(command: tuple[str, ...], seconds: float = 60.0) -> list[str]:
        starts.append(0)

        def make(*arguments: Any) -> tuple[str, ...]:
            starts[-1] += 1
            return command

        monkeypatch.setattr(first_check, "command", make)
        monkeypatch.setattr(first_check, "SECONDS", seconds)
        return []

    starts: list[int] = []
    by.starts = starts  # type: ignore[attr-defined]
    return by


def test_the_first_use_checks_and_remembers(started: Any) -> None:
    said = started(program("", TRITON, TORCH, OTHER))
    for _ in range(2):
        kernels.prepare(GPU, said.append)
        assert dispatch.select("layer_norm", "cuda:0", TRITON.kind).implementation == "triton"
        forget()
    assert started.starts == [1]
    assert said == [
        "checking the kernels on this GPU (Tesla T4), once: up to 60 seconds",
        "kernels: layer_norm triton in 1 of 2 kinds of calls (tinylm doctor tells more)",
    ]


def test_what_was_chosen_before_the_check_is_chosen_anew(started: Any) -> None:
    assert dispatch.select("layer_norm", "cuda:0", TRITON.kind).implementation == "torch"
    kernels.prepare(GPU, started(program("", TRITON, TORCH)).append)
    assert dispatch.select("layer_norm", "cuda:0", TRITON.kind).implementation == "triton"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (program("raise MemoryError('full')", TRITON, TORCH), "failed: MemoryError: full"),
        (program("os.abort()", TRITON, TORCH), "failed: it was ended by SIGABRT"),
        (program(""), "failed: it found nothing to check"),
        (("/no/such/python",), "failed: [Errno 2] No such file"),
    ],
)
def test_a_check_that_fails_means_torch_and_is_remembered(
    command: tuple[str, ...], reason: str, started: Any
) -> None:
    said = started(command)
    for _ in range(2):
        kernels.prepare(GPU, said.append)
        selection = dispatch.select("layer_norm", "cuda:0", TRITON.kind)
        assert selection.implementation == "torch"
        assert reason in selection.reason
        forget()
    assert started.starts == [1]
    assert len(said) == 2
    assert reason in said[1]
    assert said[1].startswith("kernels: all in torch; ")
    assert said[1].endswith("tinylm doctor --kernels checks again")


def test_a_check_that_takes_too_long_counts_as_far_as_it_came(started: Any) -> None:
    said = started(program("time.sleep(60)", TRITON, TORCH), seconds=1.5)
    kernels.prepare(GPU, said.append)
    assert dispatch.select("layer_norm", "cuda:0", TRITON.kind).implementation == "triton"
    missing = dispatch.select("causal_attention", "cuda:0", "fp16, T <= 64, D <= 32")
    assert missing.implementation == "sdpa"
    assert missing.reason == "the check did not come to such calls within 2 s"
    assert missing.reason in said[1]


@pytest.mark.parametrize("cache", ["a file", "~nobody-of-this-name/cache"])
def test_a_cache_that_cannot_be_written_only_costs_the_next_run_time(
    cache: str, started: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYLM_CACHE", cache)
    said = started(program("", TRITON, TORCH))
    kernels.prepare(GPU, said.append)
    kernels.prepare(GPU, said.append)
    assert dispatch.select("layer_norm", "cuda:0", TRITON.kind).implementation == "triton"
    assert [line.split(":")[0] for line in said][1:] == [
        "what the check found is not remembered", "kernels"
    ]  # fmt: skip
    forget()
    kernels.prepare(GPU, said.append)
    assert started.starts == [2]


@pytest.mark.parametrize("setting", ["torch", "triton", "reference"])
def test_nothing_is_started_where_the_user_has_chosen(
    setting: str, started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, setting)
    said = started(program("", TRITON, TORCH))
    kernels.prepare(GPU, said.append)
    assert (started.starts, said) == ([0], [])
    # A table that says otherwise is not asked.
    table.remember(GPU, Table(ENVIRONMENT, [TRITON, TORCH]))
    assert dispatch.select("layer_norm", "cuda:0", TRITON.kind).implementation == setting


def test_nothing_is_started_without_a_gpu_or_triton_or_by_other_ranks(
    started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = started(program("", TRITON, TORCH))
    for device in ("cpu", "mps"):
        kernels.prepare(torch.device(device), said.append)
    monkeypatch.setenv("RANK", "1")
    kernels.prepare(GPU, said.append)
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    dispatch.forget()
    kernels.prepare(GPU, said.append)
    assert (started.starts, said) == ([0], [])
    selection = dispatch.select("layer_norm", "cuda:0", TRITON.kind)
    assert selection.implementation == "torch"
    assert selection.reason.startswith("triton is not installed")


def test_an_argument_wins_over_the_table() -> None:
    table.remember(GPU, Table(ENVIRONMENT, [TRITON, TORCH]))
    for backend in ("torch", "reference", "triton"):
        assert dispatch.implementation("layer_norm", GPU, backend, TRITON.kind) == backend
    assert dispatch.implementation("layer_norm", GPU, None, TRITON.kind) == "triton"


# --- who asks for it ------------------------------------------------------------------------------


def test_doctor_refreshes_the_table(
    started: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    table.remember(GPU, Table(ENVIRONMENT, failure="failed once"))
    doctor = ["doctor", "--kernels", "--device", "cuda"]
    started(program("", TRITON, TORCH, OTHER))
    assert main(doctor) == 0
    out = capsys.readouterr().out
    assert str(TRITON) in out
    assert "layer_norm            triton (fp16, C <= 256): measured here: triton 0.100 ms" in out
    assert dispatch.select("layer_norm", "cuda:0", TRITON.kind).implementation == "triton"
    started(program("", dataclasses.replace(TRITON, error=1.0), TORCH))
    assert main(doctor) == 1
    assert "WRONG" in capsys.readouterr().out
    started(program("os.abort()", TRITON, TORCH))
    assert main(doctor) == 1
    assert "failed: it was ended by SIGABRT" in capsys.readouterr().out
    forget()
    found = table.remembered(GPU)
    assert found is not None
    assert found.failure is not None
