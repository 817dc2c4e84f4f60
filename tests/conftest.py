"""The one home of fixtures that every test shares: seeds, threads, and whether there is a GPU to test on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from probmoe_ext.routers import registry


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start each test from one seed, and put back what it did to torch's switches and to the registry of routers."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(0)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    # torch.compile switches this off for the whole process, for tests that come later as well.
    torch.distributions.Distribution.set_default_validate_args(True)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def with_threads() -> Callable[[int, Callable[[], object]], object]:
    """Return a function that calls another one under a number of threads."""

    def call(threads: int, function: Callable[[], object]) -> object:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return function()
        finally:
            torch.set_num_threads(before)

    return call


@pytest.fixture
def cuda() -> torch.device:
    """The GPU. Without one the test is skipped, or fails where ``PROBMOE_REQUIRE_CUDA=1`` says there must be one."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    message = "no CUDA device: torch.cuda.is_available() is False"
    if os.environ.get("PROBMOE_REQUIRE_CUDA") == "1":
        pytest.fail(message + ", and PROBMOE_REQUIRE_CUDA=1 requires one")
    pytest.skip(message)
