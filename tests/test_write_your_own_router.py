"""The page "write your own router": its code is run as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import probmoe_ext.hf
from tests.hf.models import E, gates, tiny, tokens

PAGE = Path(__file__).parents[1] / "docs" / "write_your_own_router.md"
ROUTER, USE = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def _own_routers() -> None:
    exec(compile(ROUTER, str(PAGE), "exec"), {"__name__": "page"})


def test_it_is_short() -> None:
    assert len(ROUTER.splitlines()) <= 25


def test_it_is_swapped_in_trained_saved_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    swapping, loading = USE.split("# ... train ...\n")
    names: dict[str, Any] = {"model": tiny("olmoe").train()}
    exec(swapping, names)
    trained, ids = names["model"], tokens()
    assert {gate.probmoe.name for gate in gates(trained)} == {"balanced_topk"}
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        loss = trained(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    router = gates(trained)[0].probmoe
    assert router.bias.abs().max().item() == pytest.approx(0.01)
    exec(loading, names)
    loaded = names["model"]
    assert loaded is not trained
    assert loaded(ids).logits.equal(trained.eval()(ids).logits)
    assert gates(loaded)[0].probmoe.bias.equal(router.bias)


def test_the_bias_balances_the_load() -> None:
    model = probmoe_ext.hf.swap_router(tiny("olmoe").train(), "balanced_topk", k=2, rate=0.01)
    ids, spread = tokens(8), []
    for _ in range(60):
        model(ids)
        spread.append(gates(model)[0].probmoe.load.std().item())
    assert sum(spread[-10:]) / 10 < 0.3 * spread[0]
    assert gates(model)[0].probmoe.load.sum().item() == pytest.approx(2)
    assert len(gates(model)[0].probmoe.load) == E
