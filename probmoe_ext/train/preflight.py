"""What can be wrong with a comparison, found before anything is run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from probmoe_ext.files import read_json
from probmoe_ext.routers import make_router, router_options
from probmoe_ext.train.arguments import accumulation_of
from probmoe_ext.train.comparison import COMPARE_FILE, Comparison, Run
from probmoe_ext.train.data import load_examples
from probmoe_ext.train.errors import UsageError, nearest
from probmoe_ext.train.finetune import CONFIG_FILE
from probmoe_ext.train.models import check_model, check_router, experts_of, load_config_of
from probmoe_ext.train.options import TrainConfig
from probmoe_ext.train.tiny import BUILT_IN


def check(comparison: Comparison) -> None:
    """Look at everything that can be wrong before anything is run.

    Raises:
        UsageError: an unknown router or option, k over the number of experts, data or a model that is not there.
    """
    for one in comparison.contestants:
        try:
            check_router(one.train.router)
            beginning = comparison.start.model if comparison.start is not None else one.train.model
            _check_size(beginning, one.train)
        except UsageError as error:
            raise UsageError(f"{one.label}: {error}") from error
    for config in ([comparison.start] if comparison.start else []) + [one.train for one in comparison.contestants]:
        accumulation_of(config)
    for data in {one.train.data for one in comparison.contestants}:
        load_examples(data, "train")
    load_examples(str(comparison.evaluation.data), "test")


def _check_size(model: str, config: TrainConfig) -> None:
    if model in BUILT_IN:
        size = BUILT_IN[model]
        experts, active, width = size.experts, size.active, size.width
    else:
        check_model(model)
        found = load_config_of(model)
        held = experts_of(found)
        if held is None:
            raise UsageError(f"--model {model!r} has no experts to route to")
        experts, active, width = *held, found.get_text_config().hidden_size
    largest = config.k if isinstance(config.k, int) or config.k is None else config.k[1]
    if largest is not None and largest > experts:
        raise UsageError(f"k={largest} is more than the {experts} experts of {model}; choose at most {experts}")
    options = dict(config.router_options)
    if "hidden_size" in router_options(config.router):
        options.setdefault("hidden_size", width)
    try:
        make_router(config.router, num_experts=experts, k=config.k or active, **options)
    except (ValueError, TypeError) as error:
        raise UsageError(" ".join(str(error).split())) from error


def chosen_runs(comparison: Comparison, only: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """The runs of a comparison that are asked for: all, or those of some labels and seeds.

    Raises:
        UsageError: a label or a seed that the comparison does not have.
    """
    labels = [one.label for one in comparison.contestants]
    for label in only:
        if label not in labels:
            hint = nearest(label, labels) or f"; known: {', '.join(labels)}"
            raise UsageError(f"--only {label!r} is no label of the file{hint}")
    for seed in seeds:
        if seed not in comparison.seeds:
            raise UsageError(f"--seeds {seed} is not among {', '.join(map(str, comparison.seeds))}; add it to the file")
    return [
        run
        for run in comparison.runs()
        if (not only or run.contestant.label in only) and (not seeds or run.train.seed in seeds)
    ]


def check_earlier(comparison: Comparison) -> None:
    """Refuse to mix: all that an earlier call has set stands, but routers and seeds may be added.

    Raises:
        UsageError: the folder holds runs with other settings; the message names what changed.
    """
    earlier = (read_json(comparison.folder / COMPARE_FILE) or {}).get("config")
    if earlier is None or not any(comparison.folder.glob(f"*/**/{CONFIG_FILE}")):
        return
    now = comparison.resolved
    changed = [f"seed {seed} is gone" for seed in earlier["seeds"] if seed not in now["seeds"]]
    changed += [f"router {label!r} is gone" for label in earlier["routers"] if label not in now["routers"]]
    before, after = _flat({**earlier, "seeds": 0}), _flat({**now, "seeds": 0})
    # A setting that a later version has brought is no change.
    changed += [
        f"{name} is {after[name]!r}, was {value!r}"
        for name, value in before.items()
        if name in after and after[name] != value
    ]
    if changed:
        raise UsageError(
            f"{comparison.folder} holds this comparison with other settings: {'; '.join(changed)}. "
            "Use another --output, or put them back (routers and seeds may be added; --only and --seeds run a part)"
        )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {key: one for part in value for key, one in _flat(value[part], f"{name}.{part}".lstrip(".")).items()}
