"""Protocol A is lm-eval's own task `gsm8k`: the same prompts, outputs, filters, scores and errors on the same model."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from probmoe_ext.files import read_lines, write_lines
from probmoe_ext.train.evaluate import evaluate
from probmoe_ext.train.models import Routing, load_model
from probmoe_ext.train.options import EvalConfig
from probmoe_ext.train.scoring import INVALID

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'probmoe_ext[lm-eval]'")

PAD, EOS, UNKNOWN = "<pad>", "<end>", "<unk>"
WORDS = [*"0123456789", "abcdef", "eggs", "Ben", "has", "more", "Question:", "Answer:", "</s>", "<|im_end|>", " ", "\n"]
NUMBERS = [*"$,.", "#### ", *(f"#### {sign}{digit}" for sign in ("", "-", "$") for digit in range(1, 5)), "-7", "8."]
# The last ones are ordinary text that spells the end-of-text token.
VOCABULARY = [PAD, EOS, UNKNOWN, *WORDS, *NUMBERS, f"{EOS}.", f"{EOS}6"]
ROOM, SEED = 250, 2
FILTERS = {"a.strict_match": "strict-match", "a.flexible_extract": "flexible-extract"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OLMoE whose every token means something to the filters, in a folder."""
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(VOCABULARY)}, UNKNOWN))
    pieces = "|".join(re.escape(token) for token in sorted(VOCABULARY[3:], key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    torch.manual_seed(SEED)
    config = OlmoeConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        # Some prompts do not fit beside 256 new tokens, and lose their beginning.
        max_position_embeddings=256 + ROOM,
        initializer_range=0.4,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("lm-eval") / "model"
    OlmoeForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems of different lengths in the words of the vocabulary."""
    folder, rng = tmp_path_factory.mktemp("lm-eval") / "data", random.Random(1)
    folder.mkdir()

    def problem() -> dict[str, str]:
        number = str(rng.randrange(10_000))
        words = [rng.choice([*WORDS, number]) for _ in range(rng.randrange(3, 30))]
        return {"question": " ".join(words), "answer": f"Ben has {number}.\n#### {number}"}

    write_lines(folder / "train.jsonl", [problem() for _ in range(30)])
    write_lines(folder / "test.jsonl", [problem() for _ in range(18)])
    return folder


def theirs(model: Any, tokenizer: Any, data: Path, folder: Path) -> dict[str, Any]:
    """What lm-eval says: its installed task, with another data set."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    task = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"),
        "task": "gsm8k_local",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(data / f"{split}.jsonl") for split in ("train", "test")},
            "cache_dir": str(folder / "cache"),
        },
    }
    (folder / "gsm8k_local.yaml").write_text(json.dumps(task), "utf-8")
    found: dict[str, Any] = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=6),
        tasks=["gsm8k_local"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=1,  # the mean has a formula; 0 would leave the error out
    )
    return found


@pytest.mark.parametrize("routing", [Routing(), Routing("probmoe", (1, 3))], ids=str)
def test_equal_to_lm_eval_document_by_document(model: Path, data: Path, tmp_path: Path, routing: Routing) -> None:
    settings = EvalConfig(
        model=str(model),
        router=routing.router,
        k=routing.k,
        data=str(data),
        output=str(tmp_path / "ours"),
        protocols=("a",),
        batch_size=6,
        device="cpu",
    )
    evaluate(settings, quiet=True)
    # The test answers are in no prompt: some become what the model said, so that there are right ones to count.
    problems, said = read_lines(data / "test.jsonl"), read_lines(tmp_path / "ours" / "samples-few-shot.jsonl")
    for index, (problem, sample) in enumerate(zip(problems, said, strict=True)):
        key = list(FILTERS)[index % 2]
        if index % 3 and sample["scores"][key]["prediction"] != INVALID:
            problem["answer"] = f"Ben has 1.\n#### {sample['scores'][key]['prediction']}"
    answered = tmp_path / "data"
    answered.mkdir()
    write_lines(answered / "test.jsonl", problems)
    (answered / "train.jsonl").write_bytes((data / "train.jsonl").read_bytes())
    settings.data = str(answered)

    result = evaluate(settings, overwrite=True, quiet=True)
    samples = read_lines(tmp_path / "ours" / "samples-few-shot.jsonl")
    found = theirs(*load_model(str(model), routing, "float32"), answered, tmp_path)

    assert found["configs"]["gsm8k_local"]["metadata"]["version"] == 3.0
    for key, name in FILTERS.items():
        logged = {one["doc_id"]: one for one in found["samples"]["gsm8k_local"] if one["filter"] == name}
        assert len(logged) == len(samples) == len(problems)
        for sample in samples:
            one = logged[sample["index"]]
            assert one["arguments"][0][0] == sample["prompt"]
            assert one["resps"] == [[sample["output"]]]
            assert one["filtered_resps"] == [sample["scores"][key]["prediction"]]
            assert one["exact_match"] == float(sample["scores"][key]["correct"])
        scores = found["results"]["gsm8k_local"]
        assert result.scores[key].value == scores[f"exact_match,{name}"]
        assert result.scores[key].error == pytest.approx(scores[f"exact_match_stderr,{name}"], rel=1e-12)

    # Nothing of this holds because nothing happened: every rule had something to do.
    outputs = [sample["output"] for sample in samples]
    predictions = [sample["scores"][key]["prediction"] for sample in samples for key in FILTERS]
    assert 0 < result.scores["a.strict_match"].value < 1
    assert 0 < result.scores["a.flexible_extract"].value < 1
    assert INVALID in predictions
    assert min(map(len, outputs)) < 20 < max(map(len, outputs))
    assert len(set(outputs)) > len(outputs) // 2
    _, tokenizer = load_model(str(model), routing, "float32")
    lengths = [len(tokenizer(sample["prompt"])["input_ids"]) for sample in samples]
    assert min(lengths) < ROOM < max(lengths)
