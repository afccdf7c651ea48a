"""MAP: missing-aware prompts, one set for each way in which a sample may be incomplete.

    h_i = block_i([P_i(c); h_{i-1}])  or  attention over [P_i(c); tokens]     c in {0, 1, 2}

c is the sample's missing code (complete, text missing, image missing), from the data. Mode "input"
puts 16 more tokens before the sequence at each of the lowest six blocks, beside those of earlier
blocks; mode "attention" makes half of them keys and half of them values of the block's attention.
Prompts are shared by all tasks and trained by each in turn: nothing protects them.

Paper: Lee et al., Multimodal Prompting with Missing Modalities, CVPR 2023, arXiv 2303.03369: one
task. Theirs: prompts, start (zeros with one row of ones, another for each set), trained pooler.
Ours: tasks in turn, as RebQ and DeLo compare it; one linear head per task instead of an MLP head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from evolora.backbones.base import Backbone
from evolora.errors import ConfigError
from evolora.experts.prompts import PromptKind, PromptLayer, PromptSite
from evolora.experts.sites import ExpertLayer
from evolora.methods.base import Method
from evolora.registry import METHODS
from evolora.routing.route import Route
from evolora.routing.selector import AlwaysSelector

CODES = 3
"""Missing codes: 0 complete, 1 text missing, 2 image missing."""
ROW_OF_ONES = (0, 2, 1)
"""Row of a set that starts as ones, by missing code."""
KINDS: dict[str, PromptKind] = {"input": "input", "attention": "prefix"}


@dataclass(frozen=True, kw_only=True)
class MapConfig:
    """Settings of missing-aware prompts.

    Args:
        type: "map".
        mode: "input" (more tokens) or "attention" (more keys and values).
        prompt_length: rows per block and set; in mode "attention" half keys, half values
            (authors: 16).
        layers_to_transform: block indices (negative counts from the top); None takes all (authors:
            the lowest six of twelve).
        train_pooler: whether a copy of the model's pooler trains too, as the authors' does.
    """

    type: Literal["map"] = "map"
    mode: Literal["input", "attention"] = "input"
    prompt_length: int = 16
    layers_to_transform: tuple[int, ...] | None = (0, 1, 2, 3, 4, 5)
    train_pooler: bool = True

    def __post_init__(self) -> None:
        least = CODES if self.mode == "input" else 2 * CODES
        if self.prompt_length < least:
            raise ConfigError(
                f"prompt_length must be at least {least} in mode {self.mode!r}: a row of ones of "
                f"its own tells each set from the others; got {self.prompt_length}"
            )


class MapLayer(PromptLayer):
    """The three prompt sets of one block."""

    def __init__(self, site: PromptSite, config: MapConfig, device: torch.device) -> None:
        super().__init__(site, config.prompt_length, KINDS[config.mode])
        start = torch.zeros(CODES, config.prompt_length, site.width)
        for code, row in enumerate(ROW_OF_ONES):
            start[code, row] = 1.0
            if config.mode == "attention":
                start[code, row + config.prompt_length // 2] = 1.0
        self.prompts = nn.Parameter(start.to(device))

    def forward(self, route: Route) -> Tensor:
        """Return the set of each row's missing code."""
        return self.prompts[missing_codes(route)]


class PoolerLayer(ExpertLayer):
    """A trained copy of the model's pooler: tanh(W h + c) of the first token."""

    def __init__(self, pooler: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(pooler.dense.weight.detach().clone())
        self.bias = nn.Parameter(pooler.dense.bias.detach().clone())

    def forward(self, x: Tensor, out: Tensor, route: Route) -> Tensor:
        """Return the pooled state (b, d) of a sequence (b, n, d)."""
        first = x[:, 0]
        return nn.functional.linear(first, self.weight.to(x.dtype), self.bias.to(x.dtype)).tanh()


def missing_codes(route: Route) -> Tensor:
    """Return the missing code of each row (b,)."""
    assert route.spans is not None
    return (~route.spans.has("text")).long() + 2 * (~route.spans.has("image")).long()


@METHODS.register("map", summary="MAP: prompts for each missing modality, shared by all tasks")
class Map(Method):
    """The method; see the module docstring."""

    config_class = MapConfig
    needs_one_stream = True

    def __init__(self, config: MapConfig, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__(config, backbone, seed=seed)
        self.selector = AlwaysSelector(0)
        sites = backbone.prompt_sites(config.layers_to_transform)
        self.insert_prompts(
            {site.key_of(): MapLayer(site, config, backbone.device) for site in sites}
        )
        if config.train_pooler:
            self.insert(backbone.pooler_site, PoolerLayer(backbone.pooler_site.module))

    def expert_task(self, task: int) -> int:
        """All tasks share the prompts."""
        return 0
