"""The baselines are what they claim: a LoRA is W + (alpha / r) B A, a probe is a linear layer."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.conftest import ToyProcessor, toy_model, toy_task

from evolora.backbones.clip import DualEncoder
from evolora.errors import ConfigError
from evolora.learner import Learner
from evolora.methods.full_finetuning import FullFinetuningConfig
from evolora.methods.linear_probe import LinearProbe, LinearProbeConfig
from evolora.methods.lora import JointLoRAConfig, LoRALayer, LoRAPerTaskConfig, SequentialLoRAConfig
from evolora.methods.zero_shot import ZeroShotConfig
from evolora.routing.route import BASE
from evolora.streams.task import LabelSpace
from evolora.training.config import TrainingConfig

TRAINING = TrainingConfig(
    max_steps=6, warmup_steps=2, per_device_train_batch_size=6, learning_rate=1e-2
)
WHERE = {"q_proj": "self_attn.q_proj", "v_proj": "self_attn.v_proj", "fc1": "mlp.fc1",
         "fc2": "mlp.fc2"}  # fmt: skip


def learner_of(make_backbone, method) -> Learner:
    return Learner(make_backbone(), method=method, training=TRAINING)


@pytest.mark.parametrize("task", [0, 1])
def test_a_lora_is_its_merged_weight(make_backbone, task: int) -> None:
    learner = learner_of(make_backbone, LoRAPerTaskConfig(r=3, lora_alpha=6.0))
    for index in range(2):
        learner.learn(toy_task(index))
    merged = toy_model()
    with torch.no_grad():
        for key, layer in learner.method.layers.items():
            assert isinstance(layer, LoRALayer)
            tower, index, target = key.split("/")
            linear = merged.get_submodule(f"{tower}_model.encoder.layers.{index}.{WHERE[target]}")
            linear.weight += 2.0 * layer.bank.B.all()[task].T @ layer.bank.A.all()[task]
    plain = Learner(DualEncoder(merged, ToyProcessor()), method=ZeroShotConfig())
    batch = learner.backbone.collate([toy_task(task).test[row] for row in range(6)])
    labels = toy_task(task).labels
    got = learner.method.predict(batch, labels, oracle=task)
    assert got.tasks.tolist() == [task] * 6
    torch.testing.assert_close(
        got.scores, plain.method.predict(batch, labels).scores, rtol=1e-4, atol=1e-5
    )


def test_lora_per_task_sends_unlearned_tasks_to_the_base(make_backbone) -> None:
    learner = learner_of(make_backbone, LoRAPerTaskConfig(r=2))
    learner.learn(toy_task(0))
    plain = learner_of(make_backbone, ZeroShotConfig())
    assert learner.evaluate(toy_task(1)) == plain.evaluate(toy_task(1))


def test_sequential_and_joint_have_one_expert(make_backbone) -> None:
    for config in (SequentialLoRAConfig(r=2), JointLoRAConfig(r=2)):
        learner = learner_of(make_backbone, config)
        for index in range(2):
            learner.begin(toy_task(index))
        assert all(len(layer.bank) == 1 for layer in learner.method.layers.values())


def test_sequential_full_finetuning_is_plain_training(make_backbone) -> None:
    """The functional copy trains like a model whose own weights train."""
    learner = learner_of(make_backbone, FullFinetuningConfig())
    learner.begin(toy_task(0))
    batch = learner.backbone.collate([toy_task(0).train[row] for row in range(6)], task=0)
    learner.method(batch)["loss"].backward()
    model = copy.deepcopy(toy_model()).requires_grad_(True)
    tokens = learner.backbone.tokenize(toy_task(0).labels.prompts())
    logits = model(pixel_values=batch.inputs["pixel_values"], **tokens).logits_per_image
    torch.nn.functional.cross_entropy(logits, batch.labels, label_smoothing=0.2).backward()
    for name, parameter in model.named_parameters():
        if name == "logit_scale":
            assert "logit_scale" not in learner.method.tuned
            continue
        own = learner.method.tuned[name.replace(".", "/")].grad
        torch.testing.assert_close(own, parameter.grad, rtol=1e-3, atol=1e-5)


def test_a_probe_is_one_linear_layer_on_frozen_features(make_backbone) -> None:
    learner = learner_of(make_backbone, LinearProbeConfig())
    learner.learn(toy_task(0))
    method = learner.method
    assert isinstance(method, LinearProbe)
    batch = learner.backbone.collate([toy_task(0).test[row] for row in range(6)])
    embedding = learner.backbone.encode_base(batch).embedding
    unit = torch.nn.functional.normalize(embedding, dim=-1)
    expected = learner.backbone.model.logit_scale.exp() * unit @ method.vectors.all().T
    got = method.predict(batch, toy_task(0).labels).scores
    torch.testing.assert_close(got, expected.softmax(dim=1))


def test_a_probe_answers_untaught_classes_by_their_prompts(make_backbone) -> None:
    learner = learner_of(make_backbone, LinearProbeConfig())
    for index in range(2):
        learner.learn(toy_task(index))
    method = learner.method
    assert isinstance(method, LinearProbe)
    space = LabelSpace(classes=("blue ring", "green bar", "red dot"), templates=("the {} .",))
    with torch.no_grad():
        classes = method.classifier(space, BASE)
        prompts = learner.backbone.class_embeddings(space, BASE)
    assert torch.equal(classes[0], prompts[0])
    assert torch.equal(classes[1], method.vectors.all()[4])  # second task, second class
    assert torch.equal(classes[2], method.vectors.all()[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r must be at least 1"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\)"),
    ],
)
def test_settings_are_checked(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SequentialLoRAConfig(**settings)
