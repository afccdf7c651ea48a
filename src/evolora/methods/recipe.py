"""Recipe: a method of named parts, those of the others, in any combination that makes sense.

    y = base(x) + sum_i g_i E_i(x)    at every chosen site, for rows that a task's experts answer

What E is and where it stands, what decides g, who knows the task, whose experts are made when a
task begins, and what is added to the loss are one part each (``evolora ls parts``):

experts -> E, ``recipes/experts.py`` ; sites -> where, the same file ; gate -> g, and so the layer
at a site, ``recipes/gates.py`` ; selector -> who answers a row ; allocation -> what a new task
gets, both ``recipes/choices.py`` ; losses -> ``recipes/terms.py`` ; regularizers -> as anywhere.

What cannot go together is refused by ``recipes/rules.py``, with the reason. The layers are those of
the methods that the parts come from, so a recipe of one method's parts is that method, bit by bit;
``docs/recipes.md`` says which settings, and what a recipe leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from evolora.allocation.allocator import Allocator, SiteExperts
from evolora.allocation.sample import TaskSamples
from evolora.allocation.settings import check_allocation
from evolora.backbones.base import Backbone, Batch, Encoded
from evolora.backbones.modalities import ModalitySpec
from evolora.errors import ConfigError, unknown_name
from evolora.experts.factor_layer import SEES, FactorLayer, Queries
from evolora.experts.sites import ExpertLayer, Site
from evolora.experts.task_layer import TaskLayer
from evolora.methods.base import Method
from evolora.methods.entries import newest_stage, stages, the_new_one
from evolora.methods.pathweave import PathWeave
from evolora.methods.selectors import use_selector
from evolora.randomness import generator
from evolora.recipes.choices import EverySite, kind_of
from evolora.recipes.experts import LinearSites, LoRAExperts, QFormerSites
from evolora.recipes.gates import OwnGate, Place
from evolora.recipes.rules import check_on, check_parts
from evolora.registry import A_PART, METHODS, PARTS, SOME_PARTS
from evolora.routing.route import Route
from evolora.routing.selection import Chosen, Selection
from evolora.routing.selector import Helper, Selector
from evolora.routing.task_keys import BoundedTaskKeySelectorConfig


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """Which parts; each is a name (its defaults) or a mapping of its type and settings.

    Args:
        type: "recipe".
        experts: what learns: "lora", "bottleneck", "factors" or "woven".
        sites: where: "linear", "attention", "qkv", "mlp" or "q-former".
        gate: what weighs them: "own", "top-k", "tokens", "query" or "paths".
        selector: who tells the task: "task-keys", "auto-encoder", "modality", "oracle" or "none".
        allocation: what a new task gets: "every-site", a budget ("gradient", "uniform", "random",
            or the path of a saved allocation), "pool", "shared" or "per-modality".
        regularizers: losses on the experts, as in any configuration.
        losses: "align", "consistency", "load-balance".
    """

    type: Literal["recipe"] = "recipe"
    experts: Any = field(default_factory=LoRAExperts, metadata=A_PART)
    sites: Any = field(default_factory=LinearSites, metadata=A_PART)
    gate: Any = field(default_factory=OwnGate, metadata=A_PART)
    selector: Any = field(default_factory=BoundedTaskKeySelectorConfig, metadata=A_PART)
    allocation: Any = field(default_factory=EverySite, metadata=A_PART)
    regularizers: tuple[Any, ...] = field(default=(), metadata=SOME_PARTS)
    losses: tuple[Any, ...] = field(default=(), metadata=SOME_PARTS)

    modality_towers: ClassVar[tuple[str, ...]] = QFormerSites.towers

    def __post_init__(self) -> None:
        if isinstance(self.allocation, str):
            check_allocation(self.allocation)
        for name in ("experts", "sites", "gate", "selector", "allocation"):
            given = getattr(self, name)
            if isinstance(given, str) and name == "allocation":
                continue
            if getattr(given, "type", None) not in PARTS[name].names():
                raise unknown_name(name, getattr(given, "type", given), PARTS[name].names())
        check_parts(self)

    def towers_on(self, backbone: Backbone) -> tuple[str, ...]:
        """Return the towers whose sites get experts."""
        if self.sites.towers is not None:
            chosen: tuple[str, ...] = self.sites.towers
            return chosen
        if self.experts.made_of == "factors" and backbone.answers == "prompts":
            return tuple(name for name in backbone.towers if SEES.get(name) == ("image",))
        return backbone.towers


@METHODS.register("recipe", summary="parts of the other methods by name, combined")
class Recipe(Method):
    """The method; see the module docstring.

    Attributes:
        recipe: the parts.
        queries: what describes the modalities of the rows now running, where experts are factors.
    """

    config_class: ClassVar[Any] = RecipeConfig
    writes = True

    def __init__(self, config: Any, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__(config, backbone, seed=seed)
        self.recipe = recipe = self.parts_for(config, backbone)
        check_on(recipe, backbone)
        self.kind, self.regularizers = kind_of(recipe.allocation), recipe.regularizers
        self.queries: Queries | None = None
        if recipe.experts.made_of == "factors":
            self.queries = Queries(backbone.modalities, recipe.gate.cmgr)
        if recipe.experts.made_of == "paths":
            self.counted_as = PathWeave.counted_as
        sites = recipe.sites.find(backbone, recipe.towers_on(backbone))
        for site in sites:
            place = Place(site=site, recipe=recipe, backbone=backbone, queries=self.queries)
            self.insert(site, recipe.gate.layer(place))
        if self.kind == "budget":
            self._share_budget(recipe.allocation, sites)
        if self.queries is not None and backbone.one_stream:
            backbone.watch_blocks(backbone.towers[0], self.queries.see)
        elif self.queries is not None:
            self.query_feature = "modalities"
        if recipe.selector.type == "modality":
            self.selector, self.routing = Selector(), "task-free"  # the data say the modality
        else:
            helper: Helper = getattr(recipe.selector, "helper", "none")
            use_selector(self, recipe.selector, helper=helper)

    def parts_for(self, config: Any, backbone: Backbone) -> RecipeConfig:
        """Return the parts that a configuration means on a backbone."""
        assert isinstance(config, RecipeConfig)
        return config

    # -- learning --------------------------------------------------------------------------------

    @property
    def paths(self) -> list[str]:
        """The learned modalities, in the order of their experts."""
        return list(stages(self.task_modalities[: len(self.labels)]))

    def expand(self, spec: ModalitySpec) -> None:
        """Plug in a modality that the backbone did not know; the next task may bring it."""
        if self.entries is None:
            raise ConfigError(f"{type(self.backbone).__name__} takes no further modality")
        self.entries.expand(spec)

    def allocate(self, task: int) -> None:
        """Give every site what the new task gets there; a budget waits for the task's samples."""
        if self.kind == "budget" or (self.kind == "shared" and task > 0):
            return
        if self.kind == "modality" and (
            the_new_one(self.task_modalities, task, self.task_names[task]) is None
        ):
            return
        self._begin(self.layers, task)

    def preview(self, task: int, samples: TaskSamples | None) -> None:
        """Give experts to the sites that the budget buys for the task."""
        if self.allocator is None:
            return
        counts = self.allocator.decide(self, task, samples)
        self._begin([key for key, n in zip(self.layers, counts, strict=True) if n], task)

    def finish_task(self) -> None:
        """Freeze what the task leaves behind; shared experts go on learning."""
        if self.kind == "shared":
            return
        for layer in self.layers.values():
            layer.finish_task()  # type: ignore[operator]
        if self.kind == "modality" and self.entries is not None:
            self.entries.freeze()

    def expert_task(self, task: int) -> int:
        """Where nobody tells the task, all are routed as one."""
        return 0 if self.recipe.selector.type == "none" else task

    def extra_losses(self, batch: Batch, embedding: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms of the recipe's losses."""
        found = {}
        for loss in self.recipe.losses:
            term = loss.of(self, batch, embedding)
            if term is not None:
                found[loss.type.replace("-", "_")] = loss.weight * term
        return found

    # -- who answers -----------------------------------------------------------------------------

    @torch.no_grad()
    def route(self, batch: Batch, oracle: int | None = None) -> tuple[Encoded | None, Selection]:
        """Return who answers each row: by the selector, or the newest of its modalities."""
        if self.kind != "modality":
            return super().route(batch, oracle)
        tasks = self.task_modalities[: len(self.labels)]
        return None, Selection(tasks=newest_stage(tasks, batch, self.backbone.device))

    def told(self, batch: Batch, experts: int) -> tuple[Encoded | None, Selection]:
        """Return who answers rows whose experts are told; a modality is never told."""
        return super().told(batch, experts) if self.kind != "modality" else self.route(batch)

    def make_route(self, tasks: Chosen, batch: Batch, encoded: Encoded | None = None) -> Route:
        """Return the route of a batch; where modalities have experts, each goes by its own."""
        route = super().make_route(tasks, batch, encoded)
        if self.kind != "modality":
            return route
        return replace(route, paths={modality: path for path, modality in enumerate(self.paths)})

    def route_tensors(self, task: int) -> list[Tensor] | None:
        """Return what alone answers a task, where its experts are its own."""
        if self.kind not in ("private", "budget"):
            return None
        found = [] if self.allocator is None else [self.allocator.experts[task : task + 1]]
        for _, layer in self._own_layers():
            found += layer.task_tensors(task)
        return found

    def remove(self) -> None:
        """Take all experts, and entries of modalities, out of the backbone again."""
        super().remove()
        if self.kind == "modality" and self.entries is not None:
            self.entries.leave()

    # -- inside ----------------------------------------------------------------------------------

    def _begin(self, keys: Iterable[str], task: int) -> None:
        for key in keys:
            layer: Any = self.layers[key]
            layer.begin_task(partial(_drawn, self.seed, key, task))

    def _own_layers(self) -> list[tuple[str, TaskLayer | FactorLayer]]:
        layers: Mapping[str, ExpertLayer] = dict(self.layers.items())  # type: ignore[arg-type]
        return [(k, one) for k, one in layers.items() if isinstance(one, TaskLayer | FactorLayer)]

    def _share_budget(self, allocation: Any, sites: list[Site]) -> None:
        """Let an allocator say at which sites a task has experts."""
        layers = [layer for _, layer in self._own_layers()]
        costs = [
            layer.parameters_per_task()
            if isinstance(layer, FactorLayer)
            else layer.bank.parameters_per_expert()
            for layer in layers
        ]
        self.allocator = allocator = Allocator(allocation, sites, costs, seed=self.seed)
        for column, layer in enumerate(layers):
            layer.places = SiteExperts(allocator, column)


def _drawn(seed: int, key: str, task: int, *words: str) -> torch.Generator:
    return generator(seed, key, *words, task)
