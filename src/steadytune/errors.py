"""The one error that users see, and the words that name what is known."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable

SHOWN = 20  # names in a message


class UsageError(ValueError):
    """What the user asked for cannot be done; the message says what, why, and what to do instead."""


def suggest(name: str, known: Iterable[str]) -> str:
    """The tail of every 'unknown name' message: the nearest known name, then the others, twenty at most."""
    names = [one_line(known_name, 60) for known_name in known]
    near = difflib.get_close_matches(name, names, n=1)
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
    return (f" Did you mean {near[0]!r}?" if near else "") + f" Known: {', '.join(names[:SHOWN]) or 'none'}{more}."


def one_line(said: object, longest: int = 500) -> str:
    """A library's message or a user's value, fit to stand inside our message: one line of limited length."""
    line = " ".join(str(said).split())
    return line if len(line) <= longest else line[: longest - 3] + "..."


def first_rows(rows: Iterable[int]) -> str:
    """The first of many row numbers, for messages."""
    numbers = list(itertools.islice(rows, 6))
    return ", ".join(str(int(row)) for row in numbers[:5]) + (", ..." if len(numbers) > 5 else "")
