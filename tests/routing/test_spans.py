"""Spans: means over what a modality fills, and block watchers that get them with the route."""

from __future__ import annotations

import pytest
import torch
from tests.backbones.pairs import Pairs, make
from torch import Tensor

from evolora.backbones.vilt import TOWER
from evolora.errors import RouteError
from evolora.experts.sites import ExpertLayer
from evolora.routing.route import BASE, Route
from evolora.routing.spans import Span, Spans, TokenSpans


def golden(last_masked: bool = False) -> Spans:
    mask = torch.ones(1, 7, dtype=torch.bool)
    mask[0, 3] = not last_masked
    return Spans(
        of={"image": Span(start=4, stop=7), "text": Span(start=0, stop=4, head=1)},
        mask=mask,
        present=torch.tensor([[True, False]]),
    )


def test_g9_queries() -> None:
    """Hidden rows (1, 2) .. (13, 14), four of them text (DeLo specification, G9)."""
    hidden = torch.arange(1.0, 15.0).view(1, 7, 2)
    assert golden().means(hidden).tolist() == [[[11.0, 12.0], [5.0, 6.0]]]
    assert golden(last_masked=True).means(hidden)[0, 1].tolist() == [4.0, 5.0]


def test_positions_and_presence() -> None:
    spans = golden()
    assert spans.positions("text").tolist() == [True] * 4 + [False] * 3
    assert spans.positions("image").tolist() == [False] * 4 + [True] * 3
    assert spans.has("image").tolist() == [True] and spans.has("text").tolist() == [False]


class Nothing(ExpertLayer):
    def __init__(self, order: list[str]) -> None:
        super().__init__()
        self.order = order
        self.factor = torch.nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor, out: Tensor, route: Route) -> Tensor:
        self.order.append(f"layer {len(x)}")
        return out + self.factor * x


def test_watchers_get_what_enters_a_block_before_its_experts() -> None:
    backbone = make("vilt")
    batch = backbone.collate(Pairs((0, 1, 2)).all())
    order: list[str] = []
    seen: list[tuple[int, Tensor, Route]] = []

    def watch(index: int, hidden: Tensor, route: Route) -> None:
        order.append(f"block {index}")
        seen.append((index, hidden, route))

    for site in backbone.sites("linear", target_modules=["query"], layers=[1]):
        backbone.host.insert(site, Nothing(order))
    backbone.watch_blocks(TOWER, watch, layers=[1, -1])
    with torch.no_grad():
        backbone.encode(batch, Route(torch.tensor([0, BASE, 2])))
    assert order == ["block 1", "layer 2", "block 2"]
    for index, hidden, route in seen:
        spans = route.spans
        assert spans is not None and route.tasks.tolist() == [0, 2]
        assert spans.present.tolist() == [[True, True], [False, True]]
        whole = backbone.prefix_of(batch, index)
        rows = whole.hidden[[0, 2]]
        assert whole.mask is not None
        text = rows[:, 1:12] * whole.mask[[0, 2], 1:12, None]
        wanted = torch.stack(
            [rows[:, 12:].mean(1), text.sum(1) / whole.mask[[0, 2], 1:12].sum(1, keepdim=True)], 1
        )
        torch.testing.assert_close(spans.means(hidden), wanted)


def test_watchers_do_not_see_the_base_and_go_with_the_experts() -> None:
    backbone = make("vilt")
    batch = backbone.collate(Pairs((0, 1)).all())
    calls: list[int] = []
    backbone.watch_blocks(TOWER, lambda index, *_: calls.append(index))
    with torch.no_grad():
        backbone.encode(batch, Route.of(BASE, 2))
        backbone.encode_base(batch)
        assert calls == []
        backbone.encode(batch, Route.of(0, 2))
        assert calls == [0, 1, 2]
        with pytest.raises(RouteError, match="block 0 got 2 rows, its route 3"):
            backbone.encode(batch, Route.of(0, 3))
        backbone.host.remove_all()
        backbone.encode(batch, Route.of(0, 2))
    assert calls == [0, 1, 2]


def test_watchers_are_called_again_where_backward_runs_a_block_again() -> None:
    backbone = make("vilt")
    batch = backbone.collate(Pairs((0, 1)).all())
    seen: list[tuple[int, Tensor]] = []
    for site in backbone.sites("linear", target_modules=["query"]):
        backbone.host.insert(site, Nothing([]))
    backbone.watch_blocks(TOWER, lambda index, hidden, _: seen.append((index, hidden.detach())))
    with backbone.checkpointing():
        backbone.encode(batch, Route.of(0, 2)).sum().backward()
    assert [index for index, _ in seen] == [0, 1, 2, 2, 1, 0]
    for index, hidden in seen[3:]:
        assert torch.equal(hidden, dict(seen[:3])[index])


def test_without_a_route_a_watched_block_raises() -> None:
    backbone = make("vilt")
    backbone.watch_blocks(TOWER, lambda *_: None)
    batch = backbone.collate(Pairs((0,)).all())
    with pytest.raises(RouteError, match="block 0 was run with experts enabled and no route"):
        backbone.model(**batch.inputs)


def test_tokens_that_stand_elsewhere_in_each_row() -> None:
    image = torch.tensor([[False, True, True, False], [False, False, False, False]])
    text = torch.tensor([[False, False, False, True], [False, True, True, True]])
    present = torch.tensor([[True, True], [False, True]])
    spans = TokenSpans({"image": image, "text": text}, present)
    hidden = torch.arange(8.0).view(2, 4, 1)
    assert spans.means(hidden).squeeze(2).tolist() == [[1.5, 3.0], [0.0, 6.0]]
    assert spans.mask.tolist() == [[False, True, True, True], [False, True, True, True]]
    assert spans.has("image").tolist() == [True, False]
    second = spans.take(torch.tensor([1]))
    assert second.means(hidden[1:]).squeeze(2).tolist() == [[0.0, 6.0]]
    assert second.present.tolist() == [[False, True]]
