"""DeLo: low-rank experts composed of rank-one factors, one pool per modality and task.

    y = W x + b + delta_image(x; q~_image) + delta_text(x; q~_text)
    delta_m(x; q) = alpha * sum_k g_k b_{J_k} (a_{I_k} . x)     I, J, g chosen by q (factor_pool.py)
    q~_m = q_m, or the query of the other modality where the sample lacks m  (cross-modal guidance)

q_m describes a sample's modality m: the mean of its tokens as they enter a block (ViLT), or its
embedding by the untouched towers (CLIP). Pools of finished tasks are frozen; at inference task keys
tell the task of each sample (routing/task_keys.py), and its head answers. Besides the task's loss

    L = L_task + align * mean(1 - cos(q_image, q_text)) + consistency * KL

over complete samples: queries of the last block are drawn together, so that one can stand in for
the other, and the answer without a modality is drawn to the answer with both.

The paper's (arXiv 2603.01632, AAAI 2026): factor pools per modality, a structural split by tasks,
cross-modal guided routing, task-key memory. Its equations were not available to us: formulas are
those of the released code, repaired (there the experts are never reached, would raise if they
were, and the true task is told in every evaluation). Ours: learned gates of hard choices, guidance
in both directions, exact task keys per sample, masked means, CLIP as two streams. See `preset`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.backbones.base import Backbone, Batch
from evolora.errors import ConfigError
from evolora.experts.bank import Factors
from evolora.experts.factor_pool import FactorConfig, FactorPool
from evolora.experts.mixing import add_pairs
from evolora.experts.sites import ExpertLayer, Site
from evolora.methods.base import HeadMode, Method
from evolora.methods.selectors import SelectorConfig, use_selector
from evolora.randomness import generator
from evolora.registry import METHODS
from evolora.routing.route import Route
from evolora.routing.selector import OracleSelectorConfig
from evolora.routing.spans import Spans
from evolora.routing.task_keys import TaskKeySelectorConfig
from evolora.streams.task import LabelSpace

Cmgr = Literal["symmetric", "text_only", "off"]
SEES = {"vision": ("image",), "text": ("text",), "multimodal": ("image", "text")}
"""Tower -> modalities whose experts stand in it."""


@dataclass(frozen=True, kw_only=True)
class DeLoConfig:
    """Settings of DeLo; what is None is as the preset says.

    Args:
        type: "delo".
        preset: "paper_like": symmetric guidance, learned gates, keys per sample.
            "released_formula": the released code's formulas as they would be if they ran: guidance
            for missing text only, unit factors, raw logits, no gradient to routers, moving averages
            as keys, heads competing. "released_behaviour": what the released code does: a linear
            probe of each task with the true task told; no expert at all.
        num_factors, r, alpha, router_grad, cfs_mode, factor_init: see :class:`FactorConfig`.
        token_scope: tokens an expert acts on: "all" (as the code), or those of its "own_modality".
        cmgr: cross-modal guided routing: a missing modality's query is the other's, "symmetric" or
            for missing text alone ("text_only"); "off" leaves the query of what stands in for it.
        align: weight of the alignment of queries (0.1); needs queries from hidden states.
        consistency: weight of the consistency of answers (0.1).
        cons_direction: "distil": the answer with a modality dropped (either one, drawn per sample)
            learns from the complete one. "released": the complete one, with gradient, learns from
            the one without text.
        head_mode: whose classes compete: the "selected" task's, or those of "all_seen" tasks.
        logit_scope: classes of a training loss: the "current" task's or all "seen" ones.
        target_modules: Linears that get experts.
        layers_to_transform: block indices (negative counts from the top); None takes all.
        selector: who tells the task: "task-keys" (presets), "oracle", or any other selector.
    """

    type: Literal["delo"] = "delo"
    preset: Literal["paper_like", "released_formula", "released_behaviour"] = "paper_like"
    num_factors: int = 16
    r: int = 4
    alpha: float = 2.0
    router_grad: Literal["weighted", "straight_through", "none"] | None = None
    cfs_mode: Literal["softmax_sum", "logit_sum", "off"] | None = None
    factor_init: Literal["scaled", "unit"] | None = None
    token_scope: Literal["all", "own_modality"] = "all"
    cmgr: Cmgr | None = None
    align: float | None = None
    consistency: float | None = None
    cons_direction: Literal["distil", "released"] | None = None
    head_mode: HeadMode | None = None
    logit_scope: Literal["current", "seen"] | None = None
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    layers_to_transform: tuple[int, ...] | None = None
    selector: SelectorConfig | None = None

    def __post_init__(self) -> None:
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("align", "consistency"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0; got {getattr(self, name)}")
        _ = self.factors  # refuses what does not fit

    @property
    def factors(self) -> FactorConfig:
        """Sizes and routing of a pool."""
        assert self.router_grad and self.cfs_mode and self.factor_init
        return FactorConfig(
            num_factors=self.num_factors,
            r=self.r,
            alpha=self.alpha,
            router_grad=self.router_grad,
            cfs_mode=self.cfs_mode,
            factor_init=self.factor_init,
        )


_PAPER: dict[str, Any] = {
    "router_grad": "weighted",
    "cfs_mode": "softmax_sum",
    "factor_init": "scaled",
    "cmgr": "symmetric",
    "align": 0.1,
    "consistency": 0.1,
    "cons_direction": "distil",
    "head_mode": "selected",
    "logit_scope": "current",
    "selector": TaskKeySelectorConfig(),
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper_like": _PAPER,
    "released_formula": {
        **_PAPER,
        "router_grad": "none",
        "cfs_mode": "logit_sum",
        "factor_init": "unit",
        "cmgr": "text_only",
        "cons_direction": "released",
        "head_mode": "all_seen",
        "logit_scope": "seen",
        "selector": TaskKeySelectorConfig(keys="ema"),
    },
    "released_behaviour": {
        **_PAPER,
        "align": 0.0,
        "consistency": 0.0,
        "logit_scope": "seen",
        "selector": OracleSelectorConfig(),
    },
}


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


class DeLoLayer(ExpertLayer):
    """The pools of one Linear: one for each modality that its tower sees.

    Args:
        site: the Linear.
        config: the method's settings.
        queries: what the sites of the backbone choose by.
        width: of a query; None takes the site's own.
    """

    def __init__(
        self,
        site: Site,
        config: DeLoConfig,
        queries: Queries,
        width: int | None,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.queries, self.alpha, self.r = queries, config.alpha, config.r
        self.scope = config.token_scope
        self.pools = nn.ModuleDict(
            {
                name: FactorPool(
                    site.d_in, site.d_out, width or site.d_in, config.factors, device=device
                )
                for name in SEES[site.tower]
            }
        )

    def forward(self, x: Tensor, out: Tensor, route: Route) -> Tensor:
        """Return out plus the factors that each modality's query chooses."""
        queries = self.queries.of(route)
        parts: list[tuple[Factors, Tensor]] = []
        for name, pool in self.pools.items():
            assert isinstance(pool, FactorPool)
            query = queries[:, self.queries.modalities.index(name)].to(x.dtype)
            down, up, gates = pool.choose(query, route.tasks, uniform=route.uniform)
            weights = torch.ones_like(down, dtype=x.dtype) if gates is None else gates
            parts.append((pool.factors(down, up, uniform=route.uniform), self.alpha * weights))
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
        """Return the extra FLOPs of one row of ``tokens`` tokens."""
        return sum(m.flops(tokens) for m in self.pools.values() if isinstance(m, FactorPool))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return values (b, r, ...) of several pools beside one another."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=1)


@METHODS.register(
    "delo", summary="DeLo: experts of rank-one factors per modality and task, told by task keys"
)
class DeLo(Method):
    """The method; see the module docstring."""

    config_class: ClassVar[Any] = DeLoConfig
    config: DeLoConfig

    def __init__(self, config: DeLoConfig, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__(config, backbone, seed=seed)
        assert config.cmgr and config.head_mode
        self.head_mode = config.head_mode
        self.queries = Queries(backbone.modalities, config.cmgr)
        self.by_block = backbone.one_stream
        described = backbone.feature_widths()["modalities"]
        if config.preset != "released_behaviour":
            towers = backbone.towers if backbone.answers == "heads" else ("vision",)
            for site in backbone.sites(
                "linear",
                towers=towers,
                layers=config.layers_to_transform,
                target_modules=config.target_modules,
            ):
                width = None if self.by_block else described
                self.insert(site, DeLoLayer(site, config, self.queries, width, backbone.device))
            if self.by_block:
                backbone.watch_blocks(backbone.towers[0], self.queries.see)
        if self.layers and not self.by_block:
            self.query_feature = "modalities"
        assert config.selector is not None
        use_selector(self, config.selector)

    def allocate(self, task: int) -> None:
        """Give every site a pool per modality for the task; older ones are frozen."""
        for key, layer in self.layers.items():
            assert isinstance(layer, DeLoLayer)
            for name, pool in layer.pools.items():
                assert isinstance(pool, FactorPool)
                pool.grow(generator(self.seed, key, name, task))

    def finish_task(self) -> None:
        """Freeze the task's pools."""
        for pool in self._pools():
            pool.freeze()

    def route_tensors(self, task: int) -> list[Tensor]:
        """Return the task's own pools: they alone answer it."""
        found = []
        for pool in self._pools():
            for stack in pool.stacks():
                rows = len(stack) // len(self.labels)
                own = torch.arange(task * rows, (task + 1) * rows, device=stack.slot.device)
                found.append(stack.take(own))
        return found

    def training_logits(
        self, embedding: Tensor, batch: Batch, labels: LabelSpace, task: int
    ) -> tuple[Tensor, Tensor]:
        """Return logits among the classes of ``logit_scope``; older heads are frozen."""
        logits, targets = super().training_logits(embedding, batch, labels, task)
        if self.heads is None or self.config.logit_scope == "current":
            return logits, targets
        older = [self.heads.of_task(embedding, before) for before in range(len(self.labels) - 1)]
        extra = sum(part.shape[1] for part in older)
        targets = F.pad(targets, (extra, 0)) if labels.multi_label else targets + extra
        return torch.cat([*older, logits], dim=1), targets

    def extra_losses(self, batch: Batch, embedding: Tensor) -> dict[str, Tensor]:
        """Return the alignment and consistency terms of the complete samples."""
        complete = torch.ones(len(batch), dtype=torch.bool, device=embedding.device)
        for present in batch.present.values():
            complete = complete & present
        rows = complete.nonzero()[:, 0]
        if len(self.backbone.modalities) < 2 or len(rows) == 0:
            return {}
        terms: dict[str, Tensor] = {}
        if self.config.align and self.by_block and self.layers:
            assert self.queries.raw is not None
            terms["align"] = self.config.align * alignment(self.queries.raw[rows])
        if self.config.consistency and self.heads is not None:
            terms["consistency"] = self.config.consistency * self._consistency(
                batch, embedding, rows
            )
        return terms

    def _consistency(self, batch: Batch, embedding: Tensor, rows: Tensor) -> Tensor:
        """Return how far answers without a modality are from answers with both."""
        assert batch.task is not None and batch.random is not None and self.heads is not None
        released = self.config.cons_direction == "released"
        no_text = batch.random.normal("dropped modality", (len(batch),), embedding)[rows] > 0
        lost = {"text": no_text | released, "image": ~(no_text | released)}
        with torch.set_grad_enabled(not released):
            embedded = self._embed_without(batch, embedding, rows, lost)
            poorer = self.heads.of_task(embedded, batch.task)
        whole = self.heads.of_task(embedding[rows], batch.task)
        learner, teacher = (whole, poorer) if released else (poorer, whole.detach())
        return divergence(teacher, learner, self.labels[batch.task].multi_label)

    def _embed_without(
        self, batch: Batch, embedding: Tensor, rows: Tensor, lost: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the embedding of rows as if they lacked a modality: modality -> (rows,) bool."""
        parts = self.backbone.parts
        if set(parts) == set(self.backbone.modalities):
            # Towers that never meet: what is left of a sample is as it was, and need not run again.
            gone = [lost[name].unsqueeze(1).expand(-1, width) for name, width in parts.items()]
            return embedding[rows].masked_fill(torch.cat(gone, dim=1), 0.0)
        assert batch.task is not None
        part = self.backbone.without(batch.take(rows), lost)
        return self.backbone.encode(part, self.make_route(batch.task, part))

    def _pools(self) -> list[FactorPool]:
        return [m for m in self.modules() if isinstance(m, FactorPool)]


def alignment(queries: Tensor) -> Tensor:
    """Return the mean of 1 - cos between the two queries of each row (b, 2, q)."""
    return (1.0 - F.cosine_similarity(queries[:, 0], queries[:, 1], dim=1)).mean()


def divergence(teacher: Tensor, learner: Tensor, multi_label: bool = False) -> Tensor:
    """Return the mean KL(teacher || learner) of logits (b, c); of each label if there are several.

    The released code takes a softmax of several labels too.
    """
    if not multi_label:
        log_chances = F.log_softmax(learner, dim=1)
        return F.kl_div(log_chances, teacher.softmax(dim=1), reduction="batchmean")
    there = teacher.sigmoid()
    of_labels = there * (F.logsigmoid(teacher) - F.logsigmoid(learner)) + (1.0 - there) * (
        F.logsigmoid(-teacher) - F.logsigmoid(-learner)
    )
    return of_labels.sum(dim=1).mean()
