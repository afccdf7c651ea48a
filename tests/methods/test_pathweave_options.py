"""PathWeave's options: variants that learn and keep too, and the released code's faults."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.methods.modalities import task
from tests.methods.test_pathweave import answers, learner, untouched

from evolora.methods.pathweave import PathWeaveConfig
from evolora.randomness import StepRandom
from evolora.storage.state import export_state


def test_faults_of_the_released_code_are_options() -> None:
    config = PathWeaveConfig(
        r=2, init="bert_normal", dead_projection=("video",), dead_cross_value=("audio",),
        value_by_key=("audio",),
    )  # fmt: skip
    learned = learner(config=config)
    learned.learn(task("video"))
    state = export_state(learned.method)
    projection = "layers.projection/0/projection.bank.B.frozen"
    assert not state[projection].any()
    assert state["layers.qformer/0/attention/query.bank.B.frozen"].std() > 0.01
    fresh = learner(config=PathWeaveConfig(r=2, init="bert_normal"))
    for stage in ("video", "audio"):
        fresh.begin(task(stage))
        fresh.method.finish_task()
    state = export_state(fresh.method)
    assert not state[projection].any(), "that one stands outside of BERT"
    inner = state["layers.qformer/0/attention/query.inner.weights.0.frozen"]
    assert inner.any() and inner.std() < 0.05
    learned.begin(task("audio"))
    batch = learned.backbone.collate(list(task("audio").train)[:3], task=1)
    learned.method(batch)["loss"].backward()
    silent = {
        name for name, p in learned.method.trainable().items() if p.grad is None or not p.grad.any()
    }
    where = {name.rpartition(".layers.")[2].split(".")[1] for name in silent}
    assert "qformer/0/crossattention/value" in where
    own = {name for name in silent if "/value.bank." in name}
    assert own and all("/crossattention/" in name for name in own)
    assert {n for n in silent if "attention/value.inner" in n and "cross" not in n}
    assert not any("attention/key" in name and "weight" in name for name in silent)
    mended = learner()
    mended.learn(task("video"))
    assert export_state(mended.method)[projection].any()


def test_shared_in_adapters_change_what_earlier_paths_answer() -> None:
    learned = learner(config=PathWeaveConfig(r=2, in_adapter_slots="source"))
    learned.learn(task("video"))
    learned.learn(task("audio"))
    before = {name: answers(learned, name) for name in ("video", "audio")}
    learned.learn(task("pc"))
    assert torch.equal(answers(learned, "video"), before["video"])
    assert not torch.equal(answers(learned, "audio"), before["audio"])


@pytest.mark.parametrize(
    "config",
    [
        PathWeaveConfig(r=2, reuse=False),
        PathWeaveConfig(r=2, mixture="mean", in_adapter="none"),
        PathWeaveConfig(r=2, in_adapter="mlp", activation="relu"),
        PathWeaveConfig(r=2, in_adapter="two-linear", top_k=1, gate_noise=False),
        PathWeaveConfig(r=2, adapt_projection=False, layers_to_transform=(1,)),
    ],
    ids=["alone", "mean", "mlp", "two-linear", "one layer"],
)
def test_variants_learn_and_keep_too(config: PathWeaveConfig) -> None:
    learned = learner(config=config)
    learned.learn(task("video"))
    before = answers(learned, "video")
    learned.learn(task("pc"))
    assert torch.equal(answers(learned, "video"), before)
    assert not torch.equal(answers(learned, "pc"), untouched("pc"))


def test_without_reuse_a_path_depends_on_no_other() -> None:
    for reuse in (False, True):
        learned = learner(config=PathWeaveConfig(r=2, reuse=reuse))
        for stage in ("video", "audio"):
            learned.learn(task(stage))
        before = answers(learned, "audio")
        for layer in learned.method.layers.values():
            with torch.no_grad():  # all that belongs to the first path
                layer.bank.A.frozen[0].add_(1.0)
                layer.bank.up_bias.frozen[0].add_(1.0)
        assert torch.equal(answers(learned, "audio"), before) != reuse
        inside = {name for name, value in export_state(learned.method).items() if value.numel()}
        assert any(".gates." in name or ".inner." in name for name in inside) == reuse


def test_what_is_chosen_of_blocks_and_noise_is_what_there_is() -> None:
    learned = learner(config=PathWeaveConfig(r=2, layers_to_transform=(1,), gate_noise=False))
    assert {name.split("/")[1] for name in learned.method.layers if "qformer" in name} == {"1"}
    assert "projection/0/projection" in learned.method.layers
    for stage in ("video", "audio"):
        learned.learn(task(stage))
    assert not any(".gates.noise" in name for name in export_state(learned.method))
    batch = learned.backbone.collate(list(task("audio").train)[:3], task=1)
    losses = [
        float(learned.method(dataclasses.replace(batch, random=StepRandom(seed)))["loss"])
        for seed in (1, 2)
    ]
    assert losses[0] == losses[1]
    noisy = learner()
    for stage in ("video", "audio"):
        noisy.learn(task(stage))
    batch = noisy.backbone.collate(list(task("audio").train)[:3], task=1)
    losses = [
        float(noisy.method(dataclasses.replace(batch, random=StepRandom(seed)))["loss"])
        for seed in (1, 2)
    ]
    assert losses[0] != losses[1]
