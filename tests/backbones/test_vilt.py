"""Vilt: transformers' own numbers, missing modalities, padding, positions, spans, prefixes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.backbones.pairs import Pairs, memory, vilt
from tests.conftest import ToyProcessor, toy_vilt
from torch import Tensor

from evolora.backbones.base import Prefix
from evolora.backbones.texts import interpolated
from evolora.backbones.vilt import TOWER, Vilt
from evolora.errors import ConfigError, DataError
from evolora.experts.sites import ExpertLayer
from evolora.learner import Learner
from evolora.methods.lora import SequentialLoRA, SequentialLoRAConfig
from evolora.methods.zero_shot import ZeroShotConfig
from evolora.routing.route import BASE, Route
from evolora.streams.task import Example
from evolora.training.samples import Samples

QKV = ("query", "key", "value")


class Scaled(ExpertLayer):
    """Adds a multiple of its input, so that its place is told by the output."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.calls = torch.nn.Parameter(torch.tensor(factor)), 0

    def forward(self, x: Tensor, out: Tensor, route: Route) -> Tensor:
        self.calls += 1
        return out + self.factor * x


def insert(backbone: Vilt, layers: tuple[int, ...] | None, kind: Any = "linear") -> list[Scaled]:
    found = []
    for site in backbone.sites(kind, layers=layers, target_modules=QKV):
        found.append(Scaled(0.3))
        backbone.host.insert(site, found[-1])
    return found


def encode(backbone: Vilt, batch: Any, task: int = 0) -> Tensor:
    return backbone.encode(batch, Route.of(task, len(batch)))


def stock(model: Any, batch: Any) -> Tensor:
    """Return the pooled output of the untouched class, called as its documentation says."""
    with torch.no_grad():
        return model(**batch.inputs).pooler_output


def test_base_is_the_stock_forward_and_leaves_the_random_state_alone() -> None:
    backbone = vilt()
    batch = backbone.collate(Pairs().all())
    state = torch.get_rng_state()
    encoded = backbone.encode_base(batch)
    assert torch.equal(torch.get_rng_state(), state), "the stock class shuffles its patches"
    torch.testing.assert_close(encoded.embedding, stock(toy_vilt(), batch), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        trimmed = encode(backbone, batch, BASE)
    torch.testing.assert_close(trimmed, encoded.embedding, rtol=1e-5, atol=1e-6)
    widths = {name: value.shape[-1] for name, value in encoded.features.items()}
    assert widths == backbone.feature_widths() and backbone.parts == {TOWER: backbone.width}


def test_patches_are_never_dropped() -> None:
    model = toy_vilt()
    model.config.max_image_length = 2
    batch = vilt().collate(Pairs().all())
    embedding = Vilt(model, ToyProcessor()).encode_base(batch).embedding
    assert torch.equal(embedding, vilt().encode_base(batch).embedding)


def test_a_model_inside_another_is_taken_out() -> None:
    from transformers import ViltForMaskedLM

    inner = toy_vilt()
    whole = ViltForMaskedLM(inner.config)
    whole.vilt = inner
    backbone = Vilt(whole, ToyProcessor())
    assert backbone.model is inner and type(backbone.model).__name__ == "ViltModel"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (torch.nn.Linear(2, 2), "expected a ViltModel, got Linear"),
        ("no pooler", "this ViltModel has no pooler"),
    ],
)
def test_other_models_are_refused(model: Any, message: str) -> None:
    if isinstance(model, str):
        model = toy_vilt()
        model.pooler = None
    with pytest.raises(ConfigError, match=message):
        Vilt(model)


def test_missing_modalities_are_constants_and_flags() -> None:
    backbone = vilt()
    batch = backbone.collate(Pairs((0, 1, 2)).all())
    assert batch.present["image"].tolist() == [True, True, False]
    assert batch.present["text"].tolist() == [True, False, True]
    assert torch.equal(batch.inputs["pixel_values"][2], torch.ones(3, 16, 16))
    tokenizer = backbone.processor.tokenizer
    mask = batch.inputs["attention_mask"][1].bool()
    assert batch.inputs["input_ids"][1][mask].tolist() == tokenizer("")["input_ids"]
    features = backbone.encode_base(batch).features["modalities"]
    absent = features.isnan().all(dim=2)
    assert absent.tolist() == [[False, False], [False, True], [True, False]]
    norms = features[~absent].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(4))


def test_a_white_image_that_is_there_is_not_missing() -> None:
    backbone = vilt()
    white = torch.full((3, 16, 16), 255, dtype=torch.uint8)
    there = Example(inputs={"image": white, "text": "a dot"}, label=0, key="there")
    gone = Example(inputs={"text": "a dot"}, label=0, key="gone")
    samples = Samples(backbone, memory())
    batch = samples.batch(Rows([there, gone]), [0, 1])
    assert batch.known is not None and len(set(batch.known.samples)) == 2
    assert batch.present["image"].tolist() == [True, False]
    encoded = backbone.encode_base(batch)
    assert torch.equal(encoded.embedding[0], encoded.embedding[1])
    assert encoded.features["modalities"][:, 0].isnan().all(dim=1).tolist() == [False, True]


class Rows(list[Example]):
    """A list of samples that may be referred to weakly."""


def test_a_sample_with_neither_is_refused() -> None:
    nothing = Example(inputs={"audio": 1}, label=0, key="x7")
    with pytest.raises(DataError, match=r"sample 'x7' has no image or text.*got audio"):
        vilt().collate([nothing])


def test_text_of_another_type_is_refused() -> None:
    with pytest.raises(DataError, match="expected a text"):
        vilt().collate([Example(inputs={"text": ["a", "b"]}, label=0, key="x")])


def test_several_labels_are_floats() -> None:
    examples = Pairs((0, 1), several=True)
    backbone = vilt()
    wanted = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    assert torch.equal(backbone.collate(examples.all()).labels, wanted)
    assert torch.equal(Samples(backbone, memory()).batch(examples, [0, 1]).labels, wanted)


def test_batch_mates_and_padding_do_not_matter() -> None:
    """I8, I9: alone, a short text is padded by nothing; beside a long one, by much."""
    backbone = vilt()
    insert(backbone, None)
    examples = Pairs().all()
    with torch.no_grad():
        together = encode(backbone, backbone.collate(examples))
        features = backbone.encode_base(backbone.collate(examples)).features
        for row, example in enumerate(examples):
            alone = backbone.collate([example])
            torch.testing.assert_close(encode(backbone, alone)[0], together[row])
            for name, value in backbone.encode_base(alone).features.items():
                torch.testing.assert_close(value[0], features[name][row], equal_nan=True)
    wide = vilt(text_length=23)
    wide.model.embeddings.text_embeddings.position_embeddings.weight[:12] = (
        backbone.model.embeddings.text_embeddings.position_embeddings.weight
    )
    more = wide.encode_base(wide.collate(examples))  # the same positions, longer padding
    for name, value in more.features.items():
        torch.testing.assert_close(value, features[name], equal_nan=True, rtol=1e-4, atol=1e-5)


def test_long_texts_are_cut_to_the_table() -> None:
    backbone = vilt()
    long = Example(inputs={"text": "a dot " * 30}, label=0, key="long")
    ids = backbone.prepare(long)["text"]
    assert len(ids) == 12 and ids.dtype == torch.int32


def test_positions_are_interpolated_and_rows_kept() -> None:
    """I15: every second row of a table twice as long is a row of the table, never random."""
    model = toy_vilt()
    table = model.embeddings.text_embeddings.position_embeddings.weight
    backbone = Vilt(model, ToyProcessor(), text_length=23)
    longer = backbone.model.embeddings.text_embeddings.position_embeddings.weight
    torch.testing.assert_close(longer[::2], table)
    torch.testing.assert_close(longer[1::2], (table[1:] + table[:-1]) / 2)
    assert torch.equal(longer[[0, -1]], table[[0, -1]])
    assert model.config.max_position_embeddings == 12 and len(table) == 12, "not touched"
    assert backbone.model.pooler.dense.weight is model.pooler.dense.weight
    assert torch.equal(interpolated(table, 12), table)
    long = Example(inputs={"text": "a dot " * 30}, label=0, key="long")
    batch = backbone.collate([long])
    assert batch.inputs["attention_mask"].sum() == 23
    assert backbone.encode_base(batch).embedding.isfinite().all()
    assert backbone.fingerprint() != Vilt(model, ToyProcessor()).fingerprint()
    again = Vilt(toy_vilt(), ToyProcessor(), text_length=23)
    assert again.fingerprint() == backbone.fingerprint()


def test_a_length_without_room_for_a_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="text_length must be at least 2"):
        vilt(text_length=1)


def test_names_of_linears() -> None:
    backbone = vilt()
    names = [s.name for s in backbone.sites("linear", layers=[-1], target_modules=QKV)]
    assert names == [f"multimodal.2.{name}" for name in QKV]
    clip = ("q_proj", "k_proj", "v_proj", "query", "out_proj", "dense", "fc1", "fc2")
    sites = backbone.sites("linear", layers=[0], target_modules=clip)
    assert [s.name.split(".")[-1] for s in sites] == [*QKV, "out_proj", "fc1", "fc2"]
    block = backbone.model.encoder.layer[0]
    assert sites[0].module is block.attention.attention.query
    assert sites[3].module is block.attention.output.dense
    assert (sites[4].d_in, sites[4].d_out) == (32, 64) and sites[5].module is block.output.dense


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_modules": ["qerry"]}, "unknown target module 'qerry'; did you mean 'query'"),
        ({"towers": ["vision"]}, "unknown tower 'vision'.*known: multimodal"),
        ({"layers": [3]}, "the multimodal tower has 3 blocks; got 3"),
    ],
)
def test_unknown_sites_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        vilt().sites("linear", **arguments)


def test_an_mlp_site_reads_the_residual_and_adds_to_the_block() -> None:
    """Y = h + MLP(LN(h)) + E(h), h being what enters layernorm_after."""
    backbone = vilt()
    block = backbone.model.encoder.layer[2]
    batch = backbone.collate(Pairs().all())
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        handles = [
            block.layernorm_after.register_forward_pre_hook(
                lambda _, args: seen.update(residual=args[0])
            ),
            block.register_forward_hook(lambda _, __, out: seen.update(block=out[0])),
        ]
        encode(backbone, batch, BASE)
        plain = dict(seen)
        layers = insert(backbone, (2,), "mlp")
        encode(backbone, batch)
    for handle in handles:
        handle.remove()
    assert [layer.calls for layer in layers] == [1]
    torch.testing.assert_close(seen["residual"], plain["residual"])
    torch.testing.assert_close(seen["block"], plain["block"] + 0.3 * plain["residual"])


def test_disabled_experts_are_the_base_and_nothing_is_left_behind() -> None:
    backbone = vilt()
    batch = backbone.collate(Pairs().all())
    with torch.no_grad():
        before = encode(backbone, batch, BASE)
        layers = insert(backbone, None)
        assert not torch.allclose(encode(backbone, batch), before)
        assert [layer.calls for layer in layers] == [1] * 9
        with backbone.host.disabled():
            assert torch.equal(encode(backbone, batch), before)
        backbone.host.remove_all()
        assert torch.equal(encode(backbone, batch), before)


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_going_on_from_a_prefix_is_the_whole_run(cut: int) -> None:
    backbone = vilt()
    layers = insert(backbone, tuple(range(cut, 3)))
    examples = Pairs().all()[2:3] + Pairs().all()[:1]  # short texts: padding is cut off
    batch = backbone.collate(examples)
    whole = encode(backbone, batch)
    (expected,) = torch.autograd.grad(whole.sum(), [layers[0].factor])
    prefix = backbone.prefix_of(batch, cut)
    assert prefix.hidden.shape[1] == backbone.tokens(TOWER)
    from dataclasses import replace

    part = replace(batch, inputs={}, prefix=prefix)
    going_on = encode(backbone, part)
    torch.testing.assert_close(going_on, whole)
    (got,) = torch.autograd.grad(going_on.sum(), [layers[0].factor])
    torch.testing.assert_close(got, expected)
    alone = encode(backbone, part.take(torch.tensor([1])))
    torch.testing.assert_close(alone[0], whole[1])


def test_a_cut_outside_the_model_is_refused() -> None:
    backbone = vilt()
    with pytest.raises(ConfigError, match="blocks 0 to 2; got cut 3"):
        backbone.prefix(backbone.collate(Pairs().all()), 3)


def test_known_samples_run_only_from_the_lowest_expert_on() -> None:
    backbone = vilt()
    insert(backbone, (2,))
    data, samples = Pairs(), Samples(backbone, memory())
    runs: list[int] = []
    backbone.blocks(TOWER)[0].register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        plain = encode(backbone, backbone.collate(data.all()))
        runs.clear()
        first = encode(backbone, samples.batch(data, [0, 1, 2, 3]))
        assert len(runs) == 2
        again = encode(backbone, samples.batch(data, [3, 1]))
    assert len(runs) == 2
    torch.testing.assert_close(first, plain)
    torch.testing.assert_close(again, plain[[3, 1]])


def test_the_base_is_asked_once_per_known_sample() -> None:
    backbone = vilt()
    data, samples = Pairs(), Samples(backbone, memory())
    plain = backbone.encode_base(backbone.collate(data.all()))
    runs: list[int] = []
    backbone.blocks(TOWER)[0].register_forward_hook(lambda *_: runs.append(1))
    for _ in range(2):
        encoded = backbone.encode_base(samples.batch(data, [0, 1, 2, 3]))
        for name, value in plain.features.items():
            torch.testing.assert_close(encoded.features[name], value, equal_nan=True)
        torch.testing.assert_close(encode(backbone, samples.batch(data, [2])), plain.embedding[2:3])
    assert len(runs) == 2


def test_other_weights_reach_every_part() -> None:
    backbone = vilt()
    batch = backbone.collate(Pairs().all())
    other = toy_vilt(seed=5)
    with torch.no_grad(), backbone.with_weights(dict(other.named_parameters())):
        got = encode(backbone, batch, BASE)
    torch.testing.assert_close(got, stock(other, batch), rtol=1e-5, atol=1e-6)


def test_training_crops_are_random_and_repeatable() -> None:
    from evolora.randomness import StepRandom

    backbone = vilt()
    examples = Pairs((0, 0)).all()
    one, same, two = (
        backbone.collate(examples, random=StepRandom(seed)).inputs for seed in (1, 1, 2)
    )
    assert torch.equal(one["pixel_values"], same["pixel_values"])
    assert not torch.equal(one["pixel_values"], two["pixel_values"])
    assert torch.equal(one["input_ids"], two["input_ids"])


def test_a_lora_learns_with_gradient_checkpointing_and_frees_the_model() -> None:
    backbone = vilt()
    method = SequentialLoRA(SequentialLoRAConfig(r=2, towers=(TOWER,)), backbone)
    from evolora.streams.task import LabelSpace

    method.begin_task("toy", LabelSpace(classes=("a", "b")))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    batch = backbone.collate(Pairs().all())
    gradients = []
    for wanted in (False, True):
        with backbone.checkpointing(wanted):
            encode(backbone, batch).sum().backward()
        gradients.append([p.grad.clone() for p in method.parameters() if p.grad is not None])
        method.zero_grad()
    assert len(gradients[0]) == len(list(method.layers.parameters()))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


def test_methods_that_need_prompts_say_so() -> None:
    with pytest.raises(ConfigError, match="zero-shot answers by class-name prompts; Vilt has none"):
        Learner(vilt(), method=ZeroShotConfig())


def test_a_prefix_is_taken_by_rows() -> None:
    prefix = Prefix(cut=1, hidden=torch.arange(6.0).view(3, 2, 1), mask=torch.eye(3, 2).bool())
    part = prefix.take(torch.tensor([2, 0]))
    assert part.hidden.flatten().tolist() == [4, 5, 0, 1]
    assert part.mask is not None and part.mask.tolist() == [[False, False], [True, False]]
