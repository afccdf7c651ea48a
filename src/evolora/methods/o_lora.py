"""O-LoRA: a new LoRA per task, kept across the subspaces of earlier ones; all are summed.

    y = W x + (alpha / r) * sum_{i<=t} B_i A_i x
    L = L_task + orthogonality * sum_s sum_{i<t} sum |A_i A_t^T| + l2 * sum_s (|A_t| + |B_t|)

s are the sites. Only (A_t, B_t) train while task t is learned; earlier pairs are frozen. No task is
told or recognised: every input is answered by all of them, which may be folded into the weights
(experts/merge.py), so that answering costs what the base costs.

Source: Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning", Findings
of EMNLP 2023, arXiv 2310.14152. orthogonality and l2 are the lambda_1 and lambda_2 of its released
code, whose values are the defaults and whose l2 sums norms, not their squares. The term is in
regularizers/orthogonal.py. Departure: experts at every site that the configuration names, not at
queries and values alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from evolora.backbones.base import Batch
from evolora.errors import ConfigError
from evolora.experts.merge import AlwaysOn
from evolora.methods.lora import LoRAConfig, LoRALayer, SequentialLoRA
from evolora.randomness import generator
from evolora.registry import METHODS
from evolora.regularizers.orthogonal import overlap
from evolora.routing.route import Route


@dataclass(frozen=True, kw_only=True)
class OLoRAConfig(LoRAConfig):
    """Settings of O-LoRA; see :class:`LoRAConfig` for those of each task's LoRA.

    Args:
        type: "o-lora".
        orthogonality: weight of the overlap with earlier tasks' LoRAs (lambda_1); 0 sums LoRAs that
            are trained in turn.
        l2: weight of the norms of the new factors (lambda_2).
    """

    type: Literal["o-lora"] = "o-lora"
    orthogonality: float = 0.5
    l2: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("orthogonality", self.orthogonality), ("l2", self.l2)):
            if not value >= 0.0:
                raise ConfigError(f"{name} must be at least 0; got {value}")


class SummedLayer(LoRALayer):
    """The LoRAs of all tasks at one Linear; every row gets their sum."""

    def experts(self, route: Route) -> AlwaysOn:
        """Return all of them."""
        return AlwaysOn(tuple(range(len(self.bank))))

    def flops(self, tokens: int) -> int:
        """Return the extra FLOPs of one row of ``tokens`` tokens, nothing folded."""
        return self.bank.flops(tokens, len(self.bank))


@METHODS.register("o-lora", summary="a LoRA per task, orthogonal to earlier ones, all summed")
class OLoRA(SequentialLoRA):
    """One expert per task; all of them answer, under the one route that tasks share."""

    config_class: ClassVar[Any] = OLoRAConfig
    config: OLoRAConfig
    layer_class = SummedLayer

    def allocate(self, task: int) -> None:
        """Give every site one new expert."""
        for key, layer in self.layers.items():
            assert isinstance(layer, SummedLayer)
            layer.bank.grow(1, generator(self.seed, key, task))

    def extra_losses(self, batch: Batch, embedding: Tensor) -> dict[str, Tensor]:
        """Return the overlap with earlier LoRAs, from the second task on, and the norms."""
        found: dict[str, Tensor] = {}
        banks = [layer.bank for layer in self.layers.values() if isinstance(layer, SummedLayer)]
        if self.config.orthogonality > 0 and len(self.labels) > 1:
            total = sum(overlap(bank.A.frozen, bank.A.active) for bank in banks)
            found["overlap"] = self.config.orthogonality * torch.as_tensor(total)
        if self.config.l2 > 0:
            factors = [stack.active for bank in banks for stack in bank.stacks()]
            norms = torch.stack([torch.linalg.vector_norm(factor) for factor in factors])
            found["l2"] = self.config.l2 * norms.sum()
        return found

    def finish_task(self) -> None:
        """Freeze the task's expert."""
        for layer in self.layers.values():
            assert isinstance(layer, SummedLayer)
            layer.bank.freeze(range(len(layer.bank)))
