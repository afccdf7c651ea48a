"""Branches: up-projections of one site that share what one trunk makes of the input.

    out + sum_k gate_k * h B_k ,  h = A x

The trunk A belongs to the layer. Nothing of full size is made per branch: the branches of a row are
summed before they meet its tokens, or, where a row has few tokens, the bottleneck is weighted.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from evolora.experts.accumulate import accumulate, may_overwrite
from evolora.experts.bank import GrowingStack
from evolora.experts.dispatch import Formulation, thresholds_for
from evolora.experts.recording import Recorder


class BranchBank(nn.Module):
    """Branches of one site, frozen ones and trainable ones apart.

    Args:
        r: width of the trunk's output.
        d_out: width of the site's output.

    Attributes:
        recorder: who is told what the trunk makes of a row's tokens; None: nobody asks.
    """

    recorder: Recorder | None = None

    def __init__(self, r: int, d_out: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.r, self.d_out = r, d_out
        self.B = GrowingStack(r, d_out, device=device)

    def __len__(self) -> int:
        return len(self.B)

    def grow(self, count: int) -> None:
        """Append ``count`` branches that output exactly zero."""
        self.B.grow(torch.zeros(count, self.r, self.d_out, device=self.B.active.device))

    def freeze(self, ids: Iterable[int]) -> None:
        """Freeze branches for good: bit for bit what they are now."""
        self.B.freeze(ids)

    def frozen_ids(self) -> list[int]:
        """Return the identifiers of frozen branches, ascending."""
        return self.B.frozen_ids()

    def add(
        self,
        out: Tensor,
        hidden: Tensor,
        ids: Tensor,
        gates: Tensor,
        *,
        formulation: Formulation = "auto",
        inplace: bool = False,
    ) -> Tensor:
        """Return ``out`` plus the gated sum of each row's branches of ``hidden``.

        Args:
            out: (b, n, d_out) base output.
            hidden: (b, n, r) what the trunk made of the input.
            ids: (b, k) branches of each row.
            gates: (b, k).
            formulation: "gather" or "stacked" (see :mod:`evolora.experts.mixing`); any other word
                takes the first where a row has many tokens.
            inplace: ``out`` belongs to nobody else and may be overwritten (where autograd allows).
        """
        hidden, gates = hidden.to(out.dtype), gates.to(out.dtype)
        if self.recorder is not None and torch.is_grad_enabled():
            z = hidden.repeat(1, 1, ids.shape[1])
            self.recorder.see(self, z, ids, gates, hidden, None)
        overwrite = inplace and may_overwrite(out)
        many = out.shape[1] >= thresholds_for(out.device.type).gather_min_tokens
        if formulation == "gather" or (many and formulation != "stacked"):
            own = self.B.take(ids).to(out.dtype).flatten(2)  # (b, k, r d_out)
            summed = torch.bmm(gates.unsqueeze(1), own).view(-1, self.r, self.d_out)
            return accumulate(out, hidden, summed, inplace=overwrite)
        return self._stacked(out, hidden, ids, gates, overwrite)

    def flops(self, tokens: int, active: int) -> int:
        """Return the FLOPs that ``active`` branches add to a row of ``tokens`` tokens."""
        return 2 * (active + tokens) * self.r * self.d_out

    def _stacked(
        self, out: Tensor, hidden: Tensor, ids: Tensor, gates: Tensor, overwrite: bool
    ) -> Tensor:
        """Weight the bottleneck once per branch; those that were not chosen have a gate of zero."""
        dense = gates.new_zeros(len(gates), len(self)).scatter(1, self.B.slot[ids], gates)
        start = 0
        for rows in (self.B.frozen, self.B.active):
            if len(rows):
                part = dense[:, None, start : start + len(rows), None]
                wide = (hidden.unsqueeze(2) * part).flatten(2)
                stacked = rows.to(out.dtype).flatten(0, 1)
                out = accumulate(out, wide, stacked, inplace=overwrite)
                overwrite = overwrite or may_overwrite(out)  # from the second part on, it is ours
            start += len(rows)
        return out
