"""The command line: its surface, its output, and one clear line for every kind of bad input."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, make_documents, write_jsonl

from tinylm.cli import build_parser, main

COMMANDS = "prepare train generate chat next eval reproduce tokenize export bench doctor".split()


def run(*arguments: object) -> int:
    try:
        return main([str(a) for a in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def flags(**options: object) -> list[str]:
    return [x for k, v in options.items() for x in ("--" + k.replace("_", "-"), str(v))]


SMALL_FLAGS = flags(**SMALL)


def test_commands() -> None:
    assert tuple(re.findall(r"^    (\w+) ", build_parser().format_help(), re.M)) == tuple(COMMANDS)


def test_train_options() -> None:
    """Renaming or dropping an option breaks what people have written down."""
    parser = build_parser()._subparsers._group_actions[0].choices["train"]  # type: ignore[union-attr, index]
    options = {o for action in parser._actions for o in action.option_strings}
    expected = (
        "-h --help --preset --resume --fresh --quiet --data --valid --text-field --errors "
        "--tokenizer --vocab-size --valid-fraction --d-model --n-layers --n-heads --n-kv-heads "
        "--d-ff --max-seq-len --out --steps --epochs --minutes --seq-len --stride --batch-size "
        "--micro-batch-size --invented-scripts --embedding-init --optimizer --lr --muon-lr --beta1 "
        "--beta2 --weight-decay --embedding-decay --schedule --warmup --decay --clip --device "
        "--precision --seed --deterministic --no-deterministic --on-nan --log-every --eval-every "
        "--eval-tokens "
        "--logger --sample-every --checkpoint-seconds --keep-checkpoints "
        "--cuda-graph --no-cuda-graph"
    )
    assert options == set(expected.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: Any) -> None:
    assert run(command, "--help") == 0
    assert f"usage: tinylm {command}" in capsys.readouterr().out


def test_help_names_the_defaults(capsys: Any) -> None:
    for command, expected in [
        ("train", "windows in a batch B (default 16)"),
        ("train", "or the path of a tokenizer.json (default bpe)"),
        ("reproduce", "or the path of a tokenizer.json (default word)"),
        ("train", "(default 0.005)"),
        ("train", "seed of initial weights, order of data and samples (default 0)"),
    ]:
        run(command, "--help")
        assert expected in " ".join(capsys.readouterr().out.split())


def test_nothing_heavy_is_imported_until_it_is_used() -> None:
    code = (
        "import sys, tinylm, tinylm.cli; tinylm.cli.build_parser().format_help(); "
        "heavy = ('torch', 'datasets', 'matplotlib', 'tqdm', 'pyarrow', 'numpy'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# --- the whole path ------------------------------------------------------------------------------


def test_prepare_train_and_use(tmp_path: Path, corpus: Path, capsys: Any) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    assert (
        run("prepare", "--data", corpus, "--tokenizer", "word", "--vocab-size", 60, "--out", data)
        == 0
    )
    assert "documents" in capsys.readouterr().out
    small = [f for f in SMALL_FLAGS if f not in ("--vocab-size", "60")]
    assert run("train", "--data", data, "--out", out, "--steps", 30, *small) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{out}\n"
    for part in ("parameters", "validation loss", "bits per byte", "loss.png", "tinylm chat"):
        assert part in shown.err

    assert run("generate", out, "they were", "--max-new-tokens", 5, "--seed", 1) == 0
    text = capsys.readouterr().out
    assert text.startswith("they were ")
    assert run("generate", out, "they were", "--max-new-tokens", 5, "--seed", 1) == 0
    assert capsys.readouterr().out == text
    assert run("generate", out, "they", "it", "--max-new-tokens", 5, "--seed", 1) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["they", "it"]

    assert run("next", out, "they were", "--top", 4) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert run("next", out, "they were", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == 10

    assert run("eval", out, "--json") == 0
    own = json.loads(capsys.readouterr().out)
    saved = json.loads((out / "eval.json").read_text())
    assert own == pytest.approx(saved)
    other = write_jsonl(tmp_path / "other.jsonl", make_documents(20, seed=9))
    assert run("eval", out, "--data", other, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    keys = "loss perplexity top1 top5 bits_per_byte unk_share known_loss known_top1 tokens bytes"
    assert set(keys.split()) <= result.keys()
    assert result["overlap"] < 0.5
    for data in ([], ["--data", other]):
        assert run("eval", out, *data, "--baselines", "--json") == 0
        counted = json.loads(capsys.readouterr().out)["baselines"]
        assert counted["trigram"]["loss"] < counted["unigram"]["loss"]
        assert set(counted["bigram"]) == {
            "loss", "top1", "known_loss", "known_top1", "bits_per_byte",
        }  # fmt: skip
        if not data:
            assert json.loads((out / "eval.json").read_text()) == saved | {"baselines": counted}
    assert run("eval", out, "--data", corpus, "--context", 8) == 0
    text = capsys.readouterr().out
    assert "context 8" in text
    assert "bits per byte" in text


def test_tokenize(trained: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    file = tmp_path / "text.txt"
    file.write_text("They were\nnot there")
    assert run("tokenize", trained, file) == 0
    ids = capsys.readouterr().out
    assert len(ids.split()) == 4
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(ids.encode())))
    assert run("tokenize", trained / "tokenizer.json", "--decode") == 0
    assert capsys.readouterr().out == "they were not there\n"
    assert run("tokenize", trained, file, "--eos") == 0
    assert capsys.readouterr().out.split()[-1] == "1"
    assert run("tokenize", trained, file, file, "--eos", "--out", tmp_path / "x.bin") == 0
    assert "10 tokens of 2 documents in" in capsys.readouterr().out
    expected = [*map(int, ids.split()), 1] * 2
    assert np.fromfile(tmp_path / "x.bin", "<u2").tolist() == expected
    assert np.fromfile(tmp_path / "x.docs", "<i8").tolist() == [0, 5, 10]
    assert run("tokenize", trained, "--out", tmp_path / "x.bin") == 2
    assert run("tokenize", trained, file, "--out", tmp_path / "x.txt") == 2


def test_chat(trained: Path, capsys: Any, monkeypatch: Any) -> None:
    lines = iter(["they were", "xyzzy", "", "clear", "it is", "quit", "never read"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert run("chat", trained, "--max-new-tokens", 4, "--seed", 0) == 0
    out = capsys.readouterr().out
    assert "`quit` leaves" in out
    assert next(lines) == "never read"
    assert len(out.splitlines()) == 5  # two of greeting, three of replies


def test_chat_ctrl_c_stops_the_reply_only(trained: Path, capsys: Any, monkeypatch: Any) -> None:
    from tinylm.lm import LanguageModel

    def endless(self: object, prompt: str, **options: object) -> Any:
        yield " some"
        raise KeyboardInterrupt

    asked: list[str] = []

    def answer(prompt: str) -> str:
        asked.append(prompt)
        return "they" if len(asked) < 3 else "quit"

    monkeypatch.setattr(LanguageModel, "stream", endless)
    monkeypatch.setattr("builtins.input", answer)
    assert run("chat", trained) == 0
    assert capsys.readouterr().out.count(" some …") == 2


def test_chat_remembers(trained: Path, monkeypatch: Any) -> None:
    from tinylm.lm import LanguageModel

    prompts: list[str] = []

    def reply(self: object, prompt: str, **options: object) -> Any:
        prompts.append(prompt)
        yield " yes"

    lines = iter(["one", "two", "clear", "three"])
    monkeypatch.setattr(LanguageModel, "stream", reply)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, "quit"))
    assert run("chat", trained) == 0
    assert prompts == ["one", "one yes\ntwo", "three"]


def test_export_loads_in_transformers(trained: Path, tmp_path: Path, capsys: Any) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    import tinylm

    out = tmp_path / "hf"
    assert run("export", trained, "--out", out) == 0
    assert capsys.readouterr().out == f"{out}\n"
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    lm = tinylm.load(trained)
    ids = tokenizer("They were not there", return_tensors="pt", add_special_tokens=False)[
        "input_ids"
    ]
    assert ids[0].tolist() == lm.tokenizer.encode("They were not there", add_eos=False)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, lm.model(ids), rtol=1e-4, atol=1e-4)
    assert run("export", trained, "--out", out) == 2
    assert "is not an empty folder" in capsys.readouterr().err


def test_notebook_weights_can_be_exported_and_used(
    small_run: Any, tmp_path: Path, capsys: Any
) -> None:
    from tinylm.run import train

    folder, pth = tmp_path / "run", tmp_path / "simple_transformer.pth"
    lm = train(small_run("notebook", steps=3), quiet=True)
    assert run("export", folder, "--to", "notebook", "--out", pth) == 0
    capsys.readouterr()
    options = ("--max-new-tokens", 4, "--seed", 0)
    assert run("generate", pth, "they", *options) == 2
    assert "name its tokenizer.json too" in capsys.readouterr().err
    assert run("generate", pth, "they", "--tokenizer", folder / "tokenizer.json", *options) == 0
    assert capsys.readouterr().out.strip() == lm.generate("they", max_new_tokens=4, seed=0)
    strange = write_jsonl(tmp_path / "strange.jsonl", ["they were xyzzy", "it is plugh"])
    evaluation = ("eval", pth, "--tokenizer", folder / "tokenizer.json", "--data", strange)
    assert run(*evaluation, "--json") == 0  # unknown words, and no model of how they are spelled
    assert json.loads(capsys.readouterr().out)["bits_per_byte"] is None
    assert run(*evaluation, "--baselines") == 2
    assert "baselines need the run's training text" in capsys.readouterr().err
    assert run("eval", folder, "--data", strange, "--json") == 0
    assert json.loads(capsys.readouterr().out)["bits_per_byte"] > 0
    assert run("export", folder, "--out", tmp_path / "hf") == 2
    assert "no counterpart in transformers" in capsys.readouterr().err


def test_doctor(capsys: Any) -> None:
    assert run("doctor", "--device", "cpu") == 0
    out = capsys.readouterr().out
    for part in ("python", "torch", "device        cpu", "tokenizer", "causal_attention"):
        assert part in out


def test_doctor_checks_the_kernels(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinylm.kernels import check

    monkeypatch.setattr(check, "SECONDS", 0)
    assert run("doctor", "--kernels", "--device", "cpu") == 0
    out = capsys.readouterr().out
    for operator in ("causal_attention", "layer_norm", "rms_norm", "linear_cross_entropy"):
        *lines, chosen = (line for line in out.split("\n") if line.startswith(operator))
        assert lines
        assert all(" ok " in line and " ms" in line for line in lines)
        assert ": " in chosen


def test_doctor_fails_when_a_kernel_is_wrong(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinylm.kernels import attention, check

    right = attention._sdpa
    monkeypatch.setattr(attention, "_sdpa", lambda *inputs: right(*inputs) * 1.01)
    monkeypatch.setattr(check, "SECONDS", 0)
    assert run("doctor", "--kernels", "--device", "cpu") == 1
    wrong = [line for line in capsys.readouterr().out.split("\n") if "WRONG" in line]
    assert wrong
    assert all("sdpa" in line and " fp32 " in line for line in wrong)


# --- bad input -----------------------------------------------------------------------------------


def refused(capsys: Any, *arguments: object) -> str:
    """Runs a command that must fail with exit code 2 and one line on standard error."""
    capsys.readouterr()
    assert run(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    lines = shown.err.strip().split("\n")
    assert lines[-1].startswith("tinylm")
    return str(lines[-1])


TRAIN = ["train", *SMALL_FLAGS, "--steps", "3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "gpt5"], "unknown preset 'gpt5'; the presets are modern, causal, notebook"),
        (["--vocab-size", "2"], "vocab_size is 2; a word vocabulary needs at least 3"),
        (["--d-model", "33"], "d_model 33 is not divisible by n_heads 4"),
        (["--batch-size", "8", "--micro-batch-size", "3"], "batch_size 8 is not divisible by"),
        (["--epochs", "2"], "give one of steps, epochs and minutes, not steps and epochs"),
        (["--device", "cuda"], "device 'cuda' is not available"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--precision", "fp16"], "precision fp16 needs a CUDA device"),
        (["--text-field", "body"], "body"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--lr", "0"], "lr is 0.0; it must be more than 0"),
        (["--lr", "inf"], "lr is inf; it must be more than 0, and finite"),
        (["--clip", "-1"], "clip is -1.0; it must be at least 0"),
        (["--beta2", "1"], "beta2 is 1.0; it must be at least 0, below 1"),
        (["--seed", "-1"], "seed is -1; it must be at least 0"),
        (["--warmup", "0.8"], "together at most 1"),
    ],
)
def test_bad_options(
    corpus: Path, tmp_path: Path, capsys: Any, options: list[str], message: str
) -> None:
    if options[0] == "--device" and options[1] == "cuda":
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device here")
    out = tmp_path / "run"
    assert message in refused(capsys, *TRAIN, "--data", corpus, "--out", out, *options)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "none.jsonl"),
        ("empty.jsonl", b"", "empty"),
        ("bad.txt", b"good " * 100 + b"\xff\xfe bad", "byte 500"),
        ("bad.jsonl", b'{"text": "fine words here"}\n{"text": \n', "line 2"),
        ("text.docx", b"hello", "docx"),
    ],
)
def test_bad_data(
    tmp_path: Path, capsys: Any, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    said = refused(capsys, *TRAIN, "--data", path, "--out", tmp_path / "run")
    assert message in said
    assert name in said


def test_errors_replace_goes_on(tmp_path: Path) -> None:
    text = "\n\n".join(make_documents(200)).encode()
    (tmp_path / "bad.txt").write_bytes(text + b" \xff\xfe " + text)
    options = ["--data", tmp_path / "bad.txt", "--out", tmp_path / "run", "--quiet"]
    assert run(*TRAIN, *options) == 2
    assert run(*TRAIN, *options, "--errors", "replace") == 0


def test_bad_models(trained: Path, tmp_path: Path, capsys: Any) -> None:
    import shutil

    assert "no such run folder" in refused(capsys, "generate", tmp_path / "none", "they")
    assert "not a run folder" in refused(capsys, "generate", tmp_path, "they")
    for name, damage, message in [
        ("model.safetensors", b"", "model.safetensors is damaged"),
        ("config.json", b"{}", "config.json is damaged"),
        ("tokenizer.json", b"{", "tokenizer.json"),
    ]:
        copy = tmp_path / name
        shutil.copytree(trained, copy)
        (copy / name).write_bytes(damage)
        assert message in refused(capsys, "generate", copy, "they")
    assert "no word that the model knows" in refused(capsys, "generate", trained, "xyzzy")
    assert "top_p is 2.0" in refused(capsys, "generate", trained, "they", "--top-p", "2")
    assert "penalty is inf" in refused(
        capsys, "generate", trained, "they", "--repetition-penalty", "inf"
    )
    assert "seed is 9999" in refused(capsys, "generate", trained, "they", "--seed", "9" * 30)
    for context in (0, -5):
        assert f"context is {context}; it must be" in refused(
            capsys, "eval", trained, "--context", context
        )
    assert "a part of that path is a file" in refused(
        capsys, "export", trained, "--out", trained / "config.json" / "hf"
    )
    assert "k is 0" in refused(capsys, "next", trained, "they", "--top", "0")
    assert "no such file" in refused(capsys, "tokenize", trained, tmp_path / "none.txt")
    assert "it takes only --logger, --log-every" in refused(
        capsys, "train", "--resume", trained, "--lr", "1"
    )


def test_a_text_too_short_for_an_overlap_is_evaluated(
    trained: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "short.txt").write_text("They were not there.")
    assert run("eval", trained, "--data", tmp_path / "short.txt", "--device", "cpu") == 0
    assert "overlap" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "tinylm: out of memory (MemoryError); a smaller model"),
        (RuntimeError("can't allocate memory: 9 bytes\nat some place"), "9 bytes); a smaller"),
    ],
)
def test_out_of_memory_anywhere_is_one_line(
    trained: Path, capsys: Any, monkeypatch: Any, error: Exception, said: str
) -> None:
    def full(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("tinylm.lm.load", full)
    assert run("next", trained, "they") == 1
    assert said in capsys.readouterr().err
    monkeypatch.setattr("tinylm.lm.load", lambda *args, **options: {}["bug"])
    with pytest.raises(KeyError):  # a bug stays one
        run("next", trained, "they")


def test_unknown_commands_and_options(capsys: Any) -> None:
    assert "see tinylm --help" in refused(capsys, "dance")
    assert "unrecognized arguments: --speed" in refused(capsys, "doctor", "--speed", "9")


def test_an_offline_hub_names_the_ways_on(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")  # a name that never resolves
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, "-m", "tinylm", "prepare", "--data", "nobody/nothing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no network, and no copy in the cache" in done.stderr
    assert "builtin" in done.stderr
    assert len(done.stderr.strip().split("\n")) == 1
