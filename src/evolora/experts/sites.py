"""Sites: where experts stand inside a frozen model, inserted and removed without a trace.

A stock ``transformers`` model is never subclassed, rewritten or wrapped: a site is one or two
forward hooks. Its state dict, its module tree and its weights stay what they were.

* ``linear``: experts see a Linear's input and add to its output (LoRA).
* ``mlp``: experts see the residual stream before the MLP's LayerNorm and add to the MLP's output:
  y = h + MLP(LN(h)) + E(h)   (MoE-Adapters, section 3.2 of arXiv 2403.11549).

The route is handed to all sites of a tower through one :class:`SiteHost`. It stays in place until
the tower's next forward, so a backward pass that recomputes (gradient checkpointing) meets the same
route.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from evolora.errors import RouteError
from evolora.routing.route import Route

SiteKind = Literal["linear", "mlp"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """One place for experts.

    Args:
        tower: "vision" or "text" (other backbones add theirs).
        layer: index of the transformer block, from 0.
        name: unique within the model, with dots ("vision.3.self_attn.q_proj").
        kind: where the experts read and write, see the module docstring.
        module: the Linear, or the MLP, whose output the experts add to.
        norm: for kind "mlp": the LayerNorm whose input the experts read.
        d_in, d_out: widths the experts must have.
    """

    tower: str
    layer: int
    name: str
    kind: SiteKind
    module: nn.Module
    d_in: int
    d_out: int
    norm: nn.Module | None = None

    @property
    def key(self) -> str:
        """The site's name as a key of a ModuleDict, which must not contain dots."""
        return self.name.replace(".", "/")


class ExpertLayer(nn.Module):
    """What stands at a site: from its input, its base output and the route to the new output."""

    def forward(self, x: Tensor, out: Tensor, route: Route) -> Tensor:
        """Return the new output (b, n, d_out); never called with a row that the base answers."""
        raise TypeError(f"{type(self).__name__} must define forward")


class SiteHost:
    """Inserts expert layers at sites and hands each tower its route."""

    def __init__(self) -> None:
        self.enabled = True
        self._routes: dict[str, Route] = {}
        self._handles: list[RemovableHandle] = []
        self._lowest: dict[str, int] = {}

    def lowest(self, tower: str) -> int | None:
        """Return the lowest block of a tower that has a site, or None if none has."""
        return self._lowest.get(tower)

    def insert(self, site: Site, layer: ExpertLayer) -> None:
        """Let ``layer`` add to ``site`` from the next forward on."""
        self._lowest[site.tower] = min(site.layer, self._lowest.get(site.tower, site.layer))
        if site.norm is None:

            def add(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
                return self._run(site, layer, args[0], out)

            self._handles.append(site.module.register_forward_hook(add))
            return
        seen: list[Tensor] = []

        def remember(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.clear()  # a pass that broke off between the norm and the MLP left its input
            if self._wanted(site):
                seen.append(args[0])

        def beside(_: nn.Module, __: tuple[Any, ...], out: Tensor) -> Tensor:
            return self._run(site, layer, seen.pop(), out) if seen else out

        self._handles.append(site.norm.register_forward_pre_hook(remember))
        self._handles.append(site.module.register_forward_hook(beside))

    def remove_all(self) -> None:
        """Take every expert layer out again; the model is as it was before the first insert."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._routes.clear()
        self._lowest.clear()

    def set_route(self, tower: str, route: Route) -> None:
        """Put the route in place for the tower's forwards until the next call."""
        self._routes[tower] = route

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the untouched base model: no expert code, no route needed."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def _wanted(self, site: Site) -> bool:
        if not self.enabled:
            return False
        if site.tower not in self._routes:
            raise RouteError(
                f"site {site.name!r} was run with experts enabled and no route for the "
                f"{site.tower!r} tower; call set_route first, or run inside disabled()"
            )
        return not self._routes[site.tower].nobody

    def _run(self, site: Site, layer: ExpertLayer, x: Tensor, out: Tensor) -> Tensor:
        if not self._wanted(site):
            return out
        route = self._routes[site.tower]
        if route.rows != out.shape[0]:
            raise RouteError(f"site {site.name!r} got {out.shape[0]} rows, its route {route.rows}")
        if route.everybody:
            result: Tensor = layer(x, out, route)
            return result
        rows = route.active
        return out.index_copy(0, rows, layer(x[rows], out[rows], route.of_active))
