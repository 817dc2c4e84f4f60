"""What two processes check together: ``torchrun --nproc-per-node 2 -m tests.hf.workers.parallel ddp fsdp2 ep tp``.

Every process has the same seed and the same batch. What each must do by itself is known: the same model, alone, with
the process's stream of draws. So choices must be those of one's own reference, gradients the mean of both.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from probmoe_ext.hf import RoutingMonitor, add_router_losses, record_routing, swap_router
from probmoe_ext.ops import sample_stream, set_sample_stream
from tests.hf.models import K, experts, tiny, tokens
from tests.hf.workers import leave

BAND = (1, K)


def prepared(**options: Any) -> Any:
    model = swap_router(tiny("olmoe", **options).train(), "probmoe", k=BAND)
    return add_router_losses(model, load_balancing=0.1, z=0.01)


def padded() -> dict[str, torch.Tensor]:
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def run(call: Any, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients by the parameter's name, and choices by the gate's path, of one step from one seed."""
    torch.manual_seed(11)
    with record_routing(model) as record:
        call(**padded()).loss.backward()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return gradients, record.passes[0]


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def references() -> list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """What each process does by itself."""
    found = []
    for stream in range(dist.get_world_size()):
        set_sample_stream(stream)
        model = prepared()
        found.append(run(model, model))
    set_sample_stream(None)
    return found


def check_averaged(call: Any, model: Any, expected: list[Any]) -> None:
    gradients, choices = run(call, model)
    own = expected[dist.get_rank()][1]
    assert all(choices[path].equal(own[path]) for path in own), "not the choices of one's own stream"
    other = expected[1 - dist.get_rank()][1]
    assert not any(choices[path].equal(other[path]) for path in other), "the processes draw the same"
    assert list(gradients) == list(expected[0][0])
    for name, gradient in gradients.items():
        mean = sum(one[0][name] for one in expected) / len(expected)
        torch.testing.assert_close(gradient, mean, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def ddp() -> None:
    expected, model = references(), prepared()
    wrapped = DistributedDataParallel(model)
    with RoutingMonitor(model) as monitor:
        check_averaged(wrapped, model, expected)
    report = monitor.report()
    assert report["layers"]["model.layers.0.mlp.gate"]["tokens"] == 2 * int(padded()["attention_mask"].sum())
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    assert reports[0] == reports[1]


def sharded(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp2() -> None:
    expected = references()
    model = sharded(prepared())
    with RoutingMonitor(model) as monitor:
        check_averaged(model, model, expected)
    assert monitor.report()["mean"]["drift"] == 0
    # A model that is sharded already can be swapped, too.
    model = sharded(tiny("olmoe").train())
    add_router_losses(swap_router(model, "probmoe", k=BAND), load_balancing=0.1, z=0.01)
    check_averaged(model, model, expected)


def saved() -> str:
    """A folder with a model that one process made and all see."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        tiny("olmoe").save_pretrained(folder[0])
    dist.barrier()
    return folder[0]


def loaded(**options: Any) -> Any:
    """A model that the library splits as it loads it."""
    return AutoModelForCausalLM.from_pretrained(saved(), **options)


def check_split(model: Any) -> None:
    """The library's plan and a swapped router together compute what one process does."""
    batch = padded()
    for k in (2, BAND):
        alone = swap_router(tiny("olmoe").train(), "probmoe", k=k)
        swap_router(model.train(), "probmoe", k=k)
        assert sample_stream() == 0, "processes that share a batch must draw the same"
        results = []
        for one in (alone, model):
            one.zero_grad()
            torch.manual_seed(11)
            with record_routing(one) as record:
                loss = one(**batch).loss
                loss.backward()
            gradients = [whole(layer.mlp.gate.weight.grad) for layer in one.model.layers]
            results.append((record.passes[0], loss.detach(), gradients))
            one.eval()
            with torch.no_grad():
                results[-1] = (*results[-1], one(**batch).logits)
            one.train()
        for path, choice in results[0][0].items():
            assert results[1][0][path].equal(choice), f"{path} chose otherwise"
        for mine, theirs in zip(results[0][1:], results[1][1:], strict=True):
            torch.testing.assert_close(theirs, mine, rtol=1e-3, atol=1e-5)
    set_sample_stream(None)


def ep() -> None:
    from transformers.distributed import DistributedConfig

    model = loaded(distributed_config=DistributedConfig(tp_size=2, ep_size=2))
    assert experts(model)[0].num_experts == 4
    check_split(model)


def tp() -> None:
    check_split(loaded(tp_plan="auto"))


def zero(stage: int) -> None:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    # What one process would do with the mean of both gradients.
    expected, alone = references(), prepared()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.5)
    for name, parameter in alone.named_parameters():
        parameter.grad = sum(one[0][name] for one in expected) / len(expected) if name in expected[0][0] else None
    optimizer.step()

    def train(model: Any) -> None:
        client = torch.optim.SGD(model.parameters(), lr=0.5)
        engine, *_ = deepspeed.initialize(model=model, optimizer=client, config=copy.deepcopy(config))
        torch.manual_seed(11)
        monitor = RoutingMonitor(model)
        with record_routing(model) as record, monitor:
            loss = engine(**padded()).loss
            engine.backward(loss)
        engine.step()
        report = monitor.report()
        assert report["layers"]["model.layers.0.mlp.gate"]["tokens"] == 2 * int(padded()["attention_mask"].sum())
        assert report["mean"]["drift_kl"] < 1e-6
        own = expected[dist.get_rank()][1]
        assert all(record.passes[0][path].equal(own[path]) for path in own), "not the choices of one's own stream"
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters(parameter, enabled=stage == 3):
                torch.testing.assert_close(
                    parameter.detach(),
                    dict(alone.named_parameters())[name],
                    rtol=1e-4,
                    atol=1e-6,
                    msg=lambda text, n=name: f"{n}: {text}",
                )
        engine.destroy()

    train(prepared())
    if stage == 3:
        # Parameters that are partitioned as the model is loaded.
        from transformers.integrations import HfDeepSpeedConfig

        folder = saved()  # before the configuration, under which making a model takes every process
        kept = HfDeepSpeedConfig(copy.deepcopy(config))
        model = AutoModelForCausalLM.from_pretrained(folder).train()
        assert kept.is_zero3()
        assert model.model.layers[0].mlp.gate.weight.numel() == 0
        train(add_router_losses(swap_router(model, "probmoe", k=BAND), load_balancing=0.1, z=0.01))


CHECKS: dict[str, Callable[[], None]] = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "ep": ep,
    "tp": tp,
    "zero2": lambda: zero(2),
    "zero3": lambda: zero(3),
}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    if any(name.startswith("zero") for name in names):
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    else:
        dist.init_process_group("gloo")
    for name in names:
        CHECKS[name]()
        print(f"{name}: ok on process {dist.get_rank()}", flush=True)
    leave()


if __name__ == "__main__":
    main(sys.argv[1:])
