"""Reading ``tokenizer.json``, the file format of Hugging Face's ``tokenizers``."""

import json
import os
from typing import Any

from tinylm.errors import InputError


def read_tokenizer_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of the file ``path``, which has a model with a type.

    Raises:
        InputError: the file cannot be read, is not JSON, or is not a tokenizer's.
    """
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read().decode("utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {os.fspath(path)}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{os.fspath(path)} is not JSON: {error}") from error
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("type"), str):
        raise InputError(f"{os.fspath(path)} is not a tokenizer.json: it names no model type")
    return dict(content)
