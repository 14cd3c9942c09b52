"""Special tokens in text: where they are one token, where they are text, where they are refused."""

import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Literal

from tinylm.errors import InputError

Choice = Literal["all"] | Collection[str]
Segment = tuple[str, int | None]  # text, and its id if it is a special token


class SpecialTokens:
    """Finds special tokens by name, decided as in tiktoken; the longest wins where two begin."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = dict(ids)

    def segments(
        self, text: str, allowed: Choice, disallowed: Choice, where: str = "the text"
    ) -> list[Segment]:
        """``text`` cut at the special tokens that are ``allowed``; no segment is empty.

        ``disallowed`` may be ``"all"``, which means all that are not allowed.

        Raises:
            InputError: ``text`` has a token that is disallowed, or a name is no special token.
        """
        chosen = self._chosen(allowed, "allowed_special")
        refused = self._chosen(disallowed, "disallowed_special")
        if disallowed == "all":
            refused -= chosen
        if refused and (found := _any_of(refused).search(text)):
            raise InputError(
                f"{where} has the special token {found[0]!r} at position {found.start()}, which "
                "disallowed_special forbids; put it into allowed_special to have it encoded as "
                "one token, or leave it out of disallowed_special to have it encoded as text"
            )
        segments: list[Segment] = []
        end = 0
        for found in _any_of(chosen).finditer(text) if chosen else ():
            segments += [(text[end : found.start()], None), (found[0], self._ids[found[0]])]
            end = found.end()
        segments.append((text[end:], None))
        return [segment for segment in segments if segment[0]]

    def _chosen(self, choice: Choice, argument: str) -> frozenset[str]:
        if choice == "all":
            return frozenset(self._ids)
        if isinstance(choice, str):
            raise InputError(f"{argument} is {choice!r}; it must be 'all' or a set of names")
        for name in choice:
            if name not in self._ids:
                known = ", ".join(self._ids)
                raise InputError(f"{argument} has {name!r}, which is no special token ({known})")
        return frozenset(choice)


def is_empty(choice: Choice) -> bool:
    """Whether no special token is chosen."""
    return not isinstance(choice, str) and len(choice) == 0


@lru_cache(maxsize=64)
def _any_of(names: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, longest_first)))
