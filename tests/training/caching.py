"""Learners of small CLIPs with experts in their top blocks, and what runs in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.backbones.test_prefix import deep_backbone
from tests.conftest import toy_task

from evolora.backbones.clip import DualEncoder
from evolora.config import EvaluationConfig, RunConfig
from evolora.learner import Learner
from evolora.methods.linear_probe import LinearProbeConfig
from evolora.methods.lora import LoRAPerTaskConfig, SequentialLoRAConfig
from evolora.methods.moe_adapters import MoEAdaptersConfig
from evolora.methods.zero_shot import ZeroShotConfig
from evolora.routing.autoencoders import AutoEncoderTraining
from evolora.routing.selector import AutoEncoderSelectorConfig
from evolora.streams.task import Stream
from evolora.training.config import TrainingConfig
from evolora.training.continual import ContinualRun

TOP = (-1, -2)
MOE = MoEAdaptersConfig(
    num_experts=4,
    r=4,
    dropout=0.1,
    layers_to_transform=TOP,
    selector=AutoEncoderSelectorConfig(training=AutoEncoderTraining(hidden=4, steps=20)),
)
METHODS: dict[str, Any] = {
    "moe": MOE,
    "sequential": SequentialLoRAConfig(r=2, lora_dropout=0.1, layers_to_transform=TOP),
    "per-task": LoRAPerTaskConfig(r=2, layers_to_transform=TOP),
    "images only": SequentialLoRAConfig(r=2, layers_to_transform=TOP, towers=("vision",)),
    "prompts only": SequentialLoRAConfig(r=2, layers_to_transform=TOP, towers=("text",)),
    "probe": LinearProbeConfig(),
    "zero-shot": ZeroShotConfig(),
}


def settings(**given: Any) -> TrainingConfig:
    return TrainingConfig(
        **{
            "max_steps": 7,
            "warmup_steps": 2,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "augment": False,
            "max_classes_per_step": 2,
            **given,
        }
    )


def learner_of(method: Any, *, kind: str = "clip", cache: bool = True, **training: Any) -> Learner:
    return Learner(
        deep_backbone(kind),
        method=method,
        training=settings(**training),
        evaluation_batch_size=5,
        evaluation_cache=cache,
    )


def rows_through(backbone: DualEncoder, block: int, run: Any, tower: str = "vision") -> int:
    """Return how many rows went through a block while something ran."""
    rows: list[int] = []
    module = backbone.blocks(tower)[block]
    handle = module.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    run()
    handle.remove()
    return sum(rows)


def run_of(folder: Path, method: Any, *, evaluate: bool, **training: Any) -> ContinualRun:
    config = RunConfig(
        method=method,
        stream={"name": "toy"},
        training=settings(**training),
        evaluation=EvaluationConfig(batch_size=5, cache=evaluate),
    )
    tasks = tuple(toy_task(index, 20) for index in range(3))
    return ContinualRun(
        config, folder, stream=Stream(name="toy", tasks=tasks), backbone=deep_backbone("clip")
    )
