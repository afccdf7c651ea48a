"""Branches: both formulations equal a plain loop, in values and in gradients (float64)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evolora.experts.branches import BranchBank

R, D_OUT, TOKENS = 3, 5, 4
FORMS = ("gather", "stacked", "auto")


def make_bank(frozen: tuple[int, ...] = (2, 0), branches: int = 5) -> BranchBank:
    bank = BranchBank(R, D_OUT)
    bank.grow(branches)
    bank.double()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        bank.B.active.copy_(torch.randn(bank.B.active.shape, generator=draw))
    for branch in frozen:
        bank.freeze([branch])
    return bank


def inputs(rows: int = 3, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    values = {"generator": draw, "dtype": torch.float64}
    out, hidden = torch.randn(rows, tokens, D_OUT, **values), torch.randn(rows, tokens, R, **values)
    ids = torch.rand(rows, 5, generator=draw).topk(2, dim=1).indices
    return out, hidden.requires_grad_(), ids, torch.rand(rows, 2, **values).requires_grad_()


def loop(out: Tensor, hidden: Tensor, rows: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
    total = [
        out[row] + sum(g * hidden[row] @ rows[i] for i, g in zip(ids[row], gates[row], strict=True))
        for row in range(len(out))
    ]
    return torch.stack(total)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("frozen", [(), (2, 0), (4, 3, 2, 1, 0)])
@pytest.mark.parametrize("formulation", FORMS)
def test_every_formulation_equals_the_loop(formulation, frozen, inplace) -> None:
    bank = make_bank(frozen)
    for tokens in (1, TOKENS, 40):
        out, hidden, ids, gates = inputs(tokens=tokens)
        weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
        every = bank.B.all().detach().requires_grad_()
        expected = loop(out, hidden, every, ids, gates)
        wanted = torch.autograd.grad((expected * weight).sum(), [hidden, gates, every])
        kept = out.clone()
        got = bank.add(out.clone(), hidden, ids, gates, formulation=formulation, inplace=inplace)
        torch.testing.assert_close(got, expected.detach(), rtol=1e-10, atol=1e-10)
        bank.zero_grad()
        hidden.grad = gates.grad = None
        again = bank.add(out, hidden, ids, gates, formulation=formulation)
        (again * weight).sum().backward()
        assert torch.equal(out, kept), "the base output was modified"
        torch.testing.assert_close(hidden.grad, wanted[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gates.grad, wanted[1], rtol=1e-10, atol=1e-10)
        learning = [branch for branch in range(5) if branch not in frozen]
        if learning:
            grad = bank.B.active.grad
            torch.testing.assert_close(grad, wanted[2][learning], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("formulation", FORMS)
def test_fresh_branches_add_exact_zeros(formulation: str) -> None:
    bank = BranchBank(R, D_OUT)
    bank.grow(5)
    out, hidden, ids, gates = inputs()
    hidden, gates = hidden.float(), gates.float()
    assert torch.equal(bank.add(out.float(), hidden, ids, gates), out.float())


def test_float32_branches_serve_a_base_in_bfloat16() -> None:
    bank = make_bank().float()
    out, hidden, ids, gates = (value.detach() for value in inputs())
    expected = loop(out.float(), hidden.float(), bank.B.all(), ids, gates.float())
    for formulation in FORMS:
        got = bank.add(out.bfloat16(), hidden.bfloat16(), ids, gates, formulation=formulation)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), expected, rtol=5e-2, atol=1e-1)
