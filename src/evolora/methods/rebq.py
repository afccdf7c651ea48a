"""RebQ: the query of a missing modality is rebuilt, then both queries choose prompts.

    1. frozen pass:  q_m = last state of the class token of modality m
    2. rebuild pass: memory prompt = sum over present m of pool_memory(q_m), more tokens after the
       first one, others in each block; q~_m = last state of the class token of the missing m
    3. answer pass:  pool_text(q_text) and pool_image(q_image) are keys and values of each attention
    pool(q) = sum_k cos(q * A_k, K_k) p_k               (prompt_pool.py; G10)
    L = L_task + reconstruction * mean (q~_m - q_m)^2

Every complete training sample is learned once more without its text and once without its image;
there the rebuilt query is drawn to the one of the complete sample in the same pass, which learns
nothing from it. The head reads the text's class token, without the pooler.

Paper: Zhao et al., Reconstruct before Query, arXiv 2403.11373; sizes and the three passes are
its code's. The released setting (`reinit=False`) fills the components of the first task alone:
those of later tasks are zero in every factor, get no gradient and never learn, while weight decay
shrinks the first ones. By default each task's components start by Gram-Schmidt and older ones are
frozen, out of the optimizer. Ours: components come with each task; linear heads of the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from evolora.backbones.base import Backbone, Batch, Encoded
from evolora.errors import ConfigError
from evolora.experts.prompt_pool import PromptPool
from evolora.experts.prompts import PromptLayer, PromptSite
from evolora.experts.sites import ExpertLayer
from evolora.methods.base import Method
from evolora.randomness import generator
from evolora.registry import METHODS
from evolora.routing.route import Route
from evolora.routing.selection import Chosen
from evolora.routing.selector import AlwaysSelector
from evolora.routing.spans import Spans

REBUILD = "rebuild"
"""Stage of the pass that rebuilds queries."""


@dataclass(frozen=True, kw_only=True)
class RebQConfig:
    """Settings of RebQ.

    Args:
        type: "rebq".
        components_per_task: components that each task adds to each pool (authors: 128 for all, 12
            for each of 10 tasks, 25 for each of 5).
        prompt_length: rows of a component; half keys, half values in the answer pass (authors: 8).
        layers_to_transform: block indices (negative counts from the top); None takes all (authors:
            the lowest eight of twelve).
        reconstruction: weight of the reconstruction of queries (authors: 0.01).
        reinit: whether a new task's components start by Gram-Schmidt and older ones are frozen.
            False is the released setting, in which only the first task's components ever learn.
    """

    type: Literal["rebq"] = "rebq"
    components_per_task: int = 12
    prompt_length: int = 8
    layers_to_transform: tuple[int, ...] | None = (0, 1, 2, 3, 4, 5, 6, 7)
    reconstruction: float = 0.01
    reinit: bool = True

    def __post_init__(self) -> None:
        if self.components_per_task < 1:
            raise ConfigError(
                f"components_per_task must be at least 1; got {self.components_per_task}"
            )
        if self.reconstruction < 0:
            raise ConfigError(f"reconstruction must be at least 0; got {self.reconstruction}")


class MemoryLayer(PromptLayer):
    """Tokens of the rebuild pass in one block."""

    def __init__(self, site: PromptSite, config: RebQConfig, device: torch.device) -> None:
        super().__init__(site, config.prompt_length, "input", stage=REBUILD)
        self.pool = PromptPool(site.width, config.prompt_length, site.width, device=device)

    def forward(self, route: Route) -> Tensor:
        """Return the sum of what each present modality's query (b, m, d; else NaN) retrieves."""
        assert route.queries is not None
        found = [self.pool(query) for query in route.queries.nan_to_num(nan=0.0).unbind(1)]
        return torch.stack(found).sum(dim=0)


class AnswerLayer(PromptLayer):
    """Keys and values of the answer pass in one block, of one pool per modality."""

    def __init__(
        self,
        site: PromptSite,
        config: RebQConfig,
        modalities: Sequence[str],
        device: torch.device,
    ) -> None:
        super().__init__(site, len(modalities) * config.prompt_length, "prefix")
        self.pools = nn.ModuleDict(
            {
                name: PromptPool(site.width, config.prompt_length, site.width, device=device)
                for name in modalities
            }
        )

    def forward(self, route: Route) -> Tensor:
        """Return the keys that the queries (b, m, d) retrieve, and then the values."""
        assert route.queries is not None
        pairs = zip(self.pools.values(), route.queries.unbind(1), strict=True)
        found = [pool(query) for pool, query in pairs]
        halves = [prompts.chunk(2, dim=1) for prompts in found]
        return torch.cat([*(keys for keys, _ in halves), *(values for _, values in halves)], dim=1)


class TokenReader(ExpertLayer):
    """In the pooler's place: the first token, or in the rebuild pass every class token."""

    def forward(self, x: Tensor, out: Tensor, route: Route) -> Tensor:
        """Return (b, d) of a sequence (b, n, d), or (b, m d) in the rebuild pass."""
        if route.stage != REBUILD:
            return x[:, 0]
        assert isinstance(route.spans, Spans)
        return route.spans.heads(x).flatten(1)


@METHODS.register("rebq", summary="RebQ: rebuilds a missing modality's query, then picks prompts")
class RebQ(Method):
    """The method; see the module docstring."""

    config_class = RebQConfig
    config: RebQConfig
    needs_one_stream = True

    def __init__(self, config: RebQConfig, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__(config, backbone, seed=seed)
        self.selector = AlwaysSelector(0)
        sites, device = backbone.prompt_sites(config.layers_to_transform), backbone.device
        memory = {site.key_of("memory"): MemoryLayer(site, config, device) for site in sites}
        self.insert_prompts(memory, at=1, replace=True)
        modalities = backbone.modalities
        self.insert_prompts(
            {site.key_of("answer"): AnswerLayer(site, config, modalities, device) for site in sites}
        )
        self.insert(backbone.pooler_site, TokenReader())

    def allocate(self, task: int) -> None:
        """Give every pool components for the task; older ones are frozen, unless as released."""
        for name, pool in self._pools().items():
            if not self.config.reinit and task > 0:
                pool.grow_zeros(self.config.components_per_task)
                continue
            pool.freeze()
            pool.grow(self.config.components_per_task, generator(self.seed, name, task))

    def finish_task(self) -> None:
        """Freeze the task's components, unless as released."""
        if self.config.reinit:
            for pool in self._pools().values():
                pool.freeze()

    def expert_task(self, task: int) -> int:
        """Components of all tasks answer together."""
        return 0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of a training batch and of what its complete samples are in part."""
        assert batch.task is not None
        self._tensors.forget()
        complete = torch.ones(len(batch), dtype=torch.bool, device=self.backbone.device)
        for present in batch.present.values():
            complete = complete & present
        rows = complete.nonzero()[:, 0]
        whole, lost = batch, []
        if len(rows):
            part, every = batch.take(rows), torch.ones_like(rows, dtype=torch.bool)
            lost = list(self.backbone.modalities)
            whole = batch.joined([self.backbone.without(part, {name: every}) for name in lost])
        route, rebuilt = self._routed(0, whole, None)
        embedding = self.backbone.encode(whole, route)
        loss = self.task_loss(embedding, whole, self.labels[batch.task], 0)
        terms = {"task": loss.detach()}
        if lost and self.config.reconstruction:
            ours = rebuilt[len(batch) :].view(len(lost), len(rows), *rebuilt.shape[1:])
            made = torch.stack([ours[index, :, index] for index in range(len(lost))], dim=1)
            error = (made - rebuilt[rows].detach()).square().mean()
            terms["reconstruction"] = self.config.reconstruction * error
            loss = loss + terms["reconstruction"]
        return {"loss": loss, **{name: value.detach() for name, value in terms.items()}}

    def make_route(self, tasks: Chosen, batch: Batch, encoded: Encoded | None = None) -> Route:
        """Return the route with a query of every modality, rebuilt where the sample lacks it."""
        return self._routed(tasks, batch, encoded)[0]

    def _routed(self, tasks: Chosen, batch: Batch, encoded: Encoded | None) -> tuple[Route, Tensor]:
        """Return the route of the answer pass, and the rebuild pass's class tokens (b, m, d)."""
        known = (encoded or self.backbone.encode_base(batch)).features["heads"]
        plain = super().make_route(tasks, batch, encoded)
        if not torch.is_grad_enabled() and not known.isnan().any():
            return replace(plain, queries=known), known
        asked = replace(plain, queries=known, stage=REBUILD)
        rebuilt = self.backbone.encode(batch, asked).view_as(known)
        return replace(plain, queries=torch.where(known.isnan(), rebuilt, known)), rebuilt

    def _pools(self) -> dict[str, PromptPool]:
        found: dict[str, Any] = dict(self.named_modules())
        return {name: pool for name, pool in found.items() if isinstance(pool, PromptPool)}
