"""Fine-tune a model with a router on question-answer pairs: `transformers.Trainer`, the loss on the answer only."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, set_seed

from probmoe_ext.files import check_writable, write_json
from probmoe_ext.hf import RoutingMonitor
from probmoe_ext.train.arguments import accumulation_of, trainer_arguments
from probmoe_ext.train.beginning import load_beginning
from probmoe_ext.train.callbacks import LossProgress, MetricsFile, RoutingBesideCheckpoints, StepClock
from probmoe_ext.train.checkpoints import last_checkpoint, remove_unfinished, save_final
from probmoe_ext.train.data import load_examples, split_holdout
from probmoe_ext.train.encode import Encoded, PadRight, encode, pad_token
from probmoe_ext.train.errors import UsageError
from probmoe_ext.train.interrupt import StopOnSignal
from probmoe_ext.train.lora import merge_lora
from probmoe_ext.train.models import (
    Routing,
    check_k,
    check_model,
    check_router,
    load_config_of,
    load_model,
    pick_device,
    write_routing,
)
from probmoe_ext.train.options import TrainConfig, load_config
from probmoe_ext.train.protocols import PROMPTS
from probmoe_ext.train.tiny import BUILT_IN

CONFIG_FILE, METRICS_FILE, SUMMARY_FILE = "train_config.json", "metrics.jsonl", "summary.json"
MONITOR_FILE = "routing.jsonl"


class _Rows(Dataset[dict[str, list[int]]]):
    def __init__(self, rows: list[dict[str, list[int]]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


@dataclass(frozen=True)
class Summary:
    """What came out of a run; also written to ``summary.json``.

    Attributes:
        folder: the run's folder, which `AutoModelForCausalLM` can load.
        routing: router and k, as text.
        steps: optimizer steps in all.
        train_loss: mean loss on completion tokens over the run's part in this process.
        heldout_loss: loss on the held-out slice of the training data; None without one.
        step_seconds: median time of an optimizer step in this process; None if it made none.
        seconds: wall-clock time of training, without what an interruption has lost.
        tokens_per_step: mean number of tokens in an optimizer step, prompts included, padding not, over all processes.
        examples: number of training examples.
        shortened: completions that lost their end to `max_length`.
        dropped: examples left out since their prompt alone reaches `max_length`.
        parameters: the model's.
        device: where it ran.
    """

    folder: str
    routing: str
    steps: int
    train_loss: float | None
    heldout_loss: float | None
    step_seconds: float | None
    seconds: float
    tokens_per_step: float
    examples: int
    shortened: int
    dropped: int
    parameters: int
    device: str


def finetune(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    callbacks: Iterable[TrainerCallback] = (),
) -> Summary:
    """Fine-tune, and leave model, tokenizer, settings, metrics and summary in the run's folder.

    Args:
        config: the settings.
        resume: go on from the last checkpoint in the folder (from the start if there is none yet).
        overwrite: delete an earlier run in the folder.
        quiet: no progress bar.
        callbacks: further ones for the Trainer.

    Returns:
        The summary of the run.

    Raises:
        UsageError: settings that do not fit together, the model or the data; nothing has been written then.
        OSError: the folder cannot be written, or the disk is full; the last whole checkpoint is there to resume from.
        KeyboardInterrupt: a signal ended the training; the step that was under way has its checkpoint.
    """
    folder, routing = config.folder, Routing(config.router, config.k, config.router_options)
    check_request(config, resume=resume, overwrite=overwrite)
    device = pick_device(config.device)
    examples = load_examples(config.data, "train")
    training, heldout = split_holdout(examples, config.holdout)
    training = training[: config.limit]
    checkpoint = last_checkpoint(folder) if resume else None
    set_seed(config.seed)
    model, tokenizer = load_beginning(config, training, checkpoint)
    prompt = PROMPTS[config.prompt]
    rows = encode(training, tokenizer, prompt, config.max_length)
    heldout_rows = encode(heldout, tokenizer, prompt, config.max_length)

    if overwrite and folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_FILE, dataclasses.asdict(config))
    if checkpoint is not None:
        write_routing(checkpoint, routing)
    remove_unfinished(folder)
    clock, stop = StepClock(), StopOnSignal()
    metrics = MetricsFile(folder / METRICS_FILE, clock)
    trainer = Trainer(
        model=model,
        args=trainer_arguments(config, folder, len(rows.rows), device),
        train_dataset=_Rows(rows.rows),
        eval_dataset=_Rows(heldout_rows.rows) if heldout else None,
        data_collator=PadRight(pad_token(tokenizer)),
        processing_class=tokenizer,
        callbacks=[metrics, RoutingBesideCheckpoints(routing), clock, stop, *callbacks],
    )
    if config.monitor:
        RoutingMonitor(model, folder / MONITOR_FILE, every=config.monitor).attach(trainer)
    # Which of the two the Trainer installs depends on the logging level; ours takes the place of either.
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if not quiet:
        trainer.add_callback(LossProgress(str(routing)))
    try:
        with stop:
            result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except BaseException:
        remove_unfinished(folder)
        raise
    if stop.stopped:
        raise KeyboardInterrupt(f"after step {trainer.state.global_step} of {trainer.state.max_steps}")
    seconds = metrics.seconds
    best = trainer.state.best_model_checkpoint
    if config.select == "best" and best is not None:
        # The Trainer's own loading knows the weights by their names in memory; on disk those of experts differ.
        model.load_state_dict(load_model(best, routing, config.dtype, config.experts)[0].state_dict())
    heldout_loss = trainer.evaluate()["eval_loss"] if heldout else None
    if config.lora_rank is not None:
        model = trainer.model = merge_lora(model)
    save_final(trainer, folder)
    summary = _summarize(
        config, routing, trainer, model.num_parameters(), result.training_loss, heldout_loss, clock, seconds, rows
    )
    if trainer.is_world_process_zero():
        write_routing(folder, routing)
        write_json(folder / SUMMARY_FILE, dataclasses.asdict(summary))
    return summary


def load_run(folder: Path) -> TrainConfig:
    """The settings of an earlier run.

    Raises:
        UsageError: the folder holds no run.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise UsageError(f"{folder} holds no run to go on with (no {CONFIG_FILE})")
    return load_config(TrainConfig, str(folder / CONFIG_FILE), {"output": str(folder)})


def check_request(config: TrainConfig, *, resume: bool, overwrite: bool) -> None:
    """Check settings, model and folder before anything is loaded or written.

    Raises:
        UsageError: what is wrong, and what to change.
        OSError: the folder cannot be written.
    """
    folder = config.folder
    check_router(config.router)
    accumulation_of(config)
    if config.model in BUILT_IN:
        largest = config.k if isinstance(config.k, int) or config.k is None else config.k[1]
        experts = BUILT_IN[config.model].experts
        if largest is not None and largest > experts:
            raise UsageError(f"--k {largest} is more than the {experts} experts of {config.model}")
    else:
        check_model(config.model)
        check_k(load_config_of(config.model), config.k)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {str(folder)!r} is a file; give a folder")
    if (folder / CONFIG_FILE).exists() and not (resume or overwrite):
        raise UsageError(f"{folder} holds a run: use --resume {folder}, --overwrite, or another --output")
    check_writable(folder)


def _summarize(
    config: TrainConfig,
    routing: Routing,
    trainer: Trainer,
    parameters: int,
    train_loss: float,
    heldout_loss: float | None,
    clock: StepClock,
    seconds: float,
    rows: Encoded,
) -> Summary:
    return Summary(
        folder=str(config.folder),
        routing=str(routing),
        steps=trainer.state.global_step,
        train_loss=train_loss if clock.seconds else None,
        heldout_loss=heldout_loss,
        step_seconds=statistics.median(clock.seconds) if clock.seconds else None,
        seconds=seconds,
        tokens_per_step=sum(len(row["input_ids"]) for row in rows.rows)
        / len(rows.rows)
        * trainer.args.per_device_train_batch_size
        * trainer.args.gradient_accumulation_steps
        * trainer.args.world_size,
        examples=len(rows.rows),
        shortened=rows.shortened,
        dropped=rows.dropped,
        parameters=parameters,
        device=str(trainer.args.device),
    )
