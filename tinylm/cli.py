"""The command line. Options of ``train`` and ``prepare`` come from the configuration classes.

Only what parsing needs is imported at the top, so that ``tinylm --help`` is quick.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from tinylm import __version__
from tinylm.config import PRESETS, DataConfig, ModelConfig, TrainConfig
from tinylm.errors import InputError, TrainingError

BAD_INPUT = 2
FAILED = 1


class Parser(argparse.ArgumentParser):
    """Answers a bad command line with one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 1 failed, 2 bad input, 128 + n by signal n."""
    _log_to_stderr()
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except InputError as error:
        print(f"tinylm: {error}", file=sys.stderr)
        return BAD_INPUT
    except TrainingError as error:
        print(f"tinylm: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `tinylm … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _log_to_stderr() -> None:
    """Shows what tinylm logs, such as which tokenizer runs, as plain lines."""
    log = logging.getLogger("tinylm")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False


def build_parser() -> Parser:
    parser = Parser(
        prog="tinylm",
        description="From raw text to a trained, honestly evaluated small language model.",
    )
    parser.add_argument("-V", "--version", action="version", version=f"tinylm {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_prepare(verbs)
    _add_train(verbs)
    _add_generate(verbs)
    _add_chat(verbs)
    _add_next(verbs)
    _add_eval(verbs)
    _add_reproduce(verbs)
    _add_tokenize(verbs)
    _add_export(verbs)
    _add_doctor(verbs)
    return parser


def _command(verbs: Any, name: str, run: Callable[[Any], int | None], help: str) -> Parser:
    parser: Parser = verbs.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.set_defaults(run=run)
    return parser


# --- options from configuration classes ----------------------------------------------------------


def _add_fields(parser: Any, cls: type, only: Sequence[str] = ()) -> None:
    """An option for each field of a configuration class that has a help text."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if "help" not in field.metadata or (only and field.name not in only):
            continue
        option: dict[str, Any] = {"help": field.metadata["help"], "default": None}
        kind = hints[field.name]
        if get_origin(kind) is Union or type(kind).__name__ == "UnionType":
            kind = next(t for t in get_args(kind) if t is not type(None))
        if get_origin(kind) is Literal:
            option["choices"] = get_args(kind)
        elif kind is bool:
            option["action"] = argparse.BooleanOptionalAction
        else:
            option |= {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}
        parser.add_argument("--" + field.name.replace("_", "-"), **option)


def _given(arguments: argparse.Namespace, *classes: type) -> dict[str, Any]:
    """The options that were given, by field name."""
    names = {f.name for cls in classes for f in dataclasses.fields(cls)}
    return {k: v for k, v in vars(arguments).items() if k in names and v is not None}


# --- commands ------------------------------------------------------------------------------------


def _add_prepare(verbs: Any) -> None:
    text = "turn text into a tokenizer and memory-mapped token files"
    parser = _command(verbs, "prepare", _prepare, text)
    _add_fields(parser, DataConfig)
    parser.add_argument("--out", metavar="FOLDER", help="data folder; the cache if unset")


def _prepare(arguments: argparse.Namespace) -> None:
    from tinylm.data import prepare

    dataset = prepare(DataConfig(**_given(arguments, DataConfig)), out=arguments.out)
    for name, split in dataset.meta["splits"].items():
        print(
            f"{name:6} {split['documents']:>10,} documents {split['tokens']:>14,} tokens "
            f"{split['text_bytes']:>16,} bytes"
        )
    print(f"vocabulary of {dataset.tokenizer.vocab_size:,} ({dataset.tokenizer.kind})")
    print(dataset.path)


def _add_train(verbs: Any) -> None:
    parser = _command(verbs, "train", _train, "train a model; prepares the data if needed")
    parser.add_argument("--preset", metavar="NAME", default=None, help=", ".join(PRESETS))
    parser.add_argument("--resume", metavar="RUN", help="go on with a run as it began")
    parser.add_argument("--fresh", action="store_true", help="replace what the run folder holds")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the run folder")
    _add_fields(parser.add_argument_group("data"), DataConfig)
    _add_fields(parser.add_argument_group("model"), ModelConfig)
    _add_fields(parser.add_argument_group("training"), TrainConfig)


def _train(arguments: argparse.Namespace) -> int:
    options = _given(arguments, DataConfig, ModelConfig, TrainConfig)
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


def _add_model(parser: Parser) -> None:
    parser.add_argument("model", metavar="RUN", help="run folder, or the notebook's .pth file")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json of a .pth file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")


def _load(arguments: argparse.Namespace) -> Any:
    from tinylm.lm import load

    return load(arguments.model, tokenizer=arguments.tokenizer, device=arguments.device)


SAMPLING_HELP = {
    "max_new_tokens": "longest continuation in tokens",
    "temperature": "0 always takes the most likely token; higher is more varied",
    "top_k": "draw among the k most likely tokens",
    "top_p": "draw among the likeliest tokens that together have this probability",
    "repetition_penalty": "above 1 makes what has occurred less likely",
    "seed": "make the draw repeatable",
}


def _add_sampling(parser: Parser, max_new_tokens: int = 100) -> None:
    whole = ("max_new_tokens", "top_k", "seed")
    defaults = {
        "max_new_tokens": max_new_tokens,
        "temperature": 0.8,
        "repetition_penalty": 1.0,
    }
    for name, text in SAMPLING_HELP.items():
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=int if name in whole else float,
            default=defaults.get(name),
            metavar="N" if name in whole else "X",
            help=text + (f" (default {defaults[name]})" if name in defaults else ""),
        )


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in SAMPLING_HELP}


def _add_generate(verbs: Any) -> None:
    parser = _command(verbs, "generate", _generate, "continue a prompt")
    _add_model(parser)
    parser.add_argument("prompt", nargs="*", help="text to continue; none starts a new text")
    _add_sampling(parser)


def _generate(arguments: argparse.Namespace) -> None:
    lm = _load(arguments)
    prompts = arguments.prompt or [""]
    if len(prompts) > 1:
        for text in lm.generate(prompts, **_sampling(arguments)):
            print(_printable(text))
        return
    pieces = lm.stream(prompts[0], **_sampling(arguments))
    first = next(pieces, "")  # bad input shows before anything is printed
    print(_printable(prompts[0] + first), end="", flush=True)
    for piece in pieces:
        print(_printable(piece), end="", flush=True)
    print()


def _printable(text: str) -> str:
    """``text`` with what the terminal's encoding cannot show replaced."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def _add_chat(verbs: Any) -> None:
    parser = _command(verbs, "chat", _chat, "continue what you type, line by line")
    _add_model(parser)
    _add_sampling(parser, max_new_tokens=50)


CHAT_HELP = "type a line to have it continued; `clear` forgets what was said; `quit` leaves"


def _chat(arguments: argparse.Namespace) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history, where the system has it)
    lm = _load(arguments)
    print(f"{lm!r}\n{CHAT_HELP}")
    history = ""
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.strip().lower() in ("quit", "exit"):
            return
        if line.strip().lower() == "clear":
            history = ""
            continue
        if line.strip():
            history = _reply(lm, history, line, _sampling(arguments))


def _reply(lm: Any, history: str, line: str, sampling: dict[str, Any]) -> str:
    """Prints the continuation of ``line``; returns the conversation with it."""
    history = f"{history}\n{line}" if history else line
    try:
        for piece in lm.stream(history, **sampling):
            print(_printable(piece), end="", flush=True)
            history += piece
        print()
    except KeyboardInterrupt:
        print(" …")
    except InputError as error:
        print(error)
        return history.removesuffix(line).rstrip("\n")
    return history


def _add_next(verbs: Any) -> None:
    parser = _command(verbs, "next", _next, "show the most likely next tokens of a prompt")
    _add_model(parser)
    parser.add_argument("prompt")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="how many (default 10)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _next(arguments: argparse.Namespace) -> None:
    tokens = _load(arguments).next_tokens(arguments.prompt, k=arguments.top)
    if arguments.json:
        print(json.dumps([{"token": token, "probability": p} for token, p in tokens]))
        return
    for token, p in tokens:
        print(f"{p:7.2%}  {_printable(repr(token))}")


def _add_eval(verbs: Any) -> None:
    parser = _command(verbs, "eval", _eval, "evaluate a model honestly on text")
    _add_model(parser)
    _add_fields(parser, DataConfig, only=("data", "text_field", "errors"))
    parser.add_argument(
        "--context", type=int, metavar="N", help="window length in tokens; as in training if unset"
    )
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="also evaluate n-gram models that count the run's training text",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _eval(arguments: argparse.Namespace) -> None:
    from tinylm.report import evaluate_on, result_lines

    lm = _load(arguments)
    options = _given(arguments, DataConfig)
    options.pop("tokenizer", None)
    result = evaluate_on(
        lm,
        options.pop("data", None),
        seq_len=arguments.context,
        baselines=arguments.baselines,
        **options,
    )
    if arguments.json:
        print(json.dumps(result))
        return
    for line in result_lines(result):
        print(line)


SHARED_BY_PRESETS = ("device", "seed", "logger")


def _add_reproduce(verbs: Any) -> None:
    text = "train the presets under an equal budget and compare them in one table"
    parser = _command(verbs, "reproduce", _reproduce, text)
    parser.add_argument("--minutes", type=float, metavar="X", help="to train each preset for")
    parser.add_argument("--tokens", type=int, metavar="N", help="or tokens to train each on")
    parser.add_argument(
        "--presets", default="notebook,causal,modern", metavar="NAMES", help="default %(default)s"
    )
    parser.add_argument("--out", default="runs/reproduce", metavar="FOLDER")
    parser.add_argument("--fresh", action="store_true", help="train again what is finished")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the table")
    _add_fields(parser.add_argument_group("data"), DataConfig)
    _add_fields(parser.add_argument_group("training"), TrainConfig, only=SHARED_BY_PRESETS)


def _reproduce(arguments: argparse.Namespace) -> int:
    from tinylm.reproduce import reproduce, table
    from tinylm.signals import Interrupted

    data = DataConfig(**{"tokenizer": "word"} | _given(arguments, DataConfig))
    given = _given(arguments, TrainConfig)
    try:
        report = reproduce(
            data,
            arguments.out,
            minutes=arguments.minutes,
            tokens=arguments.tokens,
            presets=arguments.presets.replace(",", " ").split(),
            fresh=arguments.fresh,
            quiet=arguments.quiet,
            **{name: given[name] for name in SHARED_BY_PRESETS if name in given},
        )
    except Interrupted as stop:
        print(f"{stop}; the same command goes on from there", file=sys.stderr)
        return 128 + stop.signum
    print(table(report))
    print(f"{arguments.out}/report.md, report.json, report.png", file=sys.stderr)
    return 0


def _add_tokenize(verbs: Any) -> None:
    parser = _command(verbs, "tokenize", _tokenize, "turn text into ids, or ids into text")
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
            print(_printable(tokenizer.decode(_parse_ids(text, name))))
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


def _add_export(verbs: Any) -> None:
    parser = _command(verbs, "export", _export, "write a model for other programs")
    _add_model(parser)
    parser.add_argument(
        "--to",
        choices=("hf", "notebook"),
        default="hf",
        help="hf: a folder for transformers; notebook: its .pth (notebook preset)",
    )
    parser.add_argument("--out", required=True, metavar="PATH", help="folder or file to write")


def _export(arguments: argparse.Namespace) -> None:
    from tinylm.export import export_huggingface
    from tinylm.notebook import save_state_dict

    lm = _load(arguments)
    if arguments.to == "hf":
        export_huggingface(lm, arguments.out)
    else:
        save_state_dict(lm.model, arguments.out)
    print(arguments.out)


def _add_doctor(verbs: Any) -> None:
    text = "show versions, devices, and which implementation runs and why"
    parser = _command(verbs, "doctor", _doctor, text)
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


if __name__ == "__main__":
    sys.exit(main())
