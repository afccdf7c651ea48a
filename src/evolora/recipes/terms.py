"""Further terms of a method's own loss: the part "losses" of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from evolora.backbones.batch import Batch
from evolora.errors import ConfigError
from evolora.experts.pool_layer import PoolLayer
from evolora.methods.agreement import Direction, alignment, complete_rows, consistency
from evolora.registry import TERMS

if TYPE_CHECKING:
    from evolora.backbones.base import Backbone
    from evolora.methods.recipe import Recipe, RecipeConfig


@dataclass(frozen=True, kw_only=True)
class _Term:
    """A term of the loss.

    Args:
        weight: factor on it.
    """

    weight: float = 0.1

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ConfigError(f"weight must be at least 0; got {self.weight}")


@TERMS.register("align", summary="queries of image and text of complete samples drawn together")
@dataclass(frozen=True, kw_only=True)
class Align(_Term):
    """mean(1 - cos(q_image, q_text)) over complete samples (DeLo).

    Args:
        type: "align".
    """

    type: Literal["align"] = "align"

    def refuses(self, recipe: RecipeConfig, backbone: Backbone) -> str | None:
        """Return why it cannot be had, or None."""
        if recipe.gate.type != "query":
            return f"align draws queries together, and gate {recipe.gate.type!r} asks none"
        if not backbone.one_stream:
            return (
                "align draws queries of hidden states together, as ViltModel has them; those of "
                f"{type(backbone).__name__} are the untouched model's and learn nothing"
            )
        return None

    def of(self, method: Recipe, batch: Batch, embedding: Tensor) -> Tensor | None:
        """Return the term, not weighed; None where no sample is complete."""
        rows = complete_rows(batch, embedding.device)
        if len(rows) == 0:
            return None
        assert method.queries is not None and method.queries.raw is not None
        return alignment(method.queries.raw[rows])


@TERMS.register("consistency", summary="answers without a modality drawn to answers with both")
@dataclass(frozen=True, kw_only=True)
class Consistency(_Term):
    """KL(answer with both || answer without one) over complete samples (DeLo).

    Args:
        type: "consistency".
        direction: who learns from whom, see :func:`evolora.methods.agreement.consistency`.
    """

    type: Literal["consistency"] = "consistency"
    direction: Direction = "distil"

    def refuses(self, recipe: RecipeConfig, backbone: Backbone) -> str | None:
        """Return why it cannot be had, or None."""
        if backbone.answers != "heads" or len(backbone.modalities) < 2:
            return (
                "consistency drops one of a sample's two modalities and compares what heads "
                f"answer; {type(backbone).__name__} sees {', '.join(backbone.modalities)} and "
                f"answers by {backbone.answers}"
            )
        return None

    def of(self, method: Recipe, batch: Batch, embedding: Tensor) -> Tensor | None:
        """Return the term, not weighed; None where no sample is complete."""
        rows = complete_rows(batch, embedding.device)
        if len(rows) == 0:
            return None
        return consistency(method, batch, embedding, rows, self.direction)


@TERMS.register("load-balance", summary="experts of a pool used alike (CV^2 of gates and chances)")
@dataclass(frozen=True, kw_only=True)
class LoadBalance(_Term):
    """CV^2 of the experts' importance plus CV^2 of their load, summed over sites.

    Args:
        type: "load-balance".
    """

    type: Literal["load-balance"] = "load-balance"
    weight: float = 0.01

    def refuses(self, recipe: RecipeConfig, backbone: Backbone) -> str | None:
        """Return why it cannot be had, or None."""
        if recipe.gate.type != "top-k":
            return f"load-balance needs gate 'top-k'; gate {recipe.gate.type!r} has no load"
        return None

    def of(self, method: Recipe, batch: Batch, embedding: Tensor) -> Tensor | None:
        """Return the term, not weighed."""
        layers = [layer for layer in method.layers.values() if isinstance(layer, PoolLayer)]
        found = [layer.balance for layer in layers if layer.balance is not None]
        return torch.stack(found).sum() if found else None
