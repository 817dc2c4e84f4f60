"""The cheap way into an operator in eager mode: what must still see it sees it, and it keeps nothing it need not."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from probmoe_ext import ops

OPS = torch.ops.probmoe_ext


class Log(TorchDispatchMode):
    """Records the operators that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Wrapped(Tensor):
    """A subclass that sees every operator below autograd."""

    seen: list[Any]

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner
        self.seen = []

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument in args:
            if isinstance(argument, Wrapped):
                argument.seen.append(func)
        return func(*(a.inner if isinstance(a, Wrapped) else a for a in args), **(kwargs or {}))


@pytest.mark.parametrize("with_grad", [False, True])
def test_a_dispatch_mode_sees_the_operator(with_grad: bool) -> None:
    logits = torch.randn(3, 8, requires_grad=with_grad)
    with Log() as log:
        weights, _ = ops.route_probmoe(logits, 2, training=True)
    assert OPS.route_probmoe.default in log.seen
    assert torch.ops.aten.randint.low in log.seen, "the seed is drawn in the open too"
    if with_grad:
        with Log() as log:
            weights.sum().backward()
        assert OPS.route_probmoe_backward.default in log.seen


def test_a_subclass_sees_the_operator() -> None:
    logits = Wrapped(torch.randn(3, 8))
    _, indices = ops.route_probmoe(logits, 2, training=True)
    assert indices.shape == (3, 2)
    assert OPS.route_probmoe.default in logits.seen


def test_fake_tensors_stay_fake() -> None:
    with FakeTensorMode() as mode:
        inside = ops.route_probmoe(torch.randn(3, 8), 2, training=True)
    outside = ops.route_top_k(mode.from_tensor(torch.randn(3, 8)), 2)
    for output in (*inside, *outside):
        assert isinstance(output, FakeTensor) and output.shape == (3, 2)


@pytest.mark.parametrize("name", ["subset_sample", "route_probmoe"])
def test_a_fresh_seed_is_what_randint_draws(name: str) -> None:
    """In eager mode, compiled, and under a mode: the same experts after the same torch.manual_seed."""
    logits = torch.randn(50, 16)

    def draw(x: Tensor, seed: Tensor | None = None) -> Tensor:
        if name == "subset_sample":
            return ops.subset_sample(x, 4, seed)
        return ops.route_probmoe(x, 4, training=True, seed=seed)[1]

    torch.manual_seed(3)
    seed = torch.randint(-(2**63), 2**63 - 1, ())
    after = torch.get_rng_state()
    want = draw(logits, seed)
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for function, x in ((draw, logits), (compiled, logits), (draw, logits.clone().requires_grad_())):
        torch.manual_seed(3)
        assert torch.equal(function(x), want)
        assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(3)
    with Log():
        assert torch.equal(draw(logits), want)


def test_a_graph_must_have_its_seed() -> None:
    """Traced without one, the raw operator would draw the same experts each time, or be merged with its like."""
    with pytest.raises(Exception, match="route_probmoe needs a seed outside eager mode"):
        torch.compile(
            lambda x: torch.ops.probmoe_ext.route_probmoe(x, None, 2, 2, True, False, True),
            fullgraph=True,
            backend="aot_eager",
        )(torch.randn(3, 8))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_replays_the_draw(use_reentrant: bool) -> None:
    logits = torch.randn(20, 16, requires_grad=True)
    upstream = torch.randn(20, 4)

    def gradient(route: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(9)
        weights = route(logits)
        torch.manual_seed(10)  # the replay must bring back its own generator
        return weights, torch.autograd.grad(weights, logits, upstream)[0] if not use_reentrant else backward(weights)

    def backward(weights: Tensor) -> Tensor:
        logits.grad = None
        weights.backward(upstream)
        assert logits.grad is not None
        return logits.grad

    def route(x: Tensor) -> Tensor:
        return ops.route_probmoe(x, 4, training=True)[0]

    plain = gradient(route)
    replayed = gradient(lambda x: checkpoint(route, x, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, replayed, strict=True))


def test_threads_and_inference_mode_keep_seeds_apart() -> None:
    """Threads that draw at the same time, their first draws in inference mode, disturb no one."""
    logits = torch.zeros(1, 64)
    drawn: list[list[int]] = []

    def work() -> None:
        with torch.inference_mode():
            ops.route_probmoe(logits, 32, training=True)
        drawn.extend(ops.route_probmoe(logits, 32, training=True)[1][0].tolist() for _ in range(200))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len({tuple(d) for d in drawn}) == 600


def saved_for_backward(function: Any) -> list[Tensor]:
    """The tensors that autograd keeps while ``function`` runs."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        function()
    return kept


@pytest.mark.parametrize("k", [8, (6, 8)], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_routing_keeps_the_logits_and_the_indices(k: Any, normalize: bool) -> None:
    """Nothing else waits for the backward pass, and of the logits no copy."""
    logits = torch.randn(32, 64, requires_grad=True)
    results: list[Tensor] = []
    kept = saved_for_backward(
        lambda: results.extend(ops.route_probmoe(logits, k, training=True, seed=1, normalize=normalize))
    )
    assert [t.data_ptr() for t in kept] == [logits.data_ptr(), results[1].data_ptr()]
    if k == 8:
        results.clear()
        kept = saved_for_backward(lambda: results.extend(ops.route_top_k(logits, 8, normalize)))
        assert [t.data_ptr() for t in kept] == [logits.data_ptr(), results[1].data_ptr()]


def test_an_unused_weight_has_no_gradient() -> None:
    """The indices alone lead nowhere; weights that a loss leaves out get zeros if asked for."""
    logits = torch.randn(3, 8, requires_grad=True)
    weights, indices = ops.route_probmoe(logits, 2, training=True, seed=1)
    assert weights.requires_grad and not indices.requires_grad
    (gradient,) = torch.autograd.grad((weights * 0).sum(), logits)
    assert (gradient == 0).all()
