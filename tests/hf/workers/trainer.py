"""A training script as users have it: ``accelerate launch -m tests.hf.workers.trainer FOLDER``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from probmoe_ext.hf import RoutingMonitor, add_router_losses, record_routing, swap_router
from tests.hf.models import K
from tests.hf.test_monitor import Rows
from tests.hf.workers import leave


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    arguments = TrainingArguments(
        str(folder / "run"),
        per_device_train_batch_size=4,
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        save_strategy="no",
        report_to=[],
        use_cpu="ACCELERATE_USE_DEEPSPEED" not in os.environ,
        disable_tqdm=True,
        seed=3,
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    add_router_losses(swap_router(model, "probmoe", k=(1, K)), load_balancing=0.01)
    trainer = Trainer(model, arguments, train_dataset=Rows())
    RoutingMonitor(model, folder / "routing.jsonl").attach(trainer)
    with record_routing(model) as record:
        trainer.train()
    result = {
        "history": trainer.state.log_history,
        "choices": [one["model.layers.0.mlp.gate"].tolist() for one in record.passes],
        "wrapper": type(trainer.model_wrapped).__name__,
        "processes": torch.distributed.get_world_size(),
    }
    (folder / f"process-{torch.distributed.get_rank()}.json").write_text(json.dumps(result), encoding="utf-8")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
