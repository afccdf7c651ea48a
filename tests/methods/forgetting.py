"""How much of a first toy task a learner forgets while it learns a second one."""

from __future__ import annotations

from typing import Any

from tests.conftest import ToyProcessor, toy_model, toy_task

from evolora.backbones.clip import DualEncoder
from evolora.learner import Learner
from evolora.streams.task import Task
from evolora.training.config import TrainingConfig

SEEDS = (0, 1, 2, 3)


def toy_backbone() -> DualEncoder:
    return DualEncoder(toy_model(), ToyProcessor(), name="toy")


def learner_of(method: Any, seed: int = 0, **training: Any) -> Learner:
    settings: dict[str, Any] = {
        "max_steps": 20,
        "warmup_steps": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "augment": False,
        "label_smoothing_factor": 0.0,
        **training,
    }
    return Learner(toy_backbone(), method=method, seed=seed, training=TrainingConfig(**settings))


def chance(learner: Learner, task: Task) -> float:
    """Mean probability of the true class: finer than the accuracy of twelve samples."""
    batch = learner.backbone.collate([task.test[row] for row in range(len(task.test))])
    scores = learner.method.predict(batch, task.labels).scores
    return float(scores.gather(1, batch.labels.unsqueeze(1)).mean())


def forgotten(method: Any) -> tuple[float, float]:
    """Return (loss of the first task's chance, chance of the second), means over seeds."""
    lost, new = 0.0, 0.0
    for seed in SEEDS:
        learner = learner_of(method, seed)
        learner.learn(toy_task(0))
        before = chance(learner, toy_task(0))
        learner.learn(toy_task(1))
        lost += before - chance(learner, toy_task(0))
        new += chance(learner, toy_task(1))
    return lost / len(SEEDS), new / len(SEEDS)
