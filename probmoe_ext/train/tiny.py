"""The built-in models: OLMoEs of random parameters, with a tokenizer trained on the training text.

Both are ordinary Hugging Face objects: what `save_pretrained` writes, `AutoModelForCausalLM` and `AutoTokenizer` read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

TINY_OLMOE, SMALL_OLMOE = "tiny-olmoe", "small-olmoe"
TINY_EXPERTS, TINY_ACTIVE = 16, 4


@dataclass(frozen=True)
class Size:
    """The size of a built-in model.

    Attributes:
        layers: decoder layers, each with attention and experts.
        width: of the hidden states.
        experts: in a layer.
        active: experts that a token uses.
        expert_width: hidden units of an expert.
    """

    layers: int
    width: int
    experts: int
    active: int
    expert_width: int


BUILT_IN = {
    TINY_OLMOE: Size(2, 64, TINY_EXPERTS, TINY_ACTIVE, 128),
    SMALL_OLMOE: Size(4, 128, 48, 8, 128),
}
"""0.9 M parameters, and 10 M of which a token uses 2 M."""

PAD, EOS = "<|pad|>", "<|endoftext|>"

# Words keep the space before them; "####" is one piece; digits stand alone, so that a model of this size can learn to
# calculate.
_PIECES = r" ?\p{L}+|\p{N}|\n+|#+| ?[^\s\p{L}\p{N}]|\s"


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024, max_length: int = 2048) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose digits are single tokens.

    Args:
        texts: the training text; any text can be encoded afterwards (bytes are the fallback).
        vocab_size: largest vocabulary, special tokens and the 256 bytes included.
        max_length: recorded as the tokenizer's `model_max_length`.

    Returns:
        A tokenizer with pad and eos tokens, padding on the left.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def tiny_config(tokenizer: PreTrainedTokenizerFast, size: Size) -> OlmoeConfig:
    """The configuration of a model of this size."""
    return OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=size.expert_width,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_experts=size.experts,
        num_experts_per_tok=size.active,
        max_position_embeddings=2048,
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


def build_tiny(
    texts: Iterable[str], seed: int, size: Size = BUILT_IN[TINY_OLMOE]
) -> tuple[OlmoeForCausalLM, PreTrainedTokenizerFast]:
    """Build a model of random weights for a training text.

    Args:
        texts: what the tokenizer is trained on.
        seed: seeds torch's generator for the random weights.
        size: of the model.

    Returns:
        The float32 model and its tokenizer.
    """
    tokenizer = train_tokenizer(texts)
    torch.manual_seed(seed)
    return OlmoeForCausalLM(tiny_config(tokenizer, size)), tokenizer
