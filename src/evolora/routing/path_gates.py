"""Path gates: how much each expert of a path counts for each token, noisy while it is learned.

    clean = x W_t                                              (b, n, t + 1)
    logits = clean + eps * (softplus(x N_t) + 0.01) ,  eps ~ normal(0, 1)      in training
    g = softmax(logits)                                        or of the top k of them

Path t weighs the t earlier experts and its own, in that order; path 0 has one expert and no gate.
W_t and N_t start at zero, so that all experts begin with the weight 1 / (t + 1).

Source: PathWeave (arXiv 2410.20178), whose released code takes k = all experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.experts.bank import GrowingStack
from evolora.randomness import StepRandom
from evolora.routing.gates import NOISE_FLOOR


class PathGates(nn.Module):
    """The gates of all paths at one site; columns of W_t are rows of a stack.

    Args:
        d: width of a token.
        noise: whether there are weights N_t; without, no noise is drawn.
        top_k: experts of a token; None takes all.
    """

    def __init__(
        self,
        d: int,
        *,
        noise: bool = True,
        top_k: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.d, self.top_k = d, top_k
        self.weight = GrowingStack(d, device=device)
        self.noise = GrowingStack(d, device=device) if noise else None

    def grow(self, path: int) -> None:
        """Add the gate of a path, all zero; the paths before it have theirs."""
        if path == 0:
            return
        for stack in (self.weight, self.noise):
            if stack is not None:
                stack.grow(torch.zeros(path + 1, self.d, device=stack.active.device))

    def forward(
        self, x: Tensor, path: int, *, random: StepRandom | None = None, key: str = ""
    ) -> Tensor:
        """Return the weights (b, n, path + 1) of the path's experts; they sum to 1.

        Computed in the gates' own type (float32), whatever the model runs in.

        Args:
            x: (b, n, d) input of the site.
            path: whose gate, from 1.
            random: noise source; None draws none.
            key: name under which this site draws.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.weight.active.dtype)
            logits = F.linear(x, _rows(self.weight, path))
            if random is not None and self.noise is not None:
                spread = F.softplus(F.linear(x, _rows(self.noise, path))) + NOISE_FLOOR
                drawn = random.normal(f"{key}/gate", tuple(logits.shape), logits)
                logits = logits + drawn * spread
            if self.top_k is not None and self.top_k < path + 1:
                least = logits.topk(self.top_k, dim=-1).values[..., -1:]
                logits = logits.masked_fill(logits < least, float("-inf"))
            return torch.softmax(logits, dim=-1)


def _rows(stack: GrowingStack, path: int) -> Tensor:
    """Return the columns (path + 1, d) of a path's matrix."""
    first = path * (path + 1) // 2 - 1
    places = stack.places()
    return stack.part([places[row] for row in range(first, first + path + 1)])
