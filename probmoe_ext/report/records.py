"""Files that runs left, read with errors that name the file and the place in it."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from probmoe_ext.train.errors import UsageError


class Record:
    """A JSON object that knows where it comes from.

    Args:
        content: the parsed value; anything but an object is damage.
        path: the file.
        place: where in the file, such as ``layers[2]``.

    Raises:
        UsageError: the content is no object; from the methods, a value that is missing or of another type.
    """

    def __init__(self, content: Any, path: Path, place: str = "") -> None:
        self.path, self.place = path, place
        if not isinstance(content, dict):
            raise damaged(path, f"{place or 'the file'} must hold a JSON object, got {_short(content)}")
        self.content: dict[str, Any] = content

    def text(self, key: str, default: str | None = None) -> str:
        """A string; `default` where the key is missing or null."""
        value = self.content.get(key)
        if value is None and default is not None:
            return default
        return str(self._of(key, str, "a string"))

    def integer(self, key: str) -> int:
        """A whole number of at least 0."""
        value: int = self._of(key, int, "a whole number of at least 0")
        if value < 0:
            raise self._wrong(key, "a whole number of at least 0")
        return value

    def number(self, key: str) -> float | None:
        """A number; None where the key is missing or null."""
        if self.content.get(key) is None:
            return None
        return float(self._of(key, (int, float), "a number"))

    def boolean(self, key: str) -> bool:
        """True or false."""
        return bool(self._of(key, bool, "true or false"))

    def numbers(self, key: str) -> list[float]:
        """A list of numbers."""
        values = self._of(key, list, "a list of numbers")
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            raise self._wrong(key, "a list of numbers")
        return [float(value) for value in values]

    def texts(self, key: str) -> list[str]:
        """A list of strings."""
        values: list[str] = self._of(key, list, "a list of strings")
        if not all(isinstance(value, str) for value in values):
            raise self._wrong(key, "a list of strings")
        return values

    def record(self, key: str) -> Record:
        """An object."""
        return Record(self.content.get(key), self.path, self._at(key))

    def records(self, key: str) -> list[Record]:
        """A list of objects."""
        values = self._of(key, list, "a list")
        return [Record(value, self.path, f"{self._at(key)}[{place}]") for place, value in enumerate(values)]

    def lists(self, key: str) -> list[list[Any]]:
        """A list of lists."""
        values: list[list[Any]] = self._of(key, list, "a list of lists")
        if not all(isinstance(value, list) for value in values):
            raise self._wrong(key, "a list of lists")
        return values

    def _of(self, key: str, kind: Any, words: str) -> Any:
        value = self.content.get(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self._wrong(key, words)
        return value

    def _at(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key

    def _wrong(self, key: str, words: str) -> UsageError:
        found = _short(self.content[key]) if key in self.content else "nothing"
        return damaged(self.path, f"{self._at(key)} must be {words}, got {found}")


def read_record(path: Path) -> Record:
    """A file that holds one JSON object."""
    try:
        content = json.loads(_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise damaged(path, f"no JSON ({error})") from None
    return Record(content, path)


def read_lines(path: Path) -> Iterator[Record]:
    """A JSONL file; empty lines are nothing, nor is a last one without an end: a process was stopped in it."""
    *lines, last = _text(path).split("\n")
    for number, line in enumerate([*lines, last], 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            if number > len(lines):
                return
            raise damaged(path, f"line {number} is no JSON ({error})") from None
        yield Record(content, path, f"line {number}")


def printable(text: str) -> str:
    """A text without what neither HTML nor SVG can hold: control characters, halves of surrogate pairs."""
    return "".join("�" if unicodedata.category(one) in ("Cc", "Cs") and one not in "\n\t" else one for one in text)


def damaged(path: Path, message: str) -> UsageError:
    """The error for a file that cannot be used."""
    return UsageError(f"{path} is damaged: {message}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise damaged(path, f"no UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
