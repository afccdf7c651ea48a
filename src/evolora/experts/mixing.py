"""One function, several exact formulations: add gated low-rank experts onto a base output.

    out + scale * sum_k gate_k * (act(x A_k^T + a_k) B_k + b_k)

All formulations accumulate onto the base output (no full-size temporary per expert) and multiply
by the gates in the r-dimensional space, where autograd keeps almost nothing.

| formulation | what it does | its cost |
|---|---|---|
| shared   | two thin products, the same experts for every row | those experts |
| gather   | a batched product with each sample's own factors | independent of the pool size e |
| stacked  | two thin products over the whole pool, most gates zero | grows with e * r |
| grouped  | rows sorted by expert, one ``grouped_mm`` | copies x and out k times |
| segments | rows sorted by expert, one product per expert | one small product per expert |

:mod:`evolora.experts.dispatch` has the rule that picks. Frozen and trainable experts are multiplied
apart, so that no formulation computes a gradient for a frozen one or copies the bank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from evolora.errors import ConfigError, unknown_name
from evolora.experts.accumulate import accumulate, may_overwrite
from evolora.experts.bank import ExpertBank, Factors
from evolora.experts.dispatch import FORMULATIONS, Formulation, choose, thresholds_for
from evolora.experts.recording import Experts
from evolora.experts.segments import add_sorted
from evolora.randomness import StepRandom


def mix(
    out: Tensor,
    x: Tensor,
    bank: ExpertBank,
    ids: Tensor | Sequence[int],
    gates: Tensor | None = None,
    *,
    dropout: float = 0.0,
    random: StepRandom | None = None,
    key: str = "",
    formulation: Formulation = "auto",
    inplace: bool = False,
) -> Tensor:
    """Return ``out`` plus the gated sum of the experts ``ids`` applied to ``x``.

    Everything is computed in the type of ``out``.

    Args:
        out: (b, n, d_out) base output.
        x: (b, n, d_in) input of the experts.
        bank: experts of this site.
        ids: (b, k) expert per sample, (b, n, k) per token, or (1, k) when all rows share them. A
            sequence of numbers is shared by all rows and, known to Python, looked up for free.
        gates: same shape as ``ids``; for shared ones also (b, k), or (b, n, k): a dense mixture in
            which each token weighs all experts. None for ones. A gate of 0 silences its expert.
        dropout: probability of zeroing a bottleneck unit; needs ``random``, off without it. The
            experts of a row must then differ.
        random: randomness of the step.
        key: name under which this site draws.
        formulation: "auto" applies the dispatch rule; the others force one form.
        inplace: ``out`` belongs to nobody else and may be overwritten (where autograd allows it).

    Raises:
        ConfigError: shapes that do not fit, or a formulation that cannot serve such ids.
    """
    k = ids.shape[-1] if isinstance(ids, Tensor) else len(ids)
    _check(out, x, ids, gates, formulation)
    if k == 0:
        return out
    x = x.to(out.dtype)
    keep = None
    if dropout > 0.0 and random is not None:
        b, n = x.shape[:2]
        mask = random.keep_mask(f"{key}/dropout", (b, n, k * bank.r), dropout, x)
        keep = mask.view(b, n, k, bank.r)
    weights = None if gates is None else gates.to(out.dtype)
    overwrite = inplace and may_overwrite(out)
    form = formulation
    if form == "auto":
        form = _choose(x, bank, ids, k)
    shape = out.shape
    each = isinstance(ids, Tensor) and ids.dim() == 3
    if each or (weights is not None and weights.dim() == 3):
        # A route per token is a route per sample of one token.
        out, x = _rows(out), _rows(x)
        ids = ids.flatten(0, 1) if each and isinstance(ids, Tensor) else ids
        weights = None if weights is None else weights.flatten(0, 1)
        keep = None if keep is None else _rows(keep)
    if not isinstance(ids, Tensor):
        # Where rows stand is a fact of the moment, which a compiled graph must not freeze.
        if form == "shared" and not torch.compiler.is_compiling():
            return _listed(out, x, bank, ids, weights, keep, overwrite).view(shape)
        ids = torch.tensor(ids, device=x.device).unsqueeze(0)
    if form == "shared":
        factors = bank.taken(ids[0]).to(out.dtype)
        return _add(out, x, bank, factors, ids, weights, keep, overwrite).view(shape)
    ids = ids.expand(len(x), k)
    if weights is not None:
        weights = weights.expand(ids.shape)
    if form == "gather":
        factors = bank.taken(ids).to(out.dtype)
        return _add(out, x, bank, factors, ids, weights, keep, overwrite).view(shape)
    if form == "stacked":
        return _stacked(out, x, bank, ids, weights, keep, overwrite).view(shape)
    grouped = form == "grouped"
    return add_sorted(
        out, x, bank, ids, weights, keep, grouped=grouped, inplace=overwrite
    ).view(shape)  # fmt: skip


def add_pairs(
    out: Tensor,
    x: Tensor,
    factors: Factors,
    gates: Tensor,
    *,
    mask: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """Return ``out`` plus one thin pair of each sample, its ranks weighted: rank-one experts.

    Args:
        out: (b, n, d_out) base output.
        x: (b, n, d_in).
        factors: a (b, R, d_in) and b (b, R, d_out).
        gates: (b, R) weight of each rank.
        mask: (b, n, R), or None: which ranks act on which token.
        inplace: as for :func:`mix`.
    """
    factors, x = factors.to(out.dtype), x.to(out.dtype)
    hidden = torch.bmm(x, factors.a.mT) * gates.to(out.dtype).unsqueeze(1)
    if mask is not None:
        hidden = hidden * mask
    return accumulate(out, hidden, factors.b, inplace=inplace and may_overwrite(out))


def _choose(x: Tensor, bank: ExpertBank, ids: Tensor | Sequence[int], k: int) -> Formulation:
    if not isinstance(ids, Tensor):
        return "shared"
    return choose(
        len(bank),
        bank.r,
        ids.shape[0],
        x.shape[1],
        k,
        per_token=ids.dim() == 3,
        thresholds=thresholds_for(x.device.type),
    )


def _listed(
    out: Tensor,
    x: Tensor,
    bank: ExpertBank,
    ids: Sequence[int],
    weights: Tensor | None,
    keep: Tensor | None,
    overwrite: bool,
) -> Tensor:
    """Add experts that all rows share and Python knows: a product for each part of the bank."""
    for positions, factors in bank.split(ids):
        part = None if weights is None else _columns(weights, positions, 1)
        kept = None if keep is None else _columns(keep, positions, 2)
        own = [ids[position] for position in positions]
        out = _add(out, x, bank, factors.to(out.dtype), own, part, kept, overwrite)
        overwrite = overwrite or may_overwrite(out)  # from the second part on, it is ours
    return out


def _stacked(
    out: Tensor,
    x: Tensor,
    bank: ExpertBank,
    ids: Tensor,
    weights: Tensor | None,
    keep: Tensor | None,
    overwrite: bool,
) -> Tensor:
    """Run every expert on every row; those that were not chosen have a gate of zero."""
    places = bank.A.slot[ids]
    if weights is None:
        weights = x.new_ones(()).expand(places.shape)
    dense = x.new_zeros(len(x), len(bank)).scatter_add(1, places, weights)
    kept = None
    if keep is not None:
        index = places[:, None, :, None].expand_as(keep)
        kept = keep.new_zeros(*x.shape[:2], len(bank), bank.r).scatter(2, index, keep)
    for span, factors in bank.whole():
        part = None if kept is None else kept[:, :, span]
        out = _add(out, x, bank, factors.to(out.dtype), span, dense[:, span], part, overwrite)
        overwrite = overwrite or may_overwrite(out)
    return out


def _add(
    out: Tensor,
    x: Tensor,
    bank: ExpertBank,
    factors: Factors,
    experts: Experts,
    weights: Tensor | None,
    keep: Tensor | None,
    overwrite: bool,
) -> Tensor:
    """Return out + scale * sum over the factors' experts; weights (b, k) or (1, k)."""
    hidden = _bottleneck(x, bank, factors)
    if bank.recorder is not None and hidden.requires_grad:
        read = partial(_bottleneck, bank=bank, factors=factors)
        bank.recorder.see(bank, hidden, experts, weights, x, read)
    if keep is not None:
        hidden = hidden * keep.flatten(2)
    if weights is not None:
        scaled = weights * bank.scale
        wide = scaled.unsqueeze(-1).expand(*scaled.shape, bank.r).flatten(1)
        hidden = hidden * wide.unsqueeze(1)
    elif bank.scale != 1.0:
        hidden = hidden * bank.scale
    row = None
    if factors.up_bias is not None:
        row = _up_bias(factors.up_bias, weights, bank.scale)
    return accumulate(out, hidden, factors.b, row, inplace=overwrite)


def _bottleneck(x: Tensor, bank: ExpertBank, factors: Factors) -> Tensor:
    """Return what the factors' experts make of x (b, n, d_in): (b, n, R)."""
    if factors.a.dim() == 2:
        hidden = F.linear(x, factors.a, factors.down_bias)
    elif factors.down_bias is None:
        hidden = torch.bmm(x, factors.a.mT)
    else:
        hidden = torch.baddbmm(factors.down_bias.unsqueeze(1), x, factors.a.mT)
    return torch.relu(hidden) if bank.activation == "relu" else hidden


def _up_bias(bias: Tensor, weights: Tensor | None, scale: float) -> Tensor:
    """Return what the up biases (k, d) or (b, k, d) add to every token: (1, d) or (b, d)."""
    if weights is None:
        total = bias.sum(dim=-2) * scale
        return total if total.dim() == 2 else total.unsqueeze(0)
    scaled = weights * scale
    if bias.dim() == 2:
        return scaled @ bias
    return torch.bmm(scaled.unsqueeze(1), bias).squeeze(1)


def _columns(values: Tensor, positions: list[int], dim: int) -> Tensor:
    """Return values at ``positions`` of an axis, without asking the device."""
    first, count = positions[0], len(positions)
    if positions == list(range(first, first + count)):
        return values.narrow(dim, first, count)
    return torch.cat([values.narrow(dim, position, 1) for position in positions], dim)


def _rows(values: Tensor) -> Tensor:
    """(b, n, ...) -> (b n, 1, ...)."""
    return values.flatten(0, 1).unsqueeze(1)


def _check(
    out: Tensor,
    x: Tensor,
    ids: Tensor | Sequence[int],
    gates: Tensor | None,
    formulation: Formulation,
) -> None:
    if formulation not in FORMULATIONS:
        raise unknown_name("formulation", formulation, FORMULATIONS)
    if x.dim() != 3 or out.shape[:2] != x.shape[:2]:
        raise ConfigError(
            f"experts need x (b, n, d_in) and out (b, n, d_out); "
            f"got {tuple(x.shape)} and {tuple(out.shape)}"
        )
    if not isinstance(ids, Tensor):
        shape: tuple[int, ...] = (1, len(ids))
    else:
        shape = tuple(ids.shape)
        rows, tokens = x.shape[:2]
        if not (len(shape) == 2 and shape[0] in (1, rows)) and shape[:-1] != (rows, tokens):
            raise ConfigError(
                f"expert ids must be (1, k), ({rows}, k) or ({rows}, {tokens}, k); got {shape}"
            )
        if formulation == "shared" and (len(shape) == 3 or shape[0] != 1):
            raise ConfigError(f"'shared' needs one row of expert ids; got {shape}")
    if gates is None or tuple(gates.shape) == shape:
        return
    if len(shape) == 2 and shape[0] == 1:
        k = shape[1]
        if tuple(gates.shape) in ((len(x), k), (*x.shape[:2], k)):
            return
    raise ConfigError(f"gates {tuple(gates.shape)} do not fit expert ids {shape}")
