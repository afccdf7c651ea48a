"""Sites: where experts stand inside a frozen model, inserted and removed without a trace.

A stock ``transformers`` model is never subclassed, rewritten or wrapped: a site is one or two
forward hooks. Its state dict, its module tree and its weights stay what they were.

* ``linear``: experts see a Linear's input and add to its output (LoRA). Those that need no gradient
  may be folded into the weight: the Linear then runs with a merged one (see experts/merge.py).
* ``mlp``: experts see the residual stream before the MLP's LayerNorm and add to the MLP's output:
  y = h + MLP(LN(h)) + E(h)   (MoE-Adapters, section 3.2 of arXiv 2403.11549).
* ``ffn``: experts are whole MLPs, whose mixture takes the place of the base's
  (experts/feed_forward.py).

The route is handed to all sites of a tower through one :class:`SiteHost`. It stays in place until
the tower's next forward; a backward pass that recomputes (gradient checkpointing) meets the route
of its own forward (:meth:`SiteHost.holding_routes`), however many forwards a step has.

A gate that reads what enters a whole block, not what enters a Linear, watches the block
(:meth:`SiteHost.watch`): its callback keeps what the block's sites then use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from evolora.errors import RouteError
from evolora.experts.bank import ExpertBank
from evolora.experts.dispatch import Formulation, thresholds_for
from evolora.experts.feed_forward import FeedForward, FeedForwardHooks, Projected
from evolora.experts.merge import MAX_ROUTES, AlwaysOn, FoldCache
from evolora.routing.route import Route

SiteKind = Literal["linear", "mlp", "ffn"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """One place for experts.

    Args:
        tower: "vision", "text", or "multimodal" where one stream holds both.
        layer: index of the transformer block, from 0.
        name: unique within the model, with dots ("vision.3.self_attn.q_proj").
        kind: where the experts read and write, see the module docstring.
        module: the Linear, or the MLP, whose output the experts add to.
        norm: for kind "mlp": the LayerNorm whose input the experts read.
        mlp: for kind "ffn": the MLP's parts.
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
    mlp: FeedForward | None = None

    @property
    def place(self) -> str:
        """What messages call it."""
        return f"site {self.name!r}"

    @property
    def key(self) -> str:
        """The site's name as a key of a ModuleDict, which must not contain dots."""
        return self.name.replace(".", "/")


BlockWatcher = Callable[[int, Tensor, Route], None]
"""Called with (index of the block, hidden states (b, n, d) entering it, their route)."""


class ExpertLayer(nn.Module):
    """What stands at a site: from its input, its base output and the route to the new output.

    Attributes:
        formulation: forces one form of :func:`evolora.experts.mixing.mix`, where "auto" picks.
    """

    formulation: Formulation = "auto"

    def answers(self, task: int | None) -> bool:
        """Return whether the layer may change a row of a task; of None: of any task."""
        return True

    def forward(self, x: Tensor, out: Tensor, route: Route) -> Tensor:
        """Return the new output (b, n, d_out); never called with a row that the base answers.

        ``out`` belongs to the layer: it may be overwritten.
        """
        raise TypeError(f"{type(self).__name__} must define forward")


class FoldableLayer(ExpertLayer):
    """A layer of linear experts, some of which a host may fold into the weight of their Linear."""

    bank: ExpertBank

    def always_on(self, route: Route) -> AlwaysOn | None:
        """Return experts that answer every row of the route with constant gates, or None."""
        raise TypeError(f"{type(self).__name__} must define always_on")

    def forward(
        self, x: Tensor, out: Tensor, route: Route, folded: frozenset[int] = frozenset()
    ) -> Tensor:
        """Return the new output; experts ``folded`` are in ``out`` already."""
        raise TypeError(f"{type(self).__name__} must define forward")


class FeedForwardLayer(ExpertLayer):
    """A layer of experts that are whole MLPs, at a site of kind "ffn"."""

    def hidden(self, seen: Projected, route: Route) -> tuple[Tensor, ...]:
        """Return what the base's ``down`` gets in place of its own, and what :meth:`forward` needs.

        Args:
            seen: what the base has projected, of rows that experts answer.
            route: of these rows.
        """
        raise TypeError(f"{type(self).__name__} must define hidden")

    def forward(
        self, x: Tensor, out: Tensor, route: Route, hidden: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """Return the new output, given that of ``down`` and what :meth:`hidden` returned."""
        raise TypeError(f"{type(self).__name__} must define forward")


class SiteHost:
    """Inserts expert layers at sites and hands each tower its route.

    Attributes:
        enabled: False runs the untouched base model; see :meth:`disabled`.
        merging: whether experts may be folded into the weights of their Linears.
        max_routes: folded weights kept per Linear.
    """

    def __init__(self, *, max_routes: int = MAX_ROUTES) -> None:
        self.enabled = True
        self.merging = True
        self.max_routes = max_routes
        self._routes: dict[str, Route] = {}
        self._handles: list[RemovableHandle] = []
        self._linears: list[_LinearSite] = []
        self._layers: list[ExpertLayer] = []
        self._places: list[tuple[str, int, ExpertLayer | None]] = []

    @property
    def folded_bytes(self) -> int:
        """Bytes of all folded weights kept now."""
        return sum(linear.folds.nbytes for linear in self._linears if linear.folds)

    def lowest(self, tower: str, task: int | None = None) -> int | None:
        """Return the lowest block of a tower where something acts, or None if nothing does.

        Args:
            tower: the tower.
            task: on whose rows; None asks for any task.
        """
        acting = (
            block
            for where, block, layer in self._places
            if where == tower and (layer is None or layer.answers(task))
        )
        return min(acting, default=None)

    def insert(self, site: Site, layer: ExpertLayer) -> None:
        """Let ``layer`` add to ``site`` from the next forward on."""
        self._places.append((site.tower, site.layer, layer))
        self._layers.append(layer)
        if site.mlp is not None:
            assert isinstance(layer, FeedForwardLayer)
            self._handles += FeedForwardHooks(self, site, layer).insert()
            return
        if site.norm is None:
            linear = _LinearSite(self, site, layer)
            self._linears.append(linear)
            self._handles.append(site.module.register_forward_pre_hook(linear.before))
            self._handles.append(site.module.register_forward_hook(linear.after, always_call=True))
            return
        seen: list[Tensor] = []

        def remember(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.clear()  # a pass that broke off between the norm and the MLP left its input
            if self._wanted(site.tower, site.place):
                seen.append(args[0])

        def beside(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            return self._run(site, layer, seen.pop(), _own(out, args)) if seen else out

        self._handles.append(site.norm.register_forward_pre_hook(remember))
        self._handles.append(site.module.register_forward_hook(beside))

    def watch(self, tower: str, entries: Mapping[int, nn.Module], seen: BlockWatcher) -> None:
        """Call ``seen`` each time one of the blocks is about to run with experts.

        It gets the rows that experts answer, in the order in which expert layers get them, before
        any layer of the block runs; and again where a backward pass runs the block once more, so
        what it keeps for the block's layers is the block's own then too. It keeps it in an object
        of its owner, never on a tensor or in a module global.

        Args:
            tower: whose blocks they are.
            entries: index of a block -> its module that takes what enters the block.
            seen: what is called.
        """

        def hook(index: int, args: tuple[Any, ...]) -> None:
            if not self._wanted(tower, f"block {index}"):
                return
            route, hidden = self._routes[tower], args[0]
            if route.rows != hidden.shape[0]:
                raise RouteError(
                    f"block {index} got {hidden.shape[0]} rows, its route {route.rows}"
                )
            if not route.everybody:
                hidden, route = hidden[route.active], route.of_active
            seen(index, hidden, route)

        for index, entry in entries.items():
            self._handles.append(
                entry.register_forward_pre_hook(lambda _, args, index=index: hook(index, args))
            )

    def hold(self, tower: str, layer: int, handle: RemovableHandle) -> None:
        """Keep the handle of a hook that acts in a block, to be removed with all the others."""
        self._places.append((tower, layer, None))
        self._handles.append(handle)

    def route_at(self, tower: str, place: str, rows: int) -> Route | None:
        """Return the route of a forward in which every row gets prompts; None if none does.

        Raises:
            RouteError: there is no route, or it is for other rows, or the base answers some rows.
        """
        route = self.acting(tower, place, rows)
        if route is not None and not route.everybody:
            raise RouteError(
                f"{place}: rows with prompts and rows of the base cannot run in one forward, for "
                "prompts make a sequence longer; run the rows of the base apart"
            )
        return route

    def acting(self, tower: str, place: str, rows: int) -> Route | None:
        """Return the route of a forward in which experts answer some row; None if none does.

        Raises:
            RouteError: there is no route, or it is for other rows.
        """
        if not self._wanted(tower, place):
            return None
        route = self._routes[tower]
        if route.rows != rows:
            raise RouteError(f"{place} got {rows} rows, its route {route.rows}")
        return route

    def route_of(self, tower: str) -> Route:
        """Return the route in place for a tower."""
        return self._routes[tower]

    def holding_routes(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function as it runs under the routes that are in place now."""
        routes = dict(self._routes)

        def run(*args: Any, **kwargs: Any) -> Any:
            before, self._routes = self._routes, routes
            try:
                return function(*args, **kwargs)
            finally:
                self._routes = before

        return run

    def remove_all(self) -> None:
        """Take every expert layer and watcher out again; the model is as before the first."""
        for handle in self._handles:
            handle.remove()
        for linear in self._linears:
            linear.restore()
        self._handles.clear()
        self._linears.clear()
        self._layers.clear()
        self._routes.clear()
        self._places.clear()

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

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Run without the fast paths: nothing folded, and "gather" for every shape; to compare."""
        merging, self.merging = self.merging, False
        formulations = [layer.formulation for layer in self._layers]
        for layer in self._layers:
            layer.formulation = "gather"
        try:
            yield
        finally:
            self.merging = merging
            for layer, formulation in zip(self._layers, formulations, strict=True):
                layer.formulation = formulation

    def _wanted(self, tower: str, place: str) -> bool:
        if not self.enabled:
            return False
        if tower not in self._routes:
            raise RouteError(
                f"{place} was run with experts enabled and no route for the {tower!r} tower; "
                "call set_route first, or run inside disabled()"
            )
        return not self._routes[tower].nobody

    def _run(
        self,
        site: Site,
        layer: ExpertLayer,
        x: Tensor,
        out: Tensor,
        folded: frozenset[int] = frozenset(),
    ) -> Tensor:
        if not self._wanted(site.tower, site.place):
            return out
        route = self._routes[site.tower]
        if route.rows != out.shape[0]:
            raise RouteError(f"site {site.name!r} got {out.shape[0]} rows, its route {route.rows}")
        if x.dim() == 2:  # tokens of several images in one sequence: each is a row of its own
            return self._added(layer, x.unsqueeze(1), out.unsqueeze(1), route, folded).squeeze(1)
        return self._added(layer, x, out, route, folded)

    @staticmethod
    def _added(
        layer: ExpertLayer, x: Tensor, out: Tensor, route: Route, folded: frozenset[int]
    ) -> Tensor:
        if route.everybody:
            result: Tensor = layer(x, out, route, folded) if folded else layer(x, out, route)
            return result
        rows = route.active
        return out.index_copy(0, rows, layer(x[rows], out[rows], route.of_active))

    def _foldable(self, site: Site, layer: ExpertLayer, x: Tensor) -> AlwaysOn | None:
        """Return the experts of this forward that answer all rows, if folding is allowed now.

        A compiler or a CUDA graph would keep the weight of one moment for ever.
        """
        if not self.merging or not isinstance(layer, FoldableLayer):
            return None
        if torch.compiler.is_compiling():
            return None
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        if not self._wanted(site.tower, site.place) or not self._routes[site.tower].everybody:
            return None
        return layer.always_on(self._routes[site.tower])


class _LinearSite:
    """The hooks of one Linear: before it, experts are folded; after it, the others are added.

    A folded weight shadows the parameter as a plain attribute of the instance while the Linear
    runs. The parameter itself stays where it was, so state dict, parameters and device moves never
    see anything else.
    """

    def __init__(self, host: SiteHost, site: Site, layer: ExpertLayer) -> None:
        self.host, self.site, self.layer = host, site, layer
        self.folds: FoldCache | None = None
        if isinstance(layer, FoldableLayer) and isinstance(site.module, nn.Linear):
            self.folds = FoldCache(site.module, layer.bank, host.max_routes)
        self.folded: frozenset[int] = frozenset()

    def before(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.restore()  # after a forward that was interrupted
        x: Tensor = args[0]
        if self.folds is None or "weight" in self.site.module.__dict__:
            return
        wanted = self.host._foldable(self.site, self.layer, x)
        if wanted is None:
            if torch.is_grad_enabled():
                self.folds.clear()
            return
        limit = thresholds_for(x.device.type).fold_min_tokens
        found = self.folds.lookup(wanted, x, limit)
        if found is not None:
            weight, experts = found
            self.site.module.__dict__["weight"] = weight
            self.folded = frozenset(experts.ids)

    def after(self, _: nn.Module, args: tuple[Any, ...], out: Tensor | None) -> Tensor | None:
        folded = self.restore()
        if out is None:  # the forward raised
            return None
        return self.host._run(self.site, self.layer, args[0], _own(out, args), folded)

    def restore(self) -> frozenset[int]:
        """Take a folded weight away; return the experts it held."""
        if self.folded:
            del self.site.module.__dict__["weight"]
        folded, self.folded = self.folded, frozenset()
        return folded


def _own(out: Tensor, args: tuple[Any, ...]) -> Tensor:
    """Return an output that the experts may overwrite: an identity hands on what is not its own."""
    return out.clone() if any(out is argument for argument in args) else out
