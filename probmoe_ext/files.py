"""Files that are whole at any moment: written beside their place, then renamed into it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from probmoe_ext.train.errors import UsageError


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that readers see either as it was or whole, also after a crash or on a full disk.

    Raises:
        OSError: it cannot be written; nothing is left beside it then.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _named(path), unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping as indented JSON; see `write_text`."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; None where there is none.

    Raises:
        UsageError: it is damaged; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}); delete it, and the same command writes it again") from error


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write mappings as JSON, one a line; see `write_text`."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append a mapping to a file of JSON lines. A crash can leave half a line, which `read_lines` passes over."""
    with _named(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines that a process may have been stopped in; no file is no lines.

    Returns:
        Its mappings, without a line that was not finished.
    """
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def check_writable(folder: Path) -> None:
    """Check that a folder can be made, or written into, before there is anything to write.

    Raises:
        NotADirectoryError: a file is in the way.
        PermissionError: it cannot.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Give the system's errors on an open file the name of the file, which they lack."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise
