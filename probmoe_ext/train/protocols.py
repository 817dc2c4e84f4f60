"""How a problem is put to a model: prompts, few-shot examples, where the output ends.

Protocol A is lm-eval's task `gsm8k` (version 3), protocol B is open-instruct's GSM evaluation, the one that DenseMixer
and ProbMoE report. Protocol C scores the zero-shot output of B numerically.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from probmoe_ext.train.data import Example
from probmoe_ext.train.errors import UsageError

SHOTS = 5
SHOT_SEED = 1234


@dataclass(frozen=True)
class Generation:
    """How outputs are generated and where they are cut.

    Attributes:
        name: ``few-shot`` or ``zero-shot``.
        max_new_tokens: length of the longest output.
        stop: strings that end the output; neither they nor what follows is scored.
        stop_at_end_text: the characters of the end-of-text token end the output as well, where ordinary tokens spell
            them.
    """

    name: str
    max_new_tokens: int
    stop: tuple[str, ...]
    stop_at_end_text: bool = False

    def stop_strings(self, end_text: str | None) -> tuple[str, ...]:
        """All strings that end the output.

        Args:
            end_text: the end-of-text token of the tokenizer.
        """
        return (*self.stop, end_text) if self.stop_at_end_text and end_text else self.stop


FEW_SHOT = Generation("few-shot", 256, ("Question:", "</s>", "<|im_end|>"), stop_at_end_text=True)
ZERO_SHOT = Generation("zero-shot", 512, ("Answer the following question", "Question:", "Comment:"))


def prompt_a(question: str) -> str:
    """Protocol A's prompt without shots."""
    return f"Question: {question}\nAnswer:"


def prompt_b(question: str) -> str:
    """Protocol B's prompt."""
    return f"Answer the following question.\n\nQuestion: {question}\nAnswer:"


PROMPTS = {"a": prompt_a, "b": prompt_b}


def few_shot_prompts(test: Sequence[Example], train: Sequence[Example]) -> Iterator[str]:
    """Protocol A's prompts: five worked training problems before each question.

    One generator, seeded with 1234, draws the shots of all test problems in order, so the shots of a problem depend on
    its place: always start at the first one.

    Args:
        test: the test problems, from the first.
        train: where the shots come from, complete and in order.

    Yields:
        A prompt for each test problem.

    Raises:
        UsageError: fewer than five training problems.
    """
    if len(train) < SHOTS:
        raise UsageError(f"protocol a needs {SHOTS} training problems for its shots, got {len(train)}")
    rng = random.Random(SHOT_SEED)
    for example in test:
        shots = [f"{prompt_a(shot.question)} {shot.answer}" for shot in rng.sample(list(train), SHOTS)]
        yield "\n\n".join([*shots, prompt_a(example.question)])


def cut(output: str, stop: Sequence[str]) -> str:
    """The output up to the first of the stop strings."""
    for string in stop:
        output = output.split(string)[0]
    return output
