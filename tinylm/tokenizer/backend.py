"""Which implementation of the tokenizers runs, the compiled or the Python one, and why.

``TINYLM_TOKENIZER`` decides: ``auto`` (the default) takes the compiled one wherever it gives the
results of this interpreter, ``c++`` insists on it, ``python`` avoids it.
"""

import logging
import os
import unicodedata
from functools import cache
from types import ModuleType

from tinylm.errors import InputError

VARIABLE = "TINYLM_TOKENIZER"
SETTINGS = ("auto", "c++", "python")
log = logging.getLogger("tinylm")


def implementation() -> tuple[str, str]:
    """The implementation in use, ``"c++"`` or ``"python"``, and in a few words why.

    Raises:
        InputError: ``TINYLM_TOKENIZER`` has an unknown value, or is ``c++`` where that cannot be.
    """
    name, reason, _ = _choose(os.environ.get(VARIABLE, "auto"))
    return name, reason


def compiled() -> ModuleType | None:
    """``tinylm._C`` if it is the implementation in use, else None. Raises as `implementation`."""
    return _choose(os.environ.get(VARIABLE, "auto"))[2]


@cache
def _choose(setting: str) -> tuple[str, str, ModuleType | None]:
    if setting not in SETTINGS:
        raise InputError(f"{VARIABLE} is {setting!r}; it must be one of {', '.join(SETTINGS)}")
    if setting == "python":
        return "python", f"{VARIABLE}=python", None
    module, reason = _probe()
    if module is not None:
        return "c++", reason, module
    if setting == "c++":
        raise InputError(f"{VARIABLE} is 'c++', but {reason}")
    log.warning("using the slower Python tokenizers: %s", reason)
    return "python", reason, None


def _probe() -> tuple[ModuleType | None, str]:
    """The extension, if it can be used, and why or why not."""
    try:
        from tinylm import _C
    except ImportError as error:
        return None, f"the compiled extension does not import ({error})"
    if _C.unicode_version != unicodedata.unidata_version:
        return None, (
            f"the compiled extension has Unicode {_C.unicode_version}, this Python "
            f"{unicodedata.unidata_version}; reinstall tinylm with this Python"
        )
    return _C, f"the compiled extension imports and has this Python's Unicode {_C.unicode_version}"
