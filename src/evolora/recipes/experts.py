"""Kinds of experts, and where they stand: the parts "experts" and "sites" of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from evolora.backbones.families import PROJECTION
from evolora.backbones.qformer_parts import QFORMER
from evolora.errors import ConfigError
from evolora.experts.bank import ExpertBank
from evolora.experts.factor_pool import FactorConfig
from evolora.experts.in_adapters import InAdapterKind, InAdapterStart
from evolora.experts.sites import Site
from evolora.registry import EXPERTS, SITES

if TYPE_CHECKING:
    from evolora.backbones.base import Backbone

MadeOf = Literal["matrices", "factors", "paths"]
"""What a gate finds: a bank of low-rank matrices, pools of rank-one factors, woven paths."""


@EXPERTS.register("lora", summary="linear low-rank pairs (LoRA); those of one task can be folded")
@dataclass(frozen=True, kw_only=True)
class LoRAExperts:
    """E(x) = lora_alpha / r * B A x.

    Args:
        type: "lora".
        r: rank.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: probability of zeroing a bottleneck unit during training, in [0, 1).
    """

    made_of: ClassVar[MadeOf] = "matrices"
    type: Literal["lora"] = "lora"
    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_sizes(self.r, "lora_dropout", self.lora_dropout)

    @property
    def dropout(self) -> float:
        """Probability of zeroing a bottleneck unit during training."""
        return self.lora_dropout

    def bank(self, site: Site, device: torch.device) -> ExpertBank:
        """Return an empty bank for a site."""
        scale = self.lora_alpha / self.r
        return ExpertBank(site.d_in, site.d_out, self.r, scale=scale, device=device)


@EXPERTS.register("bottleneck", summary="ReLU bottlenecks with biases (MoE-Adapters)")
@dataclass(frozen=True, kw_only=True)
class BottleneckExperts:
    """E(x) = scale * (B relu(A x + a) + b).

    Args:
        type: "bottleneck".
        r: width of the bottleneck (64).
        scale: constant factor (0.1).
        dropout: on the bottleneck in training (0.1), in [0, 1).
    """

    made_of: ClassVar[MadeOf] = "matrices"
    type: Literal["bottleneck"] = "bottleneck"
    r: int = 64
    scale: float = 0.1
    dropout: float = 0.1

    def __post_init__(self) -> None:
        _check_sizes(self.r, "dropout", self.dropout)

    def bank(self, site: Site, device: torch.device) -> ExpertBank:
        """Return an empty bank for a site."""
        return ExpertBank(
            site.d_in,
            site.d_out,
            self.r,
            bias=True,
            activation="relu",
            scale=self.scale,
            device=device,
        )


@EXPERTS.register("factors", summary="rank-one factors per modality, composed anew per row (DeLo)")
@dataclass(frozen=True, kw_only=True)
class FactorExperts(FactorConfig):
    """Pools of rank-one factors, one for each modality; see :class:`FactorConfig`.

    Args:
        type: "factors".
    """

    made_of: ClassVar[MadeOf] = "factors"
    type: Literal["factors"] = "factors"


@EXPERTS.register("woven", summary="adapters that reuse those of earlier modalities (PathWeave)")
@dataclass(frozen=True, kw_only=True)
class WovenExperts:
    """An adapter of each modality, which reuses earlier ones by in-adapters.

    Args:
        type: "woven".
        r: rank of an adapter (8).
        activation: between the halves of an adapter: "relu", or None.
        in_adapter: "linear" (r -> r), "mlp", "two-linear", or "none": reused as they are.
        in_adapter_start: of a linear one: "identity", "zero", or "normal".
    """

    made_of: ClassVar[MadeOf] = "paths"
    type: Literal["woven"] = "woven"
    r: int = 8
    activation: Literal["relu"] | None = None
    in_adapter: InAdapterKind | Literal["none"] = "linear"
    in_adapter_start: InAdapterStart = "identity"

    def __post_init__(self) -> None:
        _check_sizes(self.r, "dropout", 0.0)


@dataclass(frozen=True, kw_only=True)
class _Sites:
    """Which blocks.

    Args:
        towers: towers that get experts; None takes all that the experts can stand in.
        layers_to_transform: block indices (negative counts from the top); None takes all.
    """

    towers: tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] | None = None


@SITES.register("linear", summary="Linears by name (q_proj, fc1 ... or all-linear)")
@dataclass(frozen=True, kw_only=True)
class LinearSites(_Sites):
    """Linears by their names.

    Args:
        type: "linear".
        target_modules: names, or "all-linear"; None takes the backbone's usual ones.
    """

    type: Literal["linear"] = "linear"
    target_modules: tuple[str, ...] | None = None

    def find(self, backbone: Backbone, towers: Sequence[str] | None) -> list[Site]:
        """Return the sites in some towers (None: in all), in order of tower and depth."""
        return backbone.sites(
            "linear",
            towers=towers,
            layers=self.layers_to_transform,
            target_modules=self.target_modules,
        )


READING = ("q_proj", "k_proj", "v_proj", "query", "key", "value", "qkv", "wqkv", "q", "k", "v")
WRITING = ("out_proj", "o_proj", "dense", "proj", "wo", "o")
"""What families call the Linears of an attention: those that read its input, and the other."""


@SITES.register("attention", summary="every Linear of every attention, whatever it is called")
@dataclass(frozen=True, kw_only=True)
class AttentionSites(_Sites):
    """Every Linear of every attention.

    Args:
        type: "attention".
    """

    type: Literal["attention"] = "attention"
    names: ClassVar[tuple[str, ...]] = (*READING, *WRITING)

    def find(self, backbone: Backbone, towers: Sequence[str] | None) -> list[Site]:
        """Return the sites in some towers (None: in all), in order of tower and depth.

        Raises:
            ConfigError: no Linear has a known name.
        """
        towers = [name for name in towers or backbone.towers if name != PROJECTION]
        known = [name for name in self.names if _has(backbone, towers, name)]
        if not known:
            raise ConfigError(
                f"no Linear of {type(backbone).__name__} has one of the names that attentions' "
                f"Linears go by ({', '.join(self.names)}); name them by sites linear"
            )
        return backbone.sites(
            "linear", towers=towers, layers=self.layers_to_transform, target_modules=known
        )


@SITES.register("qkv", summary="query, key and value of every attention, whatever they are called")
@dataclass(frozen=True, kw_only=True)
class QKVSites(AttentionSites):
    """The Linears that read an attention's input; one Linear where a model has one for all three.

    Args:
        type: "qkv".
    """

    type: Literal["qkv"] = "qkv"  # type: ignore[assignment]
    names: ClassVar[tuple[str, ...]] = READING


@SITES.register("mlp", summary="beside the MLP of every block")
@dataclass(frozen=True, kw_only=True)
class MLPSites(_Sites):
    """Beside the MLP of every block: experts read what its norm reads and add to its output.

    Args:
        type: "mlp".
    """

    type: Literal["mlp"] = "mlp"

    def find(self, backbone: Backbone, towers: Sequence[str] | None) -> list[Site]:
        """Return the sites in some towers (None: in all), in order of tower and depth."""
        return backbone.sites("mlp", towers=towers, layers=self.layers_to_transform)


@SITES.register("q-former", summary="attentions of a Q-Former, and its projection (PathWeave)")
@dataclass(frozen=True, kw_only=True)
class QFormerSites:
    """Every Linear of the Q-Former's attentions, and the projection to the language model.

    Args:
        type: "q-former".
        layers_to_transform: blocks of the Q-Former; None takes all.
        adapt_projection: whether experts stand at the projection too.
    """

    type: Literal["q-former"] = "q-former"
    towers: ClassVar[tuple[str, ...]] = (QFORMER, PROJECTION)
    layers_to_transform: tuple[int, ...] | None = None
    adapt_projection: bool = True

    def find(self, backbone: Backbone, towers: Sequence[str] | None) -> list[Site]:
        """Return the sites, the projection last.

        Raises:
            ConfigError: the model has no Q-Former.
        """
        if QFORMER not in backbone.towers:
            raise ConfigError(
                f"sites q-former need a model with a Q-Former; {type(backbone).__name__} has the "
                f"towers {', '.join(backbone.towers)}: use sites linear, attention, qkv or mlp"
            )
        found = backbone.sites(
            "linear",
            towers=[QFORMER],
            layers=self.layers_to_transform,
            target_modules=("query", "key", "value", "dense"),
        )
        if not self.adapt_projection:
            return found
        return found + backbone.sites("linear", towers=[PROJECTION], target_modules=[PROJECTION])


def _has(backbone: Backbone, towers: Sequence[str], name: str) -> bool:
    """Return whether any Linear in the towers goes by a name."""
    try:
        return bool(backbone.sites("linear", towers=towers, target_modules=[name]))
    except ConfigError:
        return False


def _check_sizes(r: int, name: str, dropout: float) -> None:
    if r < 1:
        raise ConfigError(f"r must be at least 1; got {r}")
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"{name} must be in [0, 1); got {dropout}")
