"""Measures of redundancy by hand: their values, what leaves them alone, and their gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from evolora.errors import ConfigError
from evolora.randomness import generator
from evolora.regularizers.features import Features
from evolora.regularizers.redundancy import DOWN, OF_FEATURES, UP, Update, redundancy

D_IN, D_OUT, TOKENS = 10, 7, 48
ALL = [("down", name) for name in DOWN[1:]] + [("up", name) for name in UP[1:]]
EVERY = pytest.mark.parametrize(("side", "measure"), ALL)


def random_update(rank: int = 6, seed: int = 0) -> Update:
    """An update in float64 whose features are those of random, correlated tokens."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    a, b = normal(rank, D_IN), normal(rank, D_OUT)
    return of(a, b, normal(TOKENS, D_IN) @ normal(D_IN, D_IN))


def of(a: Tensor, b: Tensor, x: Tensor) -> Update:
    return Update(a, b, Features.of(x @ a.T, tokens=True))


def measured(measure: str, side: Any, z: Tensor, a: Tensor, b: Tensor, **options: Any) -> Tensor:
    return redundancy(measure, side, Update(a, b, Features.of(z, tokens=True)), **options)


def test_cosines_by_hand() -> None:
    for rows, expected in (
        ([[1.0, 0.0], [0.0, 1.0]], 0.0),
        ([[1.0, 0.0], [1.0, 1.0]], 0.5),
        ([[2.0, 1.0], [2.0, 1.0]], 1.0),
    ):
        both = torch.tensor(rows)
        for side in ("down", "up"):
            found = redundancy("w_cos", side, Update(both, both))  # type: ignore[arg-type]
            assert float(found) == pytest.approx(expected, abs=1e-6)


def test_correlations_by_hand() -> None:
    a, b = torch.eye(2), torch.eye(2)
    across = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    along = torch.tensor([[1.0, 1], [-1, -1]])
    assert float(measured("f_corr", "down", across, a, b)) == pytest.approx(0.0, abs=1e-6)
    assert float(measured("f_corr", "down", along, a, b)) == pytest.approx(1.0, abs=1e-6)
    shifted = along * torch.tensor([3.0, -0.01]) + 5.0  # neither scale nor mean is redundancy
    assert float(measured("f_corr", "down", shifted, a, b)) == pytest.approx(1.0, abs=1e-3)


def test_contributions_need_both_ends_alike() -> None:
    z = torch.randn(64, 1, generator=torch.Generator().manual_seed(0)).expand(64, 2)
    a = torch.ones(2, 3)
    apart, alike = torch.eye(2, 5), torch.ones(2, 5)
    assert float(measured("f_contrib", "up", z, a, apart)) == pytest.approx(0.0, abs=1e-6)
    assert float(measured("f_contrib", "up", z, a, alike)) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("groups", [6, 3, 2])
def test_contributions_are_those_of_what_is_written(groups: int) -> None:
    """K from Cov(z) and B^T B equals the covariance of the u that nobody makes."""
    update = random_update()
    assert update.features is not None and update.features.tokens is not None
    z = update.features.tokens
    written = (z.unsqueeze(2) * update.b).view(TOKENS, groups, 6 // groups, D_OUT).sum(dim=2)
    written = written - written.mean(dim=0)
    kernel = torch.einsum("ngd,nhd->gh", written, written)
    lengths = kernel.diagonal().sqrt()
    table = (kernel / lengths / lengths.unsqueeze(1)) ** 2
    expected = (table.sum() - groups) / (groups * (groups - 1))
    torch.testing.assert_close(redundancy("f_contrib", "up", update, groups), expected)


@pytest.mark.parametrize("groups", [3, 2])
def test_groups_share_what_their_subspaces_share(groups: int) -> None:
    update, size = random_update(), 6 // groups
    parts = update.a.view(groups, size, D_IN)
    bases = [torch.linalg.qr(part.T).Q for part in parts]
    table = torch.stack([
        torch.stack([(one.T @ other).pow(2).sum() / size for other in bases]) for one in bases
    ])  # fmt: skip
    expected = (table.sum() - groups) / (groups * (groups - 1))
    found = redundancy("w_cos", "down", update, groups)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)
    draw = torch.randn(groups, size, size, dtype=torch.float64, generator=generator(4))
    mixing = draw + 3.0 * torch.eye(size, dtype=torch.float64)  # far from singular
    mixed = (mixing @ parts).reshape(6, D_IN)
    again = redundancy("w_cos", "down", Update(mixed, update.b), groups)  # the spans are the same
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=0.0)


def test_grouped_features_by_their_definitions() -> None:
    update = random_update()
    assert update.features is not None and update.features.tokens is not None
    z = update.features.tokens
    covariance = torch.cov(z.T, correction=0)
    correlation = torch.corrcoef(z.T)
    for measure, matrix in (("f_hsic", covariance), ("f_corr", correlation)):
        parts = matrix.view(2, 3, 2, 3).transpose(1, 2)
        norms = parts.pow(2).sum(dim=(2, 3)).sqrt()
        expected = norms[0, 1] ** 2 / norms[0, 0] / norms[1, 1]
        torch.testing.assert_close(redundancy(measure, "down", update, 2), expected)


def test_distributions_that_never_meet_have_nothing_in_common() -> None:
    far = 60.0 * torch.eye(4)[:, :2]  # tokens (4) x ranks (2): each reads another token alone
    a, b = torch.eye(2), torch.eye(2)
    assert float(measured("f_dist", "down", far, a, b)) == pytest.approx(0.0, abs=1e-5)
    same = far[:, :1].expand(4, 2)
    assert float(measured("f_dist", "down", same, a, b)) == pytest.approx(1.0, abs=1e-5)
    z = torch.ones(4, 2)
    assert float(measured("f_dist", "up", z, a, 60.0 * torch.eye(2))) == pytest.approx(0, abs=1e-5)


def test_orthonormal_factors_have_no_distance_and_others_that_of_their_gram() -> None:
    b = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert float(redundancy("w_orth", "up", Update(torch.eye(2), b))) == 3.0
    assert float(redundancy("w_orth", "down", Update(torch.eye(2), b))) == 0.0
    assert float(redundancy("w_orth", "up", Update(b, torch.zeros(2, 3)))) == pytest.approx(2**0.5)


def test_gor_is_that_of_groups_of_rows() -> None:
    """Rows in fours: each group's Gram apart from the identity; of tall ones, the columns'."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 5, generator=draw)

    def distance(rows: Tensor) -> Tensor:
        gram = rows @ rows.T if rows.shape[0] < rows.shape[1] else rows.T @ rows
        return (gram - torch.eye(len(gram))).pow(2).sum()

    inside = distance(weight[:4]) + distance(weight[4:])
    across = torch.stack([distance(weight[[row, row + 4]]) for row in range(4)]).sum()
    for name, expected in (("gor", inside), ("gor_intra", across)):
        found = redundancy(name, "down", Update(weight, weight))
        torch.testing.assert_close(found, expected)
        # Of B, whose rows (d_out) are the columns of our b.
        torch.testing.assert_close(redundancy(name, "up", Update(weight.T, weight.T)), expected)
    torch.testing.assert_close(
        redundancy("gor", "down", Update(weight, weight), 1), distance(weight)
    )


@EVERY
@pytest.mark.parametrize("groups", [None, 1])
def test_one_rank_or_one_group_is_redundant_with_nobody(
    side: Any, measure: str, groups: int | None
) -> None:
    if measure in ("w_orth", "gor", "gor_intra"):
        return  # they also fix lengths
    rank = 1 if groups is None else 4
    update = random_update(rank)
    a = update.a.detach().requires_grad_()
    b = update.b.detach().requires_grad_()
    x = torch.randn(20, D_IN, dtype=torch.float64)
    found = redundancy(measure, side, of(a, b, x), groups)
    found.backward()
    assert found.item() == 0.0
    for factor in (a, b):
        assert factor.grad is None or torch.equal(factor.grad, torch.zeros_like(factor))


@EVERY
def test_the_order_of_ranks_does_not_matter(side: Any, measure: str) -> None:
    update, order = random_update(), torch.tensor([3, 0, 5, 1, 4, 2])
    x = torch.randn(TOKENS, D_IN, dtype=torch.float64)
    mine = of(update.a, update.b, x)
    other = of(update.a[order], update.b[order], x)
    torch.testing.assert_close(
        redundancy(measure, side, other), redundancy(measure, side, mine), rtol=1e-9, atol=1e-12
    )


@EVERY
def test_neither_does_the_order_of_groups_nor_that_within_them(side: Any, measure: str) -> None:
    if measure.startswith("gor"):
        return  # its groups are of rows of the weight, which B's are outputs
    update, order = random_update(), torch.tensor([5, 4, 0, 1, 3, 2])
    x = torch.randn(TOKENS, D_IN, dtype=torch.float64)
    mine = redundancy(measure, side, of(update.a, update.b, x), 3)
    other = redundancy(measure, side, of(update.a[order], update.b[order], x), 3)
    torch.testing.assert_close(other, mine, rtol=1e-6, atol=1e-12)
    torn = torch.tensor([0, 2, 1, 3, 4, 5])  # two ranks change places across groups
    other = redundancy(measure, side, of(update.a[torn], update.b[torn], x), 3)
    assert (abs(float(other - mine)) > 1e-4) == (measure != "w_orth")


@EVERY
def test_lengths_do_not_matter_to_normalised_measures(side: Any, measure: str) -> None:
    update = random_update()
    lengths = torch.tensor([2.0, 0.5, -3.0, 1.0, 10.0, 0.2], dtype=torch.float64).unsqueeze(1)
    x = torch.randn(TOKENS, D_IN, dtype=torch.float64)
    before = redundancy(measure, side, of(update.a, update.b, x))
    after = redundancy(measure, side, of(lengths * update.a, update.b / lengths, x))
    blind = measure in ("w_cos", "f_corr", "f_contrib", "f_hsic")
    assert torch.isclose(before, after, rtol=1e-9) == (blind or (measure, side) == ("f_dist", "up"))


@EVERY
def test_another_factorisation_of_the_same_update_is_another_loss(side: Any, measure: str) -> None:
    update = random_update()
    mix = torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    a, b = mix @ update.a, torch.linalg.inv(mix).T @ update.b
    torch.testing.assert_close(b.T @ a, update.b.T @ update.a)
    x = torch.randn(TOKENS, D_IN, dtype=torch.float64)
    before, after = (redundancy(measure, side, of(*f, x)) for f in ((update.a, update.b), (a, b)))
    assert abs(float(before - after)) > 1e-3


@EVERY
@pytest.mark.parametrize("groups", [None, 2])
def test_a_fresh_update_whose_b_is_zero_has_a_finite_loss_and_gradient(
    side: Any, measure: str, groups: int | None
) -> None:
    a = torch.randn(4, D_IN, requires_grad=True)
    b = torch.zeros(4, D_OUT, requires_grad=True)
    groups = None if measure.startswith("gor") else groups
    found = redundancy(measure, side, of(a, b, torch.randn(TOKENS, D_IN)), groups)
    assert torch.isfinite(found)
    gradients = torch.autograd.grad(found, (a, b), allow_unused=True)
    assert all(torch.isfinite(each).all() for each in gradients if each is not None)
    dead = redundancy(measure, side, of(a.detach() * 0.0, b, torch.randn(TOKENS, D_IN)), groups)
    assert torch.isfinite(dead)


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("measure", ["w_cos", "f_contrib"])
@pytest.mark.parametrize("length", [1e-8, 1e-4, 1e-2])
def test_the_direction_of_short_vectors_pulls_no_harder_than_that_of_the_floor(
    length: float, measure: str, groups: int | None
) -> None:
    b = (length * torch.nn.functional.normalize(torch.randn(4, D_OUT))).requires_grad_()
    x = torch.randn(TOKENS, D_IN)
    redundancy(measure, "up", of(torch.randn(4, D_IN), b, x), groups).backward()
    assert b.grad is not None and float(b.grad.norm()) < 1.1e3


@pytest.mark.parametrize(
    ("side", "measure"), [("down", "f_corr"), ("down", "f_hsic"), ("up", "f_contrib")]
)
def test_a_rank_that_counts_as_longer_than_it_is_pulls_at_no_other_s_length(
    side: Any, measure: str
) -> None:
    """The least length is a share of the layer's own lengths, of which no gradient is taken."""
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(3, D_IN, generator=draw, dtype=torch.float64)
    b = torch.randn(3, D_OUT, generator=draw, dtype=torch.float64)
    short = 1e-5 * torch.tensor([[1e5], [1e5], [1.0]], dtype=torch.float64)
    a, b = (a * short, b) if side == "down" else (a, b * short)
    x = torch.randn(TOKENS, D_IN, generator=draw, dtype=torch.float64)
    a.requires_grad_()
    redundancy(measure, side, of(a, b, x)).backward()
    assert a.grad is not None
    pulled = [float(row @ own) for row, own in zip(a.grad, a.detach(), strict=True)]
    assert pulled[:2] == pytest.approx([0.0, 0.0], abs=1e-12)
    assert float(a.grad[:2].norm()) > 1e-3


@EVERY
@pytest.mark.parametrize("groups", [None, 2])
def test_gradients_are_right(side: Any, measure: str, groups: int | None) -> None:
    update = random_update(4)
    x = torch.randn(20, D_IN, dtype=torch.float64)
    groups = None if measure.startswith("gor") else groups

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return redundancy(measure, side, of(a, b, x), groups)

    factors = (update.a.requires_grad_(), update.b.requires_grad_())
    assert torch.autograd.gradcheck(loss, factors)


@EVERY
def test_several_updates_at_once_are_each_what_they_are_alone(side: Any, measure: str) -> None:
    updates = [random_update(4, seed) for seed in range(3)]
    features = [update.features for update in updates if update.features is not None]
    together = Update(
        torch.stack([update.a for update in updates]),
        torch.stack([update.b for update in updates]),
        Features.joined([
            Features(*(None if t is None else t.unsqueeze(0) for t in vars(f).values()))  # type: ignore[arg-type]
            for f in features
        ]),
    )  # fmt: skip
    alone = torch.stack([redundancy(measure, side, update) for update in updates])
    torch.testing.assert_close(redundancy(measure, side, together), alone)


@EVERY
def test_autocast_changes_nothing(side: Any, measure: str) -> None:
    a, b, x = torch.randn(4, D_IN), torch.randn(4, D_OUT), torch.randn(TOKENS, D_IN)
    expected = redundancy(measure, side, of(a, b, x))
    z = Features.of(x @ a.T, tokens=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = redundancy(measure, side, Update(a, b, z))
        inside = redundancy(measure, side, Update(a, b, Features.of(x.clone() @ a.T, tokens=True)))
    assert found.dtype == inside.dtype == torch.float32
    assert torch.equal(found, expected)
    half = redundancy(measure, side, Update(a.bfloat16(), b.bfloat16(), z))
    assert half.dtype == torch.float32


def test_moments_of_half_precision_are_those_of_its_numbers() -> None:
    z = torch.randn(1, TOKENS, 4).bfloat16()
    every, none = torch.ones(1, TOKENS, dtype=torch.bool), torch.zeros(1, dtype=torch.long)
    exact = torch.cov(z[0].double().T, correction=0).unsqueeze(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for found in (Features.of(z), Features.of(z, every), Features.by_group(z, none, 1, every)):
            torch.testing.assert_close(found.covariance.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("side", "measure"), [pair for pair in ALL if pair[1] in OF_FEATURES])
def test_padding_is_not_seen(side: Any, measure: str) -> None:
    update = random_update()
    assert update.features is not None and update.features.tokens is not None
    z = 0.1 * update.features.tokens  # no token so large that others do not count beside it
    padded = torch.cat([z, 1e3 * torch.randn(9, 6, dtype=torch.float64)])
    real = torch.arange(len(padded)) < len(z)
    holes = padded.clone()
    holes[-2:] = torch.tensor([[math.nan], [math.inf]])
    seen = Features.of(holes, real, tokens=True)
    assert int(seen.count) == TOKENS
    found = redundancy(measure, side, Update(update.a, update.b, seen))
    alone = Update(update.a, update.b, Features.of(z, tokens=True))
    torch.testing.assert_close(found, redundancy(measure, side, alone))
    unmasked = Features.of(padded, tokens=True)
    assert not torch.isclose(found, redundancy(measure, side, Update(update.a, update.b, unmasked)))
    nothing = Features.of(padded, torch.zeros_like(real), tokens=True)
    assert torch.isfinite(redundancy(measure, side, Update(update.a, update.b, nothing)))


def test_weighing_pairs_looks_at_the_likest() -> None:
    rows = torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [0, 0, 1.0]], requires_grad=True)
    update = Update(rows, torch.eye(3))
    mean = redundancy("w_cos", "down", update)
    weighed = redundancy("w_cos", "down", update, pairwise=True)
    likeness = (rows @ rows.T / rows.norm(dim=1) / rows.norm(dim=1).unsqueeze(1)).abs().detach()
    off = ~torch.eye(3, dtype=torch.bool)
    unit = rows / rows.norm(dim=1, keepdim=True)
    expected = (likeness[off].softmax(0) * (unit @ unit.T)[off] ** 2).sum()
    torch.testing.assert_close(weighed, expected)
    pulled = [torch.autograd.grad(loss, rows)[0] for loss in (weighed, expected)]
    torch.testing.assert_close(*pulled)  # weights are given, not learned
    assert float(weighed) > float(mean)


def test_what_does_not_fit_is_refused() -> None:
    update = Update(torch.randn(4, 3), torch.randn(4, 3))
    with pytest.raises(ConfigError, match="groups must divide the rank 4; got 3"):
        redundancy("w_cos", "down", update, 3)
    with pytest.raises(ConfigError, match=r"measure_down must be one of .*got 'f_contrib'"):
        redundancy("f_contrib", "down", update)
    with pytest.raises(ConfigError, match=r"'f_corr' is of features, and none were recorded"):
        redundancy("f_corr", "down", update)


@pytest.mark.parametrize("measure", ["w_cos", "f_corr"])
def test_lowering_redundancy_spreads_the_regularised_factor(measure: str) -> None:
    """From a collapsed A it falls and A's effective rank rises; that of dW need not."""
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(1, 24, generator=draw)
    start = base + 0.3 * torch.randn(8, 24, generator=draw)
    target = torch.randn(16, 24, generator=draw) / 24**0.5
    x = torch.randn(128, 24, generator=draw)
    results = {}
    for weight in (0.0, 1.0):
        a, b = start.clone().requires_grad_(), torch.zeros(8, 16, requires_grad=True)
        optimizer = torch.optim.Adam([a, b], lr=1e-2)
        for _ in range(150):
            loss = (x @ a.T @ b - x @ target.T).pow(2).mean()
            if weight:
                loss = loss + weight * redundancy(measure, "down", of(a, b, x))
                loss = loss + weight * redundancy("f_contrib", "up", of(a, b, x))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        sigma = torch.linalg.svdvals(a.detach())
        share = sigma / sigma.sum()
        erank = float(torch.exp(-(share * share.log()).sum()))
        results[weight] = float(redundancy(measure, "down", of(a, b, x))), erank
    assert results[1.0][0] < 0.2 * results[0.0][0]
    assert results[1.0][1] > results[0.0][1] + 0.5
