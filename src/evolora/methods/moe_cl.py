"""MoE-CL: each MLP twice with LoRA, shared by all tasks and the task's own, gated per token.

    y = g_0 FFN_0(x) + g_1 FFN_t(x) ;  g = softmax(W_g x), for each token
    FFN_e(x) = W2_e (act(W1_e x) * W3_e x) ;  W_e = W + (alpha / r) B_e A_e
    L = L_task + w * mean over layers of CE(D R(z), t) ;  z = mean over tokens of FFN_0(x)

symbol -> code: FFN_e -> experts/feed_forward.py, of which the base's projections and its one
product with W2 serve both ; W_g -> TokenRouter(d, 2) ; D -> discriminator, a row per task ;
R -> gradient reversal (regularizers/adversarial.py). D learns to tell the task from what the shared
expert makes of a sample, the shared expert to hide it. Where an MLP has no gate, W3 is left out.

Source: "Self-Evolving LLMs via Continual Instruction Tuning", arXiv 2509.18133. What it keeps: a
finished task's own expert, frozen for good. The shared expert and the gates go on learning, so
answers of earlier tasks change.

Departures from the authors' code (and the option that brings their behaviour back):
- while a task is learned, every sample has its label, so that D need not look at any: here it also
  sees features that the shared expert made of samples of earlier tasks, kept when each ended; every
  task weighs the same in its loss, and only D learns from them (``discriminator_memory: 0``);
- D's cross-entropy is one of logits; theirs takes a second softmax (``disc_input: probabilities``);
- D reads z normalised over its width; else the shared expert hides the task by making z large, and
  the loss runs away (``disc_features: raw``);
- D grows with the tasks, and begins with the second one (``num_tasks``: their T from the start);
- task keys tell the task of an input; theirs is told it, in tests too (``selector: oracle``);
- experts of other tasks are frozen, not merely without a gradient; the head is the library's.
Class prompts of a dual encoder are no samples: its text tower has the experts but no D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.allocation.sample import TaskSamples
from evolora.backbones.base import Backbone, Batch, TextBackbone
from evolora.errors import ConfigError
from evolora.experts.bank import ExpertBank, GrowingStack, fresh_rows
from evolora.experts.feed_forward import Projected
from evolora.experts.mixing import mix
from evolora.experts.sites import FeedForwardLayer, Site
from evolora.methods.base import Method
from evolora.methods.selectors import use_selector
from evolora.randomness import generator
from evolora.registry import METHODS
from evolora.regularizers.adversarial import (
    DiscriminatorInput,
    discriminator_losses,
    reverse_gradient,
)
from evolora.routing.route import Route
from evolora.routing.selector import AutoEncoderSelectorConfig, OracleSelectorConfig
from evolora.routing.task_keys import TaskKeySelectorConfig
from evolora.routing.token_router import TokenRouter

SHARED = (0,)
"""The expert of all tasks; that of task t is t + 1."""
REVIEW = "review"
"""Stage of a pass that collects features for the discriminator."""


@dataclass(frozen=True, kw_only=True)
class MoECLConfig:
    """Settings of MoE-CL; defaults are the authors' where nothing else is said.

    Args:
        type: "moe-cl".
        r: rank of an expert at each of an MLP's Linears (8).
        lora_alpha: their updates are scaled by lora_alpha / r (16).
        lora_dropout: probability of zeroing a bottleneck unit in training, in [0, 1) (0.05).
        layers_to_transform: block indices (negative counts from the top); None takes all.
        towers: towers that get experts; None takes all, of a model that writes the language tower.
        disc_weight: w, weight of the discriminators' loss; 0 has none (1).
        disc_input: what its cross-entropy is of, "logits" or (authors) "probabilities".
        disc_features: what it reads, "normalized" to mean 0 and variance 1 over their width, or
            (authors) "raw": an expert then wins by making them large, and the loss runs away.
        discriminator_memory: features of each earlier task that every layer keeps for its
            discriminator (32, ours); 0 keeps none.
        num_tasks: tasks that a discriminator tells apart from the start (authors: all of the
            benchmark, 4); None: those begun so far.
        selector: who tells the task: "task-keys", "auto-encoder" or "oracle".
    """

    type: Literal["moe-cl"] = "moe-cl"
    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05
    layers_to_transform: tuple[int, ...] | None = None
    towers: tuple[str, ...] | None = None
    disc_weight: float = 1.0
    disc_input: DiscriminatorInput = "logits"
    disc_features: Literal["normalized", "raw"] = "normalized"
    discriminator_memory: int = 32
    num_tasks: int | None = None
    selector: TaskKeySelectorConfig | AutoEncoderSelectorConfig | OracleSelectorConfig = field(
        default_factory=TaskKeySelectorConfig
    )

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"r must be at least 1; got {self.r}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(f"lora_dropout must be in [0, 1); got {self.lora_dropout}")
        for name in ("disc_weight", "discriminator_memory"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be at least 0; got {getattr(self, name)}")
        if self.num_tasks is not None and self.num_tasks < 1:
            raise ConfigError(f"num_tasks must be at least 1; got {self.num_tasks}")


class MoECLLayer(FeedForwardLayer):
    """The experts, gate and discriminator of one MLP.

    Args:
        site: the MLP.
        config: the method's settings.
        judged: whether it has a discriminator.

    Attributes:
        pooled: (z (b, d), task of each row (b,)) of the forward that ran last, until it is taken.
    """

    def __init__(
        self, site: Site, config: MoECLConfig, device: torch.device, *, judged: bool
    ) -> None:
        super().__init__()
        assert site.mlp is not None
        self.name, self.config, self.mlp = site.name, config, site.mlp
        linears = {"up": self.mlp.up, "gate": self.mlp.gate, "down": self.mlp.down}
        scale = config.lora_alpha / config.r
        self.bank = nn.ModuleDict(
            {
                name: ExpertBank(
                    linear.in_features, linear.out_features, config.r, scale=scale, device=device
                )
                for name, linear in linears.items()
                if linear is not None
            }
        )
        self.router = TokenRouter(site.d_in, 2, device=device)
        self.discriminator = GrowingStack(site.d_out, device=device) if judged else None
        rows = config.discriminator_memory
        remembers = judged and rows > 0
        self.memory = GrowingStack(rows, site.d_out, device=device) if remembers else None
        self.pooled: tuple[Tensor, Tensor] | None = None

    def hidden(self, seen: Projected, route: Route) -> tuple[Tensor, ...]:
        """Return (mixture of both experts' hidden states, those of either, gates (b, n, 2))."""
        shared = self._activated(seen, SHARED, route)
        own = self._activated(seen, self._own(route), route)
        gates = self.router(seen.x)
        if self.discriminator is not None and (route.random is not None or route.stage == REVIEW):
            self.pooled = (self._pool(shared, route), route.tasks)
        # g_0 + g_1 = 1, and where both experts agree the sum is exactly what they agree on.
        mixed = shared + gates[..., 1:].to(shared.dtype) * (own - shared)
        return mixed, shared, own, gates

    def forward(
        self, x: Tensor, out: Tensor, route: Route, hidden: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """Return what the base's W2 made of the mixture plus both experts' own parts of it."""
        _, shared, own, gates = hidden
        out = self._add("down", out, shared, SHARED, route, gates[..., :1])
        return self._add("down", out, own, self._own(route), route, gates[..., 1:])

    def flops(self, tokens: int) -> int:
        """Return the extra FLOPs of one row of ``tokens`` tokens: two experts and the gate."""
        experts = sum(bank.flops(tokens, 2) for bank in self.banks())
        return experts + self.router.flops(tokens)

    def banks(self) -> list[ExpertBank]:
        """Return the banks of the MLP's Linears."""
        return [bank for bank in self.bank.values() if isinstance(bank, ExpertBank)]

    def begin_task(self, task: int, draw: torch.Generator) -> None:
        """Give the task its expert; the first also makes what all tasks share."""
        for bank in self.banks():
            bank.grow(2 if task == 0 else 1, draw)
        if task == 0:
            self.router.grow(draw)
        if self.discriminator is None:
            return
        new = max(task + 1, self.config.num_tasks or 0) - len(self.discriminator)
        if new > 0:
            self.discriminator.grow(fresh_rows(new, self.discriminator, draw))

    def adversary(self, task: int) -> Tensor | None:
        """Return the discriminator's loss on the rows that ran last and on those it remembers.

        None where there is nothing to tell apart.
        """
        pooled, self.pooled = self.pooled, None
        if pooled is None or self.discriminator is None or len(self.discriminator) < 2:
            return None
        features, tasks = pooled
        weight = self.discriminator.all()
        with torch.autocast(features.device.type, enabled=False):
            logits = F.linear(reverse_gradient(self._judged(features)), weight)
            total = discriminator_losses(logits, tasks, self.config.disc_input).mean()
            if self.memory is None or task == 0:
                return total
            known = self.memory.all()[:task]
            there = ~known.isnan().any(dim=2)  # a task may have had no sample for this tower
            logits = F.linear(self._judged(known.nan_to_num(nan=0.0)), weight)
            old = torch.arange(len(known), device=weight.device).unsqueeze(1).expand(there.shape)
            losses = discriminator_losses(
                logits.flatten(0, 1), old.flatten(), self.config.disc_input
            ).view(there.shape)
        return total + ((losses * there).sum(dim=1) / there.sum(dim=1).clamp_min(1)).sum()

    def remember(self, features: Tensor) -> None:
        """Keep features (n, d) of a finished task, spread evenly."""
        assert self.memory is not None
        count = self.memory.shape[0]
        if len(features) == 0:
            features = features.new_full((1, features.shape[1]), torch.nan)
        rows = [index * len(features) // count for index in range(count)]
        self.memory.grow(features[rows].unsqueeze(0))
        self.memory.freeze(range(len(self.memory)))

    def _judged(self, features: Tensor) -> Tensor:
        """Return what the discriminator gets of features (..., d)."""
        if self.config.disc_features == "raw":
            return features
        return F.layer_norm(features, features.shape[-1:])

    def _own(self, route: Route) -> Sequence[int] | Tensor:
        """Return the expert of the task of each row."""
        if route.uniform is not None:
            return (route.uniform + 1,)
        return route.tasks.unsqueeze(1) + 1

    def _activated(self, seen: Projected, ids: Sequence[int] | Tensor, route: Route) -> Tensor:
        """Return an expert's hidden states, from the projections of the base."""
        up = self._add("up", seen.up, seen.x, ids, route)
        if seen.gate is None:
            return self.mlp.hidden(up, None)
        return self.mlp.hidden(up, self._add("gate", seen.gate, seen.x, ids, route))

    def _add(
        self,
        part: str,
        out: Tensor,
        x: Tensor,
        ids: Sequence[int] | Tensor,
        route: Route,
        gate: Tensor | None = None,
    ) -> Tensor:
        """Return out plus an expert's low-rank part of a Linear, weighed per token (b, n, 1)."""
        bank = self.bank[part]
        assert isinstance(bank, ExpertBank)
        if gate is not None and isinstance(ids, Tensor):  # an expert has no bias: g E(x) = E(g x)
            x, gate = x * gate.to(x.dtype), None
        return mix(
            out,
            x,
            bank,
            ids,
            gate,
            dropout=self.config.lora_dropout,
            random=route.random,
            key=f"{self.name}/{part}/{'shared' if ids is SHARED else 'own'}",
            formulation=self.formulation,
            inplace=part == "down",
        )

    def _pool(self, shared: Tensor, route: Route) -> Tensor:
        """Return the mean (b, d) over real tokens of the shared expert's output.

        W2 is linear, so it is that of the mean; no dropout is drawn for it.
        """
        mean = route.mean(shared, answers=True).unsqueeze(1)
        bank = self.bank["down"]
        assert isinstance(bank, ExpertBank)
        return mix(self.mlp.project(mean), mean, bank, SHARED).squeeze(1).float()


@METHODS.register(
    "moe-cl", summary="MoE-CL: a shared and a task's own LoRA of each MLP, adversarially kept apart"
)
class MoECL(Method):
    """The method; see the module docstring."""

    config_class: ClassVar[Any] = MoECLConfig
    config: MoECLConfig
    writes = True

    def __init__(self, config: MoECLConfig, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__(config, backbone, seed=seed)
        for site in backbone.sites("ffn", towers=config.towers, layers=config.layers_to_transform):
            of_prompts = backbone.answers == "prompts" and site.tower == "text"
            judged = config.disc_weight > 0 and not of_prompts
            self.insert(site, MoECLLayer(site, config, backbone.device, judged=judged))
        use_selector(self, config.selector)

    def moe_layers(self) -> list[MoECLLayer]:
        """Return the layers in order of tower and depth."""
        return [layer for layer in self.layers.values() if isinstance(layer, MoECLLayer)]

    def allocate(self, task: int) -> None:
        """Give every MLP an expert for the task."""
        for layer in self.moe_layers():
            layer.begin_task(task, generator(self.seed, layer.name, task))

    def preview(self, task: int, samples: TaskSamples | None) -> None:
        """Where only shapes count, count what the discriminators will remember of the task."""
        for layer in self.moe_layers() if samples is None else ():
            if layer.memory is not None and len(layer.memory) == task:
                layer.remember(layer.memory.active.new_zeros(1, layer.memory.shape[1]))

    def finish_task(self) -> None:
        """Freeze the task's own experts; what is shared goes on learning."""
        for layer in self.moe_layers():
            for bank in layer.banks():
                bank.freeze(range(1, len(bank)))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss terms of a training batch."""
        for layer in self.moe_layers():
            layer.pooled = None  # of a forward that broke off, or was run again in backward
        return super().forward(batch)

    def extra_losses(self, batch: Batch, embedding: Tensor) -> dict[str, Tensor]:
        """Return the discriminators' loss; its gradient reaches the experts reversed."""
        assert batch.task is not None
        terms = [layer.adversary(batch.task) for layer in self.moe_layers()]
        found = [term for term in terms if term is not None]
        if not found:
            return {}
        return {"discriminator": self.config.disc_weight * torch.stack(found).mean()}

    @torch.no_grad()
    def review(
        self, task: int, rows: int, read: Callable[[Sequence[int]], Iterable[Batch]]
    ) -> None:
        """Let the discriminators remember features of training samples spread evenly."""
        layers = [layer for layer in self.moe_layers() if layer.memory is not None]
        if not layers:
            return
        count = min(rows, self.config.discriminator_memory)
        parts: list[list[Tensor]] = [[] for _ in layers]
        for batch in read([index * rows // count for index in range(count)]):
            route = replace(self.make_route(task, batch), stage=REVIEW)
            if isinstance(self.backbone, TextBackbone):
                self.loss_under(route, batch, self.labels[task], task)
            else:
                self.backbone.encode(batch, route)
            for layer, found in zip(layers, parts, strict=True):
                pooled, layer.pooled = layer.pooled, None
                if pooled is not None:
                    found.append(pooled[0])
        for layer, found in zip(layers, parts, strict=True):
            assert layer.memory is not None
            none = layer.memory.active.new_empty(0, layer.memory.shape[1])
            layer.remember(torch.cat([none, *found]))
