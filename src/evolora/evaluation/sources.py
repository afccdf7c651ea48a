"""Sources: how much of a new path's experts comes from each earlier one, where a gate decides it.

    share(site, i) = mean over test samples and tokens of g_i(x)          sum_i share(site, i) = 1

The tokens are those that carry the modality: the queries, and at key and value of cross-attention
what the encoder gave; the instruction's are left out. A gate that has learned nothing gives each of
t sources 1/t. Gates: :mod:`evolora.routing.path_gates`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evolora.backbones.qformer import QFormer
from evolora.experts.woven import WovenLayer
from evolora.methods.base import Method
from evolora.routing.route import Route

READING = ("crossattention/key", "crossattention/value")
"""Sites that see what the encoder gave, not the queries."""


class SourceShares:
    """Sums of a path's gate weights, per site, while a test set is answered.

    Args:
        method: whose gates they are.
        task: the stage whose path is looked at; of one without gates nothing is noted.
    """

    def __init__(self, method: Method, task: int) -> None:
        self.names = method.sources(task)
        self._path = len(self.names) - 1
        layers = method.layers.items() if self.names else ()
        self._layers = {
            key: layer
            for key, layer in layers
            if isinstance(layer, WovenLayer) and layer.gates is not None
        }
        self._queries = 0
        if isinstance(method.backbone, QFormer):
            self._queries = int(method.backbone.queries.shape[0])
        self._sums = {key: torch.zeros(len(self.names) + 1) for key in self._layers}

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note the weights of every forward in the path."""
        handles = [
            layer.register_forward_pre_hook(partial(self._note, key))
            for key, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def to_json(self, summed: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Return {"paths": names, "sites": site -> share of each}; empty where nothing was noted.

        Args:
            summed: adds up what the processes have noted.
        """
        found = {key: summed(sums).tolist() for key, sums in self._sums.items()}
        sites = {
            key: [round(value / count, 6) for value in values]
            for key, (*values, count) in found.items()
            if count
        }
        return {"paths": list(self.names), "sites": sites} if sites else {}

    @torch.no_grad()
    def _note(self, key: str, layer: nn.Module, args: tuple[Tensor, Tensor, Route]) -> None:
        x, _, route = args
        rows = torch.nonzero(route.tasks == self._path)[:, 0]
        if len(rows) == 0:
            return
        assert isinstance(layer, WovenLayer)
        tokens = x[rows] if key.endswith(READING) else x[rows, : self._queries]
        weights = layer.weights(tokens, self._path, route.take(rows)).float().cpu()
        self._sums[key][:-1] += weights.sum(dim=(0, 1))
        self._sums[key][-1] += weights.shape[0] * weights.shape[1]
