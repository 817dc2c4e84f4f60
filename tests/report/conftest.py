"""A comparison with invented numbers and hostile texts, and the report on it, made once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from probmoe_ext.report.study import Study, read_study
from probmoe_ext.report.write import Report, write_report
from tests.report.synthetic import HOSTILE, write_comparison


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten routers, two seeds; texts that would break a page that trusts them."""
    folder = tmp_path_factory.mktemp("synthetic") / "comparison"
    return write_comparison(folder, seeds=(42, 43), layers=3, problems=40, steps=24, text=HOSTILE)


@pytest.fixture(scope="session")
def study(comparison: Path) -> Study:
    """The comparison, read."""
    return read_study([comparison])


@pytest.fixture(scope="session")
def report(comparison: Path) -> Report:
    """The report on some of its runs: those of four routers and an ablation."""
    path = comparison / "compare.json"
    content = json.loads(path.read_text())
    some = ("topk", "densemixer", "probmoe-exact", "probmoe-dynamic", "sample-ste")
    fewer = comparison.parent / "fewer"
    fewer.mkdir()
    runs = [{**run, "folder": str(comparison / run["folder"])} for run in content["runs"] if run["label"] in some]
    (fewer / "compare.json").write_text(json.dumps({**content, "runs": runs}))
    return write_report([fewer], comparison.parent / "report")
