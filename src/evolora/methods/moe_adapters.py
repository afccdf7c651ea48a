"""MoE-Adapters + DDAS: pooled experts beside every MLP, a router per task, a way out to CLIP.

One idea: a frozen CLIP gets, beside the MLP of each block, a pool of small experts. Every task owns
a router that mixes the top-k of them per sample; the experts a task used most are frozen when it
ends, so later tasks may reuse but not overwrite them. Auto-encoders on frozen features recognise
the task of an input, and hand what no task knows to the untouched CLIP.

    h = x + MHSA(LN1(x)) ;  y = h + MLP(LN2(h)) + sum_{i in S} g_i E_i(h)
    E_i(h) = s * (W_up^T drop(relu(W_down h + b_down)) + b_up)
    S = top-k of c G_t + (softplus(c N_t) + 0.01) * normal ,  g = softmax over S

symbol -> code: h -> x ; E_i -> ExpertBank row ; s -> scale ; G_t, N_t -> TaskRouters.gate, .noise ;
c -> Route.summarize(x) ; DDAS -> AutoEncoderSelector.

Source: Yu et al., "Boosting Continual Learning of Vision-Language Models via Mixture-of-Experts
Adapters", CVPR 2024, arXiv 2403.11549.

Departures from the authors' code (each with the option that brings their behaviour back):
- the selector decides per sample, not per batch of 128 (``selector.group_size``);
- its thresholds are calibrated per task on held-out errors, not typed (``selector.threshold``), and
  it reads the frozen tower's own features, not AlexNet's (``selector.feature``);
- a prompt is routed on its end token; the authors read the start token, which a causal mask makes
  the same for every prompt (``text_routing: start``);
- noise is drawn in training only (``noise_at_test``);
- equal logits go to experts that may still learn, not to whichever the sort leaves first;
- routers, auto-encoders and experts grow with the tasks; the authors allocate 11, 12 and 22;
- unselected trainable experts get a zero gradient, so AdamW may still move them by momentum; the
  authors' per-expert modules are skipped. Frozen experts are in no optimizer in either.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from evolora.backbones.base import Backbone, Batch
from evolora.errors import ConfigError
from evolora.experts.bank import ExpertBank
from evolora.experts.pool_layer import PoolConfig, PoolLayer
from evolora.experts.sites import Site
from evolora.methods.base import Method
from evolora.methods.selectors import SelectorConfig, use_selector
from evolora.randomness import generator
from evolora.registry import METHODS
from evolora.routing.selector import AutoEncoderSelectorConfig


@dataclass(frozen=True, kw_only=True)
class MoEAdaptersConfig(PoolConfig):
    """Settings of MoE-Adapters; see :class:`PoolConfig` for those of pool and routers.

    Args:
        type: "moe-adapters".
        r: bottleneck width (64).
        expert: "bottleneck" (ReLU, biases) or "lora" (linear, no biases).
        scale: constant factor of every expert (0.1).
        towers: towers that get experts; ("vision",) restricts them to images; None takes all.
        layers_to_transform: block indices (negative counts from the top); None takes all.
        selector: who recognises the task: "auto-encoder" (DDAS), "task-keys", "oracle", or "none".
    """

    type: Literal["moe-adapters"] = "moe-adapters"
    r: int = 64
    expert: Literal["bottleneck", "lora"] = "bottleneck"
    scale: float = 0.1
    towers: tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] | None = None
    selector: SelectorConfig = field(default_factory=AutoEncoderSelectorConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            raise ConfigError(f"r must be at least 1; got {self.r}")
        if self.routers == "per-task" and self.selector.type == "none":
            raise ConfigError(
                "routers 'per-task' need a selector; use routers 'shared' without one"
            )
        if self.routers == "shared" and self.selector.type != "none":
            raise ConfigError("routers 'shared' leave nothing to select; use selector type 'none'")


class MoELayer(PoolLayer):
    """A pool of experts and one router per task, beside one MLP.

    Args:
        site: where it stands.
        config: the method's settings.
    """

    def __init__(self, site: Site, config: MoEAdaptersConfig, device: torch.device) -> None:
        bottleneck = config.expert == "bottleneck"
        bank = ExpertBank(
            site.d_in,
            site.d_out,
            config.r,
            bias=bottleneck,
            activation="relu" if bottleneck else None,
            scale=config.scale,
            device=device,
        )
        super().__init__(site, bank, config, device)


@METHODS.register(
    "moe-adapters", summary="MoE-Adapters + DDAS: pooled experts, a router per task, base fallback"
)
class MoEAdapters(Method):
    """The method; see the module docstring."""

    config_class: ClassVar[Any] = MoEAdaptersConfig
    config: MoEAdaptersConfig

    def __init__(self, config: MoEAdaptersConfig, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__(config, backbone, seed=seed)
        for site in backbone.sites("mlp", towers=config.towers, layers=config.layers_to_transform):
            self.insert(site, MoELayer(site, config, backbone.device))
        use_selector(self, config.selector)

    def moe_layers(self) -> list[MoELayer]:
        """Return the layers in order of tower and depth."""
        return [layer for layer in self.layers.values() if isinstance(layer, MoELayer)]

    def allocate(self, task: int) -> None:
        """Give every site a router for the task and enough unfrozen experts."""
        for key, layer in self.layers.items():
            assert isinstance(layer, MoELayer)
            layer.begin_task(partial(generator, self.seed, key, task))

    def finish_task(self) -> None:
        """Activate-freeze (section 3.2): freeze each site's most used experts and old routers."""
        for layer in self.moe_layers():
            layer.finish_task()

    def expert_task(self, task: int) -> int:
        """With a shared router all tasks route as task 0."""
        return 0 if self.config.routers == "shared" else task

    def extra_losses(self, batch: Batch, embedding: Tensor) -> dict[str, Tensor]:
        """Return the optional load-balancing term."""
        terms = [layer.balance for layer in self.moe_layers() if layer.balance is not None]
        if not terms or self.config.load_balance == 0:
            return {}
        return {"load_balance": self.config.load_balance * torch.stack(terms).sum()}
