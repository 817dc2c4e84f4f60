"""Every scorer against cases worked by hand, the quirks included."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest

from probmoe_ext.train.scoring import (
    INVALID,
    exact_match_b,
    flexible_extract,
    last_number,
    mean_of,
    numeric,
    strict_match,
)

EIGHTEEN = "She sells 9 eggs.\nShe makes 9*2=18 dollars.\n#### 18"


@pytest.mark.parametrize(
    ("output", "prediction", "correct"),
    [
        (" She makes 18.\n#### 18", "18", True),
        (" #### 18.", "18.", True),
        (" #### 18\nThen #### 19", "18", True),
        (" #### 19\nThen #### 18", "19", False),
        (" #### 1,8", "1,8", True),
        (" The answer is 18", INVALID, False),
        (" ####18", INVALID, False),
        (" #### $18", INVALID, False),
        (" #### -18", "-18", False),
        (" #### 18.0", "18.0", False),
        (" #### .", ".", False),
        ("", INVALID, False),
    ],
)
def test_strict_match(output: str, prediction: str, correct: bool) -> None:
    score = strict_match(output, EIGHTEEN)
    assert (score.prediction, score.correct) == (prediction, correct)


@pytest.mark.parametrize(
    ("output", "answer", "prediction", "correct"),
    [
        (" 9 eggs make 18 dollars", EIGHTEEN, "18", True),
        (" It is $18", EIGHTEEN, "$18", True),
        (" It is $18.", EIGHTEEN, "$18.", True),
        # The published quirks: cents make a difference, and dots at the end are taken for a number.
        (" It is $18.00", EIGHTEEN, "$18.00", False),
        (" It is 18 ...", EIGHTEEN, "...", False),
        (" It is 18, ok", EIGHTEEN, "18,", True),
        (" 7 of 18 and 7", EIGHTEEN, "7", False),
        (" five", EIGHTEEN, INVALID, False),
        (" about 1,080 men", "#### 1,080", "1,080", True),
        (" about 1080 men", "#### 1,080", "1080", True),
        (" minus -5", "#### -5", "-5", True),
        (" 12-5", "#### -5", "-5", True),
    ],
)
def test_flexible_extract(output: str, answer: str, prediction: str, correct: bool) -> None:
    score = flexible_extract(output, answer)
    assert (score.prediction, score.correct) == (prediction, correct)


@pytest.mark.parametrize(
    ("output", "answer", "prediction", "correct"),
    [
        (" 9 eggs make 18 dollars", EIGHTEEN, "18", True),
        (" #### 1,080", "#### 1,080", "1080", True),
        (" It is 18.00", EIGHTEEN, "18.00", False),
        # The published quirks: whole numbers lose their sign, and the point is punctuation.
        (" It is -5", "#### 5", "5", True),
        (" It is 5", "#### -5", "5", True),
        (" It is 3.5", "#### 35", "3.5", True),
        (" It is -3.5", "#### 3.5", "-3.5", True),
        # Commas go between pairs of digits that do not overlap: the second one stays.
        (" 1,2,3", "#### 123", "3", False),
        (" 1,200,300", "#### 1,200,300", "1200300", True),
        # Without a number the whole output is compared, case and punctuation aside.
        ("Eighteen!", "#### eighteen", "Eighteen!", True),
        (" eighteen", "#### eighteen", " eighteen", False),
    ],
)
def test_exact_match_b(output: str, answer: str, prediction: str, correct: bool) -> None:
    score = exact_match_b(output, answer)
    assert (score.prediction, score.correct) == (prediction, correct)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("It is $18.00", "18"),
        ("It is 18 ...", "18"),
        ("#### -5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("\u22125", "-5"),
        ("+7", "7"),
        ("12-7", "7"),
        ("12 - 7", "7"),
        ("12-7=5 apples", "5"),
        ("1,080 men", "1080"),
        ("114,200,000", "114200000"),
        ("3.5", "3.5"),
        (".5", "0.5"),
        ("18.", "18"),
        ("4 and 5, 6", "6"),
        ("say 7\n#### 42", "42"),
        ("#### 1\n#### 2", "2"),
        ("50%", "50"),
        ("no number", None),
        ("7 eggs\n#### none", None),
        ("", None),
    ],
)
def test_last_number(text: str, value: str | None) -> None:
    assert last_number(text) == (None if value is None else Decimal(value))


def test_numeric_mends_the_quirks() -> None:
    assert numeric(" It is $18.00", EIGHTEEN).correct
    assert numeric(" It is 18 ...", EIGHTEEN).correct
    assert not numeric(" It is -5", "#### 5").correct
    assert not numeric(" It is 3.5", "#### 35").correct
    assert not numeric(" nothing", "#### nothing").correct


def test_mean_and_standard_error() -> None:
    mean = mean_of([1.0, 0.0, 0.0, 1.0, 1.0])
    assert mean.value == pytest.approx(0.6)
    assert mean.error == pytest.approx(math.sqrt(0.3 / 5))
    assert mean.count == 5
    assert mean_of([1.0]).error is None
    with pytest.raises(ValueError, match="at least one"):
        mean_of([])
