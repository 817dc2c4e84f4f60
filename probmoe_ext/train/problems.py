"""GSM-style word problems of the project's own: seeded, offline, with a test split that training never sees.

A problem is a question and an answer in GSM8K's format, ``reasoning ... #### 42``. It comes from a template (a story
and one to three arithmetic steps) and drawn numbers. The numbers decide the split: a hash of template and numbers sends
one combination in ten to the test split, so a test problem never repeats a training problem under another name,
whatever the seeds and counts.
The arithmetic facts themselves (7*8=56) do occur in both splits, in different stories.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass
from typing import Literal

from probmoe_ext.train.templates import TEMPLATES, THEMES, Template

Split = Literal["train", "test"]

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo", "Iris", "Jon", "Kira", "Leo")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps", "stones", "toys")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
LARGEST_NUMBER = 999
TEST_SHARE = 10
"""One in this many combinations of template and numbers belongs to the test split."""

_STEP = re.compile(r"(\w+)([-+*/])(\w+)")


@dataclass(frozen=True)
class Problem:
    """One word problem.

    Attributes:
        question: the story and what is asked.
        answer: one sentence a step, then ``#### `` and the result.
        template: name of the template it was made from.
        numbers: the numbers drawn for the story, in the order of the template's letters.
    """

    question: str
    answer: str
    template: str
    numbers: tuple[int, ...]


def work_out(template: Template, numbers: dict[str, int]) -> list[tuple[str, int]] | None:
    """Work through a template's steps.

    Args:
        template: the story.
        numbers: a value for each of its letters.

    Returns:
        For each step the worked operation (``3+4=7``) and its result, or None where a result would be below 1, above
        `LARGEST_NUMBER` or no whole number.
    """
    known = dict(numbers)
    worked = []
    for position, (operation, _) in enumerate(template.steps, start=1):
        match = _STEP.fullmatch(operation)
        if match is None:
            raise ValueError(f"template {template.name!r}: {operation!r} is no operation of two letters")
        left, sign, right = known[match[1]], match[2], known[match[3]]
        if sign == "/" and left % right:
            return None
        result = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[sign]
        if not 1 <= result <= LARGEST_NUMBER:
            return None
        known[f"r{position}"] = result
        worked.append((f"{left}{sign}{right}={result}", result))
    return worked


def split_of(template: Template, numbers: tuple[int, ...]) -> Split:
    """The split to which a template with these numbers belongs: a fixed hash, the same on every machine."""
    return "train" if zlib.crc32(f"{template.name}:{numbers}".encode()) % TEST_SHARE else "test"


def _draw(template: Template, split: Split, rng: random.Random) -> Problem:
    while True:
        numbers = {letter: rng.randint(low, high) for letter, (low, high) in template.ranges.items()}
        values = tuple(numbers.values())
        worked = work_out(template, numbers)
        if worked is not None and split_of(template, values) == split:
            break
    name, other = rng.sample(NAMES, 2)
    words = {"name": name, "other": other, "thing": rng.choice(THINGS), "day": rng.choice(DAYS)}
    sentences = [
        sentence.format(operation, **words)
        for (_, sentence), (operation, _) in zip(template.steps, worked, strict=True)
    ]
    answer = "\n".join([*sentences, f"#### {worked[-1][1]}"])
    return Problem(template.question.format(**words, **numbers), answer, template.name, values)


def generate(
    split: Split, count: int, *, steps: tuple[int, ...] = (1, 2, 3), theme: str | None = None, seed: int = 0
) -> list[Problem]:
    """Generate distinct word problems.

    Args:
        split: ``"train"`` or ``"test"``; no problem is in both.
        count: how many, at least 0.
        steps: the numbers of arithmetic steps that may occur, from {1, 2, 3}; templates are drawn uniformly among them.
        theme: only templates of this theme; None for all.
        seed: same seed, same problems.

    Returns:
        `count` problems with pairwise different questions.

    Raises:
        ValueError: an unknown split, a negative count, steps or a theme that no template has, or a count that the
            templates cannot fill.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    if not steps or not set(steps) <= {1, 2, 3}:
        raise ValueError(f"steps must be numbers from 1 to 3, got {steps}")
    templates = [one for one in TEMPLATES if len(one.steps) in steps and theme in (None, one.theme)]
    if not templates:
        raise ValueError(f"theme must be one of {', '.join(THEMES)} with steps={steps}, got {theme!r}")
    rng = random.Random(f"{split}:{seed}")
    problems: dict[str, Problem] = {}
    wasted = 0
    while len(problems) < count:
        problem = _draw(rng.choice(templates), split, rng)
        wasted = wasted + 1 if problem.question in problems else 0
        if wasted > 1000:
            raise ValueError(f"count={count} is more distinct problems than the templates with steps={steps} give")
        problems.setdefault(problem.question, problem)
    return list(problems.values())
