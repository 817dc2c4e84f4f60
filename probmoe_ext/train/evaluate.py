"""Evaluate a model on the test split: generate, score by the three protocols, keep every sample.

Samples are appended to a file as they are generated; the same command again goes on behind the last one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from probmoe_ext.files import append_line, write_json, write_lines
from probmoe_ext.train.evaluation import SCORES_FILE, SETTINGS_FILE, Evaluation, Pass, prepare
from probmoe_ext.train.generate import generate_outputs
from probmoe_ext.train.models import load_model
from probmoe_ext.train.options import EvalConfig
from probmoe_ext.train.protocols import PROMPTS
from probmoe_ext.train.routing_stats import Statistics, measure
from probmoe_ext.train.scoring import SCORERS, Mean, mean_of
from probmoe_ext.train.tables import markdown_table, number, percent


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
    task = prepare(config, overwrite=overwrite)
    model, tokenizer = load_model(config.model, task.routing, task.dtype, config.experts)
    model.to(task.device).eval()
    _claim(task, overwrite)

    scores: dict[str, Mean] = {}
    for one in task.passes:
        samples = _generate(task, one, model, tokenizer, config.batch_size, quiet)
        for key in one.keys:
            scores[key] = mean_of([float(sample["scores"][key]["correct"]) for sample in samples])
    result = Result(
        folder=str(task.folder),
        routing=str(task.routing),
        scores={key: scores[key] for key in SCORERS if key in scores},
        statistics=measure(model, tokenizer, task.problems, PROMPTS["b"], config.batch_size),
    )
    write_json(task.folder / SCORES_FILE, dataclasses.asdict(result))
    return result


def _claim(task: Evaluation, overwrite: bool) -> None:
    task.folder.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for old in (*task.folder.glob("samples-*.jsonl"), task.folder / SETTINGS_FILE, task.folder / SCORES_FILE):
            old.unlink(missing_ok=True)
    write_json(task.folder / SETTINGS_FILE, task.fingerprint)


def _generate(
    task: Evaluation, one: Pass, model: Any, tokenizer: Any, batch_size: int, quiet: bool
) -> list[dict[str, Any]]:
    path, outputs = task.samples(one), task.outputs(one)
    if len(outputs) < len(one.prompts):
        # A line that was not finished goes, before others follow it.
        write_lines(path, ({"index": index, "output": output} for index, output in outputs.items()))
        generated = generate_outputs(
            model,
            tokenizer,
            one.prompts,
            max_new_tokens=one.max_new_tokens,
            stop=one.generation.stop_strings(tokenizer.eos_token),
            batch_size=batch_size,
            done=set(outputs),
        )
        name = f"{one.generation.name} prompts"
        with tqdm(total=len(one.prompts), initial=len(outputs), desc=name, disable=quiet) as bar:
            for index, output in generated:
                if index not in outputs:
                    outputs[index] = output
                    append_line(path, {"index": index, "output": output})
                    bar.update()
    samples = [
        {
            "index": index,
            "question": example.question,
            "answer": example.answer,
            "prompt": one.prompts[index],
            "output": outputs[index],
            "scores": {key: dataclasses.asdict(SCORERS[key][1](outputs[index], example.answer)) for key in one.keys},
        }
        for index, example in enumerate(task.problems)
    ]
    write_lines(path, samples)
    return samples
