"""Modalities of a Q-Former: a frozen encoder each, and how its tokens enter the Q-Former.

    value of Example.inputs[name]  --read-->  tensor  --encoder, frozen-->  (b, frames, n, d)
    (b * frames, n, d)  --norm-->  [--projection: d -> e-->]  cross-attention of the queries

A modality of one's own takes a few lines; the function gets the stock model and its processor:

    @ENCODERS.register("thermal", summary="my thermal camera")
    def thermal(name, model, processor, *, weights):
        encoder = MyEncoder.load(weights)                       # (b, 1, 64, 64) -> (b, 1, n, 256)
        return ModalitySpec(name=name, encoder=encoder, width=256, cue=" thermal: ", read=read_raw)

``backbone.modalities={"thermal": {"encoder": "thermal", "weights": "t.pt"}}`` then names it, or
``method.expand(spec)`` hands it to a learner. Packages register by the entry point group
``evolora.encoders``. Those that are here: :mod:`evolora.backbones.encoders`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.errors import ConfigError
from evolora.experts.bank import GrowingStack, fresh_rows
from evolora.registry import ENCODERS

OWN = "image"
"""The modality that the model was made for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ModalitySpec:
    """What a modality is to a Q-Former.

    Args:
        name: its key in ``Example.inputs``.
        encoder: frozen; from tensors of ``read``, stacked to (b, ...), to (b, frames, n, d).
        width: d.
        read: from a value of ``Example.inputs`` to a tensor, of the same shape for every sample;
            small integers where it can be. It raises DataError for what is none of this modality.
        frames: parts of a sample, which the Q-Former sees one by one.
        cue: text that the language model gets before the soft tokens. The authors' cues carry a
            beginning token each: write it into the cue to have that.
        augment: changes what ``read`` gave, by a generator, where training augments; None: nothing.
        needs_projection: whether a learned Linear brings d to the Q-Former's width; None: where
            they differ.
        options: what the configuration says of it, for the artefact; empty of one made by hand.
    """

    name: str
    encoder: nn.Module
    width: int
    read: Callable[[Any], Tensor]
    frames: int = 1
    cue: str = ""
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    needs_projection: bool | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("width", "frames"):
            if getattr(self, name) < 1:
                raise ConfigError(f"modality {self.name!r}: {name} must be at least 1")

    def projected(self, width: int) -> bool:
        """Return whether a learned Linear takes its tokens to a width."""
        if self.needs_projection is False and self.width != width:
            raise ConfigError(
                f"modality {self.name!r} is {self.width} wide and the Q-Former reads {width}; it "
                "needs a projection"
            )
        return self.width != width if self.needs_projection is None else self.needs_projection

    def tokens(self, values: Tensor) -> Tensor:
        """Return (b, frames, n, d) of stacked values; ConfigError where the encoder gives else."""
        found: Tensor = self.encoder(values)
        if found.dim() != 4 or found.shape[1] != self.frames or found.shape[3] != self.width:
            raise ConfigError(
                f"the encoder of modality {self.name!r} must give (b, {self.frames}, n, "
                f"{self.width}); got {tuple(found.shape)}"
            )
        return found


def default_cue(name: str) -> str:
    """Return the cue of a modality that is given none; the model's own has no cue."""
    return "" if name == OWN else f" {name}: "


def make_modality(
    name: str, options: Mapping[str, Any], model: nn.Module, processor: Any
) -> ModalitySpec:
    """Return a modality that a configuration describes.

    Args:
        name: of the modality.
        options: {"encoder": a name of ``ENCODERS``, and what its function takes}.
        model: the stock model.
        processor: its processor, or None.
    """
    given = dict(options)
    try:
        kind = given.pop("encoder")
    except KeyError:
        known = ", ".join(ENCODERS.names())
        raise ConfigError(f"modality {name!r} needs an encoder (known: {known})") from None
    try:
        spec: ModalitySpec = ENCODERS.get(kind)(name, model, processor, **given)
    except TypeError as error:
        raise ConfigError(f"modality {name!r}, encoder {kind!r}: {error}") from error
    return replace(spec, options=dict(options))


class Entry(nn.Module):
    """How a learned modality enters the Q-Former: its norm, projection and queries.

    It is empty (nothing is learned yet) until :meth:`grow`.

    Args:
        spec: the modality.
        queries: (q, h), number and width of the query tokens.
        width: e, what the Q-Former's cross-attention reads.
        eps: of the norm.
    """

    def __init__(
        self,
        spec: ModalitySpec,
        queries: Sequence[int],
        width: int,
        *,
        eps: float,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.norm = GrowingStack(2, spec.width, device=device)
        self.queries = GrowingStack(*queries, device=device)
        projected = spec.projected(width)
        self.weight = GrowingStack(width, spec.width, device=device) if projected else None
        self.bias = GrowingStack(width, device=device) if projected else None

    def __len__(self) -> int:
        return len(self.queries)

    def grow(self, norm: Tensor | None, queries: Tensor, draw: torch.Generator) -> None:
        """Make it: copied norm (2, d) and queries (q, h), and a projection drawn as a Linear is.

        A norm of None is fresh: weight 1, bias 0.
        """
        device = self.norm.active.device
        if norm is None:
            norm = torch.stack([torch.ones(self.norm.shape[1]), torch.zeros(self.norm.shape[1])])
        self.norm.grow(norm.detach().to(device).unsqueeze(0).clone())
        self.queries.grow(queries.detach().to(device).unsqueeze(0).clone())
        if self.weight is not None and self.bias is not None:
            self.weight.grow(fresh_rows(1, self.weight, draw))
            self.bias.grow(torch.zeros(1, *self.bias.shape, device=device))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return what the queries attend to (k, n, e) of an encoder's tokens (k, n, d)."""
        weight, bias = self.norm.all()[0]
        found = F.layer_norm(tokens.to(weight.dtype), tokens.shape[-1:], weight, bias, self.eps)
        if self.weight is None or self.bias is None:
            return found
        return F.linear(found, self.weight.all()[0], self.bias.all()[0])
