"""The error that the command line turns into one line and exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A wrong request: the message says in one line what was given and what to change."""


def nearest(name: str, known: Iterable[str]) -> str:
    """What follows an unknown name: `` (did you mean 'probmoe'?)``, or nothing where no known one is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
