"""A router of tokens: of each token of a sequence, the weight of every expert of a site."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evolora.experts.bank import GrowingStack, fresh_rows


class TokenRouter(nn.Module):
    """One linear router without a bias:  p = softmax(W x), for each token on its own.

    Computed in the router's own type (float32), whatever the model runs in.

    Args:
        d: width of a token.
        experts: how many there are to weigh.
    """

    def __init__(self, d: int, experts: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.d, self.experts = d, experts
        self.weight = GrowingStack(experts, d, device=device)

    def grow(self, draw: torch.Generator) -> None:
        """Make its weights, as a Linear's are: uniform in +-1/sqrt(d)."""
        self.weight.grow(fresh_rows(1, self.weight, draw))

    def forward(self, x: Tensor) -> Tensor:
        """Return the weights (b, n, e) of the experts for tokens (b, n, d); they sum to 1."""
        weight = self.weight.all()[0]
        with torch.autocast(x.device.type, enabled=False):
            logits = nn.functional.linear(x.to(weight.dtype), weight)
        return torch.softmax(logits, dim=-1)

    def flops(self, tokens: int) -> int:
        """Return the FLOPs of ``tokens`` tokens."""
        return 2 * tokens * self.d * self.experts
