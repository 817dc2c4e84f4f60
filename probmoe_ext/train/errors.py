"""The error that the command line turns into one line and exit code 2."""

from __future__ import annotations


class UsageError(ValueError):
    """A wrong request: the message says in one line what was given and what to change."""
