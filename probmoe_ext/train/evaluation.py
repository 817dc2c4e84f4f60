"""What an evaluation is going to do: model, routing, problems and prompts, checked before weights are loaded."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from probmoe_ext.files import check_writable, read_lines
from probmoe_ext.train.data import Example, load_examples
from probmoe_ext.train.errors import UsageError
from probmoe_ext.train.models import Routing, check_k, check_router, load_config_of, pick_device, read_routing
from probmoe_ext.train.options import EvalConfig
from probmoe_ext.train.protocols import FEW_SHOT, ZERO_SHOT, Generation, few_shot_prompts, prompt_b
from probmoe_ext.train.scoring import SCORERS
from probmoe_ext.train.tiny import BUILT_IN

SETTINGS_FILE, SCORES_FILE = "eval_config.json", "scores.json"


@dataclass(frozen=True)
class Pass:
    """One generation over all problems.

    Attributes:
        generation: how outputs are generated and cut.
        keys: the scores that are read from them, of `scoring.SCORERS`.
        prompts: one for each problem.
        max_new_tokens: length of the longest output.
    """

    generation: Generation
    keys: list[str]
    prompts: list[str]
    max_new_tokens: int


@dataclass(frozen=True)
class Evaluation:
    """A checked request.

    Attributes:
        folder: for samples and scores.
        routing: the router to evaluate with.
        source: where the problems come from.
        problems: of the test split, in order.
        passes: what is generated.
        device: where.
        dtype: of the weights.
        fingerprint: what samples depend on; samples with another one are not mixed in.
    """

    folder: Path
    routing: Routing
    source: str
    problems: list[Example]
    passes: list[Pass]
    device: torch.device
    dtype: str
    fingerprint: dict[str, Any]

    def samples(self, one: Pass) -> Path:
        """The file with the outputs of a pass."""
        return self.folder / f"samples-{one.generation.name}.jsonl"

    def outputs(self, one: Pass) -> dict[int, str]:
        """The outputs of a pass that an earlier call has generated, by problem."""
        return {sample["index"]: sample["output"] for sample in read_lines(self.samples(one))}


def prepare(config: EvalConfig, *, overwrite: bool = False) -> Evaluation:
    """Check a request and build its prompts; nothing is written.

    Args:
        config: the settings.
        overwrite: samples of another evaluation in the folder are to be deleted.

    Raises:
        UsageError: the model, the data or the settings; or the folder holds samples of another evaluation.
    """
    if config.model in BUILT_IN:
        raise UsageError(f"--model {config.model} has random weights; train it, then give the folder of its run")
    model = load_config_of(config.model)
    routing = _routing(config)
    check_router(routing.router)
    check_k(model, routing.k)
    source = config.data or _trained_on(Path(config.model)) or "builtin"
    problems = load_examples(source, "test")[: config.limit]
    device = pick_device(config.device)
    dtype = config.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    fingerprint = _fingerprint(config, routing, source, dtype)
    _check_folder(config.folder, fingerprint, overwrite)
    passes = _passes(config, source, problems)
    return Evaluation(config.folder, routing, source, problems, passes, device, dtype, fingerprint)


def _routing(config: EvalConfig) -> Routing:
    trained = read_routing(Path(config.model)) if Path(config.model).is_dir() else Routing()
    if config.router is not None and config.router != trained.router:
        return Routing(config.router, config.k)
    return dataclasses.replace(trained, k=trained.k if config.k is None else config.k)


def _trained_on(model: Path) -> str | None:
    for folder in (model, model.parent):
        path = folder / "train_config.json"
        if path.is_file():
            data: str | None = _read_json(path).get("data")
            return data
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UsageError(f"{path} is damaged: delete it, or write it anew")
    return content


def _fingerprint(config: EvalConfig, routing: Routing, source: str, dtype: str) -> dict[str, Any]:
    weights = sorted(Path(config.model).glob("*.safetensors")) if Path(config.model).is_dir() else []
    return {
        "model": config.model,
        "weights": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in weights],
        "routing": str(routing),
        "options": routing.options,
        "data": source,
        "dtype": dtype,
        "limit": config.limit,
        "max_new_tokens": config.max_new_tokens,
    }


def _check_folder(folder: Path, fingerprint: dict[str, Any], overwrite: bool) -> None:
    path = folder / SETTINGS_FILE
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {str(folder)!r} is a file; give a folder")
    if not overwrite and path.is_file() and (before := _read_json(path)) != fingerprint:
        changed = ", ".join(name for name in fingerprint if before.get(name) != fingerprint[name])
        raise UsageError(f"{folder} holds samples with another {changed}: use --overwrite or another --output")
    check_writable(folder)


def _passes(config: EvalConfig, source: str, problems: list[Example]) -> list[Pass]:
    passes = []
    for generation, letters in ((FEW_SHOT, "a"), (ZERO_SHOT, "bc")):
        keys = [key for key in SCORERS if key[0] in letters and key[0] in config.protocols]
        if not keys:
            continue
        if generation is FEW_SHOT:
            prompts = list(few_shot_prompts(problems, _shots(source)))
        else:
            prompts = [prompt_b(problem.question) for problem in problems]
        passes.append(Pass(generation, keys, prompts, config.max_new_tokens or generation.max_new_tokens))
    return passes


def _shots(source: str) -> list[Example]:
    if Path(source).is_file():
        raise UsageError("protocol a takes its shots from a train split: give --data a folder, or use --protocols b,c")
    return load_examples(source, "train")
