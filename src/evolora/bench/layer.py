"""Bench "layer": one frozen Linear with experts, in every formulation, and how each one grows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from evolora.bench.references import loop_over_experts
from evolora.bench.session import Session, rotated
from evolora.bench.settings import Settings
from evolora.bench.timing import Variant
from evolora.experts.bank import ExpertBank
from evolora.experts.dispatch import Formulation
from evolora.experts.mixing import mix
from evolora.randomness import generator

BARE = "bare Linear"
CHOSEN = "dispatcher's choice"
PER_SAMPLE: tuple[Formulation, ...] = ("gather", "stacked", "grouped", "segments")
PER_TOKEN: tuple[Formulation, ...] = ("stacked", "grouped", "segments")
LOOP_ALL_MAX = 32
"""A loop that runs every expert on everything is left out above so many."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Linear, its bank and its routes.

    Args:
        experts, r, k: size of the pool, rank of one, experts per route.
        tokens, batch: n and b.
        d_in, d_out: widths of the Linear.
        per_token: a route for every token; otherwise one per sample.
        routes: experts drawn with equal chances, or with chances 1 / rank ("zipf").
    """

    experts: int = 16
    r: int = 16
    k: int = 2
    tokens: int = 197
    batch: int = 8
    d_in: int = 768
    d_out: int = 768
    per_token: bool = False
    routes: Literal["uniform", "zipf"] = "uniform"

    @property
    def formulations(self) -> tuple[Formulation, ...]:
        """The formulations that can compute this shape."""
        return PER_TOKEN if self.per_token else PER_SAMPLE


@dataclass(frozen=True, eq=False)
class Case:
    """Tensors of a shape: x (b, n, d_in), a weight, a trainable bank, ids and gates."""

    shape: Shape
    inputs: list[Tensor]
    weight: Tensor
    bank: ExpertBank
    ids: Tensor
    gates: Tensor

    def variants(self, loops: bool = True) -> list[Variant]:
        """Return the bare Linear, loops over experts, every formulation, and the dispatcher."""
        bare = Variant(
            name=BARE,
            run=lambda x: F.linear(x, self.weight),
            forward_base=BARE,
            step_base=BARE,
        )
        common = replace(bare, modules=(self.bank,), reference=self.expected())
        made = [bare]
        if loops and self.shape.experts <= LOOP_ALL_MAX:
            made.append(replace(common, name="loop over all", run=self.looped(hit_only=False)))
        if loops:
            made.append(replace(common, name="loop over hit", run=self.looped(hit_only=True)))
        made += [replace(common, name=f, run=self.mixed(f)) for f in self.shape.formulations]
        return [*made, replace(common, name=CHOSEN, run=self.mixed("auto"))]

    def mixed(self, formulation: Formulation) -> Callable[[Tensor], Tensor]:
        """Return the Linear with experts in a formulation."""

        def run(x: Tensor) -> Tensor:
            out = F.linear(x, self.weight)
            return mix(
                out, x, self.bank, self.ids, self.gates, formulation=formulation, inplace=True
            )

        return run

    def looped(self, *, hit_only: bool) -> Callable[[Tensor], Tensor]:
        """Return the Linear with a loop over experts."""

        def run(x: Tensor) -> Tensor:
            out = F.linear(x, self.weight)
            return loop_over_experts(out, x, self.bank, self.ids, self.gates, hit_only=hit_only)

        return run

    def expected(self) -> Tensor:
        """Return the output for the first input in double precision."""
        with torch.no_grad():
            x, bank = self.inputs[0].double(), copy.deepcopy(self.bank).double()
            out = F.linear(x, self.weight.double())
            return loop_over_experts(out, x, bank, self.ids, self.gates.double(), hit_only=True)


def case(shape: Shape, settings: Settings) -> Case:
    """Return random tensors of a shape."""
    draw = generator(settings.seed, "layer", shape)
    place: dict[str, Any] = {"device": settings.device, "dtype": settings.torch_dtype}

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=draw).to(**place)

    def tokens() -> Tensor:
        return normal(shape.batch, shape.tokens, shape.d_in).requires_grad_()

    bank = ExpertBank(shape.d_in, shape.d_out, shape.r)
    bank.grow(shape.experts, draw)
    bank.to(**place)
    with torch.no_grad():
        bank.B.active.copy_(0.02 * normal(shape.experts, shape.r, shape.d_out))
    chances = torch.ones(shape.experts)
    if shape.routes == "zipf":
        chances = 1.0 / torch.arange(1, shape.experts + 1)
    rows = shape.batch * (shape.tokens if shape.per_token else 1)
    ids = torch.multinomial(chances.expand(rows, -1), shape.k, generator=draw)
    gates = torch.rand(ids.shape, generator=draw).softmax(dim=1)
    if shape.per_token:
        ids, gates = (t.view(shape.batch, shape.tokens, shape.k) for t in (ids, gates))
    return Case(
        shape=shape,
        inputs=rotated(tokens, torch.device(settings.device)),
        weight=normal(shape.d_out, shape.d_in) / shape.d_in**0.5,
        bank=bank,
        ids=ids.to(settings.device),
        gates=gates.to(**place),
    )


def measure(session: Session) -> None:
    """Compare the formulations for a route per sample and per token, then sweep each size."""
    s = session.settings
    center = Shape(batch=s.batch or s.either(8, 4))
    per_token = replace(center, experts=64, per_token=True)
    for title, shape in (
        ("a route per sample, e = 16", center),
        ("a route per token, e = 64", per_token),
    ):
        made = case(shape, s)
        comparison = session.compare(
            title, made.variants(), made.inputs, rounds=s.either(9, 3), memory=not s.quick
        )
    ratio = comparison.ratio(CHOSEN, "step")
    session.goal("token-step", ratio.median if ratio else None)
    if s.quick:
        return
    for title, axis, shapes in sweeps(center):
        session.sweep(title, axis, list(shapes), builder(shapes, s), rounds=5)


def builder(
    shapes: dict[str, Shape], settings: Settings
) -> Callable[[str], tuple[list[Variant], list[Tensor]]]:
    """Return a function from a shape's label to what is compared, made when it is its turn."""

    def build(label: str) -> tuple[list[Variant], list[Tensor]]:
        made = case(shapes[label], settings)
        return made.variants(), made.inputs

    return build


def sweeps(center: Shape) -> Sequence[tuple[str, str, dict[str, Shape]]]:
    """Return (title, axis, shape by label) of every sweep around a shape."""
    pools = (4, 8, 16, 32, 64, 128)
    by_pool = {str(e): replace(center, experts=e) for e in pools}
    by_pool_token = {str(e): replace(center, experts=e, per_token=True) for e in pools[1:]}
    by_rank = {str(r): replace(center, r=r) for r in (4, 8, 16, 64)}
    by_k = {str(k): replace(center, k=k) for k in (1, 2, 4)}
    sizes = ((1, 64), (16, 32), (50, 32), (197, 8))
    by_tokens = {str(n): replace(center, tokens=n, batch=b) for n, b in sizes}
    by_width = {str(d): replace(center, d_out=d) for d in (768, 3072)}
    crowd = replace(center, experts=64)
    by_routes = {
        f"{routes} per {'token' if per_token else 'sample'}": replace(
            crowd, routes=routes, per_token=per_token
        )
        for per_token in (False, True)
        for routes in ("uniform", "zipf")
    }
    return [
        ("pool, a route per sample", "e", by_pool),
        ("pool, a route per token", "e", by_pool_token),
        ("rank", "r", by_rank),
        ("experts per route", "k", by_k),
        ("tokens per route", "n", by_tokens),
        ("width of the output", "d", by_width),
        ("chances of the experts, e = 64", "routes", by_routes),
    ]
