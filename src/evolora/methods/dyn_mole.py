"""DynMoLE: a router per Linear asks all LoRA experts where it is unsure, a few where it is sure.

    y = W x + (alpha / r) sum_i g_i B_i A_i x ;  p = softmax(W_g x), for each token
    S_q(p) > H : g = p ;  else : g = the fewest experts of mass >= P, at least k, renormalised
    L = L_task + balance * L_bal + entropy * mean S_q(p) ;  L_bal = e * sum_i f_i P_i

symbol -> code: S_q, g -> routing/entropy_gates.py ; W_g -> TokenRouter ; f_i -> share of expert i
among the tokens' k most probable ; P_i -> its mean probability. Padding counts in neither term, and
both are means over Linears. The entropy is lowered for each token while L_bal evens out the
average: sure of each token, balanced over all.

Source: arXiv 2504.00661; its constants as an independent implementation states them, since the
paper's own code has no such router. There it is a recipe for one task, no continual learner: here,
as a baseline, all experts and the router go on learning in every task and nothing is frozen, no
task is told apart, and earlier ones may be forgotten.

What others do and this does not: MoE-PEFT's "top-p" leaves the kept weights at a sum below 1,
divides probabilities by its temperature, and scales its balance by another measure. All experts are
computed for all tokens, in two thin products; those a token does not ask have a gate of zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from evolora.backbones.base import Backbone, Batch
from evolora.errors import ConfigError
from evolora.experts.bank import ExpertBank
from evolora.experts.mixing import mix
from evolora.experts.sites import ExpertLayer, Site
from evolora.methods.base import Method
from evolora.methods.lora import LoRAConfig
from evolora.randomness import generator
from evolora.registry import METHODS
from evolora.routing.entropy_gates import (
    entropy_gates,
    masked_mean,
    top_k_balance,
    tsallis_entropy,
)
from evolora.routing.route import Route
from evolora.routing.selector import AlwaysSelector
from evolora.routing.token_router import TokenRouter


@dataclass(frozen=True, kw_only=True)
class DynMoLEConfig(LoRAConfig):
    """Settings of DynMoLE; see :class:`LoRAConfig` for those of each expert.

    Args:
        type: "dyn-mole".
        r, lora_alpha, lora_dropout: of every expert (16, 32, 0.05, as MoE-PEFT's recipe).
        num_experts: experts per Linear (8).
        top_k: experts a token asks at least (2), and those that the balance counts as its choice.
        tsallis_q: index q of the entropy, above 0; 1 is Shannon's (1.1).
        entropy_threshold: H; a token of higher entropy asks all experts (0.9; the most is 1.877 for
            8 experts and q = 1.1).
        top_p: P; mass that the experts of a surer token reach, in (0, 1] (0.75).
        balance: weight of L_bal (1e-3).
        entropy: weight of the mean entropy (1e-2).
    """

    type: Literal["dyn-mole"] = "dyn-mole"
    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.05
    num_experts: int = 8
    top_k: int = 2
    tsallis_q: float = 1.1
    entropy_threshold: float = 0.9
    top_p: float = 0.75
    balance: float = 1e-3
    entropy: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"top_k must be between 1 and num_experts ({self.num_experts}); got {self.top_k}"
            )
        if not self.tsallis_q > 0.0:
            raise ConfigError(f"tsallis_q must be above 0; got {self.tsallis_q}")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p must be in (0, 1]; got {self.top_p}")
        for name in ("entropy_threshold", "balance", "entropy"):
            if not getattr(self, name) >= 0.0:
                raise ConfigError(f"{name} must be at least 0; got {getattr(self, name)}")


class DynMoLELayer(ExpertLayer):
    """The experts and the router of one Linear.

    Args:
        site: the Linear.
        config: the method's settings.

    Attributes:
        terms: (L_bal, mean entropy) of the training forward that ran last, until they are taken.
    """

    def __init__(self, site: Site, config: DynMoLEConfig, device: torch.device) -> None:
        super().__init__()
        self.name, self.config = site.name, config
        scale = config.lora_alpha / config.r
        self.bank = ExpertBank(site.d_in, site.d_out, config.r, scale=scale, device=device)
        self.router = TokenRouter(site.d_in, config.num_experts, device=device)
        self.terms: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, out: Tensor, route: Route) -> Tensor:
        """Return out plus the experts that each token asks."""
        config = self.config
        probabilities = self.router(x)
        entropy = tsallis_entropy(probabilities, config.tsallis_q)
        gates = entropy_gates(
            probabilities,
            entropy,
            threshold=config.entropy_threshold,
            mass=config.top_p,
            least=config.top_k,
        )
        if route.random is not None:
            real = route.real(x, answers=True)
            balance = top_k_balance(probabilities, config.top_k, real)
            self.terms = (balance, masked_mean(entropy, real))
        return mix(
            out,
            x,
            self.bank,
            range(config.num_experts),
            gates,
            dropout=config.lora_dropout,
            random=route.random,
            key=self.name,
            formulation=self.formulation,
            inplace=True,
        )

    def flops(self, tokens: int) -> int:
        """Return the extra FLOPs of one row of ``tokens`` tokens: its router and all experts."""
        return self.router.flops(tokens) + self.bank.flops(tokens, self.config.num_experts)


@METHODS.register(
    "dyn-mole", summary="LoRA experts per token: all where the router is unsure, few where sure"
)
class DynMoLE(Method):
    """The method; see the module docstring."""

    config_class: ClassVar[Any] = DynMoLEConfig
    config: DynMoLEConfig
    writes = True

    def __init__(self, config: DynMoLEConfig, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__(config, backbone, seed=seed)
        self.selector = AlwaysSelector(0)
        for site in backbone.sites(
            "linear",
            towers=config.towers,
            layers=config.layers_to_transform,
            target_modules=config.target_modules,
        ):
            self.insert(site, DynMoLELayer(site, config, backbone.device))

    def allocate(self, task: int) -> None:
        """Make experts and routers at the first task; all tasks share them."""
        if task > 0:
            return
        for key, layer in self.layers.items():
            assert isinstance(layer, DynMoLELayer)
            draw = generator(self.seed, key)
            layer.bank.grow(self.config.num_experts, draw)
            layer.router.grow(draw)

    def expert_task(self, task: int) -> int:
        """All tasks are routed as one."""
        return 0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss terms of a training batch."""
        self._take_terms()  # of a forward that broke off, or was run again in backward
        return super().forward(batch)

    def extra_losses(self, batch: Batch, embedding: Tensor) -> dict[str, Tensor]:
        """Return balance and entropy, means over the Linears that ran."""
        terms = self._take_terms()
        if not terms:
            return {}
        balance, entropy = (torch.stack(each).mean() for each in zip(*terms, strict=True))
        return {
            "balance": self.config.balance * balance,
            "entropy": self.config.entropy * entropy,
        }

    def _take_terms(self) -> list[tuple[Tensor, Tensor]]:
        found = []
        for layer in self.layers.values():
            assert isinstance(layer, DynMoLELayer)
            if layer.terms is not None:
                found.append(layer.terms)
            layer.terms = None
        return found
