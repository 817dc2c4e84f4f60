"""The numbers in the report, against what the runs' files say."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from probmoe_ext.report.ablation import ablation, cells
from probmoe_ext.report.cardinality import binned, cardinality, frequency, rank_correlation, sizes
from probmoe_ext.report.chart import Chart, Missing
from probmoe_ext.report.cost import cost, ratio
from probmoe_ext.report.distribution import distribution
from probmoe_ext.report.load import evenness, load
from probmoe_ext.report.losses import POINTS, curve, heldout_loss, training_loss
from probmoe_ext.report.pairing import against_baseline, main_scorer
from probmoe_ext.report.scores import accuracy, paired
from probmoe_ext.report.study import Group, Study, read_study
from probmoe_ext.report.summary import result, settings
from probmoe_ext.report.training import training
from tests.report.synthetic import ROUTERS, write_comparison

FIGURES = (accuracy, paired, training_loss, heldout_loss, cost, cardinality, frequency, distribution, ablation, load)


def group(study: Study, title: str) -> Group:
    return next(one for one in study.groups if one.title == title)


def chart(study: Study, make) -> Chart:  # type: ignore[no-untyped-def]
    found = make(study)
    assert isinstance(found, Chart), found
    return found


def test_accuracy_is_the_mean_of_the_scores(study: Study, comparison: Path) -> None:
    files = [comparison / f"runs/topk/seed-{seed}/eval/scores.json" for seed in (42, 43)]
    values = [json.loads(path.read_text())["scores"]["b.exact_match"]["value"] for path in files]
    row = next(row for row in chart(study, accuracy).tables[0].rows if row[:2] == ["top-k", "B exact match"])
    assert row[2] == pytest.approx(np.mean(values))
    # Two values: half of Student's interval is t(0.975, 1) times half of their distance.
    assert row[4] - row[2] == pytest.approx(12.7062 * abs(values[0] - values[1]) / 2, rel=1e-4)
    assert row[5] == 2


def test_difference_to_top_k_is_that_of_the_same_problems(study: Study) -> None:
    exact, topk = group(study, "ProbMoE exact"), group(study, "top-k")
    found = against_baseline(study, exact, "c.numeric")
    assert found is not None
    means = [np.mean([mark for _, mark in run.samples["c.numeric"].values()]) for run in exact.runs + topk.runs]
    assert found.paired.difference == pytest.approx(np.mean(means[:2]) - np.mean(means[2:]))
    assert (found.seeds, found.problems) == (2, 40)
    assert found.paired.low <= found.paired.difference <= found.paired.high
    assert against_baseline(study, topk, "c.numeric") is None
    assert main_scorer(study) == "b.exact_match"


def test_other_problems_and_other_seeds_are_not_paired(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "c", (ROUTERS[0], ROUTERS[5]), seeds=(1,), layers=2, problems=10, steps=8)
    path = folder / "runs/probmoe-exact/seed-1/eval/samples-zero-shot.jsonl"
    path.write_text(path.read_text().replace("Question 3?", "Another?"))
    of = read_study([folder])
    found = against_baseline(of, of.groups[1], "c.numeric")
    assert found is not None and found.problems == 9
    of.groups[1].runs[0].seed = 2
    assert against_baseline(of, of.groups[1], "c.numeric") is None
    assert isinstance(paired(of), Missing)


def test_cost_ratios_are_geometric_means_by_seed(study: Study) -> None:
    dense, topk = group(study, "DenseMixer"), group(study, "top-k")
    logs = [
        math.log(a.cost["step_seconds"] / b.cost["step_seconds"]) for a, b in zip(dense.runs, topk.runs, strict=True)
    ]
    found = ratio(study, dense, "step_seconds")
    assert found is not None and found.mean == pytest.approx(math.exp(np.mean(logs)))
    assert ratio(study, topk, "step_seconds").mean == 1  # type: ignore[union-attr]
    assert ratio(study, dense, "evaluation_tokens_per_second") is None
    assert "Not recorded: generated tokens/s." in chart(study, cost).notes


def test_experts_by_layer_and_by_frequency(study: Study) -> None:
    dynamic = group(study, "ProbMoE dynamic")
    assert sum(sizes(dynamic)) == pytest.approx(1)
    assert sizes(dynamic)[:2] == [0, 0]
    rows = [row for row in chart(study, cardinality).tables[0].rows if row[0] == dynamic.title]
    layers = [run.analysis.layers[1].mean_k for run in dynamic.runs if run.analysis]
    assert rows[1][2] == pytest.approx(np.mean(layers))  # type: ignore[arg-type]
    assert "Always 4: top-k, DenseMixer" in chart(study, cardinality).notes[0]
    assert {row[0] for row in chart(study, frequency).tables[0].rows} == {dynamic.title}
    found = {"a": (1.0, 4.0), "b": (2.0, 3.0), "c": (3.0, 2.5), "d": (16.0, 1.0)}
    assert [(row[1], row[4]) for row in binned(found)] == [(4.0, 1), (2.75, 2), (1.0, 1)]
    assert rank_correlation(found) == pytest.approx(-1)


def test_ablation_has_four_cells(study: Study) -> None:
    assert {rules: one.title for rules, one in cells(study).items()} == {
        ("sample", "marginal"): "ProbMoE exact",
        ("sample", "ste"): "sample + STE",
        ("topk", "marginal"): "top-k + marginal",
        ("topk", "ste"): "top-k + STE",
    }
    assert len(chart(study, ablation).tables[0].rows) == 8


def test_load_evenness_and_dead_experts(study: Study) -> None:
    run = study.groups[0].first
    assert run.analysis is not None
    layer = run.analysis.layers[1]
    p = np.array([share for share in layer.load if share])
    assert evenness(layer) == pytest.approx(-(p * np.log(p)).sum() / math.log(len(layer.load)))
    row = chart(study, load).tables[0].rows[1]
    assert row[2] == pytest.approx(max(layer.load) * len(layer.load))
    assert row[5] == 1


def test_curves_are_means_over_seeds_and_bounded(study: Study) -> None:
    topk = study.groups[0]
    found = curve(topk)
    assert len(found) == 24
    assert found[0][1].mean == pytest.approx(np.mean([run.losses[0][1] for run in topk.runs]))
    long = Group("long", "", [study.groups[0].first])
    long.runs[0].losses, before = [(step, float(step)) for step in range(1000)], long.runs[0].losses
    try:
        assert len(curve(long)) <= POINTS
        assert curve(long)[0] == (4.0, curve(long)[0][1])
        assert curve(long)[0][1].mean == 4.0
    finally:
        long.runs[0].losses = before
    assert {row[0] for row in chart(study, training).tables[0].rows} == {one.title for one in study.main}


def test_result_has_a_line_for_each_router(study: Study) -> None:
    rows = chart(study, result).tables[0].rows
    assert [row[0] for row in rows] == [one.title for one in study.groups]
    assert rows[6][7] == pytest.approx(np.mean([run.analysis.mean_k for run in study.groups[6].runs]) / 4)  # type: ignore[union-attr]
    assert rows[0][3] is None and rows[5][3] is not None
    differing = settings(study)[0]
    assert [heading for heading, _ in differing.columns] == ["router", "seeds", "k", "router", "router_options"]


@pytest.mark.parametrize("make", FIGURES)
def test_captions_are_a_sentence_with_n_and_the_interval(study: Study, make) -> None:  # type: ignore[no-untyped-def]
    found = chart(study, make)
    assert found.caption.endswith(".")
    assert found.figure is not None and found.tables[0].rows
    if make not in (load, frequency):
        assert re.search(r"\d+ seeds", found.caption)
        assert "interval" in found.caption


def test_what_was_not_recorded_is_one_line(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "c", ROUTERS[:1], seeds=(1,), layers=2, problems=10, steps=8)
    for path in folder.glob("runs/*/*/*.json*"):
        if path.name not in ("train_config.json", "done.json"):
            path.unlink()
    for path in folder.glob("runs/*/*/eval/*"):
        path.unlink()
    of = read_study([folder])
    for make in (*FIGURES, training):
        found = make(of)
        assert isinstance(found, Missing), found
        assert "\n" not in found.reason and found.reason.startswith(("Not ", "Nothing "))


def test_a_diverged_run_does_not_stop_the_report(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "c", ROUTERS[:2], seeds=(1, 2), layers=2, problems=10, steps=8)
    path = folder / "runs/densemixer/seed-2/metrics.jsonl"
    path.write_text(re.sub(r'"loss": [^}]+', '"loss": NaN', path.read_text()))
    scores = folder / "runs/densemixer/seed-2/eval/scores.json"
    scores.write_text(re.sub(r'"loss": [^,]+', '"loss": Infinity', scores.read_text()))
    of = read_study([folder])
    assert {row[0] for row in chart(of, training_loss).tables[0].rows} == {"top-k"}
    assert chart(of, heldout_loss).figure is not None
