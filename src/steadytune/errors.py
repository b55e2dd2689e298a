"""The error class for users, and helpers for its messages."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable

SHOWN = 20  # largest number of names in a message


class UsageError(ValueError):
    """The user's arguments or data cannot be used. The message says what, why, and what to do instead."""


def suggest(name: str, known: Iterable[str]) -> str:
    """End of each message about an unknown name: the nearest known name, then at most twenty others."""
    names = [one_line(known_name, 60) for known_name in known]
    near = difflib.get_close_matches(name, names, n=1)
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
    return (f" Did you mean {near[0]!r}?" if near else "") + f" Known: {', '.join(names[:SHOWN]) or 'none'}{more}."


def one_line(said: object, longest: int = 500) -> str:
    """A library's message or a user's value as one line of limited length, for our messages."""
    line = " ".join(str(said).split())
    return line if len(line) <= longest else line[: longest - 3] + "..."


def first_rows(rows: Iterable[int]) -> str:
    """The first row numbers, for messages."""
    numbers = list(itertools.islice(rows, 6))
    return ", ".join(str(int(row)) for row in numbers[:5]) + (", ..." if len(numbers) > 5 else "")
