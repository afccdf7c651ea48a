"""One function, several exact formulations: add gated low-rank experts onto a base output.

    out + scale * sum_k gate_k * (act(x A_k^T + a_k) B_k + b_k)

All formulations accumulate onto the base output (no full-size temporary per expert) and multiply
by the gates in the r-dimensional space, where autograd keeps almost nothing.

| formulation | for | cost |
|---|---|---|
| shared  | every row has the same experts (ids has one row)   | two thin matmuls |
| gather  | a route per sample, n >= 16 tokens or few experts   | independent of the pool size e |
| stacked | one token per sample, or nearly all experts active | grows with e * r |
"""

from __future__ import annotations

import torch
from torch import Tensor

from evolora.errors import ConfigError
from evolora.experts.bank import ExpertBank
from evolora.experts.dispatch import Formulation
from evolora.randomness import StepRandom

GATHER_MIN_TOKENS = 16
"""Below so many tokens per route, a batched matmul degenerates to matrix-vector products."""
STACKED_MAX_ROWS = 1024
"""Up to e * r rows, one stacked product beats a gather for single-token inputs (CPU, fp32)."""


def mix(
    out: Tensor,
    x: Tensor,
    bank: ExpertBank,
    ids: Tensor,
    gates: Tensor | None = None,
    *,
    dropout: float = 0.0,
    random: StepRandom | None = None,
    key: str = "",
    formulation: Formulation = "auto",
    inplace: bool = False,
) -> Tensor:
    """Return ``out`` plus the gated sum of the experts ``ids`` applied to ``x``.

    Args:
        out: (b, n, d_out) base output; not modified.
        x: (b, n, d_in) input of the experts.
        bank: experts of this site.
        ids: (b, k) expert per row, or (1, k) when all rows share them.
        gates: same shape as ``ids``; a gate of 0 silences its expert.
        dropout: probability of zeroing a bottleneck unit; needs ``random``, off without it.
        random: randomness of the step.
        key: name under which this site draws.
        formulation: "auto" applies the dispatch rule; the others force one form.
    """
    if gates is None:
        gates = torch.ones(ids.shape, dtype=x.dtype, device=x.device)
    chosen = choose(bank, x, ids) if formulation == "auto" else formulation
    if chosen == "shared" and ids.shape[0] != 1:
        raise ConfigError(f"'shared' needs one row of expert ids; got {ids.shape[0]}")
    if chosen == "stacked":
        ids, gates = _dense(ids, gates, len(bank))
    if chosen != "gather":
        a, b = bank.A.take(ids[0]).flatten(0, 1), bank.B.take(ids[0]).flatten(0, 1)
        hidden = x @ a.T
    else:
        a, b = bank.A.take(ids).flatten(1, 2), bank.B.take(ids).flatten(1, 2)
        hidden = torch.bmm(x, a.transpose(1, 2))
    hidden = _bottleneck(hidden, bank, ids, dropout, random, key)
    weight = gates * bank.scale
    hidden = hidden * weight.repeat_interleave(bank.r, dim=1).unsqueeze(1)
    if b.dim() == 3:
        mixed = torch.baddbmm(out, hidden, b)
    else:
        mixed = torch.addmm(out.flatten(0, 1), hidden.flatten(0, 1), b).view_as(out)
    if bank.up_bias is not None:
        mixed = mixed + torch.einsum("bk,bkd->bd", weight, bank.up_bias.take(ids)).unsqueeze(1)
    return mixed


def choose(bank: ExpertBank, x: Tensor, ids: Tensor) -> Formulation:
    """Return the formulation for this shape (CPU thresholds; docs/architecture.md has the rule)."""
    if ids.shape[0] == 1:
        return "shared"
    tokens = x.shape[1]
    if tokens < GATHER_MIN_TOKENS and len(bank) * bank.r <= STACKED_MAX_ROWS:
        return "stacked"
    return "gather"


def _bottleneck(
    hidden: Tensor,
    bank: ExpertBank,
    ids: Tensor,
    dropout: float,
    random: StepRandom | None,
    key: str,
) -> Tensor:
    """Apply down bias, activation and dropout in the r-dimensional space."""
    if bank.down_bias is not None:
        hidden = hidden + bank.down_bias.take(ids).flatten(1, 2).unsqueeze(1)
    if bank.activation == "relu":
        hidden = torch.relu(hidden)
    if dropout > 0.0 and random is not None:
        hidden = hidden * random.keep_mask(f"{key}/dropout", tuple(hidden.shape), dropout, hidden)
    return hidden


def _dense(ids: Tensor, gates: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return ids (1, e) and gates (b, e) that say the same with every expert listed."""
    full = torch.zeros(ids.shape[0], experts, dtype=gates.dtype, device=gates.device)
    return torch.arange(experts, device=ids.device).unsqueeze(0), full.scatter_add(1, ids, gates)
