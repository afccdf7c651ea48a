"""Sites and counters: where experts stand, what a forward may leave behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from evolora.errors import RouteError
from evolora.experts.sites import ExpertLayer, Site, SiteHost
from evolora.experts.usage import UsageCounter
from evolora.routing.route import BASE, Route


class Block(nn.Module):
    """y = h + MLP(LN(h)), as every transformer block ends; the norm can break off."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(4), nn.Linear(4, 4)
        self.broken = False

    def forward(self, h: Tensor) -> Tensor:
        normed = self.norm(h)
        if self.broken:
            raise InterruptedError
        return h + self.mlp(normed)


class AddInput(ExpertLayer):
    """Adds a multiple of its input, so that a test sees what it was given."""

    def forward(self, x: Tensor, out: Tensor, route: Route) -> Tensor:
        return out + 10.0 * x + route.tasks.view(-1, 1, 1)


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block()


def hosted(block: Block, kind: str = "mlp") -> SiteHost:
    host = SiteHost()
    site = Site(
        tower="vision", layer=0, name="vision.0.mlp", kind=kind, module=block.mlp, d_in=4, d_out=4,
        norm=block.norm if kind == "mlp" else None,
    )  # fmt: skip
    host.insert(site, AddInput())
    return host


def test_beside_an_mlp_experts_read_the_stream_before_the_norm(block: Block) -> None:
    h = torch.randn(2, 3, 4)
    base = block(h)
    host = hosted(block)
    host.set_route("vision", Route.of(2, 2))
    torch.testing.assert_close(block(h), base + 10.0 * h + 2.0)


def test_at_a_linear_experts_read_its_own_input(block: Block) -> None:
    h = torch.randn(2, 3, 4)
    base, normed = block(h), block.norm(h)
    host = hosted(block, "linear")
    host.set_route("vision", Route.of(0, 2))
    torch.testing.assert_close(block(h), base + 10.0 * normed)


def test_a_mixed_route_touches_its_own_rows_only(block: Block) -> None:
    h = torch.randn(4, 3, 4)
    base = block(h)
    host = hosted(block)
    host.set_route("vision", Route(torch.tensor([BASE, 1, BASE, 0])))
    mixed = block(h)
    assert torch.equal(mixed[[0, 2]], base[[0, 2]])
    expected = base[[1, 3]] + 10.0 * h[[1, 3]] + torch.tensor([1.0, 0.0]).view(2, 1, 1)
    torch.testing.assert_close(mixed[[1, 3]], expected)


def test_a_forward_that_breaks_off_leaves_nothing_behind(block: Block) -> None:
    h, other = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    host = hosted(block)
    host.set_route("vision", Route.of(0, 2))
    expected = block(other)
    for _ in range(3):
        block.broken = True
        with pytest.raises(InterruptedError):
            block(h)
        block.broken = False
    assert torch.equal(block(other), expected)
    block.broken = True
    with pytest.raises(InterruptedError):
        block(h)
    block.broken = False
    with host.disabled():
        assert torch.equal(block(other), other + block.mlp(block.norm(other)))
    (hook,) = block.norm._forward_pre_hooks.values()
    cells = [cell.cell_contents for cell in hook.__closure__ or ()]
    assert [] in cells, "an input of a broken forward is still held"


def test_no_route_and_wrong_route_raise(block: Block) -> None:
    host = hosted(block)
    with pytest.raises(RouteError, match=r"'vision.0.mlp' was run .* no route"):
        block(torch.randn(2, 3, 4))
    host.set_route("vision", Route.of(0, 3))
    with pytest.raises(RouteError, match="got 2 rows, its route 3"):
        block(torch.randn(2, 3, 4))
    host.remove_all()
    block(torch.randn(2, 3, 4))
    assert not block.norm._forward_pre_hooks and not block.mlp._forward_hooks


def test_disabled_nests_and_restores_after_an_error(block: Block) -> None:
    host = hosted(block)
    with host.disabled():
        with pytest.raises(InterruptedError), host.disabled():
            raise InterruptedError
        assert not host.enabled
    assert host.enabled


def test_usage_counts_gates_that_are_not_zero() -> None:
    counter = UsageCounter(4)
    ids = torch.tensor([[0, 1], [1, 3]])
    counter.add(ids, torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    assert counter.counts.tolist() == [1, 2, 0, 0]
    counter.widen(6)
    assert counter.counts.tolist() == [1, 2, 0, 0, 0, 0]
    counter.reset()
    assert counter.counts.tolist() == [0] * 6


def test_usage_counts_shared_experts_once_per_row() -> None:
    counter = UsageCounter(3)
    gates = torch.tensor([[0.5, 0.5], [0.0, 1.0], [0.2, 0.8]])
    counter.add(torch.tensor([[2, 0]]), gates)
    assert counter.counts.tolist() == [3, 0, 2]


def test_usage_counts_a_recomputed_forward_once() -> None:
    counter = UsageCounter(2)
    ids, gates = torch.tensor([[0, 1]]), torch.ones(1, 2)
    first, second = Route.of(0, 1), Route.of(0, 1)
    for forward in (first, first, second, second):
        counter.add(ids, gates, forward=forward)
    assert counter.counts.tolist() == [2, 2]


def test_most_used_ties_go_to_the_smaller_index_and_unused_ones_never_count() -> None:
    counter = UsageCounter(5)
    counter.counts += torch.tensor([3, 7, 0, 7, 3])
    assert counter.most_used(2) == [1, 3]
    assert counter.most_used(3) == [1, 3, 0]
    assert counter.most_used(9) == [1, 3, 0, 4]
    assert counter.most_used(0) == []
