"""Backbone: one frozen pretrained model behind the few verbs that methods and the loop need."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from evolora.experts.sites import Site, SiteHost, SiteKind
from evolora.randomness import StepRandom
from evolora.routing.route import Route
from evolora.streams.task import Example, LabelSpace


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Preprocessed samples on the model's device.

    Args:
        inputs: name -> tensor with rows first, as the model's towers take them.
        labels: (b,) int64 class index.
        keys: identifier of each sample.
        task: index of the samples' task in the stream; read in training and by oracles only.
        random: randomness of the training step; None in evaluation.
        step_labels: class indices of the whole global batch where several processes share it.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    keys: tuple[str, ...]
    task: int | None = None
    random: StepRandom | None = None
    step_labels: Tensor | None = None

    def __len__(self) -> int:
        return self.labels.shape[0]

    def with_random(self, random: StepRandom) -> Batch:
        """Return the same samples with a training step's randomness."""
        return replace(self, random=random)

    def take(self, rows: Tensor) -> Batch:
        """Return the given rows as a batch of their own."""
        return replace(
            self,
            inputs={name: value[rows] for name, value in self.inputs.items()},
            labels=self.labels[rows],
            keys=tuple(self.keys[row] for row in rows.tolist()),
        )


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What one pass through the untouched base gives: reused for routing and for base answers.

    Args:
        embedding: (b, p) what the base model's answer is computed from.
        features: name -> (b, f) routing features.
    """

    embedding: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def take(self, rows: Tensor) -> Encoded:
        """Return the given rows."""
        features = {name: value[rows] for name, value in self.features.items()}
        return Encoded(embedding=self.embedding[rows], features=features)


class Backbone(ABC):
    """A frozen model, its towers, its sites, and how it turns samples into logits.

    The model is a stock ``transformers`` class in eval mode with gradients off. Experts are added
    through :attr:`host`; the weights are never written.
    """

    model: nn.Module
    towers: tuple[str, ...]
    vision_summary: str = "first"

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self.host = SiteHost()
        self._fingerprint: str | None = None
        self._caller = _Caller(self.model)
        self._weights: Mapping[str, Tensor] | None = None
        self._states = 0

    @property
    def device(self) -> torch.device:
        """Device of the model's weights."""
        return next(self.model.parameters()).device

    @abstractmethod
    def sites(
        self,
        kind: SiteKind,
        *,
        towers: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
        target_modules: Sequence[str] = (),
    ) -> list[Site]:
        """Return the sites of a kind, in order of tower and depth; ConfigError on unknown names."""

    @abstractmethod
    def collate(
        self,
        examples: Sequence[Example],
        *,
        task: int | None = None,
        random: StepRandom | None = None,
    ) -> Batch:
        """Return preprocessed samples; with ``random``, training augmentation is applied."""

    @abstractmethod
    def encode_base(self, batch: Batch, *, features: bool = True) -> Encoded:
        """Run the untouched base once, without gradient."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Width p of the embedding."""

    @abstractmethod
    def feature_widths(self) -> dict[str, int]:
        """Return the width of each routing feature that :meth:`encode_base` gives."""

    @abstractmethod
    def encode(self, batch: Batch, route: Route) -> Tensor:
        """Return the embedding (b, p) of the batch under the route."""

    @abstractmethod
    def class_embeddings(
        self,
        labels: LabelSpace,
        task: int,
        *,
        random: StepRandom | None = None,
        classes: Sequence[int] | None = None,
        ensemble: bool = True,
        version: int = 0,
    ) -> Tensor:
        """Return (c, p) class embeddings with the experts of ``task`` (or the base)."""

    @abstractmethod
    def logits(self, embedding: Tensor, classes: Tensor) -> Tensor:
        """Return (b, c) logits of embeddings (b, p) against class embeddings (c, p)."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what an artefact must remember to find this backbone again (JSON values)."""

    @contextmanager
    def with_weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Run the model with other weights (by parameter name); its own are not touched."""
        self._weights = weights
        try:
            yield
        finally:
            self._weights = None

    def call(self, function: str, **inputs: Any) -> Any:
        """Call a function of the model ("get_image_features") with the weights in place."""
        if self._weights is None:
            return getattr(self.model, function)(**inputs)
        named = {f"model.{name}": value for name, value in self._weights.items()}
        return torch.func.functional_call(self._caller, named, (function,), inputs)

    def new_state(self) -> int:
        """Return a number that no state of any method here has had, and forget classes."""
        self._states += 1
        self.forget_classes()
        return self._states

    @abstractmethod
    def forget_classes(self) -> None:
        """Drop cached class embeddings of learned tasks; called whenever experts may change."""

    def fingerprint(self) -> str:
        """Return the SHA-256 of every weight and buffer (name, shape, dtype, bytes)."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for name, tensor in sorted(self.model.state_dict().items()):
                value = tensor.detach().cpu().contiguous()
                digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
                digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def to(self, device: torch.device | str) -> Backbone:
        """Move the model; the weights stay the same."""
        self.model.to(device)
        return self


class _Caller(nn.Module):
    """Lets ``functional_call`` reach any function of a model, not only its forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: str, **inputs: Any) -> Any:
        return getattr(self.model, function)(**inputs)
