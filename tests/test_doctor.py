"""The doctor: what it says of a healthy installation, and that it names what is wrong with a broken one."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import probmoe_ext
from probmoe_ext import diagnosis, ops
from probmoe_ext.cli import main
from probmoe_ext.selftest import FAMILIES, check_operators
from tools.requirements import requirements

ROOT = Path(__file__).resolve().parents[1]


def test_a_healthy_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"{torch.__version__}" in text
    assert probmoe_ext.build_info()["instruction_set"] in text
    for name in (*FAMILIES, "swap into an OLMoE"):
        assert re.search(rf"^self-test, cpu +{name} +ok \(", text, re.MULTILINE)
    assert text.endswith("all well\n")


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert found["problems"] == []
    assert found["packages"]["torch"]["version"] == importlib.metadata.version("torch")
    assert {check["name"] for check in found["checks"]} == {*FAMILIES, "swap into an OLMoE"}
    assert all(check["ok"] for check in found["checks"])


@pytest.mark.parametrize("fault", ["value", "gradient", "error"])
def test_a_wrong_operator_is_found(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ops.subset_marginals

    def wrong(logits: torch.Tensor, k: object) -> torch.Tensor:
        if fault == "error":
            raise RuntimeError("no\nkernel")
        result = right(logits, k)  # type: ignore[arg-type]
        return 1.001 * result if fault == "value" else result + 0.001 * (logits - logits.detach())

    monkeypatch.setattr(ops, "subset_marginals", wrong)
    assert main(["doctor", "--quiet"]) == 1
    text = capsys.readouterr().out
    assert text.count("\n") == 1
    reason = "RuntimeError: no kernel" if fault == "error" else "call 3 in float64 differs from the reference"
    assert f"subset law             failed: {reason}" in text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_operators_of_the_gpu() -> None:
    assert [outcome.reason for outcome in check_operators("cuda")] == [None] * len(FAMILIES)


def test_an_extension_that_is_not_built(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "probmoe_ext", tmp_path / "probmoe_ext", ignore=shutil.ignore_patterns("_C*.so", "_*cache*"))
    # An editable installation would find the extension that it has; here it must not be looked for.
    (tmp_path / "probmoe_ext" / "_C.py").write_text("raise ImportError('no _C')\n", "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "probmoe_ext", "doctor"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == ""
    assert "problem: the extension cannot be imported: it is not built; build it: pip install" in done.stdout
    assert "self-test" not in done.stdout


def test_an_extension_that_does_not_load(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ImportError("undefined symbol:\n aoti_torch_new")

    monkeypatch.setattr(probmoe_ext, "build_info", fail)
    assert main(["doctor"]) == 1
    assert "the extension cannot be imported: undefined symbol: aoti_torch_new; build it" in capsys.readouterr().out


def test_packages_that_are_missing_or_old(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    version, known = importlib.metadata.version, {"torch": "2.9.1+cu128", "transformers": "5.0.0rc1", "peft": None}

    def pretended(name: str) -> str:
        found = known.get(name, "") or (version(name) if name not in known else None)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", pretended)
    found = diagnosis.diagnose()
    assert found["problems"] == ["torch 2.9.1+cu128 is too old, 2.10 or newer is needed: pip install 'torch>=2.10'"]
    assert found["packages"]["transformers"]["note"] is None
    assert found["packages"]["peft"]["note"] == "not installed: pip install 'probmoe_ext[test]'"
    known["torch"] = None  # type: ignore[assignment]
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "problem: torch is not installed: pip install 'torch>=2.10'" in text
    assert "self-test" not in text


def test_what_is_needed_is_what_the_package_declares() -> None:
    declared = dict(line.split(";")[0].split(">=") for line in [*requirements("test"), "torch>=2.10"] if ">=" in line)
    assert {name: needs for name, (needs, _) in diagnosis.NEEDED.items()} == {
        name: declared[name] for name in diagnosis.NEEDED
    }


@pytest.mark.parametrize(
    ("architectures", "capability", "covered"),
    [
        ("8.0;9.0+PTX", (8, 0), True),
        ("8.0;9.0+PTX", (8, 6), True),
        ("8.0;9.0+PTX", (12, 0), True),
        ("8.0;9.0+PTX", (7, 5), False),
        ("8.6 9.0a", (8, 0), False),
        ("8.6 9.0a", (9, 0), True),
        ("9.0", (10, 0), False),
    ],
)
def test_architectures(architectures: str, capability: tuple[int, int], covered: bool) -> None:
    assert diagnosis.covers(architectures, capability) is covered


def test_a_gpu_without_kernels() -> None:
    card = SimpleNamespace(name="GPU", major=7, minor=5, total_memory=2**30)
    cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 1, get_device_properties=lambda number: card)
    fake, problems = SimpleNamespace(version=SimpleNamespace(cuda="13.0"), cuda=cuda), list[str]()
    found = diagnosis._gpu(fake, {"cuda_architectures": "8.0", "cuda_note": None}, problems)
    assert found["devices"] == [{"name": "GPU", "capability": "7.5", "memory_bytes": 2**30}]
    assert problems == ["the kernels are built for 8.0, not for GPU (7.5): reinstall with TORCH_CUDA_ARCH_LIST=7.5"]
    slow = diagnosis._gpu(fake, {"cuda_architectures": "", "cuda_note": "not built"}, problems)
    assert slow["note"] == "operators run as plain torch on the GPU, correct but slow"
    cuda.is_available = lambda: False
    assert diagnosis._gpu(fake, {}, problems)["note"].startswith("torch is built with CUDA 13.0 but finds no GPU")
