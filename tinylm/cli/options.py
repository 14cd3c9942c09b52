"""What commands share: the parser, options made from configuration classes, models, sampling."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

BAD_INPUT = 2
FAILED = 1


class Parser(argparse.ArgumentParser):
    """Answers a bad command line with one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def command(verbs: Any, name: str, run: Callable[[Any], int | None], help: str) -> Parser:
    parser: Parser = verbs.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def add_fields(parser: Any, cls: type, only: Sequence[str] = (), **defaults: Any) -> None:
    """An option for each field of a configuration class that has a help text.

    An option that is not given is None, and the field has its default, which the help names;
    ``defaults`` are those that the command changes.
    """
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if "help" not in field.metadata or (only and field.name not in only):
            continue
        default = defaults.get(field.name, field.default)
        unnamed = isinstance(default, bool) or default in (None, "")
        shown = "" if unnamed else f" (default {default})"
        option: dict[str, Any] = {"help": field.metadata["help"] + shown, "default": None}
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


def given(arguments: argparse.Namespace, *classes: type) -> dict[str, Any]:
    """The options that were given, by field name."""
    names = {f.name for cls in classes for f in dataclasses.fields(cls)}
    return {k: v for k, v in vars(arguments).items() if k in names and v is not None}


def add_model(parser: Parser) -> None:
    parser.add_argument("model", metavar="RUN", help="run folder, or the notebook's .pth file")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json of a .pth file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")


def load_model(arguments: argparse.Namespace) -> Any:
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


def add_sampling(parser: Parser, max_new_tokens: int = 100) -> None:
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


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in SAMPLING_HELP}


def printable(text: str) -> str:
    """``text`` with what the terminal's encoding cannot show replaced."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
