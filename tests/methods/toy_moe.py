"""Toy learners of MoE-Adapters, and looks inside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from tests.conftest import toy_task
from torch import Tensor

from evolora.backbones.base import Batch
from evolora.backbones.clip import DualEncoder
from evolora.learner import Learner
from evolora.methods.moe_adapters import MoEAdapters, MoEAdaptersConfig
from evolora.routing.gates import Gating
from evolora.routing.selector import OracleSelectorConfig
from evolora.streams.task import LabelSpace
from evolora.training.batches import TrainingBatches
from evolora.training.config import TrainingConfig

ORACLE = OracleSelectorConfig()
LABELS = LabelSpace(classes=("a", "b"))
Make = Callable[..., DualEncoder]


def learner_of(make_backbone: Make, *, max_steps: int = 6, **settings: Any) -> Learner:
    values = {"num_experts": 5, "r": 4, "selector": ORACLE, **settings}
    return Learner(
        make_backbone(),
        method=MoEAdaptersConfig(**values),
        training=TrainingConfig(
            max_steps=max_steps, warmup_steps=2, per_device_train_batch_size=6, learning_rate=1e-2
        ),
    )


def method_of(learner: Learner) -> MoEAdapters:
    assert isinstance(learner.method, MoEAdapters)
    return learner.method


def batches(learner: Learner, task: int) -> Iterator[Batch]:
    feed = TrainingBatches(
        toy_task(task).train, learner.backbone, learner.training, seed=0, task=task,
        share=learner.share,
    )  # fmt: skip
    return feed.from_step(0)


def randomize(method: MoEAdapters, *, routers: bool = True, experts: bool = False) -> None:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in method.moe_layers():
            stacks = [layer.routers.gate, layer.routers.noise] if routers else []
            stacks += layer.bank.stacks() if experts else []
            for stack in stacks:
                for values in (stack.active, stack.frozen):
                    values.copy_(0.5 * torch.randn(values.shape, generator=draw))


def gatings(method: MoEAdapters, run: Callable[[], Any]) -> dict[str, list[Gating]]:
    """Return what every site's router decided while ``run`` ran."""
    found: dict[str, list[Gating]] = {}
    handles = []
    for layer in method.moe_layers():

        def note(_: Any, __: Any, out: Gating, name: str = layer.name) -> None:
            found.setdefault(name, []).append(out)

        handles.append(layer.routers.register_forward_hook(note))
    run()
    for handle in handles:
        handle.remove()
    return found


def forced(learner: Learner, batch: Batch, task: int, own: int | None = None) -> Tensor:
    tasks = torch.full((len(batch),), task)
    labels = toy_task(task if own is None else own).labels
    with torch.no_grad():
        return learner.method.answer(batch, None, tasks, labels).scores
