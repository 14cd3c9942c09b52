"""A trained language model as its user sees it: text in, text out."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch

from tinylm import kernels
from tinylm.checkpoint import load_tensors
from tinylm.config import ModelConfig, TrainConfig, config_from_dict
from tinylm.device import choose_device
from tinylm.errors import InputError
from tinylm.generate import Context, Sampling, generate_ids
from tinylm.model import Transformer
from tinylm.notebook import load_state_dict
from tinylm.tokenizer import Tokenizer, load_tokenizer


class LanguageModel:
    """A model with its tokenizer, see `load`.

    Attributes:
        model: the `Transformer`, in eval mode.
        tokenizer: `WordTokenizer` or `BPETokenizer`.
        config: the `TrainConfig` it was trained with.
        path, tokenizer_path: what it was loaded from; None if made otherwise.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        config: TrainConfig,
        path: Path | None = None,
        tokenizer_path: Path | None = None,
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.path, self.tokenizer_path = path, tokenizer_path

    def __repr__(self) -> str:
        return (
            f"LanguageModel({self.config.preset}, {self.model.parameter_count():,} parameters, "
            f"{self.tokenizer.kind} tokenizer of {self.tokenizer.vocab_size:,})"
        )

    @overload
    def generate(self, prompt: str, **options: Any) -> str: ...
    @overload
    def generate(self, prompt: Sequence[str], **options: Any) -> list[str]: ...
    def generate(self, prompt: str | Sequence[str], **options: Any) -> str | list[str]:
        """The prompt and its continuation; of several prompts at once, a list.

        Args:
            prompt: text to continue. An empty one starts a new text.
            options: fields of `Sampling`: ``max_new_tokens``, ``temperature``, ``top_k``,
                ``top_p``, ``repetition_penalty``, ``seed``.

        Raises:
            InputError: the prompt has no known word, or an option is out of its range.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        texts = list(prompts)
        for pieces in self._pieces(prompts, Sampling(**options)):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        return texts[0] if isinstance(prompt, str) else texts

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """The continuation of one prompt, piece by piece as it is drawn; whole characters only."""
        for (piece,) in self._pieces([prompt], Sampling(**options)):
            if piece:
                yield piece

    def continue_ids(self, ids: Sequence[int], sampling: Sampling) -> str:
        """The text of given tokens and their continuation."""
        out = list(ids)
        for (token,) in generate_ids(
            self.model, [ids], sampling, eos_id=self.tokenizer.eos_id, banned=self._banned
        ):
            out += [] if token is None else [token]
        return self.tokenizer.decode(out)

    @torch.no_grad()
    def next_tokens(self, prompt: str, k: int = 10) -> list[tuple[str, float]]:
        """The ``k`` most likely next tokens with their probabilities, most likely first."""
        if k < 1:
            raise InputError(f"k is {k}; it must be at least 1")
        logits_BV = Context(self.model, [self.prompt_ids(prompt)], use_cache=False).next_logits()
        top = torch.softmax(logits_BV[0].float(), dim=-1).topk(min(k, logits_BV.shape[1]))
        return [
            (self.tokenizer.decode([int(i)]), float(p))
            for p, i in zip(top.values, top.indices, strict=True)
        ]

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt. No end-of-text follows it: it is there to be continued."""
        ids = list(self.tokenizer.encode(prompt, add_eos=False))
        if not prompt.strip():
            return ids or [self.tokenizer.eos_id]  # as a new text starts in training
        if all(i == self.tokenizer.unk_id for i in ids):
            raise InputError(f"the prompt {prompt!r} has no word that the model knows; try another")
        return ids

    @property
    def _banned(self) -> tuple[int, ...]:
        """``<UNK>`` stands for words the model cannot write, so it is never drawn."""
        return () if self.tokenizer.unk_id is None else (self.tokenizer.unk_id,)

    def _pieces(self, prompts: list[str], sampling: Sampling) -> Iterator[list[str]]:
        """Text to append to each prompt, step by step."""
        decoders = [self.tokenizer.stream_decoder() for _ in prompts]
        # Words are joined by spaces; the first one needs none after white space or nothing.
        bare = [(self.tokenizer.kind == "word" and p.rstrip() != p) or not p for p in prompts]
        steps = generate_ids(
            self.model,
            [self.prompt_ids(prompt) for prompt in prompts],
            sampling,
            eos_id=self.tokenizer.eos_id,
            banned=self._banned,
        )
        for tokens in steps:
            pieces = [
                "" if token is None else decoder.push(token)
                for token, decoder in zip(tokens, decoders, strict=True)
            ]
            for i, piece in enumerate(pieces):
                if bare[i] and piece:
                    pieces[i], bare[i] = piece.removeprefix(" "), False
            yield pieces
        yield [decoder.finish() for decoder in decoders]


def load(
    path: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    device: str = "auto",
) -> LanguageModel:
    """Loads a run folder: ``config.json``, ``tokenizer.json`` and ``model.safetensors``.

    Args:
        path: the folder, or the notebook's ``simple_transformer.pth``.
        tokenizer: a ``tokenizer.json``, for a ``.pth`` file, which has none.
        device: where to run: auto, cpu, cuda, cuda:N or mps.

    Raises:
        InputError: the folder or a file in it is missing or damaged, or the device is not there.
    """
    folder, where = Path(path), choose_device(device, "fp32")
    if folder.suffix == ".pth":
        if tokenizer is None:
            raise InputError(f"{folder} holds weights only; name its tokenizer.json too")
        model = load_state_dict(folder)
        config = replace(TrainConfig.from_preset("notebook"), model=model.config)
    else:
        config = load_config(folder)
        if not (folder / "model.safetensors").exists():
            raise InputError(f"{folder} has no model.safetensors yet; train it further first")
        tensors, _ = load_tensors(folder / "model.safetensors")
        model = build_model(config.model, tensors, folder / "model.safetensors")
    tokenizer_path = Path(tokenizer or folder / "tokenizer.json")
    vocabulary = load_tokenizer(tokenizer_path)
    if vocabulary.vocab_size != config.model.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {vocabulary.vocab_size} entries, the model "
            f"{config.model.vocab_size}; they do not belong together"
        )
    kernels.prepare(where.torch_device)
    return LanguageModel(
        model.to(where.torch_device).eval(), vocabulary, config, folder, tokenizer_path
    )


def load_config(folder: Path) -> TrainConfig:
    """The configuration of a run folder; `InputError` where there is none or it is damaged."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise InputError(f"no such run folder: {folder}")
    if not path.exists():
        raise InputError(f"{folder} is not a run folder: it has no config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return config_from_dict(values["config"])
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise InputError(f"{path}: {error}") from error
        raise InputError(f"{path} is damaged: {error}") from error


def build_model(config: ModelConfig, tensors: dict[str, torch.Tensor], source: Path) -> Transformer:
    """A model with the given weights; `InputError` names ``source`` if they do not fit."""
    model = Transformer(config)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise InputError(
            f"the weights in {source} do not fit its configuration: {first}"
        ) from error
    return model
