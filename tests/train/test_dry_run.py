"""What a dry run tells is what the run does, and it loads and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, OlmoeForCausalLM

from probmoe_ext.cli import main
from probmoe_ext.train.data import load_examples
from probmoe_ext.train.dry_run import plan_evaluation, plan_training
from probmoe_ext.train.errors import UsageError
from probmoe_ext.train.options import EvalConfig
from probmoe_ext.train.protocols import few_shot_prompts, prompt_b
from tests.train.conftest import small

OPTIONS = "--data builtin:1 --limit 64 --holdout 8 --max-steps 4 --batch-size 4 --device cpu --dry-run"


@pytest.fixture(autouse=True)
def _no_weights(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("a dry run loads no weights")

    monkeypatch.setattr(OlmoeForCausalLM, "from_pretrained", load)


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_a_training(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["train", "--router", "probmoe", "--k", "2,4", "--output", str(tmp_path / "run"), *OPTIONS.split()]) == 0
    )
    text = capsys.readouterr().out
    summary = json.loads((tiny_run / "summary.json").read_text("utf-8"))
    assert f"tiny-olmoe, {summary['parameters']:,} parameters in float32, on cpu" in text
    assert "probmoe k=2,4" in text
    assert f"builtin:1: {summary['examples']} problems, 8 held out" in text
    assert f"{summary['steps']} of 4 problems, 0.25 epochs" in text
    assert f"{tmp_path / 'run'} (new)" in text
    assert not list(tmp_path.iterdir())


def test_a_training_that_goes_on(tiny_run: Path) -> None:
    before = files(tiny_run)
    assert f"{tiny_run} (goes on behind checkpoint-4)" in plan_training(small(tiny_run), resume=True)
    assert f"{tiny_run} (replaced)" in plan_training(small(tiny_run), overwrite=True)
    assert files(tiny_run) == before
    with pytest.raises(UsageError, match="no option 'speed'"):
        plan_training(small(tiny_run / "x", model=str(tiny_run), router="probmoe", router_options={"speed": 1}))


def test_an_evaluation(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "--model", str(tiny_run), "--limit", "3", "--device", "cpu", "--output", str(tmp_path / "eval")]
    before = files(tiny_run)
    assert main([*command, "--dry-run"]) == 0
    text = capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tiny_run)
    test, train = load_examples("builtin:1", "test")[:3], load_examples("builtin:1", "train")
    for name, letters, prompts, new in (
        ("few-shot", "A", list(few_shot_prompts(test, train)), 256),
        ("zero-shot", "B, C", [prompt_b(one.question) for one in test], 512),
    ):
        lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
        assert (
            f"3 prompts for protocol {letters}, 0 of them done; {sum(lengths):,} tokens, the longest {max(lengths)}; "
            f"at most {new} new ones each"
        ) in text
        assert name in text
    assert "builtin:1: 3 test problems, 32 at once" in text
    assert files(tiny_run) == before
    assert not list(tmp_path.iterdir())


def test_an_evaluation_that_goes_on(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "samples-zero-shot.jsonl").write_text('{"index": 1, "output": "x"}\n{"ind', "utf-8")
    config = EvalConfig(
        model=str(tiny_run), limit=3, protocols=("b",), output=str(tmp_path), device="cpu", router="probmoe", k=(1, 3)
    )
    text = plan_evaluation(config)
    assert "probmoe k=1,3" in text
    assert "1 of them done" in text
    assert f"{tmp_path} (exists)" in text
    with pytest.raises(UsageError, match="--k 17 is more than the 16 experts"):
        plan_evaluation(EvalConfig(model=str(tiny_run), k=17))
