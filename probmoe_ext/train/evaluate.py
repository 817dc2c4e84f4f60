"""Evaluate a model on the test split: generate, score by the three protocols, keep every sample.

Samples are appended to a file as they are generated; the same command again goes on behind the last one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from probmoe_ext.train.data import Example, load_examples
from probmoe_ext.train.errors import UsageError
from probmoe_ext.train.generate import generate_outputs
from probmoe_ext.train.models import Routing, check_model, load_model, pick_device, read_routing
from probmoe_ext.train.options import EvalConfig
from probmoe_ext.train.protocols import FEW_SHOT, PROMPTS, ZERO_SHOT, Generation, few_shot_prompts, prompt_b
from probmoe_ext.train.routing_stats import Statistics, measure
from probmoe_ext.train.scoring import SCORERS, Mean, mean_of
from probmoe_ext.train.tables import markdown_table, number, percent
from probmoe_ext.train.tiny import TINY_OLMOE

SETTINGS_FILE, SCORES_FILE = "eval_config.json", "scores.json"


@dataclass(frozen=True)
class Result:
    """What an evaluation found; also written to ``scores.json``.

    Attributes:
        folder: where samples and scores are.
        routing: router and k, as text.
        scores: mean and standard error by the keys of `scoring.SCORERS`.
        statistics: loss and routing on the same problems, with the zero-shot prompt.
    """

    folder: str
    routing: str
    scores: dict[str, Mean]
    statistics: Statistics

    def table(self) -> str:
        """The scores and the statistics as Markdown tables."""
        scores = [[SCORERS[key][0], percent(mean), str(mean.count)] for key, mean in self.scores.items()]
        found = self.statistics
        facts = [["loss", number(found.loss, 4)]]
        if found.active_experts is not None:
            facts.append(["mean active experts", number(found.active_experts, 3)])
            facts.append(["load entropy (1 is even)", number(found.load_entropy, 4)])
        return "\n\n".join(
            [
                markdown_table(["score", "mean ± s.e.", "problems"], scores),
                markdown_table(["routing", self.routing], facts),
            ]
        )


def evaluate(config: EvalConfig, *, overwrite: bool = False, quiet: bool = False) -> Result:
    """Evaluate a model; go on where an interrupted evaluation with the same settings stopped.

    Args:
        config: the settings.
        overwrite: delete earlier samples in the folder.
        quiet: no progress bar.

    Returns:
        Scores with standard errors, and the statistics of the routing.

    Raises:
        UsageError: the model, the data or the settings; or the folder holds samples of another evaluation.
    """
    if config.model == TINY_OLMOE:
        raise UsageError(f"--model {TINY_OLMOE} has random weights; train it, then give the folder of its run")
    check_model(config.model)
    routing = _routing(config)
    source = config.data or _trained_on(Path(config.model)) or "builtin"
    test = load_examples(source, "test")[: config.limit]
    shots = _shots(source) if "a" in config.protocols else []
    device = pick_device(config.device)
    dtype = config.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    folder = _folder(config)
    fingerprint = _fingerprint(config, routing, source, dtype)
    if not overwrite:
        _check_samples(folder, fingerprint)
    model, tokenizer = load_model(config.model, routing, dtype, config.experts)
    model.to(device).eval()
    _claim(folder, fingerprint, overwrite)

    scores: dict[str, Mean] = {}
    for generation, keys in _passes(config.protocols):
        prompts = (
            list(few_shot_prompts(test, shots)) if generation is FEW_SHOT else [prompt_b(one.question) for one in test]
        )
        samples = _generate(config, model, tokenizer, generation, prompts, test, keys, folder, quiet)
        for key in keys:
            scores[key] = mean_of([float(sample["scores"][key]["correct"]) for sample in samples])
    ordered = {key: scores[key] for key in SCORERS if key in scores}
    result = Result(
        str(folder), str(routing), ordered, measure(model, tokenizer, test, PROMPTS["b"], config.batch_size)
    )
    _write_json(folder / SCORES_FILE, dataclasses.asdict(result))
    return result


def _routing(config: EvalConfig) -> Routing:
    trained = read_routing(Path(config.model)) if Path(config.model).is_dir() else Routing()
    if config.router is not None and config.router != trained.router:
        return Routing(config.router, config.k)
    return dataclasses.replace(trained, k=trained.k if config.k is None else config.k)


def _trained_on(model: Path) -> str | None:
    for folder in (model, model.parent):
        path = folder / "train_config.json"
        if path.is_file():
            data: str | None = json.loads(path.read_text(encoding="utf-8")).get("data")
            return data
    return None


def _shots(source: str) -> list[Example]:
    if Path(source).is_file():
        raise UsageError("protocol a takes its shots from a train split: give --data a folder, or use --protocols b,c")
    return load_examples(source, "train")


def _folder(config: EvalConfig) -> Path:
    if config.output:
        return Path(config.output)
    model = Path(config.model)
    return model / "eval" if model.is_dir() else Path("runs") / f"eval-{model.name}"


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


def _check_samples(folder: Path, fingerprint: dict[str, Any]) -> None:
    path = folder / SETTINGS_FILE
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {str(folder)!r} is a file; give a folder")
    if path.is_file() and (before := json.loads(path.read_text(encoding="utf-8"))) != fingerprint:
        changed = ", ".join(name for name in fingerprint if before.get(name) != fingerprint[name])
        raise UsageError(f"{folder} holds samples with another {changed}: use --overwrite or another --output")


def _claim(folder: Path, fingerprint: dict[str, Any], overwrite: bool) -> None:
    if overwrite:
        for old in (*folder.glob("samples-*.jsonl"), folder / SETTINGS_FILE, folder / SCORES_FILE):
            old.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / SETTINGS_FILE, fingerprint)


def _passes(protocols: Sequence[str]) -> list[tuple[Generation, list[str]]]:
    asked = [(FEW_SHOT, "a"), (ZERO_SHOT, "bc")]
    return [
        (generation, keys)
        for generation, letters in asked
        if (keys := [key for key in SCORERS if key[0] in letters and key[0] in protocols])
    ]


def _generate(
    config: EvalConfig,
    model: Any,
    tokenizer: Any,
    generation: Generation,
    prompts: list[str],
    test: list[Example],
    keys: list[str],
    folder: Path,
    quiet: bool,
) -> list[dict[str, Any]]:
    path = folder / f"samples-{generation.name}.jsonl"
    outputs = _read_outputs(path)
    missing = [index for index in range(len(test)) if index not in outputs]
    bar = tqdm(total=len(test), initial=len(test) - len(missing), desc=f"{generation.name} prompts", disable=quiet)
    generated = generate_outputs(
        model,
        tokenizer,
        [prompts[index] for index in missing],
        max_new_tokens=config.max_new_tokens or generation.max_new_tokens,
        stop=generation.stop,
        batch_size=config.batch_size,
    )
    with path.open("a", encoding="utf-8") as file, bar:
        for place, output in generated:
            outputs[missing[place]] = output
            file.write(json.dumps({"index": missing[place], "output": output}) + "\n")
            file.flush()
            bar.update()
    samples = [
        {
            "index": index,
            "question": example.question,
            "answer": example.answer,
            "prompt": prompts[index],
            "output": outputs[index],
            "scores": {key: dataclasses.asdict(SCORERS[key][1](outputs[index], example.answer)) for key in keys},
        }
        for index, example in enumerate(test)
    ]
    whole = path.with_suffix(".tmp")
    whole.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    whole.replace(path)
    return samples


def _read_outputs(path: Path) -> dict[int, str]:
    outputs: dict[int, str] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                sample = json.loads(line)
            except json.JSONDecodeError:
                # An interrupted write: that problem is generated again.
                continue
            outputs[sample["index"]] = sample["output"]
    return outputs


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
