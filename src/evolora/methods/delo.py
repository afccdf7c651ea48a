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

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from evolora.backbones.base import Backbone, Batch
from evolora.errors import ConfigError
from evolora.experts.factor_layer import Cmgr, FactorLayer, Queries, TokenScope
from evolora.experts.factor_pool import FactorConfig
from evolora.methods.agreement import Direction, alignment, complete_rows, consistency
from evolora.methods.base import HeadMode, Method
from evolora.methods.selectors import SelectorConfig, use_selector
from evolora.randomness import generator
from evolora.registry import METHODS
from evolora.routing.selector import OracleSelectorConfig
from evolora.routing.task_keys import TaskKeySelectorConfig
from evolora.streams.task import LabelSpace


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
    token_scope: TokenScope = "all"
    cmgr: Cmgr | None = None
    align: float | None = None
    consistency: float | None = None
    cons_direction: Direction | None = None
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
                layer = FactorLayer(
                    site,
                    config.factors,
                    self.queries,
                    width,
                    scope=config.token_scope,
                    device=backbone.device,
                )
                self.insert(site, layer)
            if self.by_block:
                backbone.watch_blocks(backbone.towers[0], self.queries.see)
        if self.layers and not self.by_block:
            self.query_feature = "modalities"
        assert config.selector is not None
        use_selector(self, config.selector)

    def factor_layers(self) -> list[tuple[str, FactorLayer]]:
        """Return the layers by key, in order of tower and depth."""
        return [(k, layer) for k, layer in self.layers.items() if isinstance(layer, FactorLayer)]

    def allocate(self, task: int) -> None:
        """Give every site a pool per modality for the task; older ones are frozen."""
        for key, layer in self.factor_layers():
            layer.begin_task(lambda name, key=key: generator(self.seed, key, name, task))

    def finish_task(self) -> None:
        """Freeze the task's pools."""
        for _, layer in self.factor_layers():
            layer.finish_task()

    def route_tensors(self, task: int) -> list[Tensor]:
        """Return the task's own pools: they alone answer it."""
        return [tensor for _, layer in self.factor_layers() for tensor in layer.task_tensors(task)]

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
        rows = complete_rows(batch, embedding.device)
        if len(self.backbone.modalities) < 2 or len(rows) == 0:
            return {}
        config, terms = self.config, {}
        if config.align and self.by_block and self.layers:
            assert self.queries.raw is not None
            terms["align"] = config.align * alignment(self.queries.raw[rows])
        if config.consistency and self.heads is not None:
            assert config.cons_direction is not None
            found = consistency(self, batch, embedding, rows, config.cons_direction)
            terms["consistency"] = config.consistency * found
        return terms
