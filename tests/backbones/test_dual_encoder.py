"""DualEncoder: the same numbers as transformers' own forward, prompts, cache, recomputation."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from tests.conftest import END, ToyProcessor, toy_model, toy_task
from torch import Tensor
from torch.nn import functional as F

from evolora.backbones import prompts
from evolora.backbones.blocks import layer_statistics
from evolora.backbones.clip import DualEncoder
from evolora.errors import ConfigError
from evolora.learner import Learner
from evolora.methods.lora import LoRAPerTaskConfig, SequentialLoRAConfig
from evolora.methods.moe_adapters import MoEAdaptersConfig, MoELayer
from evolora.randomness import StepRandom
from evolora.routing.route import BASE, Route
from evolora.routing.selector import OracleSelectorConfig
from evolora.storage.state import export_state, load_state
from evolora.streams.task import LabelSpace
from evolora.training.config import TrainingConfig

KINDS = pytest.mark.parametrize("kind", ["clip", "siglip"])
MOE = MoEAdaptersConfig(num_experts=3, r=4, selector=OracleSelectorConfig())


def batch_of(backbone: DualEncoder, rows: int = 4, **settings: Any):
    return backbone.collate([toy_task(row % 3).train[row] for row in range(rows)], **settings)


@KINDS
def test_logits_are_those_of_transformers(make_backbone, kind: str) -> None:
    backbone = make_backbone(kind)
    labels = dataclasses.replace(toy_task(0).labels, templates=("a photo of a {} .",))
    batch = batch_of(backbone)
    with torch.no_grad():
        reference = toy_model(kind)(
            pixel_values=batch.inputs["pixel_values"], **backbone.tokenize(labels.prompts())
        ).logits_per_image
        classes = backbone.class_embeddings(labels, BASE)
        ours = backbone.logits(backbone.encode_base(batch).embedding, classes)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    assert ours.std() > 1e-3, "logits that do not depend on the input prove nothing"
    assert backbone.width == classes.shape[1]


def test_templates_are_averaged_as_unit_vectors(backbone: DualEncoder) -> None:
    labels = toy_task(0).labels
    assert len(labels.templates) == 2
    with torch.no_grad():
        ensemble = backbone.class_embeddings(labels, BASE)
        first = backbone.class_embeddings(labels, BASE, ensemble=False)
        each = []
        for template in range(2):
            tokens = backbone.tokenize(labels.prompts(template))
            each.append(F.normalize(toy_model().get_text_features(**tokens).pooler_output, dim=-1))
    torch.testing.assert_close(ensemble, F.normalize(sum(each) / 2, dim=-1))
    torch.testing.assert_close(first, each[0])
    torch.testing.assert_close(ensemble.norm(dim=1), torch.ones(3))
    assert not torch.allclose(ensemble, first, atol=1e-4)


def test_some_classes_alone_are_rows_of_all(backbone: DualEncoder) -> None:
    labels = toy_task(0).labels
    with torch.no_grad():
        some = backbone.class_embeddings(labels, BASE, classes=[2, 0])
        whole = backbone.class_embeddings(labels, BASE)
    torch.testing.assert_close(some, whole[[2, 0]])


def test_chunks_of_prompts_give_the_same(make_backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = LabelSpace(classes=("dot", "bar", "red cross", "blue ring", "green dot"))
    with torch.no_grad():
        whole = make_backbone().class_embeddings(labels, BASE)
        monkeypatch.setattr(prompts, "PROMPTS_PER_FORWARD", 2)
        parts = make_backbone().class_embeddings(labels, BASE)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


class Recorder:
    """Which hidden state a tower's own pooling picks, found by making every state unique."""

    @staticmethod
    def picked(model: Any, input_ids: Tensor) -> list[int]:
        hidden: list[Tensor] = []
        norm = model.text_model.final_layer_norm
        handle = norm.register_forward_hook(lambda _, __, out: hidden.append(out))
        with torch.no_grad():
            pooled = model.text_model(input_ids=input_ids).pooler_output
        handle.remove()
        distance = (hidden[0] - pooled.unsqueeze(1)).abs().sum(dim=2)
        assert (distance.min(dim=1).values == 0).all()
        return distance.argmin(dim=1).tolist()


@pytest.mark.parametrize("legacy", [False, True])
def test_text_summary_is_the_token_that_clip_pools(legacy: bool) -> None:
    """Configs older than transformers 4.31 say eos 2 and mean the largest identifier."""
    model = toy_model()
    end, padding = 19, 19  # CLIP pads with its end token: the first one counts
    ids = torch.tensor([[1, 5, 6, end, padding], [1, 7, end, padding, padding], [1, 2, 3, 4, end]])
    for config in (model.config.text_config, model.text_model):
        config.eos_token_id = 2 if legacy else end
    backbone = DualEncoder(model, ToyProcessor())
    assert backbone.text_summary(ids).tolist() == [3, 2, 4]
    assert Recorder.picked(model, ids) == [3, 2, 4]


def test_text_summary_of_the_toy_tokenizer(backbone: DualEncoder) -> None:
    ids = backbone.tokenize(["a red dot", "a photo of a red dot ."])["input_ids"]
    ends = backbone.text_summary(ids)
    assert ids[torch.arange(2), ends].tolist() == [END, END]
    assert ends[0] < ends[1]


def test_siglip_pools_the_last_position(make_backbone) -> None:
    backbone = make_backbone("siglip")
    ids = backbone.tokenize(["a red dot", "a dot"])["input_ids"]
    assert ids.shape[1] == 12, "SigLIP pads to its maximum"
    assert backbone.text_summary(ids).tolist() == [11, 11]
    assert backbone.vision_summary == "mean"


@KINDS
def test_routing_features_have_their_widths_and_come_from_the_base(make_backbone, kind) -> None:
    backbone = make_backbone(kind)
    batch = batch_of(backbone)
    before = backbone.encode_base(batch)
    assert {n: v.shape[-1] for n, v in before.features.items()} == backbone.feature_widths()
    learner = Learner(
        backbone,
        method=SequentialLoRAConfig(r=2),
        training=TrainingConfig(max_steps=3, per_device_train_batch_size=4, learning_rate=0.05),
    )
    learner.learn(toy_task(0))
    after = backbone.encode_base(batch)
    assert torch.equal(after.embedding, before.embedding)
    for name, value in after.features.items():
        assert torch.equal(value, before.features[name])
        row = backbone.encode_base(batch.take(torch.tensor([2]))).features[name]
        torch.testing.assert_close(row[0], value[2], rtol=1e-4, atol=1e-5)
    assert not any(module._forward_hooks for module in backbone.blocks("vision"))


def test_layer_statistics_are_means_and_deviations_over_tokens() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden = [torch.randn(3, 7, 16, generator=draw) + 5.0 for _ in range(2)]
    expected = [
        torch.nn.functional.layer_norm(statistic.float(), (16,))
        for tokens in hidden
        for statistic in (tokens.double().mean(dim=1), tokens.double().std(dim=1))
    ]
    got = layer_statistics(hidden)
    torch.testing.assert_close(got, torch.cat(expected, dim=1), rtol=1e-5, atol=1e-5)


def learned(make_backbone, method: Any = None) -> Learner:
    learner = Learner(
        make_backbone(),
        method=method or MOE,
        training=TrainingConfig(max_steps=2, per_device_train_batch_size=4, learning_rate=0.05),
    )
    learner.learn(toy_task(0))
    return learner


def text_calls(backbone: DualEncoder, run: Any) -> int:
    calls: list[int] = []
    handle = backbone.model.text_model.register_forward_hook(lambda *_: calls.append(1))
    run()
    handle.remove()
    return len(calls)


@pytest.mark.parametrize("change", ["add_", "copy_", "optimizer", "freeze", "load", "replace"])
def test_a_changed_expert_is_never_answered_from_the_cache(make_backbone, change: str) -> None:
    learner = learned(make_backbone)
    method, backbone = learner.method, learner.backbone
    labels = toy_task(0).labels
    layer = next(x for x in method.layers.values() if isinstance(x, MoELayer) and x.tower == "text")

    @torch.no_grad()
    def classifier() -> Tensor:
        return method.classifier(labels, 0)

    def fresh() -> Tensor:
        with torch.no_grad():
            return backbone.class_embeddings(labels, 0, version=-1)

    torch.testing.assert_close(classifier(), fresh(), rtol=0, atol=0)
    assert text_calls(backbone, classifier) == 0, "an unchanged state is answered from the cache"
    before = classifier().clone()
    answers: list[Tensor] = []
    other = {
        key: value + 1 if ".bank." in key and value.is_floating_point() else value
        for key, value in export_state(method).items()
    }
    with torch.no_grad():
        if change == "add_":
            layer.bank.B.frozen.add_(0.5)
        elif change == "copy_":
            layer.bank.B.frozen.copy_(torch.ones_like(layer.bank.B.frozen))
        elif change == "freeze":
            layer.bank.freeze(range(len(layer.bank)))
        elif change == "load":
            load_state(method, other)
        elif change == "replace":
            layer.bank.B.frozen = layer.bank.B.frozen + 1.0
    if change == "optimizer":
        layer.bank.B.active.grad = torch.ones_like(layer.bank.B.active)
        torch.optim.AdamW([layer.bank.B.active], lr=0.5).step()
    assert text_calls(backbone, lambda: answers.append(classifier())) > 0
    (again,) = answers
    backbone.forget_classes()
    assert torch.equal(again, fresh())
    if change not in ("freeze", "optimizer"):  # these need not move the chosen experts
        assert not torch.equal(again, before)


def test_an_address_used_again_is_not_taken_for_the_same_tensor(make_backbone) -> None:
    """A replaced tensor frees its memory; the next may get it, at the same count of writes."""
    learner = learned(make_backbone)
    labels = toy_task(0).labels
    layer = [x for x in learner.method.layers.values() if isinstance(x, MoELayer)][-1]
    assert layer.tower == "text"
    memory = layer.bank.B.frozen.numpy().copy()
    answers = []
    for shift in (0.0, 1.0):
        memory += shift
        layer.bank.B.frozen = torch.from_numpy(memory)
        with torch.no_grad():
            answers.append(learner.method.classifier(labels, 0))
            fresh = learner.backbone.class_embeddings(labels, 0, version=-1)
        classes = learner.backbone.prompts.classes
        classes.drop((learner.backbone.context(), 0, -1, labels, None, True))
        assert torch.equal(answers[-1], fresh)
    assert not torch.equal(*answers)


def test_two_methods_on_one_backbone_never_share_a_state(make_backbone) -> None:
    first = learned(make_backbone, LoRAPerTaskConfig(r=2))
    labels = toy_task(0).labels
    with torch.no_grad():
        one = first.method.classifier(labels, 0).clone()
        first.method.remove()
        second = Learner(first.backbone, method=LoRAPerTaskConfig(r=3), training=first.training)
        second.begin(toy_task(0))
        two = second.method.classifier(labels, 0)
        base = first.backbone.class_embeddings(labels, BASE)
    assert not torch.equal(one, two)
    assert torch.equal(two, base), "a fresh expert is the base, whatever another method cached"


def test_training_never_reads_the_cache(make_backbone) -> None:
    learner = learned(make_backbone)
    backbone = learner.backbone
    with torch.no_grad():
        backbone.class_embeddings(toy_task(0).labels, 0, version=1)
    kept = list(backbone.prompts.classes)
    graded = backbone.class_embeddings(toy_task(0).labels, 0, version=1)
    assert graded.requires_grad
    assert list(backbone.prompts.classes) == kept


def gradients(make_backbone, method: Any, checkpointing: bool) -> tuple[dict[str, Tensor], Learner]:
    learner = Learner(make_backbone(), method=method)
    learner.begin(toy_task(0))
    with torch.no_grad():
        for parameter in learner.method.parameters():
            draw = torch.Generator().manual_seed(0)
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    if checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers 6 renames it
            learner.backbone.model.gradient_checkpointing_enable()
        learner.backbone.model.train()  # transformers checkpoints in train mode only
    batch = batch_of(learner.backbone, 6, task=0, random=StepRandom(3))
    calls: list[str] = []
    for key, layer in learner.method.layers.items():
        layer.register_forward_pre_hook(lambda *_, key=key: calls.append(key))
    learner.method(batch)["loss"].backward()
    each = [calls.count(key) for key in learner.method.layers]
    # Recomputation stops early, so a block's last Linear may not be reached a second time.
    assert min(each) >= 1 and max(each) == (2 if checkpointing else 1)
    grads = {n: p.grad.clone() for n, p in learner.method.named_parameters() if p.grad is not None}
    return grads, learner


@pytest.mark.parametrize(
    "method",
    [MOE, dataclasses.replace(MOE, load_balance=0.1), SequentialLoRAConfig(r=2, lora_dropout=0.3)],
    ids=["moe", "moe-balanced", "lora"],
)
def test_checkpointing_gives_the_same_gradients(make_backbone, method: Any) -> None:
    plain, one = gradients(make_backbone, method, False)
    again, two = gradients(make_backbone, method, True)
    assert plain.keys() == again.keys() and plain
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-7)
    for key, counter in one.method.counters().items():
        assert torch.equal(two.method.counters()[key].counts, counter.counts), "counted twice"


def test_checkpointing_survives_more_prompts_than_one_chunk(make_backbone, monkeypatch) -> None:
    plain, _ = gradients(make_backbone, MOE, False)
    monkeypatch.setattr(prompts, "PROMPTS_PER_FORWARD", 2)
    again, _ = gradients(make_backbone, MOE, True)
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-7)


@KINDS
def test_sites_are_every_block_of_both_towers(make_backbone, kind: str) -> None:
    backbone = make_backbone(kind)
    names = [site.name for site in backbone.sites("mlp")]
    assert names == ["vision.0.mlp", "vision.1.mlp", "text.0.mlp", "text.1.mlp"]
    linears = backbone.sites(
        "linear", towers=["text"], layers=[-1], target_modules=["fc1", "k_proj"]
    )
    assert [(s.name, s.d_in, s.d_out) for s in linears] == [
        ("text.1.fc1", 32, 64),
        ("text.1.k_proj", 32, 32),
    ]
    block = backbone.model.get_submodule("text_model.encoder.layers.1")
    assert [s.module for s in linears] == [block.mlp.fc1, block.self_attn.k_proj]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"towers": ["visoin"]}, "unknown tower 'visoin'; did you mean 'vision'"),
        ({"target_modules": ["qproj"]}, "unknown target module 'qproj'; did you mean 'q_proj'"),
        ({"layers": [2]}, "has 2 blocks; got 2"),
        ({"layers": [-3]}, r"has 2 blocks; got -3 \(allowed: -2 to 1, negative from the top\)"),
        ({"layers": []}, "layers_to_transform must name at least one block; got none"),
    ],
)
def test_unknown_sites_are_refused(backbone: DualEncoder, arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        backbone.sites("linear", **arguments)


def test_a_model_without_two_towers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected a dual encoder .* got Linear"):
        DualEncoder(torch.nn.Linear(2, 2))


def test_fingerprint_follows_every_weight(make_backbone) -> None:
    same = make_backbone().fingerprint()
    assert make_backbone().fingerprint() == same != make_backbone(seed=1).fingerprint()
    changed = toy_model()
    with torch.no_grad():
        changed.logit_scale.add_(1e-3)
    assert DualEncoder(changed, ToyProcessor()).fingerprint() != same


def test_other_weights_are_used_inside_the_context_only(make_backbone) -> None:
    backbone = make_backbone()
    batch = batch_of(backbone)
    base = backbone.encode_base(batch).embedding
    weights = {name: value + 0.1 for name, value in backbone.model.named_parameters()}
    with torch.no_grad(), backbone.with_weights(weights):
        other = backbone.encode(batch, Route.of(BASE, 4))
    assert not torch.allclose(other, base, atol=1e-3)
    assert torch.equal(backbone.encode_base(batch).embedding, base)
