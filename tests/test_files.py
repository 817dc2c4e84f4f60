"""Files that are whole at any moment, and lines that a stopped process leaves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from probmoe_ext.files import append_line, read_lines, write_json, write_lines, write_text


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"steps": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"steps": 2})
    assert path.read_text("utf-8") == '{\n  "steps": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_utf_8(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "±\n")
    assert (tmp_path / "a").read_bytes() == b"\xc2\xb1\n"


def test_lines_and_what_a_crash_leaves_of_them(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    write_lines(path, [{"step": 1}, {"step": 2, "text": "a\u2028b"}])
    append_line(path, {"step": 3})
    with path.open("ab") as file:
        file.write(b'{"step": 4, "text": "\xc3')
    assert read_lines(path) == [{"step": 1}, {"step": 2, "text": "a\u2028b"}, {"step": 3}]
    path.write_text('3\n{"step": 5}\n', "utf-8")
    assert read_lines(path) == [{"step": 5}]
