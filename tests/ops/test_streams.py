"""Processes with equal generators draw independently; seeds that are given are used as they are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from probmoe_ext.ops import route_probmoe, sample_stream, set_sample_stream, subset_sample


@pytest.fixture(autouse=True)
def _own_stream() -> Iterator[None]:
    yield
    set_sample_stream(None)


def draws(stream: int | None, seed: int = 0) -> torch.Tensor:
    set_sample_stream(stream)
    torch.manual_seed(seed)
    return subset_sample(torch.zeros(2000, 16), 4)


def test_a_stream_is_the_same_each_time_and_differs_from_others() -> None:
    first = draws(None)
    assert sample_stream() == 0
    assert draws(0).equal(first)
    found = [first, *(draws(stream) for stream in (1, 2, 3, 1000, (1 << 31) - 1))]
    assert draws(3).equal(found[3])
    for index, one in enumerate(found):
        for other in found[index + 1 :]:
            # Independent draws of 4 of 16 share one expert on average; the same draws would share 4.
            shared = (one.unsqueeze(-1) == other.unsqueeze(-2)).any(-1).sum(-1).double().mean()
            assert abs(shared - 1) < 0.1


def test_the_default_is_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    second = draws(1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert draws(None).equal(second)
    assert sample_stream() == 1


def test_a_given_seed_is_used_as_it_is() -> None:
    logits = torch.randn(50, 16)
    expected = subset_sample(logits, 4, seed=7)
    set_sample_stream(5)
    assert subset_sample(logits, 4, seed=7).equal(expected)
    assert subset_sample(logits, 4, seed=torch.tensor(7)).equal(expected)


def test_the_generator_moves_alike_on_all_streams() -> None:
    after = []
    for stream in (0, 1):
        draws(stream)
        after.append(torch.rand(3))
    assert after[0].equal(after[1])


def test_it_compiles() -> None:
    logits = torch.randn(50, 16)
    set_sample_stream(2)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: route_probmoe(x, 4, training=True)[1], fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    expected = route_probmoe(logits, 4, training=True)[1]
    torch.manual_seed(1)
    assert compiled(logits).equal(expected)


@pytest.mark.parametrize("stream", [-1, 1 << 31])
def test_what_is_refused(stream: int) -> None:
    with pytest.raises(ValueError, match="stream must be at least 0 and below"):
        set_sample_stream(stream)
    with pytest.raises(TypeError, match=r"stream must be None or an int, not 1\.5"):
        set_sample_stream(1.5)  # type: ignore[arg-type]
