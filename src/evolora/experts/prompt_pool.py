"""Pools of prompt components, mixed anew for every sample (CODA-Prompt, RebQ).

    w_k = cos(q * A_k, K_k)          prompt = sum_k w_k p_k

q describes the sample, A_k are attention vectors, K_k keys, p_k components. Every task brings
components of its own; those of finished tasks take part but no longer learn. Source: CODA-Prompt,
Smith et al., CVPR 2023, arXiv 2211.13218, equations 2 to 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.experts.bank import GrowingStack


class PromptPool(nn.Module):
    """The components of all tasks for one block.

    Args:
        query: width of the query.
        length: rows of a prompt.
        width: of a row.
        device: where it is.
    """

    def __init__(
        self, query: int, length: int, width: int, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.keys = GrowingStack(query, device=device)
        self.attention = GrowingStack(query, device=device)
        self.prompts = GrowingStack(length, width, device=device)
        self.still = 0  # of the first so many trainable components no gradient is taken

    def stacks(self) -> list[GrowingStack]:
        """Return the growing tensors."""
        return [self.keys, self.attention, self.prompts]

    def grow(self, count: int, draw: torch.Generator) -> None:
        """Add trainable components: unit rows, orthogonal to each other and to all there are."""
        for stack in self.stacks():
            stack.grow(orthogonal_rows(stack.all().detach(), count, draw))

    def grow_zeros(self, count: int) -> None:
        """Add components that are zero, and older ones get no gradient (RebQ as released).

        The new ones get none either: each factor of it is zero. Nothing is frozen, so an
        optimizer's weight decay still shrinks the older ones.
        """
        self.still = len(self.keys)
        for stack in self.stacks():
            stack.grow(torch.zeros(count, *stack.shape, device=stack.active.device))

    def freeze(self) -> None:
        """Freeze every component there is."""
        for stack in self.stacks():
            stack.freeze(range(len(stack)))

    def forward(self, query: Tensor) -> Tensor:
        """Return the prompts (b, length, d) of queries (b, q); zeros of a query of zeros."""
        keys, attention, prompts = (self._rows(stack) for stack in self.stacks())
        weights = component_weights(query.to(keys.dtype), keys, attention)
        return torch.einsum("bk,kld->bld", weights, prompts)

    def _rows(self, stack: GrowingStack) -> Tensor:
        rows = stack.all()
        return torch.cat([rows[: self.still].detach(), rows[self.still :]]) if self.still else rows

    def orthogonality(self) -> Tensor:
        """Return how far keys, attention vectors and prompts are from orthonormal rows.

        Mean of (M M^T - I)^2 of each, summed; frozen rows count, but only the others learn.
        """
        terms = []
        for stack in self.stacks():
            rows = stack.all().flatten(1)
            eye = torch.eye(len(rows), device=rows.device, dtype=rows.dtype)
            terms.append((rows @ rows.T - eye).square().mean())
        return torch.stack(terms).sum()


def component_weights(query: Tensor, keys: Tensor, attention: Tensor) -> Tensor:
    """Return w (b, k) of queries (b, q), keys and attention vectors (k, q)."""
    # cos(q * A_k, K_k) without a tensor (b, k, q)
    products = query @ (attention * keys).T
    lengths = (query.square() @ attention.square().T).clamp_min(1e-16).sqrt()
    return products / (lengths * keys.square().sum(dim=1).clamp_min(1e-16).sqrt())


def orthogonal_rows(before: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """Return ``count`` unit rows, orthogonal to each other and to ``before`` (n, ...).

    Where the space has no direction left, rows are as drawn, of unit length.
    """
    shape = before.shape[1:]
    if before.device.type == "meta":
        return torch.empty(count, *shape, device="meta")
    old = before.detach().cpu().double().flatten(1)
    drawn = torch.randn(count, old.shape[1], generator=draw, dtype=torch.float64)
    if len(old) + count <= old.shape[1]:
        basis = torch.linalg.qr(torch.cat([old, drawn]).T)[0].T
        drawn = basis[len(old) :]
    return F.normalize(drawn, dim=1).float().view(count, *shape).to(before.device)
