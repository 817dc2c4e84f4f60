"""The built-in problems: same seed same problems, splits apart, and reasoning that is true."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest

from probmoe_ext.train import problems
from probmoe_ext.train.problems import generate, split_of
from probmoe_ext.train.templates import TEMPLATES, Template

OPERATION = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")


@pytest.fixture(scope="module")
def both() -> dict[str, list]:
    return {split: generate(split, 2000, seed=3) for split in ("train", "test")}  # type: ignore[arg-type]


def test_the_seed_decides() -> None:
    assert generate("train", 50, seed=1) == generate("train", 50, seed=1)
    assert generate("train", 50, seed=1) != generate("train", 50, seed=2)
    assert generate("train", 20, seed=1) == generate("train", 50, seed=1)[:20]


def test_the_first_problem_is_the_same_on_every_machine() -> None:
    assert generate("test", 1, steps=(1,), theme="things")[0].question == (
        "Jon has 14 coins and Gita has 5. How many more coins does Jon have than Gita?"
    )


def test_splits_share_no_combination_of_story_and_numbers(both: dict[str, list]) -> None:
    kinds = {split: {(one.template, one.numbers) for one in problems} for split, problems in both.items()}
    assert not kinds["train"] & kinds["test"]
    other_seeds = {(one.template, one.numbers) for seed in range(3) for one in generate("train", 500, seed=seed)}
    assert not other_seeds & kinds["test"]
    questions = [one.question for problems in both.values() for one in problems]
    assert len(set(questions)) == len(questions)


def test_the_reasoning_is_true(both: dict[str, list]) -> None:
    signs = {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__, "/": Fraction.__truediv__}
    for problem in both["train"] + both["test"]:
        reasoning, result = problem.answer.rsplit("\n#### ", 1)
        operations = OPERATION.findall(reasoning)
        assert len(operations) == len(reasoning.splitlines())
        known = {int(number) for number in re.findall(r"\d+", problem.question)}
        assert known == set(problem.numbers)
        for left, sign, right, value in operations:
            assert {int(left), int(right)} <= known
            assert signs[sign](Fraction(left), Fraction(right)) == int(value)
            known.add(int(value))
        assert operations[-1][3] == result
        assert int(result) >= 1


def test_every_number_of_a_story_is_used() -> None:
    for template in TEMPLATES:
        used = set(re.findall(r"[a-z]\d?", " ".join(operation for operation, _ in template.steps)))
        assert set(template.ranges) <= used
        assert set(template.ranges) == set(re.findall(r"\{([a-d])\}", template.question))
        assert {f"r{step}" for step in range(1, len(template.steps))} <= used


def test_steps_and_theme_choose_the_templates() -> None:
    lengths = {template.name: len(template.steps) for template in TEMPLATES}
    assert len(lengths) == len(TEMPLATES)
    for steps in ((1,), (2,), (3,), (1, 3)):
        assert {lengths[one.template] for one in generate("train", 200, steps=steps)} == set(steps)
    themes = {template.name: template.theme for template in TEMPLATES}
    assert {themes[one.template] for one in generate("train", 100, theme="travel", steps=(1,))} == {"travel"}


def test_the_split_is_about_one_in_ten() -> None:
    template = TEMPLATES[0]
    splits = [split_of(template, (a, b)) for a in range(2, 102) for b in range(2, 102)]
    assert 0.08 < splits.count("test") / len(splits) < 0.12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev", "count": 1}, "split must be 'train' or 'test', got 'dev'"),
        ({"split": "train", "count": -1}, "count must be at least 0, got -1"),
        ({"split": "train", "count": 1, "steps": (4,)}, "steps must be numbers from 1 to 3"),
        ({"split": "train", "count": 1, "steps": ()}, "steps must be numbers from 1 to 3"),
        ({"split": "train", "count": 1, "theme": "war"}, "theme must be one of things, travel"),
    ],
)
def test_errors(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(**arguments)


def test_more_problems_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    # 30 stories without a name, about 27 of them for training.
    only = Template("only", "{a} and {b}?", (("a+b", "{}."),), {"a": (1, 5), "b": (1, 6)})
    monkeypatch.setattr(problems, "TEMPLATES", (only,))
    assert len(generate("train", 15, steps=(1,))) == 15
    with pytest.raises(ValueError, match="count=31 is more distinct problems"):
        generate("train", 31, steps=(1,))
