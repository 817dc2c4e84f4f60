"""Tokenizer and encoding: the loss sees the answer and the end of the text, nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from probmoe_ext.train.data import Example, load_examples
from probmoe_ext.train.encode import IGNORED, PadRight, encode
from probmoe_ext.train.errors import UsageError
from probmoe_ext.train.protocols import prompt_b
from probmoe_ext.train.tiny import build_tiny, train_tokenizer

EXAMPLES = load_examples("builtin:1", "test")[:50]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(f"{prompt_b(one.question)} {one.answer}" for one in EXAMPLES)


def test_digits_are_single_tokens_and_any_text_survives(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("12+7=19\n#### 19")[-2:] == ["1", "9"]
    for text in ("1,234.5 is ½ of $2469 — naïve 你好 🙂\n\n####  7\t", EXAMPLES[0].answer):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_mask_covers_exactly_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(EXAMPLES, tokenizer, prompt_b, 512)
    assert (len(encoded.rows), encoded.shortened, encoded.dropped) == (50, 0, 0)
    for example, row in zip(EXAMPLES, encoded.rows, strict=True):
        prompt = tokenizer(prompt_b(example.question))["input_ids"]
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"][: len(prompt)] == [IGNORED] * len(prompt)
        learned = row["labels"][len(prompt) :]
        assert learned == row["input_ids"][len(prompt) :]
        assert learned[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(learned[:-1]) == f" {example.answer}"


def test_length_limit(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [Example("How many?", "1 " * 50 + "\n#### 1"), Example("many " * 100, "#### 1"), Example("1?", "1")]
    encoded = encode(examples, tokenizer, prompt_b, 60)
    assert (len(encoded.rows), encoded.shortened, encoded.dropped) == (2, 1, 1)
    assert len(encoded.rows[0]["input_ids"]) == len(encoded.rows[0]["labels"]) == 60
    with pytest.raises(UsageError, match="max_length=3"):
        encode(examples, tokenizer, prompt_b, 3)


def test_a_tokenizer_without_end_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UsageError, match="end-of-text"):
        encode(EXAMPLES, endless, prompt_b, 512)


def test_collator() -> None:
    batch = PadRight(0)([{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch["labels"].dtype == torch.int64


def test_tiny_olmoe_is_an_ordinary_model_folder(tmp_path: Path) -> None:
    text = [f"{prompt_b(one.question)} {one.answer}" for one in EXAMPLES]
    model, tokenizer = build_tiny(text, seed=1)
    assert 0.8e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.0e6
    assert (model.config.num_hidden_layers, model.config.num_experts, model.config.num_experts_per_tok) == (2, 16, 4)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, words = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert words(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (words.pad_token_id, words.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    same, other = build_tiny(text, seed=1)[0], build_tiny(text, seed=2)[0]
    assert torch.equal(same.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)
