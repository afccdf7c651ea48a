"""Going on from cached activations: the same numbers as the stock forward, computed once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.conftest import ToyProcessor, toy_model, toy_task
from torch import Tensor, nn

from evolora.backbones import prompts
from evolora.backbones.base import LazyInputs, Prefix
from evolora.backbones.clip import DualEncoder
from evolora.errors import ConfigError
from evolora.methods.base import Method
from evolora.methods.lora import SequentialLoRA, SequentialLoRAConfig
from evolora.methods.moe_adapters import MoEAdapters, MoEAdaptersConfig
from evolora.randomness import StepRandom
from evolora.routing.route import BASE, Route
from evolora.routing.selector import OracleSelectorConfig
from evolora.streams.task import LabelSpace

KINDS = pytest.mark.parametrize("kind", ["clip", "siglip"])
ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])
LABELS = LabelSpace(
    classes=("dot", "red cross", "a photo of a blue ring", "bar"), templates=("a photo of a {} .",)
)


def deep_backbone(kind: str, attention: str = "sdpa", layers: int = 4) -> DualEncoder:
    """A toy of four blocks in each tower."""
    shallow = toy_model(kind)
    config = shallow.config
    for part in (config.text_config, config.vision_config):
        part.num_hidden_layers = layers
    torch.manual_seed(1)
    model = type(shallow)._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
    return DualEncoder(model, ToyProcessor(), name="deep")


def lora(backbone: DualEncoder, layers: tuple[int, ...], **settings: Any) -> SequentialLoRA:
    config = SequentialLoRAConfig(r=2, layers_to_transform=layers, **settings)
    return begun(SequentialLoRA(config, backbone))


def moe(backbone: DualEncoder, layers: tuple[int, ...]) -> MoEAdapters:
    config = MoEAdaptersConfig(
        num_experts=3, r=4, layers_to_transform=layers, selector=OracleSelectorConfig()
    )
    return begun(MoEAdapters(config, backbone))


def begun(method: Any) -> Any:
    """Begin a task with experts that do something."""
    method.begin_task("toy", LABELS)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return method


def batch_of(backbone: DualEncoder, rows: int = 5) -> Any:
    return backbone.collate([toy_task(row % 3).train[row] for row in range(rows)])


def runs_of(block: nn.Module, run: Callable[[], Any]) -> int:
    calls: list[int] = []
    handle = block.register_forward_hook(lambda *_: calls.append(1))
    run()
    handle.remove()
    return len(calls)


def gradients(method: Method, embedding: Tensor) -> dict[str, Tensor]:
    method.zero_grad()
    embedding.square().sum().backward()
    return {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}


@KINDS
@ATTENTION
@pytest.mark.parametrize("cut", [0, 1, 3])
@pytest.mark.parametrize("make", [lora, moe])
def test_going_on_from_a_block_is_the_stock_forward(
    kind: str, attention: str, cut: int, make: Any
) -> None:
    backbone = deep_backbone(kind, attention)
    assert backbone.model.config._attn_implementation == attention
    method = make(backbone, tuple(range(cut, 4)))
    batch = batch_of(backbone)
    route = Route.of(0, len(batch), summary=backbone.vision_summary)
    whole = backbone.encode(batch, route)
    prefix = Prefix(cut=cut, hidden=backbone.prefix(batch, cut))
    assert not prefix.hidden.requires_grad
    bare = dataclasses.replace(batch, prefix=prefix, inputs={})
    below = backbone.blocks("vision")[:cut]
    again: list[Tensor] = []
    for block in below:
        assert runs_of(block, lambda: again.append(backbone.encode(bare, route))) == 0
    onward = backbone.encode(bare, route)
    torch.testing.assert_close(onward, whole, rtol=1e-5, atol=1e-6)
    first, second = gradients(method, whole), gradients(method, onward)
    assert first.keys() == second.keys() and first
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-6)
    part = bare.take(torch.tensor([3, 1]))
    alone = backbone.encode(part, Route.of(0, 2, summary=backbone.vision_summary))
    torch.testing.assert_close(alone, whole[[3, 1]], rtol=1e-4, atol=1e-5)


def test_a_prefix_is_the_untouched_model_whatever_experts_there_are() -> None:
    backbone = deep_backbone("clip")
    batch = batch_of(backbone)
    plain = backbone.prefix(batch, 3)
    lora(backbone, (0, 1))
    assert torch.equal(backbone.prefix(batch, 3), plain)
    assert not any(block._forward_pre_hooks for block in backbone.blocks("vision"))


@pytest.mark.parametrize("cut", [-1, 4])
def test_a_block_that_is_not_there_is_refused(cut: int) -> None:
    backbone = deep_backbone("clip")
    with pytest.raises(ConfigError, match=f"blocks 0 to 3; got cut {cut}"):
        backbone.prefix(batch_of(backbone), cut)


def test_other_weights_never_go_on_from_a_prefix() -> None:
    backbone = deep_backbone("clip")
    batch = batch_of(backbone)
    prefix = Prefix(cut=2, hidden=backbone.prefix(batch, 2))
    other = {n: p + 0.01 for n, p in backbone.model.named_parameters() if p.dim() > 1}
    route = Route.of(0, len(batch))
    with torch.no_grad(), backbone.with_weights(other):
        whole = backbone.encode(batch, route)
        assert torch.equal(backbone.encode(dataclasses.replace(batch, prefix=prefix), route), whole)


def test_lazy_inputs_are_read_once_and_row_by_row() -> None:
    asked: list[tuple[int, ...]] = []

    def read(rows: Any) -> dict[str, Tensor]:
        asked.append(tuple(rows))
        return {"x": torch.tensor(rows) * 10}

    inputs = LazyInputs(("x",), range(4), read)
    part = inputs.take([2, 3]).take([1])
    assert part["x"].tolist() == [30] and asked == [(3,)]
    assert inputs["x"].tolist() == [0, 10, 20, 30] and inputs["x"] is inputs["x"]
    assert inputs.take([1])["x"].tolist() == [10] and asked == [(3,), (0, 1, 2, 3)]
    assert list(inputs) == ["x"] and len(inputs) == 1
    with pytest.raises(KeyError):
        inputs["y"]


@KINDS
@ATTENTION
@pytest.mark.parametrize("make", [lora, moe])
@pytest.mark.parametrize("classes", [None, (3, 0)])
def test_prompts_go_on_from_the_lowest_expert(
    kind: str, attention: str, make: Any, classes: Any
) -> None:
    backbone = deep_backbone(kind, attention)
    method = make(backbone, (-1, -2))
    random = StepRandom(1)

    def embed(reuse: bool) -> Tensor:
        return backbone.class_embeddings(
            LABELS, 0, random=random, classes=classes, ensemble=False, reuse=reuse
        )

    reference = embed(False)
    lowest = backbone.blocks("text")[1]
    found: list[Tensor] = []
    assert runs_of(lowest, lambda: found.append(embed(True))) == 1
    assert runs_of(lowest, lambda: found.append(embed(True))) == 0
    expected = gradients(method, reference)
    for value in found:
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-5)
        got = gradients(method, value)
        assert got.keys() == expected.keys() and expected
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-5)


def test_more_prompts_than_are_kept_are_encoded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "PROMPTS_PER_PREFIX", 3)
    backbone = deep_backbone("clip")
    lora(backbone, (3,))
    with torch.no_grad():
        one = backbone.class_embeddings(LABELS, 0, version=1)
        two = backbone.class_embeddings(LABELS, 0, version=2, reuse=False)
    assert torch.equal(one, two)


@KINDS
def test_a_frozen_text_tower_runs_once(kind: str) -> None:
    backbone = deep_backbone(kind)
    lora(backbone, (0,), towers=("vision",))
    lowest = backbone.blocks("text")[0]
    found: list[Tensor] = []

    def step(classes: Any, seed: int) -> None:
        found.append(
            backbone.class_embeddings(
                LABELS, 0, random=StepRandom(seed), classes=classes, ensemble=False
            )
        )

    assert runs_of(lowest, lambda: step(None, 1)) == 1
    assert runs_of(lowest, lambda: step((2, 1), 2)) == 0
    assert not found[0].requires_grad
    torch.testing.assert_close(found[1], found[0][[2, 1]])
    with torch.no_grad():
        plain = deep_backbone(kind).class_embeddings(LABELS, BASE, ensemble=False)
    torch.testing.assert_close(found[0], plain)
    backbone.forget_classes()
    assert runs_of(lowest, lambda: step(None, 3)) == 0, "the base's stay valid"


def test_class_embeddings_of_another_precision_or_place_are_not_used() -> None:
    backbone = deep_backbone("clip")
    with torch.no_grad():
        plain = backbone.class_embeddings(LABELS, BASE)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = backbone.class_embeddings(LABELS, BASE)
        assert torch.equal(backbone.class_embeddings(LABELS, BASE), plain)
        assert not torch.equal(rounded.float(), plain)
        backbone.model.double()
        assert backbone.class_embeddings(LABELS, BASE).dtype == torch.float64


def test_written_weights_are_noticed() -> None:
    backbone = deep_backbone("clip")
    with torch.no_grad():
        before, name = backbone.class_embeddings(LABELS, BASE), backbone.fingerprint()
        backbone.model.text_model.embeddings.token_embedding.weight.add_(0.1)
        assert backbone.fingerprint() != name
        assert not torch.equal(backbone.class_embeddings(LABELS, BASE), before)


def test_a_list_of_prompts_is_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = deep_backbone("clip")
    lora(backbone, (0,))
    calls: list[int] = []
    tokenizer = backbone.processor.tokenizer

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return tokenizer(*args, **kwargs)

    monkeypatch.setattr(backbone.processor, "tokenizer", counted)
    for step in range(3):
        backbone.class_embeddings(
            LABELS, 0, random=StepRandom(step), classes=(step, 3), ensemble=False
        )
    assert len(calls) == 1


def test_prompts_are_cut_to_the_longest_that_is_encoded() -> None:
    backbone = deep_backbone("clip")
    lora(backbone, (0,))
    lengths: list[int] = []
    backbone.blocks("text")[0].register_forward_hook(lambda _, a, __: lengths.append(a[0].shape[1]))
    for classes in ([2], [0, 3]):
        backbone.class_embeddings(LABELS, 0, random=StepRandom(0), classes=classes, ensemble=False)
    assert lengths == [12, 8]
