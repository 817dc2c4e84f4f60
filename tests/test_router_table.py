"""The table of routers in the docs is that of the routers there are, and its script measures what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import routers
from tests.routers.cases import every_router

SMALL = {"experts": 8, "k": 2, "hidden": 16, "inner": 8}


def rows(page: Path = routers.PAGE) -> dict[str, list[str]]:
    found = (line.strip("| ").split(" | ") for line in page.read_text().splitlines() if line.startswith("| `"))
    return {cells[0].strip("`"): cells[1:] for cells in found}


def test_the_table_has_every_router_as_it_is() -> None:
    """If this fails: ``python -m benchmarks.routers NAME`` for each router that is new or has changed."""
    table = rows()
    assert set(table) == set(every_router())
    for name, (source, options, parameters, *_, plain) in table.items():
        about = routers.describe(name)
        assert {"source": source, "options": options, "parameters": parameters, "plain": plain} == about


@pytest.mark.parametrize("name", every_router())
def test_it_measures_every_router(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers, "K_OF", {"switch": 1, "da_moe": (1, 2), "lory": 8, "top_p": (1, 8)})
    measured = routers.measure(name, 16, 0.0, SMALL)
    assert all(value > 0 for value in measured.values())
    assert 0 < measured["evaluation"] <= 8


def test_a_page_keeps_what_stands_around_the_table(tmp_path: Path) -> None:
    document: dict[str, Any] = json.loads(routers.RESULTS.read_text())
    document["routers"]["topk"]["layer"] = 12345.0
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- routers: table -->\nold\n<!-- routers: end -->\nafter\n")
    assert routers.write(document, page) == 1
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert rows(page)["topk"][5] == "12345.00"
    page.write_text("no table")
    assert routers.write(document, page) == 0


def test_sources_are_read_from_docstrings() -> None:
    assert routers.describe("switch")["source"] == "Fedus et al. 2022, [2101.03961](https://arxiv.org/abs/2101.03961)"
    assert routers.describe("gumbel_softmax")["source"].count("arxiv.org") == 2
    assert routers.describe("noisy_topk")["parameters"] == "`noise.weight` [E, H]"


def test_an_unknown_router_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        routers.main(["top_k"])
    assert stopped.value.code == 2
    assert "no such router: top_k" in capsys.readouterr().err
