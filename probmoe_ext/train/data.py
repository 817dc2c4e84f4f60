"""Where problems come from: the hub, a local folder or file, or the built-in generator."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from probmoe_ext.train.errors import UsageError
from probmoe_ext.train.problems import Split, generate
from probmoe_ext.train.templates import THEMES

BUILTIN = "builtin"
BUILTIN_TRAIN, BUILTIN_TEST = 20_000, 500
HOLDOUT_SEED = 0
"""Fixed, so that runs with different seeds are compared on the same held-out problems."""


@dataclass(frozen=True)
class Example:
    """A question and its worked answer, which ends in ``#### `` and the result."""

    question: str
    answer: str


def load_examples(source: str, split: Split) -> list[Example]:
    """Load the problems of a split.

    Args:
        source: ``builtin``, ``builtin:1,2`` (with so many steps) or ``builtin:1/travel`` (of one theme); a folder with
            ``train.jsonl`` and ``test.jsonl``; a JSONL file (the same for either split); or a hub data set
            ``owner/name``, of which the configuration ``main`` is read.
        split: ``"train"`` or ``"test"``.

    Returns:
        The problems in the source's order.

    Raises:
        UsageError: nothing there, or a line without question and answer (the message has file and line number).
    """
    if source.split(":")[0].split("/")[0] == BUILTIN:
        return _load_builtin(source, split)
    path = Path(source)
    if path.is_dir():
        return read_jsonl(path / f"{split}.jsonl")
    if path.is_file():
        return read_jsonl(path)
    if path.suffix in (".jsonl", ".json") or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise UsageError(
            f"--data {source!r} does not exist; give a folder, a .jsonl file, {BUILTIN!r} or 'openai/gsm8k'"
        )
    return _load_hub(source, split)


def read_jsonl(path: Path) -> list[Example]:
    """Read a file with one JSON object ``{"question": ..., "answer": ...}`` a line; empty lines are passed over.

    Raises:
        UsageError: the file is missing or empty, or a line is not such an object; the message has its number.
    """
    examples = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    examples.append(_parse(line, f"{path}, line {number}"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason}") from error
    if not examples:
        raise UsageError(f"{path} holds no problems")
    return examples


def split_holdout(examples: Sequence[Example], count: int) -> tuple[list[Example], list[Example]]:
    """Set a slice of the training problems aside, for selection.

    Args:
        examples: the training split.
        count: how many to set aside.

    Returns:
        What remains for training, in order, and what was set aside (a fixed random choice).

    Raises:
        UsageError: nothing would remain.
    """
    if count >= len(examples):
        raise UsageError(f"holdout={count} leaves nothing of {len(examples)} training problems; set a smaller one")
    held = set(random.Random(HOLDOUT_SEED).sample(range(len(examples)), count))
    return (
        [example for index, example in enumerate(examples) if index not in held],
        [examples[index] for index in sorted(held)],
    )


def _load_builtin(source: str, split: Split) -> list[Example]:
    match = re.fullmatch(rf"{BUILTIN}(?::([1-3](?:,[1-3])*))?(?:/(\w+))?", source)
    if match is None or match[2] not in (None, *THEMES):
        raise UsageError(
            f"--data {source!r}: give steps from 1 to 3 and perhaps a theme ({', '.join(THEMES)}), "
            f"as in '{BUILTIN}:1,2' or '{BUILTIN}:1/travel'"
        )
    count = BUILTIN_TRAIN if split == "train" else BUILTIN_TEST
    steps = tuple(int(step) for step in match[1].split(",")) if match[1] else (1, 2, 3)
    try:
        return list(_generated(split, count, steps, match[2]))
    except ValueError as error:
        raise UsageError(f"--data {source!r}: {error}") from error


@lru_cache
def _generated(split: Split, count: int, steps: tuple[int, ...], theme: str | None) -> tuple[Example, ...]:
    """A comparison asks for the same problems in each of its runs."""
    return tuple(
        Example(problem.question, problem.answer) for problem in generate(split, count, steps=steps, theme=theme)
    )


def _load_hub(source: str, split: Split) -> list[Example]:
    from datasets import load_dataset

    try:
        rows = load_dataset(source, "main", split=split)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"--data {source!r} is no local file or folder, and the hub has not given it: {reason}"
        ) from error
    if not {"question", "answer"} <= set(rows.column_names):
        raise UsageError(f"--data {source!r} has the columns {rows.column_names}; it needs 'question' and 'answer'")
    return [Example(row["question"], row["answer"]) for row in rows]


def _parse(line: str, place: str) -> Example:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{place}: no valid JSON ({error.msg})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{place}: must be an object with 'question' and 'answer', got a {type(content).__name__}")
    for key in ("question", "answer"):
        if not isinstance(content.get(key), str) or not content[key].strip():
            raise UsageError(f"{place}: {key!r} is missing, empty or no text")
    return Example(content["question"], content["answer"])
