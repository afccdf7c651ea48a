"""MoELoRA: a LoRA cut into experts that every token weighs anew; nothing is protected.

    y = W x + s sum_i p_i B_i A_i x ,  p = softmax(W_r x) for each token ,  s = lora_alpha / r

Experts have rank r / E, so that all of them together cost what one LoRA of rank r does. All experts
and all routers are trained on every task and no task is told: what earlier tasks learned is kept
only as far as their tokens go to other experts. It is the baseline of CoIN.

symbol -> code: W_r -> TokenRouter ; A_i, B_i -> ExpertBank ; r -> r, rank of all experts together.

Source: Chen et al., "CoIN: A Benchmark of Continual Instruction Tuning for Multimodal Large
Language Models", NeurIPS 2024, arXiv 2403.08350 (MoELoRA; code zackschen/CoIN). Theirs are r = 128,
lora_alpha = 256, 8 experts at every Linear of the language model (``towers: [language]``,
``target_modules: [all-linear]``), and a projector that is tuned in full, which is frozen here.

Departures: dropout zeroes units of the bottleneck, as in all LoRAs here, not of the input;
``top_k`` is ours. The experts are one product of stacked A, weighted, and one of stacked B.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from evolora.backbones.base import Backbone
from evolora.errors import ConfigError
from evolora.experts.bank import ExpertBank
from evolora.experts.sites import Site
from evolora.experts.token_layer import TokenLayer
from evolora.methods.base import Method
from evolora.methods.lora import LoRAConfig
from evolora.randomness import generator
from evolora.registry import METHODS
from evolora.routing.selector import AlwaysSelector

INIT_STD = 0.01
"""Deviation of a fresh A (CoIN's code)."""


@dataclass(frozen=True, kw_only=True)
class MoELoRAConfig(LoRAConfig):
    """Settings of MoELoRA; see :class:`LoRAConfig` for those that are a LoRA's.

    Args:
        type: "moe-lora".
        r: rank of all experts together (128); each has r / num_experts.
        lora_alpha: the update is scaled by lora_alpha / r (256).
        num_experts: experts per site (8).
        top_k: experts of a token, their weights then sum to 1; None takes all, as CoIN does.
    """

    type: Literal["moe-lora"] = "moe-lora"
    r: int = 128
    lora_alpha: float = 256.0
    num_experts: int = 8
    top_k: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts < 1:
            raise ConfigError(f"num_experts must be at least 1; got {self.num_experts}")
        if self.r % self.num_experts:
            raise ConfigError(
                f"r is the rank of all {self.num_experts} experts together and must be a multiple "
                f"of num_experts; got {self.r}"
            )
        if self.top_k is not None and not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"top_k must be between 1 and num_experts ({self.num_experts}), or null for all; "
                f"got {self.top_k}"
            )


class MoELoRALayer(TokenLayer):
    """Experts and their router at one Linear, see :class:`TokenLayer`.

    Args:
        site: the Linear.
        config: the method's settings.
    """

    def __init__(self, site: Site, config: MoELoRAConfig, device: torch.device) -> None:
        bank = ExpertBank(
            site.d_in,
            site.d_out,
            config.r // config.num_experts,
            scale=config.lora_alpha / config.r,
            device=device,
        )
        super().__init__(
            site,
            bank,
            config.num_experts,
            top_k=config.top_k,
            dropout=config.lora_dropout,
            std=INIT_STD,
            device=device,
        )


@METHODS.register("moe-lora", summary="CoIN's MoELoRA: experts that every token weighs (forgets)")
class MoELoRA(Method):
    """The method; see the module docstring."""

    config_class: ClassVar[Any] = MoELoRAConfig
    config: MoELoRAConfig
    writes = True

    def __init__(self, config: MoELoRAConfig, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__(config, backbone, seed=seed)
        self.selector = AlwaysSelector(0)
        for site in backbone.sites(
            "linear",
            towers=config.towers,
            layers=config.layers_to_transform,
            target_modules=config.target_modules,
        ):
            self.insert(site, MoELoRALayer(site, config, backbone.device))

    def allocate(self, task: int) -> None:
        """Make the experts once; every later task goes on with them."""
        if task > 0:
            return
        for key, layer in self.layers.items():
            assert isinstance(layer, MoELoRALayer)
            layer.begin_task(partial(generator, self.seed, key, task))

    def expert_task(self, task: int) -> int:
        """Route every task alike: there is one set of experts."""
        return 0
