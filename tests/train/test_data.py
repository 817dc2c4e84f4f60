"""Where problems come from, and what is said about files that are not right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from probmoe_ext.train.data import Example, load_examples, read_jsonl, split_holdout
from probmoe_ext.train.errors import UsageError

GOOD = json.dumps({"question": "q", "answer": "a\n#### 1", "more": 3})


def test_a_folder_a_file_and_empty_lines(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(f"{GOOD}\n\n{GOOD}\n", encoding="utf-8")
    (tmp_path / "test.jsonl").write_text(f"{GOOD}\n", encoding="utf-8")
    assert load_examples(str(tmp_path), "train") == [Example("q", "a\n#### 1")] * 2
    assert len(load_examples(str(tmp_path), "test")) == 1
    assert len(load_examples(str(tmp_path / "test.jsonl"), "train")) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q"}', "line 3: 'answer' is missing"),
        ('{"answer": "a"}', "line 3: 'question' is missing"),
        ('{"question": "q", "answer": " "}', "line 3: 'answer' is missing, empty"),
        ('{"question": "q", "answer": 7}', "line 3: 'answer' is missing, empty or no text"),
        ("{", "line 3: no valid JSON"),
        ("[1]", "line 3: must be an object with 'question' and 'answer', got a list"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read_jsonl(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    for source, message in [
        (str(tmp_path / "none"), "does not exist"),
        ("none.jsonl", "does not exist"),
        (str(tmp_path), "cannot read"),
        (str(tmp_path / "empty.jsonl"), "holds no problems"),
        (str(tmp_path / "latin.jsonl"), "not UTF-8"),
        ("builtin:4", "give steps from 1 to 3"),
        ("builtin:1/war", "give steps from 1 to 3 and perhaps a theme"),
        ("builtin:3/travel", "theme must be"),
    ]:
        with pytest.raises(UsageError, match=message):
            load_examples(source, "train")


def test_builtin_specifications() -> None:
    assert len(load_examples("builtin", "test")) == 500
    assert all("####" in one.answer for one in load_examples("builtin:2,3", "test"))
    assert load_examples("builtin:1/travel", "test")[0].question.startswith("On ")


def test_the_hub_is_asked_for_the_main_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, config: str, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"question": "q", "answer": "#### 1"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_examples("openai/gsm8k", "test") == [Example("q", "#### 1")]
    assert asked == [("openai/gsm8k", "main", "test")]


def test_the_held_out_slice_is_fixed_and_complete() -> None:
    examples = [Example(str(number), "a") for number in range(100)]
    training, held = split_holdout(examples, 10)
    assert split_holdout(examples, 10) == (training, held)
    assert len(held) == 10
    assert sorted(training + held, key=lambda one: int(one.question)) == examples
    assert split_holdout(examples, 0) == (examples, [])
    with pytest.raises(UsageError, match="holdout=100 leaves nothing"):
        split_holdout(examples, 100)
