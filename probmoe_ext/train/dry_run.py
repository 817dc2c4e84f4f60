"""What a training or an evaluation would do: everything is checked, no weights are loaded, nothing is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

from probmoe_ext.train.arguments import optimizer_steps, peak_rate
from probmoe_ext.train.beginning import tokenizer_text
from probmoe_ext.train.checkpoints import last_checkpoint
from probmoe_ext.train.data import load_examples, split_holdout
from probmoe_ext.train.encode import encode
from probmoe_ext.train.evaluation import prepare
from probmoe_ext.train.finetune import check_request
from probmoe_ext.train.generate import prompt_tokens
from probmoe_ext.train.models import Routing, check_routing, load_config_of, pick_device
from probmoe_ext.train.options import EvalConfig, TrainConfig
from probmoe_ext.train.protocols import PROMPTS
from probmoe_ext.train.tiny import BUILT_IN, tiny_config, train_tokenizer


def plan_training(config: TrainConfig, *, resume: bool = False, overwrite: bool = False) -> str:
    """Describe a training.

    Args:
        config: the settings.
        resume: as for `finetune`.
        overwrite: as for `finetune`.

    Raises:
        UsageError: what `finetune` would refuse.
    """
    check_request(config, resume=resume, overwrite=overwrite)
    device, routing = pick_device(config.device), Routing(config.router, config.k, config.router_options)
    training, heldout = split_holdout(load_examples(config.data, "train"), config.holdout)
    training = training[: config.limit]
    if config.model in BUILT_IN:
        tokenizer: Any = train_tokenizer(tokenizer_text(config, training))
        model = tiny_config(tokenizer, BUILT_IN[config.model])
    else:
        model, tokenizer = load_config_of(config.model), AutoTokenizer.from_pretrained(config.model)
    parameters = check_routing(model, routing)
    encoded = encode(training, tokenizer, PROMPTS[config.prompt], config.max_length)
    lengths = [len(row["input_ids"]) for row in encoded.rows]
    steps, batch = optimizer_steps(config, len(lengths)), config.total_batch or config.batch_size
    checkpoint = last_checkpoint(config.folder) if resume else None
    state = f"goes on behind {checkpoint.name}" if checkpoint else "replaced" if config.folder.exists() else "new"
    return _lines(
        ("model", f"{config.model}, {parameters:,} parameters in {config.dtype}, on {device}"),
        ("routing", _routing(routing)),
        ("data", f"{config.data}: {len(lengths):,} problems, {len(heldout):,} held out"),
        ("tokens", f"{_tokens(lengths)}; {encoded.shortened} cut, {encoded.dropped} left out"),
        ("steps", f"{steps:,} of {batch} problems, {steps * batch / len(lengths):.2f} epochs"),
        (
            "rate",
            f"{peak_rate(config):g}, {config.schedule}, rising over {math.ceil(steps * config.warmup)} steps",
        ),
        ("folder", f"{config.folder} ({state})"),
    )


def plan_evaluation(config: EvalConfig, *, overwrite: bool = False) -> str:
    """Describe an evaluation.

    Args:
        config: the settings.
        overwrite: as for `evaluate`.

    Raises:
        UsageError: what `evaluate` would refuse.
    """
    task, model = prepare(config, overwrite=overwrite), load_config_of(config.model)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    parameters = check_routing(model, task.routing)
    prompts = []
    for one in task.passes:
        lengths = [len(ids) for ids in prompt_tokens(model, tokenizer, one.prompts, one.max_new_tokens)]
        done = 0 if overwrite else len(task.outputs(one))
        letters = ", ".join(dict.fromkeys(key[0].upper() for key in one.keys))
        prompts.append(
            (
                one.generation.name,
                f"{len(lengths):,} prompts for protocol {letters}, {done:,} of them done; {_tokens(lengths)}; "
                f"at most {one.max_new_tokens} new ones each",
            )
        )
    return _lines(
        ("model", f"{config.model}, {parameters:,} parameters in {task.dtype}, on {task.device}"),
        ("routing", _routing(task.routing)),
        ("data", f"{task.source}: {len(task.problems):,} test problems, {config.batch_size} at once"),
        *prompts,
        ("folder", f"{task.folder} ({'exists' if task.folder.exists() else 'new'})"),
    )


def _routing(routing: Routing) -> str:
    options = "".join(f", {name}={value}" for name, value in routing.options.items())
    return f"{routing}{options}{'' if routing.k else ', the number of experts of the model'}"


def _tokens(lengths: Sequence[int]) -> str:
    return f"{sum(lengths):,} tokens, the longest {max(lengths):,}"


def _lines(*rows: tuple[str, str]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)
