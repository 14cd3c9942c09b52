"""The one exception that means "your input, not our bug"."""


class InputError(ValueError):
    """Bad input: the message is one line that says what was wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class TrainingError(RuntimeError):
    """Training cannot go on (NaN, out of memory): the message is one line with the way out."""
