"""The command line: `main` runs one command, which stands in the module of its kind.

Only what parsing needs is imported at the top of these modules, so that ``tinylm --help`` is quick.
"""

import logging
import os
import sys
from collections.abc import Sequence

from tinylm import __version__
from tinylm.cli import models, tools, training
from tinylm.cli.options import BAD_INPUT, FAILED, Parser
from tinylm.errors import InputError, TrainingError


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
    except (RuntimeError, MemoryError) as error:
        if not (reason := _memory_told(error)):
            raise
        print(f"tinylm: {reason}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `tinylm … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _memory_told(error: Exception) -> str | None:
    """What to say of memory that ran out elsewhere than in a training step, which knows more."""
    from tinylm.memory import is_out_of_memory

    if not is_out_of_memory(error):
        return None
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"out of memory ({reason}); a smaller model, vocabulary or batch takes less"


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
    training.add_prepare(verbs)
    training.add_train(verbs)
    models.add_generate(verbs)
    models.add_chat(verbs)
    models.add_next(verbs)
    models.add_eval(verbs)
    training.add_reproduce(verbs)
    tools.add_tokenize(verbs)
    models.add_export(verbs)
    tools.add_bench(verbs)
    tools.add_doctor(verbs)
    return parser
