"""Prompts by hooks are what they say: checked against blocks that are run by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.backbones.pairs import Pairs, fusion, memory, vilt
from tests.conftest import toy_task, toy_vilt
from tests.contract.cases import toy_backbone
from torch import Tensor, nn

from evolora.backbones.base import Backbone, Batch
from evolora.backbones.memory import Known
from evolora.errors import ConfigError, RouteError
from evolora.experts.prompts import PromptLayer, PromptSite, extended
from evolora.routing.route import BASE, Route


class Fixed(PromptLayer):
    """Drawn prompts, other ones for each task."""

    def __init__(self, site: PromptSite, length: int, kind: Any, **options: Any) -> None:
        super().__init__(site, length, kind, **options)
        draw = torch.Generator().manual_seed(site.layer)
        self.rows = nn.Parameter(torch.randn(2, length, site.width, generator=draw))

    def forward(self, route: Route) -> Tensor:
        return self.rows[route.tasks]


def layers_of(backbone: Backbone, lengths: Mapping[int, int], kind: Any, **options: Any) -> list:
    sites = backbone.prompt_sites(tuple(lengths))
    return [Fixed(site, lengths[site.layer], kind, **options) for site in sites]


def routed(backbone: Backbone, batch: Batch, **settings: Any) -> Tensor:
    tasks = torch.arange(len(batch)) % 2
    route = Route(tasks, summary=backbone.vision_summary, **settings)
    return backbone.encode(batch, route)


def entering(backbone: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """What enters the first block of a ViLT, and the mask (b, n)."""
    prefix = backbone.prefix_of(batch, 0)
    return prefix.hidden, prefix.mask


def block_by_hand(
    block: Any, x: Tensor, mask: Tensor, keys: Tensor | None = None, values: Tensor | None = None
) -> Tensor:
    """A ViLT block in plain terms; more keys and values stand before the sequence's own."""
    own = block.attention.attention
    normal = block.layernorm_before(x)
    q, k, v = (getattr(own, name)(normal) for name in ("query", "key", "value"))
    if keys is not None and values is not None:
        k, v = torch.cat([keys, k], dim=1), torch.cat([values, v], dim=1)
        mask = torch.cat([mask.new_ones(len(x), keys.shape[1]), mask], dim=1)
    heads = own.num_attention_heads
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    mixed = (scores.softmax(dim=3) @ v).transpose(1, 2).flatten(2)
    x = x + block.attention.output.dense(mixed)
    inner = block.intermediate(block.layernorm_after(x))
    return x + block.output.dense(inner)


def pooled(backbone: Any, hidden: Tensor) -> Tensor:
    return backbone.model.pooler(backbone.model.layernorm(hidden))


def batch_of(backbone: Backbone) -> Batch:
    return backbone.collate(Pairs((0, 1, 2, 0)).all())


@torch.no_grad()
def test_prefix_prompts_are_more_keys_and_values() -> None:
    backbone = vilt()
    batch = batch_of(backbone)
    layers = layers_of(backbone, {0: 4, 2: 6}, "prefix")
    hidden, mask = entering(backbone, batch)
    assert not mask.all(), "some text is padded"
    for index, block in enumerate(backbone.blocks("multimodal")):
        rows = {layer.site.layer: layer.rows[torch.arange(4) % 2] for layer in layers}.get(index)
        keys, values = (None, None) if rows is None else rows.chunk(2, dim=1)
        hidden = block_by_hand(block, hidden, mask, keys, values)
    backbone.insert_prompts(layers)
    torch.testing.assert_close(routed(backbone, batch), pooled(backbone, hidden))


@torch.no_grad()
@pytest.mark.parametrize(("at", "replaced"), [(0, False), (1, True), (1, False), (0, True)])
def test_input_prompts_are_more_tokens(at: int, replaced: bool) -> None:
    """They stay in the blocks above, beside each other or in each other's place."""
    backbone = vilt()
    batch = batch_of(backbone)
    layers = layers_of(backbone, {0: 2, 1: 3}, "input")
    hidden, mask = entering(backbone, batch)
    length, held = hidden.shape[1], 0
    for index, block in enumerate(backbone.blocks("multimodal")):
        if index < 2:
            rows = layers[index].rows[torch.arange(4) % 2]
            gone = held if replaced else 0
            hidden = torch.cat([hidden[:, :at], rows, hidden[:, at + gone :]], dim=1)
            held += rows.shape[1] - gone
        assert (
            hidden.shape[1]
            == length + held
            == length + ((2, 3, 3) if replaced else (2, 5, 5))[index]
        )
        shown = torch.cat([mask[:, :at], mask.new_ones(4, held), mask[:, at:]], dim=1)
        hidden = block_by_hand(block, hidden, shown)
    hidden = torch.cat([hidden[:, :at], hidden[:, at + held :]], dim=1)
    backbone.insert_prompts(layers, at=at, replace=replaced)
    torch.testing.assert_close(routed(backbone, batch), pooled(backbone, hidden))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_prefix_prompts_of_a_vision_tower(kind: str) -> None:
    """An attention with keys and values of its own, against torch's."""
    backbone = toy_backbone(kind)
    batch = backbone.collate([toy_task(0).test[row] for row in range(4)])
    (layer,) = layers_of(backbone, {1: 4}, "prefix")
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"], output[0]))

    own: Any = backbone.blocks("vision")[1].self_attn
    backbone.insert_prompts([layer])
    own.register_forward_hook(keep, with_kwargs=True)
    routed(backbone, batch)
    x, got = seen[0]
    x = x[:, -backbone.tokens("vision") :]
    q, k, v = own.q_proj(x), own.k_proj(x), own.v_proj(x)
    keys, values = layer.rows[torch.arange(4) % 2].chunk(2, dim=1)
    q, k, v = (
        t.unflatten(2, (own.num_heads, -1)).transpose(1, 2)
        for t in (q, torch.cat([keys, k], dim=1), torch.cat([values, v], dim=1))
    )
    mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(got, own.out_proj(mixed))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["input", "prefix"])
def test_off_is_the_untouched_model_and_removed_leaves_no_trace(kind: str) -> None:
    backbone = vilt()
    batch = batch_of(backbone)
    before = backbone.encode_base(batch).embedding
    backbone.insert_prompts(layers_of(backbone, {0: 4, 1: 4}, kind))
    with backbone.host.disabled():
        assert torch.equal(backbone.encode_base(batch).embedding, before)
    off = backbone.encode(batch, Route.of(BASE, 4))
    assert torch.equal(off, pair_of_off(batch))
    assert not torch.allclose(routed(backbone, batch), off)
    backbone.host.remove_all()
    untouched = dict(toy_vilt().named_modules())
    for name, module in backbone.model.named_modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert vars(module).keys() == vars(untouched[name]).keys()
    assert backbone.host.lowest("multimodal") is None


def pair_of_off(batch: Batch) -> Tensor:
    """The same samples by a backbone that never had prompts."""
    return vilt().encode(batch, Route.of(BASE, len(batch)))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["input", "prefix"])
def test_a_stage_has_its_own_prompts(kind: str) -> None:
    backbone = vilt()
    batch = batch_of(backbone)
    backbone.insert_prompts(layers_of(backbone, {1: 4}, kind, stage="first"))
    assert torch.equal(routed(backbone, batch), pair_of_off(batch))
    assert not torch.allclose(routed(backbone, batch, stage="first"), pair_of_off(batch))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["input", "prefix"])
def test_neighbours_and_padding_do_not_matter(kind: str) -> None:
    backbone = vilt()
    backbone.insert_prompts(layers_of(backbone, {0: 4, 1: 2}, kind))
    batch = batch_of(backbone)
    whole = routed(backbone, batch)
    for row in range(4):
        alone = backbone.encode(batch.take(torch.tensor([row])), Route.of(row % 2, 1))
        torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["input", "prefix"])
@pytest.mark.parametrize("make", [vilt, fusion])
def test_it_goes_on_from_what_is_kept_below_the_prompts(kind: str, make: Any) -> None:
    backbone = make()
    top = len(backbone.blocks(backbone.cached_tower)) - 1
    backbone.insert_prompts(layers_of(backbone, {top: 4}, kind))
    assert backbone.host.lowest(backbone.cached_tower) == top
    batch = batch_of(backbone)
    known = replace(batch, known=Known(samples=tuple("abcd"), memory=memory()))
    expected, ran = routed(backbone, batch), []
    blocks = backbone.blocks(backbone.cached_tower)
    routed(backbone, known)
    blocks[0].register_forward_hook(lambda *_: ran.append(0))
    torch.testing.assert_close(routed(backbone, known), expected, rtol=1e-5, atol=1e-6)
    assert not ran


@pytest.mark.parametrize("kind", ["input", "prefix"])
def test_blocks_that_run_again_in_backward_meet_their_own_route(kind: str) -> None:
    """Two forwards under other routes, then one backward."""
    found: list[list[Tensor]] = []
    for again in (False, True):
        backbone = vilt()
        layers = layers_of(backbone, {0: 4, 2: 2}, kind)
        backbone.insert_prompts(layers)
        batch = batch_of(backbone)
        with backbone.checkpointing(again):
            first = backbone.encode(batch, Route.of(0, 4))
            second = backbone.encode(batch, Route.of(1, 4))
            (first.square().sum() - 2 * second.square().sum()).backward()
        found.append([layer.rows.grad for layer in layers])
    for plain, checked in zip(*found, strict=True):
        assert plain.flatten(1).any(dim=1).all(), "both forwards learn"
        torch.testing.assert_close(checked, plain, rtol=1e-4, atol=1e-7)


def test_rows_of_the_base_are_refused_beside_rows_with_prompts() -> None:
    backbone = vilt()
    backbone.insert_prompts(layers_of(backbone, {0: 4}, "input"))
    batch = batch_of(backbone)
    with pytest.raises(RouteError, match="rows of the base cannot run in one forward"):
        backbone.encode(batch, Route(torch.tensor([0, BASE, 0, 1])))
    with pytest.raises(RouteError, match="block 0 got 4 rows, its route 3"):
        backbone.host.set_route("multimodal", Route.of(0, 3))
        backbone._run(**{k: v[:, :12] if v.dim() == 2 else v for k, v in batch.inputs.items()})


@pytest.mark.parametrize(
    ("kind", "length", "text"),
    [
        ("input", 0, "input prompts: the length must be at least 1; got 0"),
        ("prefix", 3, r"prefix prompts: the length must be a positive even number .*; got 3"),
    ],
)
def test_lengths_that_cannot_be_are_refused(kind: Any, length: int, text: str) -> None:
    (site,) = vilt().prompt_sites((0,))
    with pytest.raises(ConfigError, match=text):
        PromptLayer(site, length, kind)


def test_masks_show_what_is_put_in() -> None:
    seen = torch.tensor([[True, True, False]])
    assert extended(None, 2, 0) is None
    row = extended(seen[:, None, None, :], 2, 1)
    assert row is not None and row[0, 0].tolist() == [[True, True, True, True, False]]
    added = torch.zeros(1, 1, 3, 3).masked_fill(~seen[:, None, None, :], -9.0)
    whole = extended(added, 1, 0)
    assert whole is not None and whole[0, 0].tolist() == [[0.0, 0.0, 0.0, -9.0]] * 4


def test_flops_count_what_the_prompts_add() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    backbone = vilt()
    batch = batch_of(backbone).take(torch.tensor([0]))
    full = {**batch.inputs, "attention_mask": torch.ones_like(batch.inputs["attention_mask"])}
    batch = replace(batch, inputs=full)

    def counted(kind: str, lengths: Mapping[int, int]) -> tuple[int, int]:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            backbone.encode(batch, Route.of(BASE, 1))
        base = counter.get_total_flops()
        layers = layers_of(backbone, lengths, kind)
        backbone.insert_prompts(layers)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            backbone.encode(batch, Route.of(0, 1))
        backbone.host.remove_all()
        tokens = backbone.tokens("multimodal")
        return counter.get_total_flops() - base, sum(layer.flops(tokens) for layer in layers)

    for kind in ("prefix", "input"):
        measured, told = counted(kind, {1: 4})
        assert told == pytest.approx(measured, rel=0.06), kind
