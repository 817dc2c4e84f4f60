"""Examples as token sequences: prompt and completion in one text, the loss on the completion only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from probmoe_ext.train.data import Example
from probmoe_ext.train.errors import UsageError

IGNORED = -100
"""The label that transformers' losses leave out."""


@dataclass(frozen=True)
class Encoded:
    """Token sequences ready for training.

    Attributes:
        rows: dictionaries of ``input_ids`` and ``labels``, equally long; the label is `IGNORED` on the prompt.
        shortened: how many completions lost their end to the length limit.
        dropped: how many examples were left out since their prompt alone reaches the limit.
    """

    rows: list[dict[str, list[int]]]
    shortened: int
    dropped: int


def encode(examples: Sequence[Example], tokenizer: Any, prompt: Callable[[str], str], max_length: int) -> Encoded:
    """Tokenize prompt, a space, the answer, and the end-of-text token.

    Prompt and answer are tokenized as one text, so that the tokens are those which generation from the prompt meets. A
    token belongs to the completion if it reaches beyond the prompt's last character.

    Args:
        examples: what to encode.
        tokenizer: a fast Hugging Face tokenizer with an end-of-text token.
        prompt: makes the prompt from the question.
        max_length: longest sequence in tokens.

    Raises:
        UsageError: the tokenizer has no end-of-text token or no offsets, or every example was dropped.
    """
    if tokenizer.eos_token_id is None:
        raise UsageError("the tokenizer of --model has no end-of-text token; training needs one")
    if not tokenizer.is_fast:
        raise UsageError("the tokenizer of --model is not a fast one (tokenizers library); training needs its offsets")
    prompts = [prompt(example.question) for example in examples]
    texts = [f"{start} {example.answer}" for start, example in zip(prompts, examples, strict=True)]
    batch = tokenizer(texts, return_offsets_mapping=True) if texts else {"input_ids": [], "offset_mapping": []}
    rows, shortened, dropped = [], 0, 0
    for start, tokens, offsets in zip(prompts, batch["input_ids"], batch["offset_mapping"], strict=True):
        if tokens[-1] == tokenizer.eos_token_id:
            tokens, offsets = tokens[:-1], offsets[:-1]
        labels = [token if end > len(start) else IGNORED for token, (_, end) in zip(tokens, offsets, strict=True)]
        tokens, labels = [*tokens, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
        if all(label == IGNORED for label in labels[:max_length]):
            dropped += 1
            continue
        shortened += len(tokens) > max_length
        rows.append({"input_ids": tokens[:max_length], "labels": labels[:max_length]})
    if texts and not rows:
        raise UsageError(f"no example has a prompt shorter than max_length={max_length} tokens; set a larger one")
    return Encoded(rows, shortened, dropped)


class PadRight:
    """Collator: sequences padded on the right to the longest of the batch, with the attention mask."""

    def __init__(self, pad_token_id: int) -> None:
        """Remember the token to pad with; it is masked in attention and in the loss."""
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Make int64 tensors ``input_ids``, ``attention_mask`` and ``labels``, each ``[rows, longest]``."""
        longest = max(len(row["input_ids"]) for row in rows)

        def stack(filled: Callable[[dict[str, list[int]]], list[int]], filler: int) -> torch.Tensor:
            padded = [filled(row) + [filler] * (longest - len(row["input_ids"])) for row in rows]
            return torch.tensor(padded, dtype=torch.int64)

        return {
            "input_ids": stack(lambda row: row["input_ids"], self.pad_token_id),
            "attention_mask": stack(lambda row: [1] * len(row["input_ids"]), 0),
            "labels": stack(lambda row: row["labels"], IGNORED),
        }


def pad_token(tokenizer: Any) -> int:
    """The token to pad with: the tokenizer's own, else end-of-text."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
