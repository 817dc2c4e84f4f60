"""The stories of the built-in word problems: data, and nothing that computes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """A story with open numbers.

    Attributes:
        name: unique; part of the hash that decides the split.
        question: text with ``{name}``, ``{other}``, ``{thing}``, ``{day}`` and one letter for each number.
        steps: pairs of an operation (``a+b``, ``r1*c``; ``r1`` is the first step's result) and the sentence that states
            it, where ``{}`` stands for the worked operation (``3+4=7``).
        ranges: for each letter the smallest and the largest value.
        theme: ``things``, or ``travel``: the same arithmetic in stories with other words.
    """

    name: str
    question: str
    steps: tuple[tuple[str, str], ...]
    ranges: dict[str, tuple[int, int]]
    theme: str = "things"


_ADD = {"a": (2, 20), "b": (2, 15)}
_TAKE = {"a": (3, 30), "b": (2, 15)}
_TIMES = {"a": (2, 9), "b": (2, 9)}
_SHARE = {"a": (4, 81), "b": (2, 9)}

TEMPLATES: tuple[Template, ...] = (
    Template(
        "find",
        "{name} has {a} {thing} and finds {b} more. How many {thing} does {name} have now?",
        (("a+b", "{name} has {} {thing}."),),
        _ADD,
    ),
    Template(
        "together",
        "{name} has {a} {thing}. {other} has {b} {thing}. How many {thing} do they have together?",
        (("a+b", "They have {} {thing}."),),
        _ADD,
    ),
    Template(
        "two-days",
        "On Monday {name} sold {a} {thing}. On Tuesday {name} sold {b}. How many {thing} did {name} sell?",
        (("a+b", "{name} sold {} {thing}."),),
        _ADD,
    ),
    Template(
        "give",
        "{name} had {a} {thing} and gave {b} to {other}. How many {thing} does {name} have left?",
        (("a-b", "{name} has {} {thing}."),),
        _TAKE,
    ),
    Template(
        "more-than",
        "{name} has {a} {thing} and {other} has {b}. How many more {thing} does {name} have than {other}?",
        (("a-b", "{name} has {} more {thing}."),),
        _TAKE,
    ),
    Template(
        "lost",
        "A box held {a} {thing}. {name} lost {b} of them. How many {thing} are left?",
        (("a-b", "There are {} {thing}."),),
        _TAKE,
    ),
    Template(
        "bags",
        "{name} has {a} bags with {b} {thing} in each. How many {thing} does {name} have?",
        (("a*b", "{name} has {} {thing}."),),
        _TIMES,
    ),
    Template(
        "each-day",
        "{name} finds {b} {thing} each day. How many {thing} does {name} find in {a} days?",
        (("a*b", "{name} finds {} {thing}."),),
        _TIMES,
    ),
    Template(
        "share",
        "{name} shares {a} {thing} equally among {b} friends. How many {thing} does each friend get?",
        (("a/b", "Each friend gets {} {thing}."),),
        _SHARE,
    ),
    Template(
        "pack",
        "{name} packs {a} {thing} into boxes of {b}. How many boxes does {name} fill?",
        (("a/b", "{name} fills {} boxes."),),
        _SHARE,
    ),
    Template(
        "walk",
        "On {day} {name} walks {a} miles, then {b} miles. How many miles does {name} walk?",
        (("a+b", "{name} walks {} miles."),),
        _ADD,
        "travel",
    ),
    Template(
        "both-cost",
        "On {day} {name} pays {a} dollars for a lamp and {b} for a chair. How many dollars does {name} pay?",
        (("a+b", "{name} pays {} dollars."),),
        _ADD,
        "travel",
    ),
    Template(
        "get-on",
        "On {day} a bus carries {name} and {a} others. Then {b} people join. How many others does the bus carry?",
        (("a+b", "The bus carries {} others."),),
        _ADD,
        "travel",
    ),
    Template(
        "rest",
        "On {day} {name} rests after {b} miles of a trip of {a} miles. How many miles remain?",
        (("a-b", "{} miles remain."),),
        _TAKE,
        "travel",
    ),
    Template(
        "lunch",
        "On {day} {name} took {a} dollars and paid {b} for lunch. How many dollars remain?",
        (("a-b", "{} dollars remain."),),
        _TAKE,
        "travel",
    ),
    Template(
        "rope",
        "On {day} {name} cuts {b} feet off a rope of {a} feet. How long is the rope?",
        (("a-b", "The rope is {} feet long."),),
        _TAKE,
        "travel",
    ),
    Template(
        "train",
        "On {day} {name} rides a train with {a} cars of {b} seats. How many seats does the train have?",
        (("a*b", "The train has {} seats."),),
        _TIMES,
        "travel",
    ),
    Template(
        "tickets",
        "On {day} a ticket costs {b} dollars. How many dollars does {name} pay for {a} tickets?",
        (("a*b", "{name} pays {} dollars."),),
        _TIMES,
        "travel",
    ),
    Template(
        "wage",
        "On {day} {name} earns {a} dollars in {b} hours. How many dollars does {name} earn per hour?",
        (("a/b", "{name} earns {} dollars per hour."),),
        _SHARE,
        "travel",
    ),
    Template(
        "road",
        "On {day} {name} drives {a} miles in {b} equal parts. How long is a part?",
        (("a/b", "A part is {} miles long."),),
        _SHARE,
        "travel",
    ),
    Template(
        "find-give",
        "{name} had {a} {thing}, found {b} more and gave {c} to {other}. How many {thing} does {name} have now?",
        (("a+b", "{name} had {} {thing}."), ("r1-c", "Now {name} has {} {thing}.")),
        {"a": (5, 40), "b": (5, 40), "c": (2, 30)},
    ),
    Template(
        "bags-loose",
        "{name} has {a} bags with {b} {thing} in each and {c} loose {thing}. How many {thing} does {name} have?",
        (("a*b", "The bags hold {} {thing}."), ("r1+c", "{name} has {} {thing}.")),
        {"a": (2, 9), "b": (2, 9), "c": (2, 19)},
    ),
    Template(
        "bags-eaten",
        "{name} bought {a} boxes with {b} {thing} in each and used {c}. How many {thing} are left?",
        (("a*b", "{name} bought {} {thing}."), ("r1-c", "There are {} {thing}.")),
        {"a": (2, 9), "b": (2, 9), "c": (2, 19)},
    ),
    Template(
        "times-as-many",
        "{name} has {a} {thing}. {other} has {b} times as many. How many {thing} do they have together?",
        (("a*b", "{other} has {} {thing}."), ("a+r1", "They have {} {thing}.")),
        {"a": (2, 12), "b": (2, 9)},
    ),
    Template(
        "pool-share",
        "{name} has {a} {thing} and {other} has {b}. They share them equally among {c} friends. "
        "How many {thing} does each friend get?",
        (("a+b", "They have {} {thing}."), ("r1/c", "Each friend gets {} {thing}.")),
        {"a": (2, 40), "b": (2, 40), "c": (2, 9)},
    ),
    Template(
        "three-days",
        "On Monday {name} sold {a} {thing}, on Tuesday {b} more than on Monday. How many {thing} did {name} sell?",
        (("a+b", "On Tuesday {name} sold {} {thing}."), ("a+r1", "{name} sold {} {thing}.")),
        {"a": (2, 40), "b": (2, 19)},
    ),
    Template(
        "shop",
        "{name} buys {a} {thing} for {b} dollars each and pays with {c} dollars. {other} adds {d} dollars to the "
        "change. How many dollars does {name} have?",
        (
            ("a*b", "The {thing} cost {} dollars."),
            ("c-r1", "The change is {} dollars."),
            ("r2+d", "{name} has {} dollars."),
        ),
        {"a": (2, 9), "b": (2, 9), "c": (20, 99), "d": (2, 19)},
    ),
    Template(
        "week",
        "{name} finds {a} {thing} each day for {b} days and {other} finds {c}. They give {d} away. "
        "How many {thing} do they have left?",
        (("a*b", "{name} finds {} {thing}."), ("r1+c", "They find {} {thing}."), ("r2-d", "They have {} {thing}.")),
        {"a": (2, 9), "b": (2, 9), "c": (2, 19), "d": (2, 19)},
    ),
    Template(
        "party",
        "{name} bakes {a} trays of {b} cookies. {other} brings {c} more. They put {d} cookies on each plate. "
        "How many plates do they fill?",
        (("a*b", "{name} bakes {} cookies."), ("r1+c", "They have {} cookies."), ("r2/d", "They fill {} plates.")),
        {"a": (2, 9), "b": (2, 9), "c": (2, 19), "d": (2, 9)},
    ),
)

THEMES = tuple(dict.fromkeys(template.theme for template in TEMPLATES))
