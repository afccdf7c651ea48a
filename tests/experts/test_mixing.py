"""Every formulation equals a plain loop over experts, in values and in gradients (float64)."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evolora.errors import ConfigError
from evolora.experts.bank import ExpertBank
from evolora.experts.mixing import mix
from evolora.randomness import StepRandom

D_IN, D_OUT, R, TOKENS = 5, 4, 3, 6


def make_bank(bottleneck: bool, experts: int, order: list[int], frozen: int) -> ExpertBank:
    """A float64 bank of random values; ``order[:frozen]`` are frozen one after another."""
    bank = ExpertBank(
        D_IN, D_OUT, R, bias=bottleneck, activation="relu" if bottleneck else None, scale=0.7
    )
    bank.grow(experts, torch.Generator().manual_seed(1))
    bank.double()
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for stack in bank.stacks():
            stack.active.copy_(torch.randn(stack.active.shape, generator=draw))
    for expert in order[:frozen]:
        bank.freeze([expert])
    return bank


def loop(out: Tensor, x: Tensor, bank: ExpertBank, ids: Tensor, gates: Tensor) -> Tensor:
    """The definition, row by row and expert by expert."""
    rows = []
    for b in range(x.shape[0]):
        row = b if ids.shape[0] > 1 else 0
        total = out[b]
        for expert, gate in zip(ids[row].tolist(), gates[row], strict=True):
            hidden = x[b] @ bank.A.all()[expert].T
            if bank.down_bias is not None:
                hidden = hidden + bank.down_bias.all()[expert]
            if bank.activation == "relu":
                hidden = hidden.relu()
            value = hidden @ bank.B.all()[expert]
            if bank.up_bias is not None:
                value = value + bank.up_bias.all()[expert]
            total = total + bank.scale * gate * value
        rows.append(total)
    return torch.stack(rows)


def results(function, bank: ExpertBank, rows: int, ids: Tensor, seed: int) -> list[Tensor]:
    """Output, and gradients of everything that has one."""
    draw = torch.Generator().manual_seed(seed)
    values = {"generator": draw, "dtype": torch.float64}
    x = torch.randn(rows, TOKENS, D_IN, **values).requires_grad_()
    out = torch.randn(rows, TOKENS, D_OUT, **values).requires_grad_()
    gates = torch.rand(ids.shape, **values).requires_grad_()
    weight = torch.randn(rows, TOKENS, D_OUT, **values)
    bank.zero_grad()
    kept = out.detach().clone()
    result = function(out, x, bank, ids, gates)
    (result * weight).sum().backward()
    assert torch.equal(out.detach(), kept), "the base output was modified"
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in bank.parameters()]
    return [result.detach(), x.grad, out.grad, gates.grad, *[g.clone() for g in grads]]


@settings(max_examples=40, deadline=None)
@given(
    bottleneck=st.booleans(),
    experts=st.integers(1, 5),
    k=st.integers(1, 2),
    rows=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
@pytest.mark.parametrize("formulation", ["auto", "gather", "stacked", "shared"])
def test_every_formulation_equals_the_loop(
    formulation, bottleneck, experts, k, rows, seed, data
) -> None:
    k = min(k, experts)
    order = data.draw(st.permutations(range(experts)))
    frozen = data.draw(st.integers(0, experts))
    bank = make_bank(bottleneck, experts, order, frozen)
    draw = torch.Generator().manual_seed(seed)
    count = 1 if formulation == "shared" else rows
    ids = torch.stack([torch.randperm(experts, generator=draw)[:k] for _ in range(count)])

    def with_formulation(*arguments):
        return mix(*arguments, formulation=formulation)

    expected = results(loop, bank, rows, ids, seed)
    got = results(with_formulation, bank, rows, ids, seed)
    for value, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-10)
    assert all(stack.frozen.grad is None for stack in bank.stacks())


@pytest.mark.parametrize(
    ("formulation", "bottleneck"),
    list(itertools.product(["gather", "stacked", "shared"], [True, False])),
)
def test_gradcheck(formulation: str, bottleneck: bool) -> None:
    bank = make_bank(bottleneck, 3, [1], 1)
    draw = torch.Generator().manual_seed(5)
    rows, k = (1, 2) if formulation == "shared" else (2, 2)
    ids = torch.tensor([[0, 1], [2, 0]])[:rows]
    x = torch.randn(2, 2, D_IN, generator=draw, dtype=torch.float64, requires_grad=True)
    out = torch.randn(2, 2, D_OUT, generator=draw, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(rows, k, generator=draw, dtype=torch.float64, requires_grad=True)
    names = [name for name, parameter in bank.named_parameters() if parameter.numel()]
    values = [dict(bank.named_parameters())[name].detach().requires_grad_() for name in names]

    def function(out, x, gates, *tensors):
        parameters = dict(zip(names, tensors, strict=True))
        return torch.func.functional_call(
            Mixed(bank, ids, formulation), {f"bank.{n}": t for n, t in parameters.items()},
            (out, x, gates),
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (out, x, gates, *values), fast_mode=False)


class Mixed(torch.nn.Module):
    def __init__(self, bank: ExpertBank, ids: Tensor, formulation: str) -> None:
        super().__init__()
        self.bank, self.ids, self.formulation = bank, ids, formulation

    def forward(self, out: Tensor, x: Tensor, gates: Tensor) -> Tensor:
        return mix(out, x, self.bank, self.ids, gates, formulation=self.formulation)


def test_dispatch_rule() -> None:
    small, large = ExpertBank(4, 4, 2), ExpertBank(4, 4, STACKED_MAX_ROWS)
    small.grow(3)
    large.grow(2)
    many, one = torch.zeros(2, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)
    few_tokens = torch.zeros(2, GATHER_MIN_TOKENS - 1, 4)
    enough = torch.zeros(2, GATHER_MIN_TOKENS, 4)
    assert choose(small, enough, one) == "shared"
    assert choose(small, few_tokens, many) == "stacked"
    assert choose(large, few_tokens, many) == "gather"
    assert choose(small, enough, many) == "gather"


def test_shared_refuses_ids_per_row() -> None:
    bank = make_bank(False, 2, [], 0)
    x = torch.zeros(2, TOKENS, D_IN, dtype=torch.float64)
    out = torch.zeros(2, TOKENS, D_OUT, dtype=torch.float64)
    ids = torch.tensor([[0], [1]])
    with pytest.raises(ConfigError, match="one row of expert ids; got 2"):
        mix(out, x, bank, ids, torch.ones(2, 1, dtype=torch.float64), formulation="shared")


@pytest.mark.parametrize("formulation", ["gather", "stacked"])
def test_fresh_experts_add_exact_zeros(formulation: str) -> None:
    bank = ExpertBank(D_IN, D_OUT, R, bias=True, activation="relu", scale=0.1)
    bank.grow(4, torch.Generator().manual_seed(0))
    x, out = torch.randn(3, TOKENS, D_IN), torch.randn(3, TOKENS, D_OUT)
    ids, gates = torch.tensor([[0, 1], [2, 3], [1, 2]]), torch.rand(3, 2)
    assert torch.equal(mix(out, x, bank, ids, gates, formulation=formulation), out)


def test_dropout_is_drawn_from_the_step_alone() -> None:
    bank = make_bank(True, 2, [], 0).float()
    x, out = torch.randn(4, TOKENS, D_IN), torch.zeros(4, TOKENS, D_OUT)
    ids, gates = torch.tensor([[0, 1]] * 4), torch.rand(4, 2)

    def run(seed: int | None, key: str = "site", rows: slice = slice(None), **share: int):
        random = StepRandom(seed, **share) if seed is not None else None
        arguments = (out[rows], x[rows], bank, ids[rows], gates[rows])
        return mix(*arguments, dropout=0.5, random=random, key=key, formulation="gather")

    plain = mix(out, x, bank, ids, gates, formulation="gather")
    assert torch.equal(run(None), plain)
    assert torch.equal(run(1), run(1))
    for other in (run(2), run(1, "other site"), plain):
        assert not torch.equal(run(1), other)
    halves = [  # two processes draw what one would have drawn
        run(1, rows=slice(start, start + 2), first_row=start, global_rows=4) for start in (0, 2)
    ]
    torch.testing.assert_close(torch.cat(halves), run(1), rtol=0, atol=1e-6)


def test_dropout_keeps_the_mean() -> None:
    like = torch.empty(())
    mask = StepRandom(0).keep_mask("key", (200, 500), 0.3, like)
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert float(mask.mean()) == pytest.approx(1.0, abs=0.01)
