"""Gates: what weighs the experts of a site, and so what layer stands there. The part "gate"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from evolora.backbones.base import Backbone
from evolora.backbones.families import PROJECTION
from evolora.errors import ConfigError
from evolora.experts.bank import GrowingStack
from evolora.experts.factor_layer import Cmgr, FactorLayer, Queries, TokenScope
from evolora.experts.in_adapters import InAdapters
from evolora.experts.pool_layer import PoolConfig, PoolLayer
from evolora.experts.sites import Site
from evolora.experts.task_layer import Draws, TaskLayer
from evolora.experts.token_layer import TokenLayer
from evolora.experts.woven import Mixture, WovenLayer
from evolora.methods.pathweave import BERT_STD
from evolora.recipes.choices import Kind, Pool
from evolora.recipes.experts import MadeOf, WovenExperts
from evolora.registry import GATES
from evolora.routing.path_gates import PathGates

if TYPE_CHECKING:
    from evolora.methods.recipe import RecipeConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """What a gate makes a layer for.

    Args:
        site: where it stands.
        recipe: all parts.
        backbone: the site's.
        queries: what describes the modalities of rows, where experts are factors.
    """

    site: Site
    recipe: RecipeConfig
    backbone: Backbone
    queries: Queries | None = None

    @property
    def device(self) -> torch.device:
        """Where the layer is."""
        return self.backbone.device


@GATES.register("own", summary="the experts of the row's own task, and of its helper, are added")
@dataclass(frozen=True, kw_only=True)
class OwnGate:
    """Weight 1 for the experts of the row's task (and of its helper), 0 for all others.

    Args:
        type: "own".
    """

    mixes: ClassVar[MadeOf] = "matrices"
    goes_with: ClassVar[tuple[Kind, ...]] = ("private", "budget", "shared", "modality")
    because: ClassVar[str] = "answers by the experts that are a task's or a modality's own"
    type: Literal["own"] = "own"

    def layer(self, place: Place) -> TaskLayer:
        """Return the layer of a site."""
        experts = place.recipe.experts
        bank = experts.bank(place.site, place.device)
        return TaskLayer(bank, name=place.site.name, dropout=experts.dropout)


@GATES.register(
    "top-k", summary="each task's noisy router picks k of a pool per row (MoE-Adapters)"
)
@dataclass(frozen=True, kw_only=True)
class TopKGate:
    """A router per task mixes the k best experts of a pool for each row.

    Args:
        type: "top-k".
        top_k: experts of a row (2).
        noise: noisy gates in training.
        noise_at_test: also at test time; fixed seed.
        text_routing: token a class prompt is routed on: its "end", or its "start". What a writing
            model reads is routed on the mean of its tokens.
    """

    mixes: ClassVar[MadeOf] = "matrices"
    goes_with: ClassVar[tuple[Kind, ...]] = ("pool",)
    because: ClassVar[str] = "chooses among the experts of a pool"
    type: Literal["top-k"] = "top-k"
    top_k: int = 2
    noise: bool = True
    noise_at_test: bool = False
    text_routing: Literal["end", "start"] = "end"

    def pool(self, recipe: RecipeConfig) -> PoolConfig:
        """Return the settings of pool and routers that the parts say.

        Raises:
            ConfigError: the pool has too few experts.
        """
        pool = recipe.allocation
        assert isinstance(pool, Pool)
        weights = [loss.weight for loss in recipe.losses if loss.type == "load-balance"]
        return PoolConfig(
            num_experts=pool.num_experts,
            freeze_top=pool.freeze_top,
            min_free_experts=pool.min_free_experts,
            top_k=self.top_k,
            noise=self.noise,
            noise_at_test=self.noise_at_test,
            text_routing=self.text_routing,
            routers="shared" if recipe.selector.type == "none" else "per-task",
            dropout=recipe.experts.dropout,
            load_balance=sum(weights),
        )

    def layer(self, place: Place) -> PoolLayer:
        """Return the layer of a site."""
        bank = place.recipe.experts.bank(place.site, place.device)
        return PoolLayer(place.site, bank, self.pool(place.recipe), place.device)


@GATES.register("tokens", summary="every token weighs all experts, or its k best (MoELoRA)")
@dataclass(frozen=True, kw_only=True)
class TokenGate:
    """One router for all tasks weighs the experts of a site for every token.

    Args:
        type: "tokens".
        num_experts: experts per site (8).
        top_k: experts of a token, their weights then sum to 1; None takes all.
        init_std: deviation of fresh experts' A (CoIN's 0.01); None draws them as a Linear is drawn.
    """

    mixes: ClassVar[MadeOf] = "matrices"
    goes_with: ClassVar[tuple[Kind, ...]] = ("shared",)
    because: ClassVar[str] = "weighs the same experts in every task: its router knows of no task"
    type: Literal["tokens"] = "tokens"
    num_experts: int = 8
    top_k: int | None = None
    init_std: float | None = 0.01

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ConfigError(f"num_experts must be at least 1; got {self.num_experts}")
        if self.top_k is not None and not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"top_k must be between 1 and num_experts ({self.num_experts}), or null for all; "
                f"got {self.top_k}"
            )

    def layer(self, place: Place) -> TokenLayer:
        """Return the layer of a site."""
        experts = place.recipe.experts
        return TokenLayer(
            place.site,
            experts.bank(place.site, place.device),
            self.num_experts,
            top_k=self.top_k,
            dropout=experts.dropout,
            std=self.init_std,
            device=place.device,
        )


@GATES.register("query", summary="what describes each modality of a row picks r factors (DeLo)")
@dataclass(frozen=True, kw_only=True)
class QueryGate:
    """A query of each modality picks the factors of a row; how many is the experts' ``r``.

    Args:
        type: "query".
        cmgr: a missing modality's query is the other's, "symmetric" or for missing text alone
            ("text_only"); "off" leaves the query of what stands in for it.
        token_scope: tokens an expert acts on: "all", or those of its "own_modality".
    """

    mixes: ClassVar[MadeOf] = "factors"
    goes_with: ClassVar[tuple[Kind, ...]] = ("private", "budget")
    because: ClassVar[str] = "composes experts of the factors that a task has of its own"
    type: Literal["query"] = "query"
    cmgr: Cmgr = "symmetric"
    token_scope: TokenScope = "all"

    def layer(self, place: Place) -> FactorLayer:
        """Return the layer of a site."""
        backbone = place.backbone
        assert place.queries is not None
        return FactorLayer(
            place.site,
            place.recipe.experts,
            place.queries,
            None if backbone.one_stream else backbone.feature_widths()["modalities"],
            scope=self.token_scope,
            device=place.device,
        )


@GATES.register("paths", summary="tokens weigh their modality's and earlier adapters (PathWeave)")
@dataclass(frozen=True, kw_only=True)
class PathGate:
    """On the path of a modality, a token weighs its adapter and those before it.

    Args:
        type: "paths".
        mixture: a "gate" weighs them, or all count alike ("mean").
        reuse: whether a path has the adapters of earlier ones.
        gate_noise: whether the gate is noisy in training.
        top_k: adapters of a token; None takes all.
        branch_scale: a factor on all adapters of a path but the first, zero at the start.
    """

    mixes: ClassVar[MadeOf] = "paths"
    goes_with: ClassVar[tuple[Kind, ...]] = ("modality",)
    because: ClassVar[str] = "weaves the adapters of one modality after another"
    type: Literal["paths"] = "paths"
    mixture: Literal["gate", "mean"] = "gate"
    reuse: bool = True
    gate_noise: bool = True
    top_k: int | None = None
    branch_scale: bool = False

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, or null for all; got {self.top_k}")

    def layer(self, place: Place) -> PathLayer:
        """Return the layer of a site; at the projection all adapters up to a path's are added."""
        return PathLayer(place, self)


class PathLayer(WovenLayer):
    """The woven adapters of one site, which grow by a path for each new modality.

    Args:
        place: the site.
        gate: how a path weighs its adapters.
    """

    def __init__(self, place: Place, gate: PathGate) -> None:
        site, device, experts = place.site, place.device, place.recipe.experts
        assert isinstance(experts, WovenExperts)
        plain = site.tower == PROJECTION
        mixture: Mixture = "sum" if plain else gate.mixture
        inner = gates = None
        if gate.reuse and experts.in_adapter != "none" and not plain:
            inner = InAdapters(experts.r, experts.in_adapter, device=device)
        if gate.reuse and mixture == "gate":
            gates = PathGates(site.d_in, noise=gate.gate_noise, top_k=gate.top_k, device=device)
        super().__init__(
            site,
            experts.r,
            activation=experts.activation,
            reuse=gate.reuse or plain,
            mixture=mixture,
            inner=inner,
            gates=gates,
            branch_scale=gate.branch_scale and not plain,
            device=device,
        )
        self.start: Any = experts.in_adapter_start

    def begin_task(self, draws: Draws) -> None:
        """Add the path of a new modality."""
        draw = draws()
        path = self.grow(draw)
        if self.inner is not None:
            self.inner.grow(path, draw, start=self.start, std=BERT_STD)

    def finish_task(self) -> None:
        """Freeze every path."""
        for stack in self.modules():
            if isinstance(stack, GrowingStack):
                stack.freeze(range(len(stack)))
