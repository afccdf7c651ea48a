"""Backbone: one frozen pretrained model behind the few verbs that methods and the loop need."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evolora.backbones.batch import Batch, Encoded, LazyInputs, Prefix
from evolora.errors import ConfigError
from evolora.experts.sites import Site, SiteHost, SiteKind
from evolora.randomness import StepRandom
from evolora.routing.route import Route
from evolora.streams.task import Example, LabelSpace

__all__ = ["Backbone", "Batch", "Encoded", "LazyInputs", "Prefix"]


class Backbone(ABC):
    """A frozen model, its towers, its sites, and how it turns samples into logits.

    The model is a stock ``transformers`` class in eval mode with gradients off. Experts are added
    through :attr:`host`; the weights are never written.
    """

    model: nn.Module
    towers: tuple[str, ...]
    vision_summary: str = "first"
    input_names: tuple[str, ...] = ("pixel_values",)
    answers: Literal["prompts", "heads"] = "prompts"
    modalities: tuple[str, ...] = ("image",)

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self.host = SiteHost()
        self._own = tuple(model.parameters())
        self._fingerprint: tuple[int, str] | None = None
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
    def prepare(self, example: Example) -> Tensor:
        """Return a sample as small integers, the same each time; :meth:`inputs_of` takes it on."""

    @abstractmethod
    def inputs_of(self, prepared: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the ``Batch.inputs`` of prepared samples."""

    @abstractmethod
    def encode_base(self, batch: Batch, *, features: bool = True) -> Encoded:
        """Run the untouched base once, without gradient."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Width p of the embedding."""

    @property
    def parts(self) -> Mapping[str, int]:
        """Width of each part of the embedding; a part may be missing (NaN) in a sample."""
        return {"all": self.width}

    @abstractmethod
    def feature_widths(self) -> dict[str, int]:
        """Return the width of each routing feature that :meth:`encode_base` gives."""

    @abstractmethod
    def encode(self, batch: Batch, route: Route) -> Tensor:
        """Return the embedding (b, p) of the batch under the route.

        It goes on from ``batch.prefix`` where there is one, or from what ``batch.known`` keeps of
        the activations below the lowest expert, which it computes once.
        """

    @abstractmethod
    def prefix(self, batch: Batch, cut: int) -> Tensor:
        """Return the activations (b, n, d) that enter block ``cut`` of the untouched vision tower.

        Raises:
            ConfigError: the tower has no such block.
        """

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
        reuse: bool = True,
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

    @property
    def has_other_weights(self) -> bool:
        """Whether the model runs with other weights than its own (:meth:`with_weights`)."""
        return self._weights is not None

    def context(self) -> str:
        """Return all that decides what the untouched model makes of an input, as a cache key."""
        device, dtype = self._own[0].device, self._own[0].dtype
        autocast = ""
        if torch.is_autocast_enabled(device.type):
            autocast = str(torch.get_autocast_dtype(device.type))
        return f"{self.fingerprint()}/{self.preprocessing()}/{device}/{dtype}/{autocast}"

    @abstractmethod
    def preprocessing(self) -> str:
        """Return what decides the inputs of a prepared sample (sizes, mean, deviation)."""

    def entering_block(
        self, tower: str, cut: int, function: str, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """Return what block ``cut`` of the untouched tower is called with: (b, n, d), args, kwargs.

        The model's own forward runs up to that block and no further, so masks and all that comes
        before the blocks are its own.
        """
        met: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            met.append((args, kwargs))
            raise _Reached

        handle = self.blocks(tower)[cut].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad(), self.host.disabled(), suppress(_Reached):
                self.call(function, **inputs)
        finally:
            handle.remove()
        args, kwargs = met[0]
        return args[0], args[1:], kwargs

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
        writes = sum(weight._version for weight in self._own)
        if self._fingerprint is None or self._fingerprint[0] != writes:
            digest = hashlib.sha256()
            for name, tensor in sorted(self.model.state_dict().items()):
                value = tensor.detach().cpu().contiguous()
                digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
                digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
            self._fingerprint = (writes, digest.hexdigest())
        return self._fingerprint[1]

    @contextmanager
    def checkpointing(self, wanted: bool = True) -> Iterator[None]:
        """Keep only the inputs of blocks for backward and run each block again there.

        transformers does so in blocks that are in training mode. Only the blocks themselves are
        put into it: their attention and MLP stay as they are, and so does dropout, off.

        Raises:
            ConfigError: the model's blocks cannot do so.
        """
        blocks = [block for tower in self.towers for block in self.blocks(tower)] if wanted else []
        if not all(hasattr(block, "gradient_checkpointing") for block in blocks):
            raise ConfigError(
                f"gradient_checkpointing: {type(self.model).__name__} does not support it"
            )
        again = partial(checkpoint, use_reentrant=False)
        for block in blocks:
            block.training = True
            vars(block).update(gradient_checkpointing=True, _gradient_checkpointing_func=again)
        try:
            yield
        finally:
            for block in blocks:
                block.training = False
                for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
                    vars(block).pop(name)

    @abstractmethod
    def blocks(self, tower: str) -> list[nn.Module]:
        """Return the transformer blocks of a tower, the lowest first."""

    def to(self, device: torch.device | str) -> Backbone:
        """Move the model; the weights stay the same."""
        self.model.to(device)
        return self


class _Reached(Exception):
    pass


class _Caller(nn.Module):
    """Lets ``functional_call`` reach any function of a model, not only its forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: str, **inputs: Any) -> Any:
        return getattr(self.model, function)(**inputs)
