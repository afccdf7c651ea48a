"""A layer of rank-one factors, composed anew for each row by what describes its modalities.

    y = W x + b + sum_m delta_m(x; q~_m)          m: the modalities that the site's tower sees
    q~_m = q_m, or the query of the other modality where the sample lacks m  (cross-modal guidance)

q_m describes a sample's modality m: the mean of its tokens as they enter a block, or a descriptor
of the untouched base that is the same at every site. Source: DeLo (arXiv 2603.01632); delta_m is in
:mod:`evolora.experts.factor_pool`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from evolora.experts.bank import Factors
from evolora.experts.factor_pool import FactorConfig, FactorPool
from evolora.experts.mixing import add_pairs
from evolora.experts.sites import ExpertLayer, Site
from evolora.experts.task_layer import Draws
from evolora.routing.route import Route
from evolora.routing.spans import Spans

if TYPE_CHECKING:
    from evolora.allocation.allocator import SiteExperts

Cmgr = Literal["symmetric", "text_only", "off"]
TokenScope = Literal["all", "own_modality"]
SEES = {"vision": ("image",), "text": ("text",), "multimodal": ("image", "text")}
"""Tower -> modalities whose experts stand in it."""


class Queries:
    """What describes the modalities of the rows now running, by block or for all blocks alike.

    Args:
        modalities: the backbone's, in order.
        cmgr: whose query stands in for a missing modality's.
    """

    def __init__(self, modalities: Sequence[str], cmgr: Cmgr) -> None:
        self.modalities, self.cmgr = tuple(modalities), cmgr
        self.raw: Tensor | None = None
        self._guided: Tensor | None = None
        self._known: tuple[Tensor, Tensor] | None = None  # a route's queries, and guided

    def see(self, block: int, hidden: Tensor, route: Route) -> None:
        """Take the queries of the rows entering a block (a watcher of the host)."""
        assert route.spans is not None
        self.raw = route.spans.means(hidden)
        self._guided = guided(self.raw, route.spans.present, self.modalities, self.cmgr)

    def of(self, route: Route) -> Tensor:
        """Return (b, m, q) of the rows of a route."""
        if route.queries is not None:
            if self._known is None or self._known[0] is not route.queries:
                present = ~route.queries.isnan().any(dim=2)
                known = route.queries.nan_to_num(nan=0.0)
                self._known = route.queries, guided(known, present, self.modalities, self.cmgr)
            return self._known[1]
        assert self._guided is not None, "a block's layers ran before the block was entered"
        return self._guided


def guided(queries: Tensor, present: Tensor, modalities: Sequence[str], cmgr: Cmgr) -> Tensor:
    """Return queries (b, m, q) with those of missing modalities (b, m) replaced by the other's."""
    if cmgr == "off" or len(modalities) == 1:
        return queries
    swapped = queries.flip(1)
    missing = ~present
    if cmgr == "text_only":
        missing = missing & torch.tensor(
            [name == "text" for name in modalities], device=present.device
        )
    return torch.where(missing.unsqueeze(2), swapped, queries)


class FactorLayer(ExpertLayer):
    """The pools of one Linear: one for each modality that its tower sees.

    Args:
        site: the Linear.
        config: sizes and routing of a pool.
        queries: what the sites of the backbone choose by.
        width: of a query; None takes the site's own.
        scope: tokens an expert acts on: "all", or those of its "own_modality".
        places: which tasks have pools here, and which; None: every task has its own.
    """

    def __init__(
        self,
        site: Site,
        config: FactorConfig,
        queries: Queries,
        width: int | None,
        *,
        scope: TokenScope = "all",
        places: SiteExperts | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.queries, self.alpha, self.r = queries, config.alpha, config.r
        self.scope, self.places = scope, places
        self.pools = nn.ModuleDict(
            {
                name: FactorPool(site.d_in, site.d_out, width or site.d_in, config, device=device)
                for name in SEES[site.tower]
            }
        )

    # -- tasks -----------------------------------------------------------------------------------

    def begin_task(self, draws: Draws) -> None:
        """Give a new task a pool per modality, which add nothing yet; older ones are frozen."""
        for name, pool in self._pools():
            pool.grow(draws(name))

    def finish_task(self) -> None:
        """Freeze every pool there is."""
        for _, pool in self._pools():
            pool.freeze()

    def answers(self, task: int | None) -> bool:
        """Return whether the task has pools here."""
        return self.places is None or self.places.anywhere(task)

    def task_tensors(self, task: int) -> list[Tensor]:
        """Return what answers a task here: its own pools, if it has them."""
        own = task if self.places is None else self.places.of_task(task)
        if own is None:
            return []
        found = []
        for _, pool in self._pools():
            for stack in pool.stacks():
                rows = len(stack) // len(pool)
                ids = torch.arange(own * rows, (own + 1) * rows, device=stack.slot.device)
                found.append(stack.take(ids))
        return found

    # -- answering -------------------------------------------------------------------------------

    def forward(self, x: Tensor, out: Tensor, route: Route) -> Tensor:
        """Return out plus the factors that each modality's query chooses."""
        tasks, uniform, here = route.tasks, route.uniform, None
        if self.places is not None:
            if uniform is not None:
                uniform = self.places.of_task(uniform)
            if (route.uniform is not None and uniform is None) or not self.answers(None):
                return out
            if uniform is None:
                ids, here = self.places.of_rows(tasks)
                tasks = ids.squeeze(1)
            else:
                tasks = torch.full_like(tasks, uniform)
        queries = self.queries.of(route)
        parts: list[tuple[Factors, Tensor]] = []
        for name, pool in self._pools():
            query = queries[:, self.queries.modalities.index(name)].to(x.dtype)
            down, up, gates = pool.choose(query, tasks, uniform=uniform)
            weights = torch.ones_like(down, dtype=x.dtype) if gates is None else gates
            if here is not None:
                weights = weights * here.to(weights.dtype)
            parts.append((pool.factors(down, up, uniform=uniform), self.alpha * weights))
        factors = Factors(
            a=_joined([part.a for part, _ in parts]), b=_joined([part.b for part, _ in parts])
        )
        gates = _joined([gates for _, gates in parts])
        mask = self._mask(route, x)
        return add_pairs(out, x, factors, gates, mask=mask, inplace=True)

    def _mask(self, route: Route, x: Tensor) -> Tensor | None:
        """Return which ranks act on which token, (1, n, R); None if all on all."""
        if self.scope == "all" or route.spans is None:
            return None
        assert isinstance(route.spans, Spans)
        acts = [route.spans.positions(name).to(x.dtype).unsqueeze(1) for name in self.pools]
        return torch.cat([column.expand(-1, self.r) for column in acts], dim=1).unsqueeze(0)

    def flops(self, tokens: int) -> int:
        """Return the extra FLOPs of one row of ``tokens`` tokens, of the newest task."""
        if self.places is not None and not self.places.newest():
            return 0
        return sum(pool.flops(tokens) for _, pool in self._pools())

    def parameters_per_task(self) -> int:
        """Return the number of values that one task's pools store."""
        return sum(pool.parameters_per_task() for _, pool in self._pools())

    def _pools(self) -> list[tuple[str, FactorPool]]:
        return [(name, m) for name, m in self.pools.items() if isinstance(m, FactorPool)]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return values (b, r, ...) of several pools beside one another."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=1)
