"""CODA-Prompt: prompts mixed of components by attention; every task adds components of its own.

    w_k = cos(q * A_k, K_k)     prompt = sum_k w_k p_k     L = L_task + orthogonality * R

q is the untouched model's embedding of the sample. The prompt is half keys, half values of the
attention of the lowest five blocks. Components of finished tasks are frozen but take part, so older
answers may still change; R keeps keys, attention vectors and components apart (prompt_pool.py).

Paper: Smith et al., CVPR 2023, arXiv 2211.13218. Theirs: formula, sizes, Gram-Schmidt start,
frozen older components. Ours: components come with each task, so the number of tasks need not be
known; the embedding as query (theirs is a ViT's class token); heads and losses of the library, so
classes of a training loss are the current task's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from evolora.backbones.base import Backbone, Batch
from evolora.errors import ConfigError
from evolora.experts.prompt_pool import PromptPool
from evolora.experts.prompts import PromptLayer, PromptSite
from evolora.methods.base import Method
from evolora.randomness import generator
from evolora.registry import METHODS
from evolora.routing.route import Route
from evolora.routing.selector import AlwaysSelector


@dataclass(frozen=True, kw_only=True)
class CodaPromptConfig:
    """Settings of CODA-Prompt.

    Args:
        type: "coda-prompt".
        components_per_task: components that each task adds (authors: 100 for 10 tasks).
        prompt_length: rows of a component, half keys, half values (authors: 8).
        layers_to_transform: block indices (negative counts from the top); None takes all (authors:
            the lowest five of twelve).
        orthogonality: weight of the orthogonality term (authors: 0.1).
    """

    type: Literal["coda-prompt"] = "coda-prompt"
    components_per_task: int = 10
    prompt_length: int = 8
    layers_to_transform: tuple[int, ...] | None = (0, 1, 2, 3, 4)
    orthogonality: float = 0.1

    def __post_init__(self) -> None:
        if self.components_per_task < 1:
            raise ConfigError(
                f"components_per_task must be at least 1; got {self.components_per_task}"
            )
        if self.orthogonality < 0:
            raise ConfigError(f"orthogonality must be at least 0; got {self.orthogonality}")


class CodaLayer(PromptLayer):
    """The pool of one block."""

    def __init__(
        self, site: PromptSite, config: CodaPromptConfig, query: int, device: torch.device
    ) -> None:
        super().__init__(site, config.prompt_length, "prefix")
        self.pool = PromptPool(query, config.prompt_length, site.width, device=device)

    def forward(self, route: Route) -> Tensor:
        """Return the prompt that each row's query mixes."""
        assert route.queries is not None
        prompts: Tensor = self.pool(route.queries[:, 0])
        return prompts


@METHODS.register("coda-prompt", summary="CODA-Prompt: prompts mixed of every task's components")
class CodaPrompt(Method):
    """The method; see the module docstring."""

    config_class = CodaPromptConfig
    config: CodaPromptConfig

    def __init__(self, config: CodaPromptConfig, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__(config, backbone, seed=seed)
        self.selector = AlwaysSelector(0)
        self.query_feature = "pooled"  # its embedding by the untouched model
        width, device = backbone.feature_widths()["pooled"], backbone.device
        self.insert_prompts(
            {
                site.key_of(): CodaLayer(site, config, width, device)
                for site in backbone.prompt_sites(config.layers_to_transform)
            }
        )

    def allocate(self, task: int) -> None:
        """Give every block components for the task; older ones are frozen."""
        for key, layer in self.layers.items():
            assert isinstance(layer, CodaLayer)
            layer.pool.freeze()
            layer.pool.grow(self.config.components_per_task, generator(self.seed, key, task))

    def finish_task(self) -> None:
        """Freeze the task's components."""
        for pool in self._pools():
            pool.freeze()

    def expert_task(self, task: int) -> int:
        """Components of all tasks answer together."""
        return 0

    def extra_losses(self, batch: Batch, embedding: Tensor) -> dict[str, Tensor]:
        """Return the orthogonality term, summed over blocks."""
        if self.config.orthogonality == 0:
            return {}
        terms = torch.stack([pool.orthogonality() for pool in self._pools()])
        return {"orthogonality": self.config.orthogonality * terms.sum()}

    def _pools(self) -> list[PromptPool]:
        return [module for module in self.modules() if isinstance(module, PromptPool)]
