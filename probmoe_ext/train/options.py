"""Settings of a training and of an evaluation: dataclasses read from YAML or JSON, with single values on top.

Imports neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from probmoe_ext.train.errors import UsageError, nearest

ExpertsPerToken = int | tuple[int, int]
SCHEDULES = ("linear", "cosine", "constant")
PROTOCOLS = ("a", "b", "c")
DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")


def parse_k(value: object) -> ExpertsPerToken | None:
    """Read the number of active experts.

    Args:
        value: None (the model's own), an int, a pair, or text: ``"4"`` (exactly 4), ``"2,4"`` (a band).

    Returns:
        An int, a pair ``(k_min, k_max)``, or None.

    Raises:
        UsageError: anything else.
    """
    if value is None:
        return None
    parts: list[Any] = [value]
    if isinstance(value, str):
        parts = value.split(",")
    elif isinstance(value, list | tuple):
        parts = list(value)
    try:
        numbers = [int(part) for part in parts if not isinstance(part, bool | float)]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != len(parts) or len(numbers) not in (1, 2):
        raise UsageError(f"--k must be a number (4) or a band (2,4), got {value!r}")
    if numbers[0] < 0 or numbers[-1] < max(1, numbers[0]):
        raise UsageError(f"--k must be at least 1, and a band must rise, got {value!r}")
    return numbers[0] if numbers[0] == numbers[-1] else (numbers[0], numbers[1])


@dataclass
class TrainConfig:
    """Settings of one fine-tuning run.

    Attributes:
        model: a hub name, a local folder (an earlier run too), or ``tiny-olmoe`` or ``small-olmoe``.
        router: name of the router; ``topk`` is the conventional one.
        k: active experts a token, an int or a band ``(k_min, k_max)``; None keeps the model's number.
        router_options: further options of the router.
        data: ``builtin``, ``builtin:1,2`` (steps), ``builtin:1/travel`` (one theme), a folder with train.jsonl and
            test.jsonl, a JSONL file, or a hub data set such as ``openai/gsm8k``.
        tokenizer_data: text for the tokenizer of a built-in model; None is `data`.
        prompt: protocol whose zero-shot prompt is trained: ``a`` or ``b``.
        output: folder of the run; by default ``runs/`` and the names of model, router and k.
        holdout: training examples kept aside for the held-out loss (and for `select`).
        limit: use only so many training examples.
        epochs: passes over the data, if `max_steps` is None.
        max_steps: optimizer steps.
        learning_rate: peak rate; None is 1e-6 (OLMoE in the papers), and 3e-3 for a built-in model.
        schedule: ``linear``, ``cosine`` or ``constant``.
        warmup: share of the steps over which the rate rises.
        weight_decay: of AdamW.
        adam_beta2: decay of AdamW's second moments.
        optimizer: ``adamw_torch``, ``adafactor``, ``adamw_bnb_8bit`` (needs bitsandbytes), or another of transformers.
        max_grad_norm: the gradient's norm is cut here.
        batch_size: examples in one forward pass on each device.
        total_batch: examples in one optimizer step, over all devices; None is `batch_size` on each. Reached by
            accumulating gradients.
        max_length: longest example in tokens; longer ones are cut at the end, and counted.
        aux_loss: weight of the model's own load-balancing loss; None leaves the model's configuration as it is.
        gradient_checkpointing: recompute activations in the backward pass.
        dtype: of the weights while they are trained.
        autocast: compute in bfloat16 where it is safe, beside float32 weights; None does so on a GPU.
        device: ``auto``, ``cpu`` or ``cuda``.
        experts: how transformers evaluates experts (``eager``, ``grouped_mm``); None leaves its choice.
        lora_rank: train adapters of this rank on attention and experts, and the routers whole; None trains all weights.
        lora_alpha: the adapters are scaled by it divided by their rank; None is twice the rank.
        seed: seeds the initial weights of a built-in model, the order of the data and the routing.
        log_steps: steps between two lines of metrics.
        monitor: count the routing of every so-manieth forward pass into ``routing.jsonl``; 0 counts none.
        save_steps: steps between two checkpoints; None saves at the end of each epoch.
        keep: how many checkpoints stay on disk.
        select: ``last`` keeps the final weights, ``best`` those with the lowest held-out loss at a checkpoint.
    """

    model: str = "tiny-olmoe"
    router: str = "topk"
    k: ExpertsPerToken | None = None
    router_options: dict[str, Any] = field(default_factory=dict)
    data: str = "builtin"
    tokenizer_data: str | None = None
    prompt: str = "b"
    output: str | None = None
    holdout: int = 200
    limit: int | None = None
    epochs: float = 4
    max_steps: int | None = None
    learning_rate: float | None = None
    schedule: str = "linear"
    warmup: float = 0.03
    weight_decay: float = 0.0
    adam_beta2: float = 0.999
    optimizer: str = "adamw_torch"
    max_grad_norm: float = 1.0
    batch_size: int = 32
    total_batch: int | None = None
    max_length: int = 1024
    aux_loss: float | None = None
    gradient_checkpointing: bool = False
    dtype: str = "float32"
    autocast: bool | None = None
    device: str = "auto"
    experts: str | None = None
    lora_rank: int | None = None
    lora_alpha: int | None = None
    seed: int = 42
    log_steps: int = 10
    monitor: int = 0
    save_steps: int | None = None
    keep: int = 2
    select: str = "last"

    def __post_init__(self) -> None:
        self.k = parse_k(self.k)
        _one_of(self, "schedule", SCHEDULES)
        _one_of(self, "prompt", ("a", "b"))
        _one_of(self, "dtype", DTYPES)
        _one_of(self, "device", DEVICES)
        _one_of(self, "select", ("last", "best"))
        _at_least(self, 1, "limit", "max_steps", "batch_size", "total_batch", "max_length", "log_steps", "save_steps")
        _at_least(self, 1, "keep", "lora_rank")
        _at_least(self, 0, "holdout", "warmup", "weight_decay", "aux_loss", "seed", "monitor")
        if self.epochs <= 0:
            raise UsageError(f"epochs must be above 0, got {self.epochs}")
        if not 0 < self.adam_beta2 < 1:
            raise UsageError(f"adam_beta2 must be between 0 and 1, got {self.adam_beta2}")
        if self.warmup > 1:
            raise UsageError(f"warmup is a share of the steps, from 0 to 1, got {self.warmup}")
        if self.total_batch is not None and self.total_batch % self.batch_size:
            raise UsageError(f"total_batch={self.total_batch} must be a multiple of batch_size={self.batch_size}")
        if self.select == "best" and not self.holdout:
            raise UsageError("select=best needs a held-out slice: set holdout above 0")
        if self.select == "best" and self.lora_rank:
            raise UsageError("select=best keeps whole checkpoints, and those of LoRA hold adapters: use select=last")
        if self.lora_alpha is not None and not self.lora_rank:
            raise UsageError("lora_alpha scales adapters: set lora_rank, too")

    @property
    def name(self) -> str:
        """A folder name made from model, router and k."""
        k = "" if self.k is None else f"-k{self.k}" if isinstance(self.k, int) else f"-k{self.k[0]}-{self.k[1]}"
        return f"{Path(self.model).name}-{self.router}{k}"

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.output) if self.output else Path("runs") / self.name


@dataclass
class EvalConfig:
    """Settings of one evaluation.

    Attributes:
        model: a folder that `probmoe train` wrote, any local model folder, or a hub name.
        router: as in `TrainConfig`; None is what the run was trained with (the model's own for other models).
        k: as in `TrainConfig`; None is what the run was trained with.
        data: as in `TrainConfig`; None is what the run was trained with, else ``builtin``.
        protocols: which of ``a`` (lm-eval, 5 shots), ``b`` (open-instruct) and ``c`` (numeric).
        limit: only the first so many test problems.
        batch_size: prompts generated at once.
        max_new_tokens: in place of the protocol's own limit.
        output: folder for samples and scores; by default ``eval`` in the run, else ``runs/eval-<model>``.
        dtype: of the weights; None is float32 on a CPU and bfloat16 on a GPU.
        device: as in `TrainConfig`.
        experts: as in `TrainConfig`.
    """

    model: str = "tiny-olmoe"
    router: str | None = None
    k: ExpertsPerToken | None = None
    data: str | None = None
    protocols: tuple[str, ...] = PROTOCOLS
    limit: int | None = None
    batch_size: int = 32
    max_new_tokens: int | None = None
    output: str | None = None
    dtype: str | None = None
    device: str = "auto"
    experts: str | None = None

    def __post_init__(self) -> None:
        self.k = parse_k(self.k)
        asked = self.protocols.split(",") if isinstance(self.protocols, str) else self.protocols
        self.protocols = tuple(name.strip().lower() for name in asked)
        if not self.protocols or not set(self.protocols) <= set(PROTOCOLS):
            raise UsageError(f"protocols must be among {', '.join(PROTOCOLS)}, got {','.join(self.protocols)!r}")
        _one_of(self, "dtype", (None, *DTYPES))
        _one_of(self, "device", DEVICES)
        _at_least(self, 1, "limit", "batch_size", "max_new_tokens")

    @property
    def folder(self) -> Path:
        """The folder for samples and scores."""
        if self.output:
            return Path(self.output)
        model = Path(self.model)
        return model / "eval" if model.is_dir() else Path("runs") / f"eval-{model.name}"


Config = TypeVar("Config", TrainConfig, EvalConfig)


def load_config(kind: type[Config], path: str | None, overrides: dict[str, Any]) -> Config:
    """Read settings from a file and put single values on top.

    Args:
        kind: `TrainConfig` or `EvalConfig`.
        path: a YAML or JSON file with a mapping of the settings' names, or None.
        overrides: settings that win over the file.

    Raises:
        UsageError: a missing or unreadable file, an unknown name, or a value of the wrong kind; the message names it.
    """
    values = {**(read_mapping(Path(path)) if path else {}), **overrides}
    fields = {one.name: one for one in dataclasses.fields(kind)}
    for name, value in values.items():
        if name not in fields:
            place = f" in {path}" if path else ""
            hint = nearest(name, fields) or f"; known: {', '.join(fields)}"
            raise UsageError(f"unknown setting {name!r}{place}{hint}")
        values[name] = _convert(name, value, str(fields[name].type))
    return kind(**values)


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file that holds a mapping; ``-`` in its names becomes ``_``.

    Raises:
        UsageError: the file is missing, damaged or holds something else.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from error
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise UsageError(
            f"{path} is no valid {'JSON' if path.suffix == '.json' else 'YAML'}: {_line(error)}"
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold a mapping of settings, got a {type(content).__name__}")
    return {str(name).replace("-", "_"): value for name, value in content.items()}


def _convert(name: str, value: Any, annotation: str) -> Any:
    if value is None or name in ("k", "protocols"):
        return value
    kinds = [part.strip() for part in annotation.split("|")]
    # YAML reads 1e-6 as text, and a whole number where a float is meant.
    if kinds[0] == "float" and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise UsageError(f"{name} must be a number, got {value!r}") from None
    allowed: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool, "dict[str, Any]": dict}
    expected = allowed[kinds[0]]
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise UsageError(f"{name} must be {kinds[0]}, got {value!r}")
    return value


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _one_of(config: object, name: str, allowed: tuple[str | None, ...]) -> None:
    value = getattr(config, name)
    if value not in allowed:
        raise UsageError(f"{name} must be one of {', '.join(str(one) for one in allowed if one)}, got {value!r}")


def _at_least(config: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}")


def describe(kind: type[TrainConfig] | type[EvalConfig]) -> dict[str, str]:
    """What each setting means: the lines under ``Attributes:`` in the docstring of a settings class, by name."""
    texts: dict[str, str] = {}
    name = ""
    for line in (kind.__doc__ or "").partition("Attributes:")[2].splitlines():
        start = re.match(r"        (\w+): (.*)", line)
        if start:
            name = start[1]
            texts[name] = start[2]
        elif name and line.strip():
            texts[name] += f" {line.strip()}"
    return {name: text.replace("``", "").replace("`", "") for name, text in texts.items()}
