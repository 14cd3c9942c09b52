"""Commands that need no model: ``tokenize``, ``bench`` and ``doctor``."""

import argparse
import sys
from pathlib import Path
from typing import Any

from tinylm.cli.options import FAILED, command, printable
from tinylm.errors import InputError


def add_tokenize(verbs: Any) -> None:
    parser = command(verbs, "tokenize", _tokenize, "turn text into ids, or ids into text")
    parser.add_argument("tokenizer", help="tokenizer.json, or a folder that holds one")
    parser.add_argument("file", nargs="*", help="text files; standard input if none")
    parser.add_argument("--decode", action="store_true", help="the input is ids, the output text")
    parser.add_argument("--eos", action="store_true", help="end each text with the end-of-text id")
    parser.add_argument(
        "--out",
        metavar="NAME.bin",
        help="write a token file, each input a document, instead of printing; of any size",
    )


def _tokenize(arguments: argparse.Namespace) -> None:
    from tinylm.tokenizer import load_tokenizer

    path = Path(arguments.tokenizer)
    tokenizer = load_tokenizer(path / "tokenizer.json" if path.is_dir() else path)
    if arguments.out is not None:
        _tokenize_to_file(tokenizer, arguments)
        return
    for name in arguments.file or ["-"]:
        text = _read_text(name)
        if arguments.decode:
            print(printable(tokenizer.decode(_parse_ids(text, name))))
        else:
            ids, _ = tokenizer.encode_batch([text], add_eos=arguments.eos)
            print(" ".join(map(str, ids.tolist())))


def _tokenize_to_file(tokenizer: Any, arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from tinylm.data import encode_files

    if arguments.decode or not arguments.file:
        raise InputError("--out is for ids of text files; name some, and leave out --decode")
    with tqdm(unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:

        def show(_: str, done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        tokens = encode_files(
            tokenizer, arguments.file, arguments.out, add_eos=arguments.eos, progress=show
        )
    print(f"{len(tokens):,} tokens of {tokens.documents:,} documents in {arguments.out}")


def _read_text(name: str) -> str:
    try:
        raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return raw.decode()
    except FileNotFoundError:
        raise InputError(f"no such file: {name}") from None
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not valid UTF-8 at byte {error.start:,}") from None


def _parse_ids(text: str, name: str) -> list[int]:
    try:
        return [int(word) for word in text.split()]
    except ValueError as error:
        raise InputError(f"{name} holds something that is not an id: {error}") from None


def add_bench(verbs: Any) -> None:
    text = "time each part on this machine beside its plain reference; takes about a minute"
    parser = command(verbs, "bench", _bench, text)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--out", metavar="FILE", help="also write the figures as JSON")


def _bench(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from tinylm import bench, kernels
    from tinylm.device import choose_device
    from tinylm.files import write_json

    device = choose_device(arguments.device)
    kernels.prepare(device.torch_device)
    about, results = bench.about(device), []
    for name, value in about.items():
        print(f"{name:10}{value}")
    print(bench.HEAD)
    for row in bench.rows(device):
        print(row, flush=True)
        results.append(asdict(row) | {"ratio": row.ratio})
    if arguments.out is not None:
        write_json(arguments.out, {"about": about, "results": results})


def add_doctor(verbs: Any) -> None:
    text = "show versions, devices, and which implementation runs and why"
    parser = command(verbs, "doctor", _doctor, text)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="run every operator against its reference on the device, and on a GPU choose by the "
        "result; exit code 1 if one is wrong",
    )


def _doctor(arguments: argparse.Namespace) -> int:
    from tinylm.doctor import check_kernels, lines

    if arguments.kernels:
        all_ok = check_kernels(arguments.device, lambda line: print(line, flush=True))
        return 0 if all_ok else FAILED
    for line in lines(arguments.device):
        print(line)
    return 0
