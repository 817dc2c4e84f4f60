"""A saved model comes back as it was, and never halfway; what knows nothing of this package says what it leaves out."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import probmoe_ext
from probmoe_ext.hf import model_card, push_to_hub, restore_router, routing_of, save_pretrained, swap_router
from probmoe_ext.routers import register_router
from tests.hf.models import FAMILIES, LAYERS, K, gates, tiny, tokens
from tests.hf.test_models import swappable
from tests.routers.balance import BiasedRouter

families = pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss", "ernie", "deepseek_v3"])
pytestmark = pytest.mark.filterwarnings("ignore:the '.*' implementation of .* computes slots")


@pytest.fixture
def biased() -> None:
    """Register a router with a parameter and a buffer outside the state dict."""
    register_router("biased")(BiasedRouter)


@contextmanager
def said() -> Iterator[io.StringIO]:
    """What transformers logs."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield stream
    finally:
        logger.removeHandler(handler)


@families
@pytest.mark.parametrize("k", [None, 1, (1, 2)], ids=["own k", "k=1", "band"])
def test_what_was_saved_is_loaded(family: str, k: Any, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if k == (1, 2) else torch.float32
    swappable(family).save_pretrained(tmp_path / "base")
    ids, model = tokens(), AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype).eval()
    original, own_k = model(ids).logits, model.config.num_experts_per_tok
    swap_router(model, "probmoe", k=k, backward="ste").save_pretrained(tmp_path / "routed")
    loaded = probmoe_ext.from_pretrained(tmp_path / "routed", dtype=dtype)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert routing_of(loaded) == routing_of(model)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert loaded(ids).logits.equal(model(ids).logits)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert restore_router(loaded)(ids).logits.equal(original)
    assert not hasattr(loaded.config, "probmoe")
    assert loaded.config.num_experts_per_tok == own_k


@pytest.mark.usefixtures("biased")
@families
def test_parameters_of_routers_travel(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BiasedRouter, "takes_scores", True, raising=False)
    forward = BiasedRouter.forward
    monkeypatch.setattr(BiasedRouter, "forward", lambda self, x, logits, scores=None: forward(self, x, logits))
    ids, model = tokens(), swap_router(swappable(family), "biased", k=2, coefficient=0.25)
    routers = [module for module in model.modules() if isinstance(module, BiasedRouter)]
    for router in routers:
        torch.nn.init.normal_(router.bias)
    model.save_pretrained(tmp_path)
    loaded, info = probmoe_ext.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    others = [module for module in loaded.modules() if isinstance(module, BiasedRouter)]
    assert len(others) == len(routers) > 0
    for one, other in zip(routers, others, strict=True):
        assert other.bias.equal(one.bias)
        assert float(other.loss_scale) == 1.0
        assert other.coefficient == 0.25
        assert other.bias.requires_grad
    assert loaded(ids).logits.equal(model(ids).logits)
    loss = loaded.train()(ids, labels=ids).loss
    loss.backward()
    assert all(other.bias.grad.isfinite().all() for other in others)

    with said() as log:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "UNEXPECTED" in log.getvalue()
    assert "probmoe.bias" in log.getvalue()
    assert plain.eval()(ids).logits.equal(restore_router(model)(ids).logits)


def test_a_plain_loader_says_that_it_loads_another_routing(tmp_path: Path) -> None:
    ids, model = tokens(), swap_router(tiny("olmoe"), "probmoe", k=(1, 3))
    model.save_pretrained(tmp_path)
    with said() as log:
        plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert "UNEXPECTED" in log.getvalue()
    assert "mlp.gate.probmoe.experts_per_token" in log.getvalue()
    expected = {f"model.layers.{index}.mlp.gate.probmoe.experts_per_token" for index in range(LAYERS)}
    assert set(info["unexpected_keys"]) == expected
    assert routing_of(plain) == {}
    assert plain.eval()(ids).logits.equal(tiny("olmoe")(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("k", [2, K])
def test_exact_k_is_an_ordinary_checkpoint(family: str, k: int, tmp_path: Path) -> None:
    ids, model = tokens(), swap_router(tiny(family), "probmoe", k=k)
    model.save_pretrained(tmp_path)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert json.loads((tmp_path / "config.json").read_text())["num_experts_per_tok"] == k
    # At another k the swapped model computes by this package's operator, in another order of additions.
    torch.testing.assert_close(plain.eval()(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert plain(ids).logits.equal(tiny(family, num_experts_per_tok=k)(ids).logits)


def test_layers_that_differ_are_told_apart(tmp_path: Path) -> None:
    ids, model = tokens(), swap_router(tiny("olmoe"), "probmoe", k=2, layers=[0])
    swap_router(model, "topk", layers=[2])
    assert [name for name in model.state_dict() if "probmoe" in name] == [
        "model.layers.0.mlp.gate.probmoe.experts_per_token"
    ]
    assert model.config.num_experts_per_tok == K
    model.save_pretrained(tmp_path)
    loaded = probmoe_ext.from_pretrained(tmp_path)
    assert routing_of(loaded) == routing_of(model)
    assert loaded(ids).logits.equal(model(ids).logits)
    swap_router(loaded, "probmoe", k=2)
    assert loaded.config.num_experts_per_tok == 2
    assert not any("probmoe" in name for name in loaded.state_dict())
    swap_router(loaded, "probmoe", k=2, normalize=True)
    assert loaded.config.num_experts_per_tok == K


def test_a_model_without_its_head_finds_its_gates(tmp_path: Path) -> None:
    ids, model = tokens(), swap_router(tiny("olmoe"), "probmoe", k=(1, 3))
    model.save_pretrained(tmp_path)
    inner = probmoe_ext.from_pretrained(tmp_path, model_class=type(AutoModel.from_config(tiny("olmoe").config)))
    assert inner(ids).last_hidden_state.equal(model.model(ids).last_hidden_state)


def test_arguments_reach_the_library(tmp_path: Path) -> None:
    swap_router(tiny("olmoe"), "probmoe", k=2).save_pretrained(tmp_path)
    loaded = probmoe_ext.from_pretrained(
        tmp_path, dtype="bfloat16", experts_implementation="eager", output_router_logits=True, local_files_only=True
    )
    assert loaded.dtype == torch.bfloat16
    assert loaded.config._experts_implementation == "eager"
    assert loaded.config.output_router_logits is True
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tmp_path)
    assert probmoe_ext.from_pretrained(tmp_path, config=config).config.num_experts_per_tok == 2


def test_what_does_not_fit_is_refused(tmp_path: Path, biased: None) -> None:
    tiny("olmoe").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"plain has no routing in its config\.json.*swap_router"):
        probmoe_ext.from_pretrained(tmp_path / "plain")
    with pytest.raises(OSError, match="nowhere"):
        probmoe_ext.from_pretrained(tmp_path / "nowhere")

    swap_router(tiny("olmoe"), "biased", k=2).save_pretrained(tmp_path / "lost")
    weights = load_file(tmp_path / "lost" / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.endswith("1.mlp.gate.probmoe.bias")}
    save_file(kept, tmp_path / "lost" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks the state of its routers: model\.layers\.1\.mlp\.gate\.probmoe\.bias$"
    ):
        probmoe_ext.from_pretrained(tmp_path / "lost")

    swap_router(tiny("olmoe"), "probmoe", k=(1, 3)).save_pretrained(tmp_path / "band")
    path = tmp_path / "band" / "config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"k": [1, 2]}, r"says k = \(1, 2\) in config.json, and \[1, 3\] in model.layers.0.mlp.gate"),
        ({"gates": ["model.layers.0.mlp.gate", "model.layers.9.mlp.gate"]}, "routes 2 layers .* has 1"),
        ({"router": "unheard-of"}, "router must be one of .*; got 'unheard-of'"),
    ):
        entry = {"routing": [config["probmoe"]["routing"][0] | change], "config": {}}
        path.write_text(json.dumps(config | {"probmoe": entry}))
        with pytest.raises(ValueError, match=message):
            probmoe_ext.from_pretrained(tmp_path / "band")
    path.write_text(json.dumps(config | {"probmoe": ["k"]}))
    with pytest.raises(ValueError, match=r"'probmoe' in config\.json is damaged"):
        probmoe_ext.from_pretrained(tmp_path / "band")
    path.write_text(json.dumps(config | {"architectures": ["Unheard"]}))
    with pytest.raises(ValueError, match=r"names no model class .*\['Unheard'\]\); give model_class"):
        probmoe_ext.from_pretrained(tmp_path / "band")


def test_an_option_that_cannot_be_saved_is_refused_at_once(biased: None) -> None:
    model = tiny("olmoe")
    with pytest.raises(TypeError, match="option 'coefficient' of router 'biased' cannot be saved in JSON: Tensor"):
        swap_router(model, "biased", k=2, coefficient=torch.ones(()))
    assert routing_of(model) == {}
    assert not hasattr(model.config, "probmoe")


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, folder = tokens(), tmp_path / "model"
    first, second = swap_router(tiny("olmoe"), "probmoe", k=(1, 3)), swap_router(tiny("mixtral"), "probmoe")
    save_pretrained(first, folder)
    (folder / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def broken(self: Any, directory: Any, **kwargs: Any) -> None:
        (Path(directory) / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(second), "save_pretrained", broken)
        for target in (folder, tmp_path / "new"):
            with pytest.raises(OSError, match="No space left"):
                save_pretrained(second, target)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    save_pretrained(first, folder, max_shard_size="20KB")
    assert not (folder / "model.safetensors").exists()
    assert probmoe_ext.from_pretrained(folder)(ids).logits.equal(first(ids).logits)
    save_pretrained(second, folder)
    assert {path.name for path in folder.iterdir() if "model" in path.name} == {"model.safetensors"}
    assert (folder / "notes.txt").read_text() == "mine"
    assert probmoe_ext.from_pretrained(folder)(ids).logits.equal(second(ids).logits)
    with pytest.raises(NotADirectoryError, match="is a file; give a folder"):
        save_pretrained(first, folder / "notes.txt")


def test_the_model_card_says_how_it_routes(tmp_path: Path) -> None:
    model = swap_router(tiny("olmoe"), "probmoe", k=(1, 3), layers=[0, 1])
    swap_router(model, "topk", k=2, layers=[2])
    save_pretrained(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    options = "`normalize=False`, `forward='sample'`, `backward='marginal'`"
    assert f"| `probmoe` | 1 to 3 | {options} | 0–1 |" in card
    assert "| `topk` | 2 | `normalize=False` | 2 |" in card
    assert "probmoe_ext.from_pretrained(" in card
    assert "reports the tensors `*.probmoe.*`" in card
    (tmp_path / "README.md").write_text(f"# My model\n\n{card.split('---')[-1].lstrip()}\n## Data\n\nMine.\n")
    save_pretrained(swap_router(model, "probmoe"), tmp_path)
    again = (tmp_path / "README.md").read_text()
    assert again.startswith("# My model\n")
    assert "## Data\n\nMine.\n" in again
    assert again.count("## Routing") == 1
    assert "any software that runs the base model runs this" in again
    assert model_card(tiny("olmoe")) == ""


def test_the_layout_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    uploads: dict[str, Any] = {}

    class Api:
        def __init__(self, token: Any = None) -> None:
            uploads["token"] = token

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            uploads.update(kwargs)
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, **kwargs: Any) -> str:
            folder = Path(kwargs.pop("folder_path"))
            uploads.update(kwargs, files={path.name: path.read_bytes() for path in folder.iterdir()})
            return "commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    ids, model = tokens(), swap_router(tiny("olmoe"), "probmoe", k=(1, 3))
    assert push_to_hub(model, "routed", private=True, token="secret", revision="draft") == "commit"
    files = uploads.pop("files")
    assert set(files) == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    message = "Upload a model with its routing"
    assert uploads == {"token": "secret", "private": True, "exist_ok": True, "repo_id": "me/routed"} | {
        "revision": "draft",
        "commit_message": message,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert probmoe_ext.from_pretrained(tmp_path)(ids).logits.equal(model(ids).logits)


def test_a_copy_of_a_model_has_its_own_entry() -> None:
    import copy

    model = swap_router(tiny("olmoe"), "probmoe", k=(1, 3))
    other = copy.deepcopy(model)
    restore_router(model)
    assert not hasattr(model.config, "probmoe")
    assert other.config.probmoe["routing"][0]["k"] == [1, 3]
    assert all(gate.probmoe.experts_per_token.tolist() == [1, 3] for gate in gates(other))
