"""FrozenModel: a stock ``transformers`` model whose weights are never written, and what runs it."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evolora.backbones.blocks import block_indices, entry_of
from evolora.errors import ConfigError
from evolora.experts.sites import BlockWatcher, SiteHost

ModelFunction = str | Callable[..., Any]
"""Name of a function of the model, or a function that calls the model and its parts."""


def config_of(model: Any) -> Any:
    """Return the configuration of a ``transformers`` model."""
    return model.config


class FrozenModel(ABC):
    """A model in eval mode with gradients off, its towers, and the host of its experts.

    Attributes:
        towers: of transformer blocks; a tower has one route at a time.
    """

    model: nn.Module
    towers: tuple[str, ...]

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self.host = SiteHost()
        self._own = tuple(model.parameters())
        self._fingerprint: tuple[int, str] | None = None
        self._caller = _Caller(self.model)
        self._weights: Mapping[str, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Device of the model's weights."""
        return next(self.model.parameters()).device

    @abstractmethod
    def blocks(self, tower: str) -> list[nn.Module]:
        """Return the transformer blocks of a tower, the lowest first."""

    def watch_blocks(
        self, tower: str, seen: BlockWatcher, *, layers: Sequence[int] | None = None
    ) -> None:
        """Hand what enters blocks to ``seen``, see :meth:`SiteHost.watch`.

        Args:
            tower: whose blocks.
            seen: called with (index, hidden states (b, n, d), route).
            layers: indices; None watches all.
        """
        blocks = self.blocks(tower)
        wanted = block_indices(layers, len(blocks), tower)
        self.host.watch(tower, {index: entry_of(blocks[index]) for index in wanted}, seen)

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

    def entering_block(
        self, tower: str, cut: int, function: ModelFunction, inputs: Mapping[str, Tensor]
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

    def call(self, function: ModelFunction, **inputs: Any) -> Any:
        """Call a function of the model ("get_image_features") with the weights in place."""
        if self._weights is None:
            return _function(self.model, function)(**inputs)
        named = {f"model.{name}": value for name, value in self._weights.items()}
        return torch.func.functional_call(self._caller, named, (function,), inputs)

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

    def repeated_blocks(self) -> list[nn.Module]:
        """Return the blocks that gradient checkpointing runs again: those of all towers."""
        return [block for tower in self.towers for block in self.blocks(tower)]

    @contextmanager
    def checkpointing(self, wanted: bool = True) -> Iterator[None]:
        """Keep only the inputs of blocks for backward and run each block again there.

        transformers does so in blocks that are in training mode. Only the blocks themselves are
        put into it: their attention and MLP stay as they are, and so does dropout, off.

        Raises:
            ConfigError: the model's blocks cannot do so.
        """
        blocks = self.repeated_blocks() if wanted else []
        if not all(hasattr(block, "gradient_checkpointing") for block in blocks):
            raise ConfigError(
                f"gradient_checkpointing: {type(self.model).__name__} does not support it"
            )

        def again(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            held = self.host.holding_routes(function)
            return checkpoint(held, *args, use_reentrant=False, **kwargs)

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

    def to(self, device: torch.device | str) -> Self:
        """Move the model; the weights stay the same."""
        self.model.to(device)
        return self


class _Reached(Exception):
    pass


def _function(model: nn.Module, function: ModelFunction) -> Callable[..., Any]:
    return function if callable(function) else getattr(model, function)


class _Caller(nn.Module):
    """Lets ``functional_call`` reach any function of a model, not only its forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: ModelFunction, **inputs: Any) -> Any:
        return _function(self.model, function)(**inputs)
