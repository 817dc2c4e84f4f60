"""The benchmarks' own arithmetic: peers compute what they claim, cases are those asked for, pages keep their text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import full_size, peers, report, run
from benchmarks.measure import alternate, measure, summary
from benchmarks.registry import BENCHMARKS, Benchmark, Case
from probmoe_ext import ops


@pytest.mark.parametrize(("experts", "k"), [(8, 3), (12, 4), (5, 1), (3, 3)])
def test_the_circuit_has_the_marginals(experts: int, k: int) -> None:
    """And their derivative: it is the published law, only evaluated otherwise."""
    logits = torch.randn(4, experts, dtype=torch.float64, requires_grad=True)
    v = torch.randn(4, experts, dtype=torch.float64)
    m = peers.marginals_by_circuit(logits, k)
    torch.testing.assert_close(m, ops.subset_marginals(logits, k), rtol=1e-9, atol=1e-12)
    (got,) = torch.autograd.grad(m, logits, v)
    torch.testing.assert_close(got, ops.subset_covariance_vp(logits, v, k), rtol=1e-9, atol=1e-12)


def test_published_routing_has_our_weights_and_gradient() -> None:
    """Given the same experts: what is timed against is the same function."""
    torch.manual_seed(1)
    logits = torch.randn(6, 10, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(6, 3, dtype=torch.float64)
    torch.manual_seed(2)
    published = peers.routed_through(peers.marginals_by_circuit)(logits, 3)
    torch.manual_seed(2)
    indices = torch.topk(peers._gumbel_keys(logits.detach()), 3, -1).indices
    torch.testing.assert_close(published, torch.softmax(logits, -1).gather(-1, indices))
    (got,) = torch.autograd.grad(published, logits, upstream)
    want = torch.ops.probmoe_ext.route_probmoe_backward(upstream, logits.detach(), indices, 3, 3, False, True)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_gumbel_softmax_is_k_hot_with_a_gradient() -> None:
    logits = torch.randn(6, 10, requires_grad=True)
    hot = peers.gumbel_softmax_topk(logits, (2, 3))
    torch.testing.assert_close(hot.detach().sort(-1).values, torch.tensor([0.0] * 7 + [1.0] * 3).expand(6, -1))
    (gradient,) = torch.autograd.grad(hot[:, 0].sum(), logits)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_runs(name: str) -> None:
    """Each side, at a small size; those that name a target name where it is measured."""
    benchmark = BENCHMARKS[name]
    logits = torch.randn(3, 16)
    for make in (benchmark.ours, benchmark.peer):
        make(logits, 4)()
    assert benchmark.suite


def test_alternate_takes_turns() -> None:
    order: list[str] = []
    mine, theirs = alternate(lambda: order.append("a"), lambda: order.append("b"), 0.0)
    assert len(mine) == len(theirs) == 7
    turns = "".join(order).replace("aa", "a")
    while "aa" in turns or "bb" in turns:
        turns = turns.replace("aa", "a").replace("bb", "b")
    assert turns == "ab" * 8, "a warm-up of each, then seven turns"


def test_summary_is_per_row_in_microseconds() -> None:
    numbers = summary([n * 1e-6 for n in range(11)], rows=2)
    assert numbers == pytest.approx({"median_us_per_row": 2.5, "p20": 1.0, "p80": 4.0})


def test_measure_restores_the_threads_and_judges() -> None:
    torch.set_num_threads(1)
    slow, fast = (lambda n: lambda logits, k: lambda: sum(range(n)))(20000), (lambda logits, k: lambda: None)
    result = measure(Benchmark("x", slow, fast, "nothing", target=1.0), Case(2, 4, (1, 2), threads=2), 0.0)
    assert torch.get_num_threads() == 1
    assert result["ratio"] > 1 and result["reached"] is False and result["k"] == [1, 2]
    assert report.verdict(result) == "≤ 1 FAIL"
    assert report.verdict(result | {"reached": True}) == "≤ 1 pass"
    assert report.verdict(result | {"target": None, "reached": None}) == ""


def test_cases_are_the_product_of_what_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sub" / "results.json"
    arguments = ["route_top_k", "--rows", "3,5", "--shapes", "8,2;8,1-3", "--spreads", "1,20", "--threads", "1"]
    assert run.main([*arguments, "--seconds", "0", "--no-tests", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    cases = [(r["T"], r["E"], r["k"], r["spread"], r["threads"]) for r in document["results"]]
    assert cases == [(t, 8, k, s, 1) for t in (3, 5) for k in (2, [1, 3]) for s in (1.0, 20.0)]
    assert {"processor", "instruction_set", "torch", "commit", "cores"} <= document["machine"].keys()
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(cases)


def test_wrong_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(["route_*", "no_such"])
    assert caught.value.code == 2
    assert "no_such" in capsys.readouterr().err


def test_red_tests_stop_the_timing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(
        run.BENCHMARKS,
        "red",
        Benchmark("red", lambda *_: pytest.fail, lambda *_: pytest.fail, ""),
    )
    monkeypatch.setattr(run.sys, "executable", shutil.which("false"))
    assert run.main(["red"]) == 1
    assert "tests are red" in capsys.readouterr().err


def result(**changes: Any) -> dict[str, Any]:
    times = {"median_us_per_row": 1.0, "p20": 0.9, "p80": 1.5}
    base = {"name": "op", "T": 7, "E": 64, "k": [6, 8], "spread": 1.0, "threads": 2, "ours": times, "peer": times}
    return base | {"peer_name": "peer", "ratio": 1.0, "target": 1.3, "reached": True} | changes


DOCUMENT = {
    "machine": {"processor": "CPU", "instruction_set": "isa", "cores": 2, "torch": "2", "commit": "abc", "load": 0.5},
    "tests": "green",
    "results": [result(), result(ratio=2.0, reached=False, threads=1), result(name="free", target=None, reached=None)],
}


def test_tables_between_markers(tmp_path: Path) -> None:
    """What is outside stays, a second time changes nothing, a page without markers is left alone and reported."""
    page, bare = tmp_path / "page.md", tmp_path / "bare.md"
    page.write_text(
        "top\n<!-- benchmarks: summary -->\nold\n<!-- benchmarks: end -->\nmiddle\n"
        "<!-- benchmarks: all -->\n<!-- benchmarks: end -->\nbottom\n"
    )
    bare.write_text("nothing\n")
    assert report.write_between_markers(page, DOCUMENT) == 2
    text = page.read_text()
    assert text.startswith("top\n<!-- benchmarks: summary -->\n") and text.endswith(
        "<!-- benchmarks: end -->\nbottom\n"
    )
    assert "CPU (isa, 2 cores), torch 2, commit abc, float32, tests green, load 0.5;" in text
    assert "old" not in text and "\nmiddle\n" in text
    assert "| `op` | peer | 1 – 2 | T = 7, (E, k) = (64, 6–8), 1 thread | ≤ 1.3 | 1 of 2 |" in text
    assert text.count("`free`") == 1, "the summary has those with a target alone"
    assert report.write_between_markers(page, DOCUMENT) == 2 and page.read_text() == text
    results = tmp_path / "results.json"
    results.write_text(json.dumps(DOCUMENT))
    assert report.main([str(results), str(bare)]) == 1 and bare.read_text() == "nothing\n"
    assert report.main([str(results), str(page)]) == 0 and page.read_text() == text


def test_plot(tmp_path: Path) -> None:
    """Each measured curve is drawn, the same bytes each time."""
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    name = plot.CURVES[0][0]
    results = [result(name=name, T=c.rows, E=c.experts, k=c.k, threads=1) for c in BENCHMARKS[name].suite]
    document = DOCUMENT | {"results": results}
    assert [p[0] for p in plot.points(document, name, "ours", "k")] == [1, 2, 4, 8, 16, 32]
    one, two = tmp_path / "one.svg", tmp_path / "two.svg"
    plot.cost(document, one)
    plot.cost(document, two)
    assert one.read_bytes() == two.read_bytes()
    assert "softmax + topk" in one.read_text() and "log-space" not in one.read_text()


def test_a_whole_model_trains_by_each_router_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--layers 2 --hidden 64 --width 32 --experts 8 --k 4 --rows 2 --length 16 --rounds 2"
    assert full_size.main(["--device", "cpu", *sizes.split(), "--json", str(tmp_path / "results.json")]) == 0
    found = json.loads((tmp_path / "results.json").read_text("utf-8"))["routers"]
    assert [one["router"] for one in found] == ["top-k", "ProbMoE exact", "ProbMoE dynamic"]
    assert [one["experts_per_token"] for one in found[:2]] == [4, 4]
    assert 3 <= found[2]["experts_per_token"] < 4
    assert found[0]["step_ratio"] == 1
    for one in found:
        assert one["tokens_per_second"] == pytest.approx(32 / one["step_seconds"])
        assert one["peak_memory_bytes"] is None
    assert capsys.readouterr().out.count("\n") == 5
