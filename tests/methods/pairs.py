"""Tasks of image and text whose classes both tell, with modalities missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tests.backbones.pairs import make
from tests.conftest import toy_task

from evolora.learner import Learner
from evolora.streams.missing import Incomplete
from evolora.streams.task import Example, LabelSpace, Task
from evolora.training.config import TrainingConfig

WORDS = ("dot", "cross", "ring")


class Captioned:
    """The pictures of a toy task, each with a text that names its shape."""

    def __init__(self, data: Any, index: int, several: bool) -> None:
        self.data, self.index, self.several = data, index, several

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> Example:
        example = self.data[row]
        assert isinstance(example.label, int)
        text = f"a {('red', 'green', 'blue')[self.index]} {WORDS[example.label]}"
        label: Any = example.label
        if self.several:
            label = tuple(int(c == example.label or c == 2) for c in range(3))
        return Example(inputs={**example.inputs, "text": text}, label=label, key=example.key)


def pair_task(
    index: int, codes: Sequence[int] = (0, 1, 2), *, several: bool = False, rows: int = 24
) -> Task:
    """Toy task ``index`` as pairs; missing codes repeat along the rows."""
    plain = toy_task(index, rows)

    def pairs(data: Any) -> Any:
        if not len(data):
            return data
        own = [codes[row % len(codes)] for row in range(len(data))]
        return Incomplete(data=Captioned(data, index, several), codes=own)

    names = tuple(f"{plain.name} {name}" for name in plain.labels.classes)
    return Task(
        name=plain.name,
        train=pairs(plain.train),
        val=pairs(plain.val),
        test=pairs(plain.test),
        labels=LabelSpace(classes=names, multi_label=several),
        modalities=("image", "text"),
        metric="macro-f1" if several else "accuracy",
    )


def pair_learner(method: Any, kind: str = "vilt", **training: Any) -> Learner:
    torch.manual_seed(0)
    values = {
        "max_steps": 6,
        "warmup_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "augment": False,
        "label_smoothing_factor": 0.0,
        **training,
    }
    return Learner(make(kind), method=method, training=TrainingConfig(**values))
