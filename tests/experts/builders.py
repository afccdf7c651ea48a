"""Banks of random values, and the definition that every formulation must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from evolora.experts.bank import ExpertBank
from evolora.experts.sites import Site

D_IN, D_OUT, R, TOKENS = 8, 4, 3, 6


def make_bank(
    bottleneck: bool,
    experts: int,
    order: Sequence[int] = (),
    *,
    dtype: torch.dtype = torch.float64,
    shape: tuple[int, int, int] = (D_IN, D_OUT, R),
) -> ExpertBank:
    """A bank of random values; the experts of ``order`` are frozen one after another."""
    bank = ExpertBank(*shape, bias=bottleneck, activation="relu" if bottleneck else None, scale=0.7)
    bank.grow(experts, torch.Generator().manual_seed(1))
    bank.to(dtype)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for stack in bank.stacks():
            stack.active.copy_(torch.randn(stack.active.shape, generator=draw))
    for expert in order:
        bank.freeze([expert])
    return bank


def loop(out: Tensor, x: Tensor, bank: ExpertBank, ids: Tensor, gates: Tensor | None) -> Tensor:
    """The definition, token by token and expert by expert, of (b, n, k) ids and gates."""
    a, b = bank.A.all(), bank.B.all()
    down = None if bank.down_bias is None else bank.down_bias.all()
    up = None if bank.up_bias is None else bank.up_bias.all()
    result = []
    for row in range(x.shape[0]):
        tokens = []
        for token in range(x.shape[1]):
            total = out[row, token]
            for position, expert in enumerate(ids[row, token].tolist()):
                hidden = a[expert] @ x[row, token]
                if down is not None:
                    hidden = hidden + down[expert]
                if bank.activation == "relu":
                    hidden = hidden.relu()
                value = hidden @ b[expert]
                if up is not None:
                    value = value + up[expert]
                gate = 1.0 if gates is None else gates[row, token, position]
                total = total + bank.scale * gate * value
            tokens.append(total)
        result.append(torch.stack(tokens))
    return torch.stack(result)


def per_token(values: Tensor, rows: int, tokens: int) -> Tensor:
    """Ids or gates of any granularity as (b, n, k)."""
    if values.dim() == 2:
        values = values.unsqueeze(1)
    return values.expand(rows, tokens, values.shape[-1])


def randomize(bank: ExpertBank, seed: int = 0) -> None:
    """Fill all experts in place, frozen ones too."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for stack in bank.stacks():
            for rows in (stack.frozen, stack.active):
                rows.copy_(torch.randn(rows.shape, generator=draw))


def assert_agree(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to ``tolerance`` of the largest value."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    if expected.numel():
        error = (got - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        assert error.item() <= tolerance, error.item()


class Block(nn.Module):
    """y = h + MLP(LN(h)), frozen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), nn.Linear(width, width)
        self.requires_grad_(False)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.mlp(self.norm(h))

    def site(self, kind: str) -> Site:
        """The site of its MLP: "mlp" beside it, "linear" at it."""
        width = self.mlp.in_features
        return Site(
            tower="vision",
            layer=0,
            name="a",
            kind=kind,
            module=self.mlp,
            norm=self.norm if kind == "mlp" else None,
            d_in=width,
            d_out=width,
        )
