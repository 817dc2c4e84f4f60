"""Padding counts in no auxiliary loss: found from the attention mask, or said in a context."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from probmoe_ext.hf import add_router_losses, padding_mask, restore_router, swap_router
from probmoe_ext.routers import aux_losses, load_balancing_loss, z_loss
from tests.hf.models import LAYERS, E, K, gates, tiny, tokens

ks = pytest.mark.parametrize("k", [K, (1, K)], ids=str)


def prepared(family: str = "olmoe", k: Any = (1, K), **changes: Any) -> Any:
    model = swap_router(tiny(family, **changes).train(), "probmoe", k=k)
    return add_router_losses(model, load_balancing=0.5, z=0.25)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Two sentences, one shorter; padding is on the right."""
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return ids.masked_fill(mask == 0, 0), mask


def gradient(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Of the auxiliary losses alone, in the last gate: the model's own loss is multiplied by 0 after it was watched."""
    model.zero_grad()
    torch.manual_seed(5)
    model(*args, **kwargs).logits.mul(0).sum().backward()
    found: torch.Tensor = gates(model)[-1].weight.grad.clone()
    return found


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
@ks
def test_the_losses_are_those_of_the_tokens_that_count(family: str, k: Any) -> None:
    ids, mask = padded()
    model = prepared(family, k)
    seen: dict[str, Any] = {}
    router = gates(model)[-1].probmoe
    hook = router.register_forward_hook(lambda router, args, out: seen.update(logits=args[1], out=out[1]))
    model(ids, attention_mask=mask)
    losses = aux_losses(model)
    assert len(losses) == 2 * LAYERS
    keep = mask.flatten().bool()
    path = f"model.layers.{LAYERS - 1}.mlp.gate.probmoe"
    torch.testing.assert_close(
        losses[f"{path}.load_balancing"], 0.5 * load_balancing_loss(seen["logits"][keep], seen["out"][keep], k)
    )
    torch.testing.assert_close(losses[f"{path}.z"], 0.25 * z_loss(seen["logits"][keep]))
    hook.remove()
    # What is behind the padding has no part in it.
    other = ids.masked_fill(mask == 0, 9)
    assert gradient(model, ids, attention_mask=mask).equal(gradient(model, other, attention_mask=mask))
    assert not gradient(model, ids).equal(gradient(model, ids, attention_mask=mask))


def test_every_way_to_say_it() -> None:
    ids, mask = padded()
    model = prepared()
    expected = gradient(model, ids, attention_mask=mask)
    assert gradient(model, ids, mask).equal(expected)
    assert gradient(model, input_ids=ids, attention_mask=mask.bool()).equal(expected)
    causal = torch.ones(12, 12).tril().bool() & mask.bool()[:, None, None, :]
    for keep in (mask, mask.bool(), mask.flatten()):
        with padding_mask(model, keep):
            torch.testing.assert_close(gradient(model, ids, attention_mask=causal), expected, rtol=1e-4, atol=1e-7)
    # The context goes before the argument, and leaves nothing behind.
    with padding_mask(model, torch.ones_like(mask)):
        everything = gradient(model, ids, attention_mask=mask)
    assert not everything.equal(expected)
    assert gradient(model, ids, attention_mask=mask).equal(expected)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_replayed_layer_sees_the_same_padding(use_reentrant: bool) -> None:
    ids, mask = padded()
    model = prepared()
    expected = gradient(model, ids, attention_mask=mask)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    torch.testing.assert_close(gradient(model, ids, attention_mask=mask), expected, rtol=1e-5, atol=1e-8)


def test_the_loss_is_scaled_and_accumulated_as_the_models_own() -> None:
    ids, mask = padded()
    model = prepared()
    plain = swap_router(tiny("olmoe").train(), "probmoe", k=(1, K))
    alone = gradient(model, ids, attention_mask=mask)
    found = []
    for one in (model, plain):
        one.zero_grad()
        for _ in range(2):
            torch.manual_seed(5)
            (one(ids, attention_mask=mask, labels=ids).loss * 256 / 2).backward()
        found.append(gates(one)[-1].weight.grad / 256)
    torch.testing.assert_close(found[0] - found[1], alone, rtol=1e-3, atol=1e-6)


def test_it_compiles_in_one_graph() -> None:
    ids, mask = padded()
    model = prepared(num_hidden_layers=1)
    expected = gradient(model, ids, attention_mask=mask)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
        torch.manual_seed(5)
        compiled(ids, attention_mask=mask).logits.mul(0).sum().backward()
    except torch._dynamo.exc.TorchDynamoException:
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            torch.compile(tiny("olmoe").train(), fullgraph=True, backend="aot_eager")(ids, attention_mask=mask)
        pytest.skip("this transformers cannot compile the model as it came, either")
    torch.testing.assert_close(gates(compiled)[-1].weight.grad, expected, rtol=1e-4, atol=1e-7)


def test_nothing_stays_behind() -> None:
    ids, mask = padded()
    model = tiny("olmoe").train()
    before = [sorted(module.__dict__) for module in model.modules()]
    with padding_mask(model, mask):
        model(ids)
    assert [sorted(module.__dict__) for module in model.modules()] == before
    swap_router(model, "probmoe", k=2)
    add_router_losses(model, z=0.1)
    model(ids, attention_mask=mask)
    assert gates(model)[0].probmoe.token_mask.equal(mask.flatten().bool())
    model.eval()(ids, attention_mask=mask)
    assert gates(model)[0].probmoe.token_mask is None
    add_router_losses(model, z=0.1)
    assert len(gates(model)[0].probmoe._forward_hooks) == 1
    restore_router(model)
    model.train()
    assert [sorted(module.__dict__) for module in model.modules()] == before
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_generation_with_a_cache() -> None:
    ids, mask = padded()
    model = prepared().eval()
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = swap_router(tiny("olmoe"), "probmoe", k=(1, K)).generate(ids, attention_mask=mask, **options)
    assert model.generate(ids, attention_mask=mask, **options).equal(expected)
    # In training mode the mask is kept, and must fit each step.
    model.train()
    model.generate(ids.flip(1), attention_mask=mask.flip(1), **options)


def test_what_is_refused() -> None:
    ids, mask = padded()
    with pytest.raises(ValueError, match="OlmoeForCausalLM has no swapped router to add a loss to"):
        add_router_losses(tiny("olmoe"), z=0.1)
    model = swap_router(tiny("olmoe").train(), "probmoe")
    with pytest.raises(ValueError, match="z must be a number that is at least 0, got -1"):
        add_router_losses(model, z=-1)
    with pytest.raises(ValueError, match="probabilities must be one of marginals, softmax; got 'all'"):
        add_router_losses(model, z=1, probabilities="all")  # type: ignore[arg-type]
    add_router_losses(model, z=0.1)
    with (
        padding_mask(model, mask[:, :5]),
        pytest.raises(ValueError, match="the padding mask has 10 values, and the router sees 24 tokens"),
    ):
        model(ids)
    assert E > K
