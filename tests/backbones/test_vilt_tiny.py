"""The embedded ViLT: there, small, what its card says, and of use."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from evolora.assets import embedded_backbone
from evolora.backbones.base import Backbone
from evolora.backbones.loading import load_backbone
from evolora.backbones.vilt import Vilt
from evolora.config import load_stream
from evolora.learner import Learner
from evolora.methods.delo import DeLoConfig
from evolora.methods.rebq import RebQConfig
from evolora.streams.task import Example, Examples
from evolora.training.config import TrainingConfig


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("vilt-tiny")


def test_the_file_is_the_card_s_and_small() -> None:
    folder = embedded_backbone("vilt-tiny")
    assert folder is not None
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert f"`{digest[:12]}`" in (folder / "README.md").read_text()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 9e6


def test_it_is_a_vilt_in_single_precision(backbone: Backbone) -> None:
    assert isinstance(backbone, Vilt) and backbone.name == "vilt-tiny"
    assert backbone.text_length == 40 and backbone.image_size == 64
    assert {parameter.dtype for parameter in backbone.model.parameters()} == {torch.float32}


def embeddings(
    backbone: Backbone, data: Examples, modalities: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Return pooled states [n, d] of samples with these modalities alone, and labels [n]."""
    examples = [data[row] for row in range(len(data))]
    cut = [
        Example(inputs={m: e.inputs[m] for m in modalities}, label=e.label, key=e.key)
        for e in examples
    ]
    found = backbone.encode_base(backbone.collate(cut), features=False).embedding
    return found, torch.tensor([e.label for e in examples])


@pytest.mark.parametrize(
    ("modalities", "times"), [(("image", "text"), 4.0), (("image",), 2.5), (("text",), 4.0)]
)
def test_its_pooled_state_tells_classes_apart(
    backbone: Backbone, modalities: Sequence[str], times: float
) -> None:
    """Nearest class mean, by both modalities and by either one."""
    (task,) = load_stream("mosaic/missing", order=["furniture"], limit=100, test_limit=100)
    seen, labels = embeddings(backbone, task.train, modalities)
    asked, wanted = embeddings(backbone, task.test, modalities)
    assert seen.abs().mean() < 0.9, "tanh is full"
    center, spread = seen.mean(0), seen.std(0)
    unit = F.normalize((seen - center) / spread, dim=1)
    classes = len(task.labels.classes)
    means = torch.stack([unit[labels == label].mean(0) for label in range(classes)])
    answers = (((asked - center) / spread) @ F.normalize(means, dim=1).T).argmax(1)
    assert float((answers == wanted).float().mean()) > times / classes


@pytest.mark.parametrize(
    "method",
    [
        DeLoConfig(num_factors=4, r=2),
        RebQConfig(components_per_task=2, prompt_length=2, layers_to_transform=(0, 1)),
    ],
    ids=lambda method: method.type,
)
def test_methods_learn_on_it(method: DeLoConfig | RebQConfig) -> None:
    stream = load_stream("mosaic/missing", limit=12, test_limit=6, missing="both")
    training = TrainingConfig(max_steps=1, per_device_train_batch_size=6, augment=False)
    learner = Learner(load_backbone("vilt-tiny"), method=method, training=training)
    learner.learn(stream.tasks[0])
    assert math.isfinite(learner.evaluate(stream.tasks[0]).score)
