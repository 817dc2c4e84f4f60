"""Greedy generation in batches: prompts padded on the left, outputs cut at the protocol's stop strings."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from probmoe_ext.train.encode import pad_token
from probmoe_ext.train.errors import UsageError
from probmoe_ext.train.protocols import cut


def prompt_tokens(config: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
    """Tokenize prompts; one that does not fit into the model's positions beside the output loses its beginning.

    Args:
        config: the model's configuration.
        tokenizer: the model's tokenizer.
        prompts: any number.
        max_new_tokens: length of the longest output.

    Raises:
        UsageError: `max_new_tokens` leaves no room for a prompt.
    """
    positions = getattr(config, "max_position_embeddings", None)
    room = positions - max_new_tokens if positions else None
    if room is not None and room < 1:
        raise UsageError(f"max_new_tokens={max_new_tokens} leaves no room for a prompt in {positions} positions")
    return [ids[-room:] if room else ids for ids in tokenizer(list(prompts))["input_ids"]] if prompts else []


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, the longest first, so that running out of memory comes at once."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def generate_outputs(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Sequence[str],
    batch_size: int,
    done: Collection[int] = (),
) -> Iterator[tuple[int, str]]:
    """Generate greedily, in the batches of `batches_by_length`.

    Which prompts share a batch depends on the prompts alone, not on `done`: what is generated after an interruption is
    what would have been generated without it, to the last bit.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        prompts: any number.
        max_new_tokens: length of the longest output.
        stop: strings at which an output ends.
        batch_size: prompts generated at once.
        done: indices of prompts that have their output; a batch without another one is passed over.

    Yields:
        The index of a prompt and its output, without stop string and special tokens, batch by batch.

    Raises:
        UsageError: `max_new_tokens` leaves no room for a prompt.
    """
    tokens = prompt_tokens(model.config, tokenizer, prompts, max_new_tokens)
    ends = _end_tokens(model, tokenizer)
    filler = pad_token(tokenizer)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=filler,
        eos_token_id=sorted(ends) or None,
        stop_strings=list(stop),
    )
    for batch in batches_by_length([len(ids) for ids in tokens], batch_size):
        if all(index in done for index in batch):
            continue
        longest = len(tokens[batch[0]])
        padded = torch.tensor([[filler] * (longest - len(tokens[index])) + tokens[index] for index in batch])
        mask = torch.tensor([[0] * (longest - len(tokens[index])) + [1] * len(tokens[index]) for index in batch])
        with torch.inference_mode():
            generated = model.generate(
                input_ids=padded.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=settings,
                tokenizer=tokenizer,
            )
        for index, row in zip(batch, generated[:, longest:].tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            yield index, cut(tokenizer.decode(row[:end], skip_special_tokens=True), stop)


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = set(own if isinstance(own, list) else [own]) | {tokenizer.eos_token_id}
    return {int(token) for token in ends if token is not None}
