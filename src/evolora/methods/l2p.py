"""L2P: a pool of prompts; each sample takes those whose keys are nearest to it.

    S = the top_k keys by cos(q, k)     prompts = [P_s for s in S]
    L = L_task + pull * sum_{s in S} (1 - cos(q, k_s)), mean over samples

q is the untouched model's embedding of the sample. The chosen prompts are more tokens before the
sequence that enters the lowest block. One pool serves all tasks and nothing in it is frozen: tasks
are kept apart only as far as their samples choose other prompts.

Paper: Wang et al., Learning to Prompt for Continual Learning, CVPR 2022, arXiv 2112.08654. Theirs:
pool, choice, pull term, uniform start. Ours: the choice is of each sample (their code takes the
prompts most chosen in a batch); the answer is read from the backbone's embedding, not from the mean
of the prompts' outputs; heads and losses of the library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.backbones.base import Backbone, Batch
from evolora.errors import ConfigError
from evolora.experts.prompts import PromptLayer, PromptSite
from evolora.methods.base import Method
from evolora.randomness import generator
from evolora.registry import METHODS
from evolora.routing.route import Route
from evolora.routing.selector import AlwaysSelector


@dataclass(frozen=True, kw_only=True)
class L2PConfig:
    """Settings of L2P.

    Args:
        type: "l2p".
        pool_size: prompts in the pool (authors: 10).
        prompt_length: tokens of a prompt (authors: 5).
        top_k: prompts that a sample takes (authors: 5).
        pull: weight of the term that draws chosen keys to their samples (authors: 0.5).
        layer: block whose sequence gets the prompts (authors: the lowest).
    """

    type: Literal["l2p"] = "l2p"
    pool_size: int = 10
    prompt_length: int = 5
    top_k: int = 5
    pull: float = 0.5
    layer: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.pool_size:
            raise ConfigError(
                f"top_k must be between 1 and pool_size ({self.pool_size}); got {self.top_k}"
            )
        if self.prompt_length < 1:
            raise ConfigError(f"prompt_length must be at least 1; got {self.prompt_length}")
        if self.pull < 0:
            raise ConfigError(f"pull must be at least 0; got {self.pull}")


class L2PLayer(PromptLayer):
    """The pool.

    Args:
        site: the block.
        config: sizes.
        query: width of a query.
        draw: randomness of the start.
        device: where the pool is.
    """

    def __init__(
        self,
        site: PromptSite,
        config: L2PConfig,
        query: int,
        draw: torch.Generator,
        device: torch.device,
    ) -> None:
        super().__init__(site, config.top_k * config.prompt_length, "input")
        self.top_k = config.top_k

        def uniform(*shape: int) -> nn.Parameter:
            values = torch.empty(config.pool_size, *shape).uniform_(-1, 1, generator=draw)
            return nn.Parameter(values.to(device))

        self.keys = uniform(query)
        self.prompts = uniform(config.prompt_length, site.width)

    def forward(self, route: Route) -> Tensor:
        """Return the chosen prompts of each row, the nearest first."""
        return self.prompts[self.nearest(route)[1]].flatten(1, 2)

    def nearest(self, route: Route) -> tuple[Tensor, Tensor]:
        """Return (cosines, indices) (b, k) of the keys nearest to each row's query."""
        assert route.queries is not None
        keys = F.normalize(self.keys, dim=1)
        cosines = F.normalize(route.queries[:, 0].to(keys.dtype), dim=1) @ keys.T
        found = cosines.topk(self.top_k, dim=1)
        return found.values, found.indices


@METHODS.register("l2p", summary="L2P: each sample takes the nearest prompts of one shared pool")
class L2P(Method):
    """The method; see the module docstring."""

    config_class = L2PConfig
    config: L2PConfig

    def __init__(self, config: L2PConfig, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__(config, backbone, seed=seed)
        self.selector = AlwaysSelector(0)
        self.query_feature = "pooled"  # its embedding by the untouched model
        (site,) = backbone.prompt_sites((config.layer,))
        draw, width = generator(seed, "l2p"), backbone.feature_widths()["pooled"]
        self.pool = L2PLayer(site, config, width, draw, backbone.device)
        self.insert_prompts({site.key_of(): self.pool})

    def expert_task(self, task: int) -> int:
        """All tasks share the pool."""
        return 0

    def extra_losses(self, batch: Batch, embedding: Tensor) -> dict[str, Tensor]:
        """Return the pull term of the rows that just took prompts."""
        if self.config.pull == 0:
            return {}
        route = self.backbone.host.route_of(self.pool.site.tower)
        cosines, _ = self.pool.nearest(route)
        return {"pull": self.config.pull * (1.0 - cosines).sum(dim=1).mean()}
