"""The one error that users see, and the words that name what is known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """What the user asked for cannot be done; the message says what, why, and what to do instead."""


def suggest(name: str, known: Iterable[str]) -> str:
    """The tail of every 'unknown name' message: the nearest known name, then all of them."""
    names = [str(known_name) for known_name in known]
    near = difflib.get_close_matches(name, names, n=1)
    return (f" Did you mean {near[0]!r}?" if near else "") + f" Known: {', '.join(names) or 'none'}."


def one_line(error: BaseException) -> str:
    """A library's message, fit to stand inside ours."""
    return " ".join(str(error).split())
