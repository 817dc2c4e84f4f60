"""A comparison with invented numbers and hostile texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from probmoe_ext.report.study import Study, read_study
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
