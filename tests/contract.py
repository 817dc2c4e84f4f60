"""What every op owes its user, written once. `tests/ops` describes each op by an `OpSpec` and applies these checks.

A check takes a spec and the function to check, so that the plain-torch reference answers to the same enumeration as the
compiled op does.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from probmoe_ext import _C, reference
from tests.inputs import MODERATE, Band, logit_sets

Tensors = tuple[Tensor, ...]
Function = Callable[..., Any]
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SEED = 20240607

needs_fma = pytest.mark.skipif(
    _C.instruction_set() == "portable" and platform.machine() in ("x86_64", "AMD64"),
    reason="the CPU's kernels in use have no fused multiply-add, and other bits for it",
)


def _only_logits(logits: Tensor, band: Band) -> Tensors:
    return (logits,)


def _no_scale(tensors: Tensors, band: Band) -> Tensor:
    return torch.ones((*tensors[0].shape[:-1], 1), dtype=torch.float64)


@dataclass(frozen=True)
class OpSpec:
    """One op (or one setting of its options) and what can be expected of it.

    Attributes:
        name: of the public function, of its reference and of the raw op.
        label: tells the settings of one op apart in test names.
        options: keyword arguments that every call gets.
        tensors: from logits and band to all tensor arguments, the logits first.
        oracle: float64 values of the floating-point output (None: only the reference knows).
        oracle_indices: the exact integer output, where it is deterministic.
        differentiable: positions among the tensor arguments that have gradients.
        twice: whether gradgradcheck must pass as well.
        exact_only: takes an int k, no band.
        sampled: the integer output is random, given the seed.
        sets: names of logit sets that values are compared on at real sizes.
        value_tolerance: float32 error allowed, in units of `scale`; float64 gets 1e-12.
        grad_tolerance: float32 error allowed in gradients, in units of the largest cotangent times `grad_scale`.
        scale, grad_scale: ``[..., 1]`` float64 units of error for each row.
        raw_values: values of raw-op arguments that the shared names below do not provide.
        banded: takes a k; otherwise it gets every exact band as a size alone.
        elementwise: a bad input spoils its own element, not its row.
        finite_differences: gradcheck applies. Not where a stop-gradient or a rejection step hides the derivative.
        own_draws: draws differ between dtypes by the width of their uniforms, so that each dtype has its own reference.
        composite: made of other ops and of torch's: there is no raw op, and sums may depend on strides in the last bit.
    """

    name: str
    label: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    tensors: Callable[[Tensor, Band], Tensors] = _only_logits
    oracle: Callable[[Tensors, Band], Tensor] | None = None
    oracle_indices: Callable[[Tensors, Band], Tensor] | None = None
    differentiable: tuple[int, ...] = (0,)
    twice: bool = False
    exact_only: bool = False
    sampled: bool = False
    sets: tuple[str, ...] = MODERATE
    value_tolerance: float = 1e-6
    grad_tolerance: float = 5e-6
    scale: Callable[[Tensors, Band], Tensor] = _no_scale
    grad_scale: Callable[[Tensors, Band], Tensor] = _no_scale
    raw_values: dict[str, Any] = field(default_factory=dict)
    banded: bool = True
    elementwise: bool = False
    finite_differences: bool = True
    own_draws: bool = False
    composite: bool = False

    def __str__(self) -> str:
        return f"{self.name}[{self.label}]" if self.label else self.name

    @property
    def op(self) -> Function:
        """The public function under test."""
        from probmoe_ext import ops

        return getattr(ops, self.name)

    @property
    def raw(self) -> Any:
        """The registered op underneath."""
        return getattr(torch.ops.probmoe_ext, self.name).default

    @property
    def reference(self) -> Function:
        """The same in plain torch."""
        return getattr(reference, self.name)

    def call(self, function: Function, tensors: Tensors, band: Band) -> Tensors:
        """Call the op or its reference, and return the outputs as a tuple."""
        k = band[0] if band[0] == band[1] else band
        result = function(*tensors, *([k] if self.banded else []), **self.options)
        return result if isinstance(result, tuple) else (result,)

    def raw_arguments(self, tensors: Tensors, band: Band) -> tuple[Any, ...]:
        """Arguments of the raw op, found by the names in its schema."""
        named = {"k": band[0], "k_min": band[0], "k_max": band[1]}
        given = iter(tensors)
        named |= {
            a.name: next(given) for a in self.raw._schema.arguments if str(a.type) == "Tensor" and a.name != "seed"
        }
        named |= {"seed": torch.tensor(SEED)} | {n: v for n, v in self.options.items() if n != "seed"} | self.raw_values
        return tuple(named[argument.name] for argument in self.raw._schema.arguments)

    def allows(self, band: Band) -> bool:
        """Whether the op takes this band."""
        return band[0] == band[1] or not (self.exact_only or not self.banded)


def floats_of(outputs: Tensors) -> list[Tensor]:
    """The floating-point outputs."""
    return [output for output in outputs if output.is_floating_point()]


def indices_of(outputs: Tensors) -> list[Tensor]:
    """The integer outputs."""
    return [output for output in outputs if not output.is_floating_point()]


def cotangents(outputs: Tensors, seed: int = 5) -> list[Tensor]:
    """Random cotangents of the floating-point outputs: numbers that every dtype holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    normal = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in floats_of(outputs)]
    return [((32 * n).round() / 32).clamp(-4, 4).to(o) for n, o in zip(normal, floats_of(outputs), strict=True)]


def gradients(spec: OpSpec, function: Function, tensors: Tensors, band: Band) -> list[Tensor]:
    """Gradients by the differentiable tensors of the outputs' product with fixed random cotangents."""
    leaves = [t.detach().clone().requires_grad_(i in spec.differentiable) for i, t in enumerate(tensors)]
    outputs = floats_of(spec.call(function, tuple(leaves), band))
    wanted = [leaves[i] for i in spec.differentiable]
    return list(torch.autograd.grad(outputs, wanted, cotangents(tuple(outputs)), materialize_grads=True))


def per_row(unit: Tensor, output: Tensor) -> Tensor:
    """Shape a ``[..., 1]`` unit to broadcast against an output of ``[..., n]`` or ``[...]``."""
    return unit if output.dim() == unit.dim() else unit.squeeze(-1)


def assert_near(got: Tensor, want: Tensor, tolerance: float | Tensor, what: str) -> None:
    """Compare in float64; NaN and infinities must agree in place and sign."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    error = torch.where((got == want) | (got.isnan() & want.isnan()), 0.0, (got - want).abs())
    worst = torch.where(error.isnan(), torch.inf, error) / tolerance
    if worst.numel() and worst.max() > 1:
        at = int(worst.flatten().argmax())
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), worst.shape))
        pytest.fail(
            f"{what}: {got.flatten()[at]:.17g} at {where}, expected {want.flatten()[at]:.17g}: "
            f"{worst.flatten()[at]:.3g} times the tolerance"
        )


def assert_same(got: Tensors, want: Tensors, what: str) -> None:
    """Outputs must agree bit for bit (NaN = NaN)."""
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        form, wanted = (a.dtype, tuple(a.shape)), (b.dtype, tuple(b.shape))
        assert form == wanted, f"{what}: output {number} is {form}, expected {wanted}"
        assert torch.equal(a.nan_to_num(nan=-7.0), b.nan_to_num(nan=-7.0)), f"{what}: output {number} differs"


# glibc's mallopt: new memory is filled with the complement of the value's low byte. All bits set are NaN, and -1.
M_PERTURB, ALL_BITS_SET = -6, 0x100


@contextmanager
def nan_filled_memory() -> Iterator[None]:
    """Make new memory NaN (floats) and out of range (integers), so that unwritten outputs show.

    torch does it for tensors from torch.empty; the operators' own come straight from the allocator, which glibc fills.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        assert mallopt(M_PERTURB, ALL_BITS_SET) == 1
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(M_PERTURB, 0)
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def check_enumeration(spec: OpSpec, function: Function, num_experts: int, band: Band) -> None:
    """Values, and gradients where the oracle has them, against all subsets in float64."""
    sets = logit_sets(3, num_experts, band, torch.float64)
    tensors = spec.tensors(torch.cat(list(sets.values())), band)
    outputs = spec.call(function, tensors, band)
    what = f"{spec} on 3 rows each of {', '.join(sets)}; E={num_experts}, band={band}"
    if spec.oracle_indices is not None:
        assert_same(tuple(indices_of(outputs)), (spec.oracle_indices(tensors, band),), what)
    if spec.oracle is None:
        return
    (got,) = floats_of(outputs)
    assert_near(got, spec.oracle(tensors, band), 1e-12 * per_row(spec.scale(tensors, band), got), what)
    if not spec.differentiable:
        return
    true = gradients(spec, lambda *a, **_: spec.oracle(a[: len(tensors)], band), tensors, band)
    for a, b in zip(gradients(spec, function, tensors, band), true, strict=True):
        assert_near(a, b, 1e-12 * num_experts * spec.grad_scale(tensors, band), "gradient: " + what)


def check_reference(spec: OpSpec, num_rows: int, num_experts: int, band: Band) -> None:
    """Values and gradients in float32 and float64 against the float64 reference at a real size."""
    sets = logit_sets(num_rows, num_experts, band, torch.float64)
    exact = spec.tensors(torch.cat([sets[name] for name in spec.sets]), band)
    want = spec.call(spec.reference, exact, band)
    true_gradients = gradients(spec, spec.reference, exact, band) if spec.differentiable else []
    scale, grad_scale = spec.scale(exact, band), spec.grad_scale(exact, band)
    largest = max([1.0, *(float(c.abs().max()) for c in cotangents(want) if c.numel())])
    for dtype in (torch.float32, torch.float64):
        wide = dtype == torch.float64
        what = f"{spec} {dtype} on {num_rows} rows each of {', '.join(spec.sets)}; E={num_experts}, band={band}"
        tensors = tuple(t.to(dtype) if t.is_floating_point() else t for t in exact)
        got = spec.call(spec.op, tensors, band)
        if spec.own_draws:
            want = spec.call(spec.reference, tensors, band)
            true_gradients = gradients(spec, spec.reference, tensors, band)
        same = torch.ones(len(exact[0]), dtype=torch.bool)
        for a, b in zip(indices_of(got), indices_of(want), strict=True):
            same &= (a == b).all(-1)
        differing = (~same).nonzero().flatten().tolist()
        allowed = 1e-4 * len(same) if spec.sampled else 0
        assert len(differing) <= allowed, f"{what}: indices differ in rows {differing}"
        for a, b in zip(floats_of(got), floats_of(want), strict=True):
            assert a.dtype == dtype, f"{what}: {a.dtype}"
            tolerance = (1e-12 if wide else spec.value_tolerance) * per_row(scale, a)
            assert_near(a[same], b[same], tolerance[same], what)
        if not spec.differentiable:
            continue
        tolerance = (1e-12 if wide else spec.grad_tolerance) * largest * grad_scale
        for a, b in zip(gradients(spec, spec.op, tensors, band), true_gradients, strict=True):
            assert a.dtype == dtype, f"gradient: {what}: {a.dtype}"
            assert_near(a[same], b[same], tolerance[same], "gradient: " + what)


def check_gradcheck(spec: OpSpec, function: Function, num_experts: int, band: Band) -> None:
    """torch.autograd.gradcheck, and gradgradcheck where promised, by finite differences in float64."""
    if not spec.differentiable or not spec.finite_differences:
        return
    logits = logit_sets(2, num_experts, band, torch.float64)["spread 1"]
    tensors = tuple(t.requires_grad_(i in spec.differentiable) for i, t in enumerate(spec.tensors(logits, band)))

    def floats(*arguments: Tensor) -> Tensors:
        return tuple(floats_of(spec.call(function, arguments, band)))

    assert torch.autograd.gradcheck(floats, tensors)
    if spec.twice:
        assert torch.autograd.gradgradcheck(floats, tensors)


def check_half(spec: OpSpec, dtype: torch.dtype, band: Band) -> None:
    """Half precision is float32 arithmetic: the result is the float32 one, rounded, in values and in gradients."""
    logits = logit_sets(5, 24, band, dtype)["spread 1"]
    tensors = spec.tensors(logits, band)
    wide = tuple(t.float() if t.is_floating_point() else t for t in tensors)
    got, want = spec.call(spec.op, tensors, band), spec.call(spec.op, wide, band)
    rounded = tuple(o.to(dtype) if o.is_floating_point() else o for o in want)
    assert_same(got, rounded, f"{spec} {dtype}")
    if spec.differentiable:
        narrow, single = gradients(spec, spec.op, tensors, band), gradients(spec, spec.op, wide, band)
        for a, b in zip(narrow, single, strict=True):
            assert a.dtype == dtype
            assert_near(a, b, torch.finfo(dtype).eps * b.double().abs() + 1e-6, f"gradient: {spec} {dtype}")


def check_strided(spec: OpSpec, band: Band) -> None:
    """Transposed, stepped and expanded inputs give the bits of contiguous ones; so do expanded cotangents."""
    logits = logit_sets(6, 16, band, torch.float32)["spread 1"]
    dense = spec.tensors(logits, band)
    want = spec.call(spec.op, dense, band)

    def transposed(t: Tensor) -> Tensor:
        return t.t().contiguous().t()

    def stepped(t: Tensor) -> Tensor:
        return torch.stack([t, t + 1], dim=-1).flatten(-2)[..., ::2]

    for layout in (transposed, stepped):
        tensors = tuple(layout(t) for t in dense)
        assert tensors[0].stride() != dense[0].stride()
        got = spec.call(spec.op, tensors, band)
        if spec.composite:
            assert_near(got[0], want[0], 1e-6 * want[0].abs().clamp(min=1), f"{spec} {layout.__name__}")
        else:
            assert_same(got, want, f"{spec} {layout.__name__}")
    one_row = tuple(t[:1] for t in dense)
    expanded = tuple(t.expand(6, -1) for t in one_row)
    copied = tuple(t.contiguous() for t in expanded)
    assert_same(spec.call(spec.op, expanded, band), spec.call(spec.op, copied, band), f"{spec} expanded")
    if spec.differentiable:
        leaves = [t.clone().requires_grad_(i in spec.differentiable) for i, t in enumerate(dense)]
        outputs = floats_of(spec.call(spec.op, tuple(leaves), band))
        wanted = [leaves[i] for i in spec.differentiable]
        ones = [torch.ones_like(o) for o in outputs]
        full = torch.autograd.grad(outputs, wanted, ones, retain_graph=True, materialize_grads=True)
        broadcast = [torch.ones((), dtype=o.dtype).expand(o.shape) for o in outputs]
        lazy = torch.autograd.grad(outputs, wanted, broadcast, materialize_grads=True)
        assert_same(tuple(lazy), tuple(full), f"{spec} expanded cotangent")


def check_batch_shapes(spec: OpSpec, band: Band) -> None:
    """No batch dimension, several, and none of anything: shapes follow, rows are those of the flat batch."""
    logits = logit_sets(6, 16, band, torch.float32)["spread 1"]
    dense = spec.tensors(logits, band)
    flat = spec.call(spec.op, dense, band)
    deep = spec.call(spec.op, tuple(t.reshape(2, 3, -1) for t in dense), band)
    assert_same(deep, tuple(o.reshape(2, 3, *o.shape[1:]) for o in flat), f"{spec} [2, 3, E]")
    single = spec.call(spec.op, tuple(t[0] for t in dense), band)
    for a, b in zip(single, flat, strict=True):
        assert a.shape == b.shape[1:]
        assert_near(a, b[0], 1e-5 * b[0].double().abs().clamp(min=1), f"{spec} [E]")
    for shape in ((0,), (3, 0)):
        empty = tuple(t.new_empty((*shape, t.shape[-1])) for t in dense)
        for a, b in zip(spec.call(spec.op, empty, band), flat, strict=True):
            assert a.shape == (*shape, *b.shape[1:]) and a.dtype == b.dtype
        if spec.differentiable:
            for position, gradient in zip(spec.differentiable, gradients(spec, spec.op, empty, band), strict=True):
                assert gradient.shape == empty[position].shape


def check_written(spec: OpSpec, band: Band) -> None:
    """No output, and no gradient, shows memory that nobody wrote; odd row counts leave SIMD tails."""
    for num_rows in (1, 7, 33):
        tensors = spec.tensors(logit_sets(num_rows, 19, band, torch.float32)["half masked"], band)
        with nan_filled_memory():
            got = spec.call(spec.op, tensors, band)
            grads = gradients(spec, spec.op, tensors, band) if spec.differentiable else []
        assert_same(got, spec.call(spec.op, tensors, band), f"{spec} in NaN-filled memory")
        for output in (*floats_of(got), *grads):
            assert not output.isnan().any(), f"{spec}: NaN in an output"
        if spec.differentiable:
            again = gradients(spec, spec.op, tensors, band)
            assert_same(tuple(grads), tuple(again), f"gradient: {spec} in NaN-filled memory")


def check_edges(spec: OpSpec, num_experts: int, band: Band) -> None:
    """NaN and +inf poison their own row only; indices stay in range; all else matches the float64 reference."""
    sets = logit_sets(4, num_experts, band, torch.float32)
    for bad in (torch.nan, torch.inf):
        tensors = spec.tensors(sets["spread 1"], band)
        first = tensors[0].clone()
        first[1, num_experts // 2] = bad
        spoilt = (first, *tensors[1:])
        got, clean = spec.call(spec.op, spoilt, band), spec.call(spec.op, tensors, band)
        for a, b in zip(got, clean, strict=True):
            kept = torch.tensor([0, 2, 3])
            assert_same((a[kept],), (b[kept],), f"{spec} beside a row with {bad}")
        for output in floats_of(got):
            indices = indices_of(got)
            used = torch.ones_like(output[1], dtype=torch.bool)
            if indices and output.shape == indices[0].shape:
                used = indices[0][1] < num_experts
            if spec.elementwise:
                want = spec.call(spec.reference, spoilt, band)[0][1]
                assert torch.equal(output[1].isnan(), want.isnan()), f"{spec} with {bad}, band={band}: {output[1]}"
                used = torch.arange(num_experts) == num_experts // 2 if bad is torch.nan else want.isnan()
            assert output[1][used].isnan().all(), f"{spec} with {bad}, band={band}: {output[1]}"
        for indices in indices_of(got):
            assert ((indices >= 0) & (indices <= num_experts)).all(), f"{spec} with {bad}: {indices}"


def check_threads(spec: OpSpec, band: Band, with_threads: Callable[[int, Function], Any]) -> None:
    """One thread and two give the same bits."""
    tensors = spec.tensors(logit_sets(700, 24, band, torch.float32)["spread 1"], band)
    one, two = (with_threads(n, lambda: spec.call(spec.op, tensors, band)) for n in (1, 2))
    assert_same(one, two, f"{spec} on 1 and 2 threads")


def check_opcheck(spec: OpSpec, band: Band, dtype: torch.dtype) -> None:
    """torch.library.opcheck on the raw op: schema, fake kernel, autograd registration, AOT dispatch, dynamic shapes."""
    logits = logit_sets(3, 12, band, dtype)["spread 1"]
    tensors = tuple(t.requires_grad_(i in spec.differentiable) for i, t in enumerate(spec.tensors(logits, band)))
    torch.library.opcheck(spec.raw, spec.raw_arguments(tensors, band))


def check_meta(spec: OpSpec, band: Band) -> None:
    """On the meta device the public function gives the shapes and dtypes of the CPU's results, and no values."""
    for num_rows in (0, 3):
        logits = logit_sets(3, 12, band, torch.float32)["spread 1"][:num_rows]
        tensors = spec.tensors(logits, band)
        abstract = spec.call(spec.op, tuple(t.to("meta") for t in tensors), band)
        for a, b in zip(abstract, spec.call(spec.op, tensors, band), strict=True):
            assert (a.device.type, a.dtype, a.shape, a.stride()) == ("meta", b.dtype, b.shape, b.stride())


def check_vmap(spec: OpSpec, band: Band) -> None:
    """torch.vmap over a batch dimension is the batched call; sampled rows are numbered along the mapped dimension."""
    flat = spec.tensors(logit_sets(6, 16, band, torch.float32)["spread 1"], band)
    dense = tuple(t.reshape(2, 3, -1) for t in flat)
    want = spec.call(spec.op, dense, band)
    assert_same(torch.vmap(lambda *t: spec.call(spec.op, t, band))(*dense), want, f"vmap of {spec}")
    if not spec.sampled:
        inner = torch.vmap(lambda *t: spec.call(spec.op, t, band), in_dims=1, out_dims=1)(*dense)
        assert_same(inner, want, f"vmap of {spec} over dimension 1")


def check_compile(spec: OpSpec, band: Band, backend: str) -> None:
    """torch.compile(fullgraph=True) of forward and backward agrees with eager."""
    torch._dynamo.reset()  # All ops share the code below: without this they would use up its recompilations.
    tensors = spec.tensors(logit_sets(5, 16, band, torch.float32)["spread 1"], band)
    compiled = torch.compile(lambda *t: spec.call(spec.op, t, band), fullgraph=True, backend=backend)
    got, want = compiled(*tensors), spec.call(spec.op, tensors, band)
    assert_same(got, want, f"compiled {spec}")
    if spec.differentiable:
        compiled_op = torch.compile(spec.op, fullgraph=True, backend=backend)
        for a, b in zip(
            gradients(spec, compiled_op, tensors, band), gradients(spec, spec.op, tensors, band), strict=True
        ):
            assert_near(a, b, 1e-6, f"gradient: compiled {spec}")


def check_cuda(spec: OpSpec, band: Band, device: torch.device) -> None:
    """On a side stream the GPU computes what the CPU does, values and gradients."""
    tensors = spec.tensors(logit_sets(257, 64, band, torch.float32)["spread 1"], band)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        there = tuple(t.to(device) for t in tensors)
        got = tuple(o.cpu() for o in spec.call(spec.op, there, band))
        grads = [g.cpu() for g in gradients(spec, spec.op, there, band)] if spec.differentiable else []
    stream.synchronize()
    want = spec.call(spec.op, tensors, band)
    for a, b in zip(indices_of(got), indices_of(want), strict=True):
        assert torch.equal(a, b), f"{spec}: CUDA indices differ"
    for a, b in zip(floats_of(got), floats_of(want), strict=True):
        assert_near(a, b, 2 * spec.value_tolerance * b.double().abs().clamp(min=1), f"{spec}: CUDA")
    for a, b in zip(grads, gradients(spec, spec.op, tensors, band) if grads else [], strict=True):
        assert_near(a, b, 2 * spec.grad_tolerance * max(1.0, float(b.abs().max())), f"gradient: {spec}: CUDA")
