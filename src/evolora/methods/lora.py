"""LoRA baselines: one expert for all tasks in turn, one per task, one trained jointly.

    y = W x + (alpha / r) * B A x ;  A Kaiming-uniform, B zero, W frozen

Source: LoRA, Hu et al., ICLR 2022, arXiv 2106.09685. The three regimes bracket every continual
method at equal parameters: sequential LoRA is what happens without protection, one LoRA per task
with the true task id is what perfect protection and routing give, joint training is what no
continual learner can see. With task keys in place of the true id, one LoRA per task is a continual
learner itself: no task is told, and each input goes to the nearest one (never to the base).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from evolora.allocation.allocator import Allocator, SiteExperts
from evolora.allocation.sample import TaskSamples
from evolora.allocation.settings import AllocationConfig, check_allocation
from evolora.backbones.base import Backbone
from evolora.errors import ConfigError
from evolora.experts.bank import ExpertBank
from evolora.experts.sites import Site
from evolora.experts.task_layer import TaskLayer
from evolora.methods.base import Method
from evolora.methods.selectors import use_selector
from evolora.randomness import generator
from evolora.registry import METHODS
from evolora.routing.selector import AlwaysSelector, OracleSelectorConfig
from evolora.routing.task_keys import TaskKeySelectorConfig


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Settings of a LoRA, named as in PEFT.

    Args:
        r: rank.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: probability of zeroing a bottleneck unit during training, in [0, 1).
        target_modules: Linears that get an expert: q_proj, k_proj, v_proj, out_proj, fc1, fc2; a
            model that writes has others beside them (o_proj, gate_proj ...); "all-linear" is all.
            None takes q_proj, v_proj, fc1 and fc2, and every Linear of a model that writes.
        layers_to_transform: block indices (negative counts from the top); None takes all.
        towers: towers that get experts; None takes all.
    """

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] | None = None
    towers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"r must be at least 1; got {self.r}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(f"lora_dropout must be in [0, 1); got {self.lora_dropout}")


@dataclass(frozen=True, kw_only=True)
class SequentialLoRAConfig(LoRAConfig):
    """See :class:`LoRAConfig`."""

    type: Literal["sequential-lora"] = "sequential-lora"


@dataclass(frozen=True, kw_only=True)
class LoRAPerTaskConfig(LoRAConfig):
    """See :class:`LoRAConfig`.

    Args:
        selector: "oracle" is told the true task; "task-keys" recognise it.
        allocation: which sites get an expert of a task: chosen under a budget, or as a saved
            allocation (path of a .json file) says; None gives one to every site.
    """

    type: Literal["lora-per-task"] = "lora-per-task"
    selector: OracleSelectorConfig | TaskKeySelectorConfig = field(
        default_factory=OracleSelectorConfig
    )
    allocation: AllocationConfig | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_allocation(self.allocation)


@dataclass(frozen=True, kw_only=True)
class JointLoRAConfig(LoRAConfig):
    """See :class:`LoRAConfig`."""

    type: Literal["joint-lora"] = "joint-lora"


class LoRALayer(TaskLayer):
    """LoRA experts at one Linear, see :class:`TaskLayer`.

    Args:
        site: the Linear.
        config: rank, scale, dropout.
        places: which tasks have an expert here, and which; None: every task has its own.
    """

    def __init__(
        self,
        site: Site,
        config: LoRAConfig,
        device: torch.device,
        places: SiteExperts | None = None,
    ) -> None:
        scale = config.lora_alpha / config.r
        bank = ExpertBank(site.d_in, site.d_out, config.r, scale=scale, device=device)
        super().__init__(bank, name=site.name, dropout=config.lora_dropout, places=places)


class _LoRA(Method):
    """Experts at Linears, allocated by the subclasses."""

    config: LoRAConfig
    layer_class: ClassVar[type[LoRALayer]] = LoRALayer
    shared: ClassVar[bool] = True
    writes = True

    def __init__(
        self,
        config: LoRAConfig,
        backbone: Backbone,
        *,
        seed: int = 0,
        allocation: AllocationConfig | str | None = None,
    ) -> None:
        super().__init__(config, backbone, seed=seed)
        self.selector = AlwaysSelector(0)
        sites = backbone.sites(
            "linear",
            towers=config.towers,
            layers=config.layers_to_transform,
            target_modules=config.target_modules,
        )
        places: list[SiteExperts | None] = [None] * len(sites)
        if allocation is not None:
            costs = [config.r * (site.d_in + site.d_out) for site in sites]
            allocator = Allocator(allocation, sites, costs, seed=seed)
            places = [SiteExperts(allocator, column) for column in range(len(sites))]
            self.allocator = allocator
        for site, own in zip(sites, places, strict=True):
            self.insert(site, self.layer_class(site, config, backbone.device, own))

    def allocate(self, task: int) -> None:
        """Give every site one new expert (shared regimes: only once); older ones are frozen."""
        if (self.shared and task > 0) or self.allocator is not None:
            return
        for key, layer in self.layers.items():
            assert isinstance(layer, LoRALayer)
            layer.bank.freeze(range(len(layer.bank)))
            layer.bank.grow(1, generator(self.seed, key, task))

    def expert_task(self, task: int) -> int:
        """Shared regimes route every task to expert 0."""
        return 0 if self.shared else task


@METHODS.register("sequential-lora", summary="one LoRA trained on each task in turn (forgets)")
class SequentialLoRA(_LoRA):
    """One expert, never protected."""

    config_class: ClassVar[Any] = SequentialLoRAConfig


@METHODS.register("lora-per-task", summary="one LoRA per task: told the task, or told by task keys")
class LoRAPerTask(_LoRA):
    """One frozen expert per learned task; an oracle sends unlearned tasks to the base."""

    config_class: ClassVar[Any] = LoRAPerTaskConfig
    shared = False

    def __init__(self, config: Any, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__(config, backbone, seed=seed, allocation=config.allocation)
        self.choose_selector(config)

    def choose_selector(self, config: Any) -> None:
        """Let the configured selector tell the tasks."""
        use_selector(self, config.selector)

    def preview(self, task: int, samples: TaskSamples | None) -> None:
        """Give an expert to the sites that the allocator chooses for the task, if there is one."""
        if self.allocator is None:
            return
        counts = self.allocator.decide(self, task, samples)
        for (key, layer), count in zip(self.layers.items(), counts, strict=True):
            assert isinstance(layer, LoRALayer)
            if count:
                layer.bank.grow(count, generator(self.seed, key, task))

    def route_tensors(self, task: int) -> list[Tensor]:
        """Return the task's own experts and where they stand: they alone answer it."""
        found = [] if self.allocator is None else [self.allocator.experts[task : task + 1]]
        for layer in self.layers.values():
            assert isinstance(layer, LoRALayer)
            found += layer.task_tensors(task)
        return found

    def finish_task(self) -> None:
        """Freeze the task's expert."""
        for layer in self.layers.values():
            assert isinstance(layer, LoRALayer)
            layer.finish_task()


@METHODS.register("joint-lora", summary="one LoRA trained on all tasks at once (upper bound)")
class JointLoRA(_LoRA):
    """One expert that sees every task at once."""

    config_class: ClassVar[Any] = JointLoRAConfig
    joint = True
