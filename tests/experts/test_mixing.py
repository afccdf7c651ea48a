"""Every formulation equals a plain loop over experts, in values and in gradients (float64)."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.experts.builders import D_IN, D_OUT, TOKENS, R, loop, make_bank, per_token
from torch import Tensor

from evolora.errors import ConfigError
from evolora.experts.bank import ExpertBank
from evolora.experts.mixing import mix
from evolora.experts.segments import _takes_grouped
from evolora.randomness import StepRandom

FORMS = ["auto", "gather", "stacked", "grouped", "segments"]


def results(function, bank: ExpertBank, rows: int, ids: Tensor, gated: bool, seed: int):
    """Output, and gradients of everything that has one."""
    draw = torch.Generator().manual_seed(seed)
    values = {"generator": draw, "dtype": bank.A.frozen.dtype}
    x = torch.randn(rows, TOKENS, D_IN, **values).requires_grad_()
    base = torch.randn(rows, TOKENS, D_OUT, **values).requires_grad_()
    gates = torch.rand(ids.shape, **values).requires_grad_() if gated else None
    weight = torch.randn(rows, TOKENS, D_OUT, **values)
    bank.zero_grad()
    # As from a Linear, which neither keeps its output nor lets anybody else have it.
    out = (base.flatten(0, 1) + 1.0).view_as(base)
    kept = out.detach().clone()
    result = function(out, x, bank, ids, gates)
    untouched = torch.equal(out.detach(), kept)
    (result * weight).sum().backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in bank.parameters()]
    found = [result.detach(), x.grad, base.grad, *[g.clone() for g in grads]]
    return [*found, gates.grad] if gated else found, untouched


def definition(out, x, bank, ids, gates):
    sizes = x.shape[:2]
    gates = None if gates is None else per_token(gates, *sizes)
    return loop(out, x, bank, per_token(ids, *sizes), gates)


@settings(max_examples=30, deadline=None)
@given(
    bottleneck=st.booleans(),
    gated=st.booleans(),
    inplace=st.booleans(),
    grain=st.sampled_from(["sample", "token", "shared"]),
    experts=st.integers(1, 6),
    k=st.sampled_from([1, 2, 4]),
    rows=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
@pytest.mark.parametrize("formulation", [*FORMS, "shared"])
def test_every_formulation_equals_the_loop(
    formulation, bottleneck, gated, inplace, grain, experts, k, rows, seed, data
) -> None:
    k = min(k, experts)
    order = data.draw(st.permutations(range(experts)))  # frozen and trainable, in any places
    frozen = order[: data.draw(st.integers(0, experts))]
    # grouped_mm on a CPU knows no float64
    dtype, tolerance = (torch.float32, 1e-5) if formulation == "grouped" else (torch.float64, 1e-10)
    bank = make_bank(bottleneck, experts, frozen, dtype=dtype)
    sizes = {"sample": (rows,), "token": (rows, TOKENS), "shared": (1,)}
    sizes = sizes["shared" if formulation == "shared" else grain]
    scores = torch.rand(*sizes, experts, generator=torch.Generator().manual_seed(seed))
    ids = scores.topk(k, dim=-1).indices

    def formulated(*arguments):
        return mix(*arguments, formulation=formulation, inplace=inplace)

    expected, _ = results(definition, bank, rows, ids, gated, seed)
    got, untouched = results(formulated, bank, rows, ids, gated, seed)
    assert inplace or untouched, "the base output was modified"
    for value, reference in zip(got, expected, strict=True):
        largest = float(reference.abs().max()) if reference.numel() else 0.0
        torch.testing.assert_close(
            value, reference, rtol=tolerance, atol=tolerance * max(largest, 1.0)
        )
    assert all(stack.frozen.grad is None for stack in bank.stacks())


@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("ids", [(2,), (4, 0), (3, 1, 0, 2, 4)])
def test_experts_known_to_python_equal_the_loop(ids, gated, bottleneck) -> None:
    bank = make_bank(bottleneck, 5, [3, 0])
    tensor = torch.tensor([ids])
    expected, _ = results(definition, bank, 3, tensor, gated, 0)
    for inplace in (False, True):

        def listed(out, x, bank, _, gates, inplace=inplace):
            return mix(out, x, bank, ids, gates, inplace=inplace)

        got, untouched = results(listed, bank, 3, tensor, gated, 0)
        assert inplace or untouched
        for value, reference in zip(got, expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("formulation", [*FORMS, "shared"])
@pytest.mark.parametrize("listed", [True, False])
def test_tokens_that_weigh_the_same_experts_equal_the_loop(listed, formulation, bottleneck) -> None:
    dtype, tolerance = (torch.float32, 1e-5) if formulation == "grouped" else (torch.float64, 1e-10)
    bank = make_bank(bottleneck, 5, [3, 0], dtype=dtype)
    chosen = torch.tensor([[4, 0, 3]])
    every = chosen.expand(3, TOKENS, 3)  # what is drawn has the shape of the ids: per token

    def shared(out, x, bank, _, gates):
        ids = tuple(chosen[0].tolist()) if listed else chosen
        return mix(out, x, bank, ids, gates, formulation=formulation, inplace=True)

    expected, _ = results(definition, bank, 3, every, True, 0)
    got, _ = results(shared, bank, 3, every, True, 0)
    for value, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=tolerance, atol=tolerance * 100)


def test_the_grouped_product_is_tested_where_it_exists() -> None:
    """The shapes above must not fall back to segments unnoticed."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    assert _takes_grouped(torch.device("cpu"), torch.float32, (D_IN, D_OUT))
    assert not _takes_grouped(torch.device("cpu"), torch.float32, (D_IN + 1, D_OUT))


@pytest.mark.parametrize("grain", ["sample", "token"])
@pytest.mark.parametrize("formulation", FORMS)
def test_every_token_meets_its_own_expert(formulation: str, grain: str) -> None:
    """One-hot experts: a wrong permutation trains wrong weights without any error."""
    experts = D_OUT
    bank = ExpertBank(D_IN, D_OUT, 1)
    bank.grow(experts)
    with torch.no_grad():  # expert i adds the sum of x to output i
        bank.A.active.fill_(1.0)
        bank.B.active.copy_(torch.eye(D_OUT).unsqueeze(1))
    bank.freeze([2])
    shape = (5,) if grain == "sample" else (5, TOKENS)
    ids = torch.randint(experts, (*shape, 1), generator=torch.Generator().manual_seed(3))
    x = torch.rand(5, TOKENS, D_IN, generator=torch.Generator().manual_seed(4))
    got = mix(torch.zeros(5, TOKENS, D_OUT), x, bank, ids, formulation=formulation)
    chosen = torch.nn.functional.one_hot(per_token(ids, 5, TOKENS).squeeze(-1), D_OUT)
    torch.testing.assert_close(got, x.sum(-1, keepdim=True) * chosen)
    (got * got.detach()).sum().backward()
    per_expert = torch.zeros(experts).index_add(
        0, per_token(ids, 5, TOKENS).flatten(), x.sum(-1).square().flatten()
    )
    own = bank.B.active.grad[:, 0]
    for place, expert in enumerate([0, 1, 3]):
        torch.testing.assert_close(own[place, expert], per_expert[expert])
        assert own[place].count_nonzero() <= 1


@pytest.mark.parametrize(
    ("formulation", "bottleneck"),
    list(itertools.product(["gather", "stacked", "grouped", "segments", "shared"], [True, False])),
)
def test_gradcheck(formulation: str, bottleneck: bool) -> None:
    bank = make_bank(bottleneck, 3, [1])
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
        form = self.formulation
        return mix(out * 1.0, x, self.bank, self.ids, gates, formulation=form, inplace=True)


@pytest.mark.parametrize("formulation", [*FORMS, "shared"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_precision_at_a_real_width(formulation, dtype, tolerance) -> None:
    """Relative to the largest value, against the same numbers in float64."""
    bank = make_bank(True, 8, [5, 2], dtype=dtype, shape=(64, 48, 8))
    draw = torch.Generator().manual_seed(0)
    count = 1 if formulation == "shared" else 4
    ids = torch.stack([torch.randperm(8, generator=draw)[:2] for _ in range(count)])
    x, out = (torch.randn(4, 20, d, generator=draw).to(dtype) for d in (64, 48))
    gates = torch.rand(count, 2, generator=draw).to(dtype)
    got = mix(out, x, bank, ids, gates, formulation=formulation)
    assert got.dtype == dtype
    exact = make_bank(True, 8, [5, 2], shape=(64, 48, 8))
    for stack, rounded in zip(exact.stacks(), bank.stacks(), strict=True):
        stack.active.data.copy_(rounded.active)
        stack.frozen.copy_(rounded.frozen)
    reference = definition(out.double(), x.double(), exact, ids, gates.double())
    error = (got.double() - reference).abs().max() / reference.abs().max()
    assert error.item() <= tolerance


def test_experts_in_float32_serve_a_base_in_bfloat16() -> None:
    bank = make_bank(True, 4, [1], dtype=torch.float32)
    x, out = torch.randn(3, TOKENS, D_IN).bfloat16(), torch.randn(3, TOKENS, D_OUT).bfloat16()
    ids, gates = torch.tensor([[0, 1], [2, 3], [1, 2]]), torch.rand(3, 2)
    reference = definition(out.float(), x.float(), bank, ids, gates)
    for formulation in FORMS:
        got = mix(out, x, bank, ids, gates, formulation=formulation)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), reference, rtol=5e-2, atol=1e-1)
        got.float().sum().backward()
    assert bank.A.active.grad.dtype == torch.float32 and bank.A.active.grad.abs().sum() > 0


@pytest.mark.parametrize("formulation", FORMS)
def test_in_place_writes_where_it_may(formulation: str) -> None:
    bank = make_bank(False, 4, [1], dtype=torch.float32)
    ids = torch.tensor([[0, 1], [2, 3], [1, 2]])
    x = torch.randn(3, TOKENS, D_IN)

    def run(out: Tensor) -> Tensor:
        return mix(out, x, bank, ids, formulation=formulation, inplace=True)

    out = torch.randn(3, TOKENS, D_OUT)
    kept = out.clone()
    with torch.no_grad():
        expected = mix(out, x, bank, ids, formulation=formulation)
        assert torch.equal(out, kept)
        result = run(out)
    assert result.data_ptr() == out.data_ptr()
    torch.testing.assert_close(result, expected)

    leaf = kept.clone().requires_grad_()
    torch.testing.assert_close(run(leaf), expected)
    assert torch.equal(leaf.detach(), kept)
    row = torch.randn(3, 1, D_OUT)
    before = row.clone()
    run(row.expand(3, TOKENS, D_OUT))
    assert torch.equal(row, before)


def test_a_producer_that_kept_its_output_raises_instead_of_lying() -> None:
    """The version counter is shared: no silent wrong gradient."""
    bank = make_bank(False, 2, dtype=torch.float32)
    base = torch.randn(2, TOKENS, D_OUT, requires_grad=True)
    for formulation in ("shared", "gather", "segments"):
        ids = torch.tensor([[0]] if formulation == "shared" else [[0], [1]])
        squashed = torch.sigmoid(base)  # its backward needs what it returned
        x = torch.randn(2, TOKENS, D_IN)
        result = mix(squashed, x, bank, ids, formulation=formulation, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.sum().backward()


def test_a_result_may_be_changed_in_place_again() -> None:
    bank = make_bank(False, 2, dtype=torch.float32)
    linear = torch.nn.Linear(D_IN, D_OUT)
    x = torch.randn(2, TOKENS, D_IN, requires_grad=True)
    once = mix(linear(x), x, bank, (0,), inplace=True)
    result = mix(once, x, bank, (1,), inplace=True).mul_(2.0)
    result.sum().backward()
    got, x.grad = x.grad, None
    (2.0 * mix(linear(x), x, bank, (0, 1))).sum().backward()
    torch.testing.assert_close(got, x.grad)


@pytest.mark.parametrize(
    ("ids", "gates", "formulation", "words"),
    [
        (torch.zeros(2, 1), None, "shared", r"'shared' needs one row of expert ids; got \(2, 1\)"),
        (torch.zeros(3, 1), None, "auto", r"must be \(1, k\), \(2, k\) or \(2, 6, k\); got \(3, 1"),
        (torch.zeros(2, 1), torch.ones(2, 2), "auto", r"gates \(2, 2\) do not fit .* \(2, 1\)"),
        (torch.zeros(2, 1), None, "stack", "unknown formulation 'stack'; did you mean 'stacked'"),
        ((0, 2), None, "auto", "no expert 2: the bank has 2, from 0"),
    ],
)
def test_bad_input_is_refused(ids, gates, formulation, words) -> None:
    bank = make_bank(False, 2, dtype=torch.float32)
    x, out = torch.zeros(2, TOKENS, D_IN), torch.zeros(2, TOKENS, D_OUT)
    ids = ids.long() if isinstance(ids, Tensor) else ids
    with pytest.raises(ConfigError, match=words):
        mix(out, x, bank, ids, gates, formulation=formulation)


def test_x_and_out_must_be_rows_of_tokens() -> None:
    bank = make_bank(False, 2, dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"need x \(b, n, d_in\) .* got \(2, 8\) and \(2, 4\)"):
        mix(torch.zeros(2, D_OUT), torch.zeros(2, D_IN), bank, (0,))


@pytest.mark.parametrize("formulation", FORMS)
def test_fresh_experts_add_exact_zeros(formulation: str) -> None:
    bank = ExpertBank(D_IN, D_OUT, R, bias=True, activation="relu", scale=0.1)
    bank.grow(4, torch.Generator().manual_seed(0))
    x, out = torch.randn(3, TOKENS, D_IN), torch.randn(3, TOKENS, D_OUT)
    ids, gates = torch.tensor([[0, 1], [2, 3], [1, 2]]), torch.rand(3, 2)
    assert torch.equal(mix(out, x, bank, ids, gates, formulation=formulation), out)


def test_dropout_is_drawn_from_the_step_alone() -> None:
    bank = make_bank(True, 2, dtype=torch.float32)
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


@pytest.mark.parametrize("grain", ["sample", "token", "shared"])
def test_dropout_does_not_depend_on_the_formulation(grain: str) -> None:
    bank = make_bank(True, 5, [3, 1])
    sizes = {"sample": (4,), "token": (4, TOKENS), "shared": (1,)}[grain]
    draw = torch.Generator().manual_seed(0)
    ids = torch.rand(*sizes, 5, generator=draw).topk(2, dim=-1).indices
    x = torch.randn(4, TOKENS, D_IN, dtype=torch.float64)
    out = torch.zeros(4, TOKENS, D_OUT, dtype=torch.float64)

    def run(ids, formulation):
        return mix(
            out, x, bank, ids, dropout=0.5, random=StepRandom(1), key="s", formulation=formulation
        )

    expected = run(ids, "gather")
    forms = ["stacked", "grouped", "segments", *(["shared"] if grain == "shared" else [])]
    for formulation in forms:
        torch.testing.assert_close(run(ids, formulation), expected)
    if grain == "shared":
        torch.testing.assert_close(run(tuple(ids[0].tolist()), "shared"), expected)


def test_dropout_keeps_the_mean() -> None:
    like = torch.empty(())
    mask = StepRandom(0).keep_mask("key", (200, 500), 0.3, like)
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert float(mask.mean()) == pytest.approx(1.0, abs=0.01)
