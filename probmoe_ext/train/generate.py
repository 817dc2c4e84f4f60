"""Greedy generation in batches: prompts padded on the left, outputs cut at the protocol's stop strings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from probmoe_ext.train.encode import pad_token
from probmoe_ext.train.errors import UsageError
from probmoe_ext.train.protocols import cut


def generate_outputs(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Sequence[str],
    batch_size: int,
) -> Iterator[tuple[int, str]]:
    """Generate greedily, the longest prompts first (an out-of-memory error comes at once).

    A prompt that does not fit into the model's positions beside `max_new_tokens` loses its beginning.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        prompts: any number.
        max_new_tokens: length of the longest output.
        stop: strings at which an output ends.
        batch_size: prompts generated at once.

    Yields:
        The index of a prompt and its output, without stop string and special tokens, batch by batch.

    Raises:
        UsageError: `max_new_tokens` leaves no room for a prompt.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    room = positions - max_new_tokens if positions else None
    if room is not None and room < 1:
        raise UsageError(f"max_new_tokens={max_new_tokens} leaves no room for a prompt in {positions} positions")
    tokens = [ids[-room:] if room else ids for ids in tokenizer(list(prompts))["input_ids"]] if prompts else []
    ends = _end_tokens(model, tokenizer)
    filler = pad_token(tokenizer)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=filler, eos_token_id=sorted(ends) or None
    )
    order = sorted(range(len(tokens)), key=lambda index: (-len(tokens[index]), index))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = len(tokens[batch[0]])
        padded = torch.tensor([[filler] * (longest - len(tokens[index])) + tokens[index] for index in batch])
        mask = torch.tensor([[0] * (longest - len(tokens[index])) + [1] * len(tokens[index]) for index in batch])
        with torch.inference_mode():
            generated = model.generate(
                input_ids=padded.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=settings,
                stop_strings=list(stop),
                tokenizer=tokenizer,
            )
        for index, row in zip(batch, generated[:, longest:].tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            yield index, cut(tokenizer.decode(row[:end], skip_special_tokens=True), stop)


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = set(own if isinstance(own, list) else [own]) | {tokenizer.eos_token_id}
    return {int(token) for token in ends if token is not None}
