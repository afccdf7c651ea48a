"""BranchLoRA: one trunk for all, a few of many branches per sample, a router per task.

    y = W x + s sum_{i in S} p_i B_i A x ,  p = softmax(W_t c) ,  S = the k largest of p ,
    s = lora_alpha / r ,  c = what speaks for the sequence at this Linear

After a task the branches that it used most are frozen, and so is its router; later tasks may use
frozen branches but not change them. Which router answers is told by the keys of the tasks. What a
task answers stays, bit for bit, where its samples go to frozen branches and the trunk is frozen;
elsewhere it drifts.

symbol -> code: A -> BranchLayer.trunk ; B_i -> BranchBank row ; W_t -> TaskRouters row t ;
c -> ``routing_token`` ; keys -> TaskKeySelector.

Source: "BranchLoRA", ACL 2025, arXiv 2506.02041. We had a digest of the paper and no code, so this
is a reading of it, which gives the published sizes (222 M on LLaVA-1.5-7B). Theirs are r = 16 per
branch, lora_alpha / r = 2, 8 branches at every Linear of the language model (``towers:
[language]``, ``target_modules: [all-linear]``), and a projector tuned in full, frozen here.

What is ours, and why:
- ``routing_token: mean``. The paper routes on a sequence's first token. In a causal language model
  (and in CLIP's text tower) that token sees only itself: its state is the same for every sample, so
  each task would have one fixed choice per Linear, however the input reads ("first" brings that
  back; in towers that look both ways it is the class token). The mean is over the sample's own
  tokens without padding or answer. Either is decided on the prompt and holds for all that is
  written after it;
- keys are not trained beside the task: what minimises sum(1 - cos(e_i, k)) is the mean of the unit
  vectors e_i, which "task-keys" keep, of the frozen model's own image and text features;
- ``freeze_trunk_after: first-task``, since a trunk that goes on learning moves what frozen branches
  answer; "never" is the other reading of the paper;
- branches are appended where a new task would find fewer than ``min_free_branches`` that may learn:
  of eight, two frozen per task are gone after four tasks;
- routers start at zero and their ties go to branches that may learn; a random start would send more
  tasks to frozen branches alone the more tasks there were;
- branches are counted and frozen per Linear. ``renormalize`` is unknown; off is the formula above.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from evolora.backbones.base import Backbone
from evolora.errors import ConfigError
from evolora.experts.bank import GrowingStack, fresh_rows
from evolora.experts.branches import BranchBank
from evolora.experts.sites import ExpertLayer, Site
from evolora.experts.usage import UsageCounter
from evolora.methods.base import Method
from evolora.methods.lora import LoRAConfig
from evolora.methods.selectors import use_selector
from evolora.randomness import generator
from evolora.registry import METHODS
from evolora.routing.gates import Gating, TaskRouters
from evolora.routing.route import Route
from evolora.routing.selector import OracleSelectorConfig
from evolora.routing.task_keys import TaskKeySelectorConfig


@dataclass(frozen=True, kw_only=True)
class BranchLoRAConfig(LoRAConfig):
    """Settings of BranchLoRA; see :class:`LoRAConfig` for those that are a LoRA's.

    Args:
        type: "branch-lora".
        r: rank of the trunk, which is that of every branch (16).
        lora_alpha: the update is scaled by lora_alpha / r (32).
        num_branches: branches per site at the start (8).
        top_k: branches of a sample (2).
        renormalize: whether the weights of these sum to 1.
        routing_token: what the router of a site reads of a sequence: the "mean" of the sample's
            own tokens, or its "first" token (the paper's).
        freeze_top: most used branches per site to freeze when a task ends (2); 0 freezes none.
        freeze_trunk_after: "first-task" keeps the trunk for all later tasks; "never".
        min_free_branches: a new task finds at least so many unfrozen branches; sites grow to it.
        selector: who tells which task's router answers: "task-keys" or "oracle".
    """

    type: Literal["branch-lora"] = "branch-lora"
    r: int = 16
    lora_alpha: float = 32.0
    num_branches: int = 8
    top_k: int = 2
    renormalize: bool = False
    routing_token: Literal["mean", "first"] = "mean"
    freeze_top: int = 2
    freeze_trunk_after: Literal["first-task", "never"] = "first-task"
    min_free_branches: int = 2
    selector: TaskKeySelectorConfig | OracleSelectorConfig = field(
        default_factory=TaskKeySelectorConfig
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top_k <= self.num_branches:
            raise ConfigError(
                f"top_k must be between 1 and num_branches ({self.num_branches}); got {self.top_k}"
            )
        if self.renormalize and self.top_k == 1 and self.num_branches > 1:
            raise ConfigError(
                "renormalize gives the one branch of top_k 1 the weight 1 whatever a router says, "
                "so that it cannot learn; use top_k of at least 2, or renormalize: false"
            )
        for name in ("freeze_top", "min_free_branches"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0; got {getattr(self, name)}")


class BranchLayer(ExpertLayer):
    """A trunk, its branches and the tasks' routers at one Linear.

    Args:
        site: the Linear.
        config: the method's settings.
    """

    def __init__(self, site: Site, config: BranchLoRAConfig, device: torch.device) -> None:
        super().__init__()
        self.name, self.config = site.name, config
        self.scale = config.lora_alpha / config.r
        self.trunk = GrowingStack(config.r, site.d_in, device=device)
        self.bank = BranchBank(config.r, site.d_out, device=device)
        self.router = TaskRouters(
            site.d_in,
            config.num_branches,
            config.top_k,
            noise=False,
            renormalize=config.renormalize,
            device=device,
        )
        self.usage = UsageCounter(config.num_branches)

    def forward(self, x: Tensor, out: Tensor, route: Route) -> Tensor:
        """Return out + the branches of each row's task, the same for all tokens of a row."""
        gating = route.once(self.name, lambda: self._decide(x, route))
        if route.random is not None:
            self.usage.add(gating.ids, gating.gates.detach(), forward=route)
        hidden = F.linear(x.to(out.dtype), self.trunk.all()[0].to(out.dtype)) * self.scale
        if self.config.lora_dropout > 0.0 and route.random is not None:
            shape = tuple(hidden.shape)
            hidden = hidden * route.random.keep_mask(
                f"{self.name}/dropout", shape, self.config.lora_dropout, hidden
            )
        return self.bank.add(
            out, hidden, gating.ids, gating.gates, formulation=self.formulation, inplace=True
        )

    def flops(self, tokens: int) -> int:
        """Return the extra FLOPs of one row of ``tokens`` tokens: router, trunk and branches."""
        router = 2 * self.router.d * self.router.experts
        trunk = 2 * tokens * self.config.r * self.router.d
        return router + trunk + self.bank.flops(tokens, self.config.top_k)

    def pairs(self, *, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """Return the trunk with each branch that trains, or with each of the others."""
        b = self.bank.B.frozen if frozen else self.bank.B.active
        return self.trunk.all().expand(len(b), -1, -1), b

    def begin_task(self, draw: torch.Generator) -> None:
        """Give the task a router and enough unfrozen branches."""
        if len(self.bank) == 0:
            self.trunk.grow(fresh_rows(1, self.trunk, draw))
            self.bank.grow(self.config.num_branches)
        frozen = self.bank.frozen_ids()
        missing = self.config.min_free_branches - (len(self.bank) - len(frozen))
        if missing > 0:
            self.bank.grow(missing)
            self.router.widen(len(self.bank))
            self.usage.widen(len(self.bank))
        self.router.grow(last=frozen)
        self.usage.reset()

    def finish_task(self) -> None:
        """Freeze the router, the branches that the task used most, and the trunk if it is to be."""
        self.bank.freeze(self.usage.most_used(self.config.freeze_top))
        self.router.freeze()
        if self.config.freeze_trunk_after == "first-task":
            self.trunk.freeze([0])

    def _decide(self, x: Tensor, route: Route) -> Gating:
        c = route.first(x) if self.config.routing_token == "first" else route.mean(x)
        c = c.to(self.router.gate.active.dtype)
        found: Gating = self.router(c, route.tasks, uniform=route.uniform)
        return found


@METHODS.register(
    "branch-lora", summary="BranchLoRA: one trunk, branches chosen per sample, a router per task"
)
class BranchLoRA(Method):
    """The method; see the module docstring."""

    config_class: ClassVar[Any] = BranchLoRAConfig
    config: BranchLoRAConfig
    writes = True

    def __init__(self, config: BranchLoRAConfig, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__(config, backbone, seed=seed)
        for site in backbone.sites(
            "linear",
            towers=config.towers,
            layers=config.layers_to_transform,
            target_modules=config.target_modules,
        ):
            layer = BranchLayer(site, config, backbone.device)
            layer.usage.replicated = site.tower == "text" and backbone.answers == "prompts"
            self.insert(site, layer)
        use_selector(self, config.selector)

    def branch_layers(self) -> list[BranchLayer]:
        """Return the layers in order of tower and depth."""
        return [layer for layer in self.layers.values() if isinstance(layer, BranchLayer)]

    def allocate(self, task: int) -> None:
        """Give every site a router for the task and enough unfrozen branches."""
        for key, layer in self.layers.items():
            assert isinstance(layer, BranchLayer)
            layer.begin_task(generator(self.seed, key, task))

    def finish_task(self) -> None:
        """Freeze what the task used most, its routers, and the trunks."""
        for layer in self.branch_layers():
            layer.finish_task()
