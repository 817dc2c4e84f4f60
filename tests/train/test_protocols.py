"""Prompts byte for byte, the order of the shots, and where outputs are cut."""

from __future__ import annotations

import random

import pytest

from probmoe_ext.train.data import Example
from probmoe_ext.train.errors import UsageError
from probmoe_ext.train.protocols import FEW_SHOT, ZERO_SHOT, cut, few_shot_prompts, prompt_a, prompt_b

TRAIN = [Example(f"q{number}?", f"because.\n#### {number}") for number in range(40)]
TEST = [Example("first?", "#### 1"), Example("second?", "#### 2")]


def test_zero_shot_prompts() -> None:
    assert prompt_a("How many?") == "Question: How many?\nAnswer:"
    assert prompt_b("How many?") == "Answer the following question.\n\nQuestion: How many?\nAnswer:"


def test_few_shot_prompt_is_byte_for_byte_the_published_form() -> None:
    prompt = next(iter(few_shot_prompts(TEST, TRAIN)))
    # What random.Random(1234) samples from 40, written out.
    shots = [28, 7, 0, 5, 37]
    assert random.Random(1234).sample(range(40), 5) == shots
    expected = "".join(f"Question: q{shot}?\nAnswer: because.\n#### {shot}\n\n" for shot in shots)
    assert prompt == expected + "Question: first?\nAnswer:"


def test_the_generator_moves_on_from_problem_to_problem() -> None:
    rng = random.Random(1234)
    drawn = [[shot.question for shot in rng.sample(TRAIN, 5)] for _ in TEST]
    prompts = list(few_shot_prompts(TEST, TRAIN))
    for shots, prompt in zip(drawn, prompts, strict=True):
        assert [part.splitlines()[0].removeprefix("Question: ") for part in prompt.split("\n\n")[:-1]] == shots
    assert drawn[0] != drawn[1]
    assert list(few_shot_prompts(TEST[:1], TRAIN)) == prompts[:1]


def test_few_shot_needs_five_problems() -> None:
    with pytest.raises(UsageError, match="5 training problems"):
        list(few_shot_prompts(TEST, TRAIN[:4]))


@pytest.mark.parametrize(
    ("output", "stop", "expected"),
    [
        (" 18\n#### 18\n\nQuestion: next", FEW_SHOT.stop, " 18\n#### 18\n\n"),
        (" 18</s> 19", FEW_SHOT.stop, " 18"),
        (" 18<|im_end|>Question:", FEW_SHOT.stop, " 18"),
        (" 18\nComment: 19", FEW_SHOT.stop, " 18\nComment: 19"),
        (" 18\nComment: 19", ZERO_SHOT.stop, " 18\n"),
        (" 18 Answer the following question. 20", ZERO_SHOT.stop, " 18 "),
        (" 18", ZERO_SHOT.stop, " 18"),
    ],
)
def test_cut(output: str, stop: tuple[str, ...], expected: str) -> None:
    assert cut(output, stop) == expected


def test_lengths() -> None:
    assert (FEW_SHOT.max_new_tokens, ZERO_SHOT.max_new_tokens) == (256, 512)
