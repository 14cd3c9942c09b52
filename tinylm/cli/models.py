"""What a trained model is for: ``generate``, ``chat``, ``next``, ``eval`` and ``export``."""

import argparse
import contextlib
import json
from typing import Any

from tinylm.cli.options import (
    add_fields,
    add_model,
    add_sampling,
    command,
    given,
    load_model,
    printable,
    sampling,
)
from tinylm.config import DataConfig
from tinylm.errors import InputError


def add_generate(verbs: Any) -> None:
    parser = command(verbs, "generate", _generate, "continue a prompt")
    add_model(parser)
    parser.add_argument("prompt", nargs="*", help="text to continue; none starts a new text")
    add_sampling(parser)


def _generate(arguments: argparse.Namespace) -> None:
    lm = load_model(arguments)
    prompts = arguments.prompt or [""]
    if len(prompts) > 1:
        for text in lm.generate(prompts, **sampling(arguments)):
            print(printable(text))
        return
    pieces = lm.stream(prompts[0], **sampling(arguments))
    first = next(pieces, "")  # bad input shows before anything is printed
    print(printable(prompts[0] + first), end="", flush=True)
    for piece in pieces:
        print(printable(piece), end="", flush=True)
    print()


def add_chat(verbs: Any) -> None:
    parser = command(verbs, "chat", _chat, "continue what you type, line by line")
    add_model(parser)
    add_sampling(parser, max_new_tokens=50)


CHAT_HELP = "type a line to have it continued; `clear` forgets what was said; `quit` leaves"


def _chat(arguments: argparse.Namespace) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history, where the system has it)
    lm = load_model(arguments)
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
            history = _reply(lm, history, line, sampling(arguments))


def _reply(lm: Any, history: str, line: str, sampling: dict[str, Any]) -> str:
    """Prints the continuation of ``line``; returns the conversation with it."""
    history = f"{history}\n{line}" if history else line
    try:
        for piece in lm.stream(history, **sampling):
            print(printable(piece), end="", flush=True)
            history += piece
        print()
    except KeyboardInterrupt:
        print(" …")
    except InputError as error:
        print(error)
        return history.removesuffix(line).rstrip("\n")
    return history


def add_next(verbs: Any) -> None:
    parser = command(verbs, "next", _next, "show the most likely next tokens of a prompt")
    add_model(parser)
    parser.add_argument("prompt")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="how many (default 10)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _next(arguments: argparse.Namespace) -> None:
    tokens = load_model(arguments).next_tokens(arguments.prompt, k=arguments.top)
    if arguments.json:
        print(json.dumps([{"token": token, "probability": p} for token, p in tokens]))
        return
    for token, p in tokens:
        print(f"{p:7.2%}  {printable(repr(token))}")


def add_eval(verbs: Any) -> None:
    parser = command(verbs, "eval", _eval, "evaluate a model honestly on text")
    add_model(parser)
    add_fields(parser, DataConfig, only=("data", "text_field", "errors"))
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

    lm = load_model(arguments)
    options = given(arguments, DataConfig)
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


def add_export(verbs: Any) -> None:
    parser = command(verbs, "export", _export, "write a model for other programs")
    add_model(parser)
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

    lm = load_model(arguments)
    if arguments.to == "hf":
        export_huggingface(lm, arguments.out)
    else:
        save_state_dict(lm.model, arguments.out)
    print(arguments.out)
