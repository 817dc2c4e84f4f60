"""The scorers of GSM8K, quirks included, and the mean with its standard error.

Every scorer takes the output (already cut, see `protocols.cut`) and the full reference answer, and returns what it read
from the output and whether that is right.
"""

from __future__ import annotations

import math
import re
import statistics
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

INVALID = "[invalid]"
"""What lm-eval puts where a filter finds nothing."""

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED_A = tuple(re.compile(pattern) for pattern in (r",", r"\$", r"(?s).*#### ", r"\.$"))
_THOUSANDS = re.compile(r"(\d),(\d)")
_NUMBER_B = re.compile(r"[-+]?\d*\.\d+|\d+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# A minus is a sign only where no digit, letter or bracket stands before it: 12-7 holds 12 and 7. "$" may stand on
# either side of it.
_NUMBER_C = re.compile(
    r"(?:(?<![\w.)\]])([-+\u2212]))?\$?(?:(?<=\$)([-+\u2212]))?((?:\d+(?:,\d{3})*(?:\.\d+)?)|(?:\.\d+))"
)


@dataclass(frozen=True)
class Score:
    """What a scorer read from an output, and whether it is right."""

    prediction: str
    correct: bool


@dataclass(frozen=True)
class Mean:
    """A mean over samples with its standard error ``sd / sqrt(n)`` (None below two samples).

    Attributes:
        value: the mean, from 0 to 1 for a share of right answers.
        error: the standard error, with the sample standard deviation (n - 1).
        count: number of samples.
    """

    value: float
    error: float | None
    count: int


def _equal_a(prediction: str, answer: str) -> bool:
    for pattern in _IGNORED_A:
        prediction, answer = pattern.sub("", prediction), pattern.sub("", answer)
    return prediction.lower() == answer.lower()


def strict_match(output: str, answer: str) -> Score:
    """Protocol A, `strict-match`: the first number that follows ``#### ``.

    Kept quirk: ``#### $18`` is not found.
    """
    match = _STRICT.search(output)
    prediction = match[1].strip() if match else INVALID
    return Score(prediction, _equal_a(prediction, answer))


def flexible_extract(output: str, answer: str) -> Score:
    """Protocol A, `flexible-extract`: the last thing that looks like a number.

    Kept quirks: ``$18.00`` differs from ``18``; a run of dots or commas at the end (``...``) is taken for a number.
    """
    matches = _FLEXIBLE.findall(output)
    prediction = next(group for group in matches[-1] if group).strip() if matches else INVALID
    return Score(prediction, _equal_a(prediction, answer))


def exact_match_b(output: str, answer: str) -> Score:
    """Protocol B: the last number, else the whole output; compared without case and punctuation.

    Kept quirks: whole numbers lose their sign (``-5`` is right for ``5``), and ``3.5`` equals ``35``.
    """
    numbers = _NUMBER_B.findall(_THOUSANDS.sub(r"\1\2", output))
    prediction = numbers[-1] if numbers else output
    reference = _THOUSANDS.sub(r"\1\2", answer.split("####")[-1].strip())
    return Score(prediction, _plain(prediction) == _plain(reference))


def _plain(text: str) -> str:
    return text.lower().translate(_PUNCTUATION)


def last_number(text: str) -> Decimal | None:
    """The last number of a text, after the last ``####`` where there is one; None if there is none."""
    matches = list(_NUMBER_C.finditer(text.rpartition("####")[2]))
    if not matches:
        return None
    before, after, digits = matches[-1].groups()
    number = Decimal(digits.replace(",", ""))
    return -number if (before or after) in ("-", "\u2212") else number


def numeric(output: str, answer: str) -> Score:
    """Protocol C: the last number of either side, compared as a decimal number (``$18.00`` equals ``18``)."""
    prediction, reference = last_number(output), last_number(answer)
    return Score(INVALID if prediction is None else str(prediction), prediction is not None and prediction == reference)


SCORERS: dict[str, tuple[str, Callable[[str, str], Score]]] = {
    "a.strict_match": ("A strict-match", strict_match),
    "a.flexible_extract": ("A flexible-extract", flexible_extract),
    "b.exact_match": ("B exact match", exact_match_b),
    "c.numeric": ("C numeric", numeric),
}
"""Key in the files, heading in tables, and function; the key starts with the protocol's letter."""


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and standard error.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("values must hold at least one number, got none")
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(math.fsum(values) / len(values), error, len(values))
