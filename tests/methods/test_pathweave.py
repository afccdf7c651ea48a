"""PathWeave on tiny Q-Formers: the invariants of its specification, saving, going on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.backbones.qformers import cloud, qformer, sample
from tests.experts.test_woven import by_loop
from tests.methods.modalities import TEXTS, Rows, task
from torch import Tensor

from evolora.backbones.qformer import QFormer
from evolora.errors import ConfigError
from evolora.experts.bank import GrowingStack
from evolora.experts.woven import WovenLayer
from evolora.learner import Learner, Progress
from evolora.methods.lora import SequentialLoRAConfig
from evolora.methods.pathweave import PathWeave, PathWeaveConfig
from evolora.methods.zero_shot import ZeroShotConfig
from evolora.routing.route import Route
from evolora.storage.state import export_state
from evolora.training.config import TrainingConfig


def learner(
    kind: str = "instructblip",
    *,
    config: Any = None,
    backbone: QFormer | None = None,
    **settings: Any,
) -> Learner:
    values: dict[str, Any] = {
        "max_steps": 3, "per_device_train_batch_size": 3, "learning_rate": 3e-2,
        "warmup_steps": 0, "augment": False, **settings,
    }  # fmt: skip
    return Learner(
        backbone or qformer(kind),
        method=config or PathWeaveConfig(r=2),
        training=TrainingConfig(**values),
        evaluation_batch_size=4,
    )


def answers(learned: Learner, modalities: str) -> Tensor:
    """Logits of the answers to two samples of modalities, each on its own path."""
    method, backbone = learned.method, learned.backbone
    batch = backbone.collate([sample(modalities, "is it this ?", seed) for seed in (7, 8)])
    with torch.no_grad():
        found = method.route(batch)[1]
        logits, _ = backbone.answer_logits(batch, method.make_route(found, batch))
    return logits


def untouched(modalities: str, kind: str = "instructblip") -> Tensor:
    plain = Learner(qformer(kind), method=ZeroShotConfig())
    return answers_of_base(plain, modalities)


def answers_of_base(plain: Learner, modalities: str) -> Tensor:
    batch = plain.backbone.collate([sample(modalities, "is it this ?", s) for s in (7, 8)])
    with torch.no_grad():
        return plain.backbone.answer_logits(batch, plain.method.make_route(-1, batch))[0]


STAGES = ("video", "audio", "pc")


@pytest.mark.parametrize("kind", ["instructblip", "blip2-t5"])
def test_every_earlier_path_is_bit_identical_after_every_later_stage(kind: str) -> None:
    learned = learner(kind)
    assert torch.equal(answers(learned, "image"), untouched("image", kind))
    digest, seen = learned.backbone.fingerprint(), {"image": answers(learned, "image")}
    assert learned.learn(task("image")) is None  # nothing to learn: the model's own
    for stage in STAGES:
        before = answers(learned, stage)
        assert learned.learn(task(stage)) is not None
        after = answers(learned, stage)
        assert not torch.equal(before, after), stage
        for modality, expected in seen.items():
            assert torch.equal(answers(learned, modality), expected), (stage, modality)
        seen[stage] = after
        seen[f"image {stage}"] = answers(learned, f"image {stage}")
    assert torch.equal(seen["image"], untouched("image", kind))
    assert learned.backbone.fingerprint() == digest
    assert not any(p.requires_grad for p in learned.backbone.model.parameters())


def test_an_untrained_first_path_is_the_base_model() -> None:
    learned = learner()
    learned.begin(task("video"))
    assert torch.equal(answers(learned, "video"), untouched("video"))


def test_with_a_factor_on_the_branch_every_adapter_starts_silent() -> None:
    scaled = learner(config=PathWeaveConfig(r=2, branch_scale=True))
    scaled.learn(task("video"))
    scaled.begin(task("pc"))
    method = scaled.method
    batch = scaled.backbone.collate([sample("pc", seed=1)])
    outs = {}
    for key, layer in method.layers.items():
        if "projection" in key:
            continue
        layer.register_forward_hook(
            lambda _, args, out, key=key: outs.__setitem__(key, (args[0], out.clone()))
        )
    route = method.make_route(0, batch)
    with torch.no_grad():
        scaled.backbone.answer_logits(batch, route)
        for key, (x, out) in outs.items():
            linear = dict(_sites(scaled.backbone))[key]
            torch.testing.assert_close(
                out, torch.nn.functional.linear(x, linear.weight, linear.bias)
            )
    assert len(outs) == len(method.layers) - 1


def _sites(backbone: QFormer) -> list[tuple[str, torch.nn.Linear]]:
    return [
        (s.key, s.module)
        for s in backbone.sites("linear", towers=["qformer"], target_modules=["all-linear"])
    ]  # type: ignore[misc]


def test_exactly_the_new_path_gets_gradients() -> None:
    learned = learner()
    learned.learn(task("video"))
    learned.begin(task("audio"))
    method = learned.method
    batch = learned.backbone.collate(list(task("audio").train)[:3], task=1)
    trainable = method.trainable()
    touched = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in trainable.items()}
    optimizer = torch.optim.SGD(trainable.values(), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        method(batch)["loss"].backward()
        for name, parameter in trainable.items():
            if ".bank.A." in name or "down_bias" in name:
                assert bool(parameter.grad.any()) == (step > 0), name
            touched[name] |= parameter.grad != 0
        optimizer.step()
    for name, seen in touched.items():
        assert seen.any() or ("attention/key" in name and "bias" in name), name
    names = {
        name.split(".")[-2] + "/" + name.split(".")[2]
        for name in trainable
        if name.startswith("entries")
    }
    assert names == {f"{part}/audio" for part in ("norm", "queries", "weight", "bias")}
    sizes = {name: p.shape[0] for name, p in trainable.items() if name.startswith("layers")}
    for name, rows in sizes.items():
        assert rows == (2 if ".gates." in name else 1), name
    assert all(p.grad is None for p in learned.backbone.model.parameters())


def test_the_first_path_has_no_gate_and_no_in_adapter() -> None:
    learned = learner()
    learned.begin(task("video"))
    names = learned.method.trainable()
    assert not any(".gates." in name or ".inner." in name for name in names)
    learned.method.finish_task()
    learned.begin(task("audio"))
    assert any(".gates." in name for name in learned.method.trainable())


def test_order_and_number_of_modalities_are_free_and_a_new_one_is_one_call() -> None:
    backbone = qformer(plugged=False)
    learned = learner(backbone=backbone)
    assert isinstance(learned.method, PathWeave)
    with pytest.raises(ConfigError, match=r"unknown modality 'pc' .known: image."):
        learned.learn(task("pc"))
    assert learned.task_names == []
    spec = cloud()
    learned.method.expand(spec)
    learned.learn(task("pc"))
    before = answers(learned, "pc")
    for number in range(2):
        new = dataclasses.replace(cloud(), name=f"pc{number}")
        learned.method.expand(new)
        rows = Rows(
            dataclasses.replace(row, inputs={f"pc{number}": row.inputs["pc"], "text": "what ?"})
            for row in task("pc").train
        )
        learned.learn(dataclasses.replace(
            task("pc"), name=f"stage {number}", train=rows, test=rows, modalities=(f"pc{number}",)
        ))  # fmt: skip
    assert learned.method.paths == ["pc", "pc0", "pc1"]
    assert torch.equal(answers(learned, "pc"), before)


def test_the_modality_of_the_input_picks_the_path_whatever_task_is_told() -> None:
    learned = learner()
    for stage in ("video", "audio"):
        learned.learn(task(stage))
    batch = learned.backbone.collate(
        [sample("audio"), sample("video"), sample("image"), sample("image audio")]
    )
    written = learned.method.write(batch, TEXTS)
    assert written.tasks.tolist() == [1, 0, -1, 1]
    told = learned.method.told(batch, 0)[1]
    assert told.tasks.tolist() == [1, 0, -1, 1]
    alone = [
        learned.method.write(batch.take(torch.tensor([row])), TEXTS).texts[0] for row in range(4)
    ]
    assert list(written.texts) == alone
    assert learned.evaluate(task("video")).routes == {"video": 6}


def test_a_path_is_learned_and_kept(tmp_path: Path) -> None:
    config = PathWeaveConfig(r=4)
    learned = learner("blip2-opt", config=config, max_steps=60, learning_rate=1e-2)
    batch = learned.backbone.collate(list(task("video", 3).train), task=0)

    def loss() -> float:
        with torch.no_grad():
            route = learned.method.make_route(0, batch)
            return float(learned.backbone.answer_losses(batch, route).mean())

    before = loss()
    learned.learn(task("video", 3))
    after = loss()
    assert after < 0.75 * before
    learned.learn(task("pc", 3))
    assert loss() == after
    learned.save_pretrained(tmp_path)
    again = Learner.from_pretrained(tmp_path, qformer("blip2-opt"))
    for modality in ("video", "pc", "image pc"):
        assert torch.equal(answers(again, modality), answers(learned, modality))


def test_names_of_the_state_do_not_depend_on_what_is_learned() -> None:
    """Every prefix of the sequence loads strictly, and a forward adds no name (B9)."""
    learned = learner()
    names = list(export_state(learned.method))
    for stage in STAGES:
        learned.learn(task(stage))
        answers(learned, stage)
        assert list(export_state(learned.method)) == names


def test_a_killed_stage_goes_on_bit_for_bit() -> None:
    whole = learner(max_steps=4)
    halves: dict[int, Any] = {}

    def save(step: int, moments: Any) -> None:
        state = {name: value.clone() for name, value in export_state(whole.method).items()}
        halves[step] = (state, {name: value.clone() for name, value in moments.items()})

    whole.learn(task("video"))
    whole.training = dataclasses.replace(whole.training, save_steps=2)
    whole.learn(task("audio"), save=save)
    from evolora.storage.state import load_state

    again = learner(max_steps=4, save_steps=2)
    again.begin(task("video"))
    again.method.finish_task()
    again.begin(task("audio"))
    load_state(again.method, halves[2][0])
    again.learn(task("audio"), progress=Progress(step=2, moments=halves[2][1]))
    mine, other = export_state(whole.method), export_state(again.method)
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_half_a_stage_is_none(tmp_path: Path) -> None:
    learned = learner()
    learned.learn(task("video"))
    before = answers(learned, "video")
    broken = dataclasses.replace(
        task("audio"), train=Rows([*task("audio").train, sample("audio", label="")])
    )
    broken = dataclasses.replace(
        broken, train=Rows(dataclasses.replace(row, label=0) for row in broken.train)
    )
    with pytest.raises(Exception, match="answer"):
        learned.learn(broken)
    assert learned.method.paths == ["video"]
    learned.save_pretrained(tmp_path)
    kept = Learner.from_pretrained(tmp_path, qformer())
    assert torch.equal(answers(kept, "video"), before)
    learned.learn(task("pc"))
    assert learned.method.paths == ["video", "pc"]
    assert torch.equal(answers(learned, "video"), before)


def test_what_pathweave_cannot_do_is_refused() -> None:
    learned = learner()
    learned.learn(task("video"))
    with pytest.raises(
        ConfigError, match=r"'again' has no new modality .video.; the paths of video"
    ):
        learned.learn(task("video", name="again"))
    with pytest.raises(ConfigError, match=r"brings 2 new modalities .audio, pc."):
        learned.learn(task("audio pc"))
    from tests.backbones.writers import writer

    with pytest.raises(
        ConfigError, match="pathweave needs a model that modalities are plugged into"
    ):
        Learner(writer("llava"), method=PathWeaveConfig())


def test_other_methods_learn_how_a_modality_enters_too() -> None:
    config = SequentialLoRAConfig(r=2, towers=("qformer",), target_modules=("query", "value"))
    learned = learner(config=config)
    blind = answers_of_base(learned, "audio")
    assert learned.learn(task("audio")) is not None
    names = set(learned.method.trainable())
    assert "entries.of.audio.queries.active" in names
    batch = learned.backbone.collate([sample("audio", "is it this ?", s) for s in (7, 8)])
    with torch.no_grad():
        route = learned.method.make_route(0, batch)
        assert not torch.equal(learned.backbone.answer_logits(batch, route)[0], blind)
    assert torch.equal(answers_of_base(learned, "audio"), blind)
    learned.begin(task("pc"))
    names = set(learned.method.trainable())
    assert "entries.of.pc.weight.active" in names and not any(".audio." in name for name in names)
    assert not learner(config=ZeroShotConfig()).method.trainable()


def test_gradient_checkpointing_gives_the_same_path() -> None:
    found = []
    for wanted in (False, True):
        learned = learner(gradient_checkpointing=wanted)
        learned.learn(task("video"))
        learned.learn(task("audio"))
        found.append(export_state(learned.method))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=1e-5, rtol=1e-4)


def test_encoders_run_once_per_sample() -> None:
    learned = learner(max_steps=6)
    calls: list[int] = []
    learned.backbone.encoders["audio"].register_forward_hook(
        lambda _, args, out: calls.append(len(args[0]))
    )
    learned.learn(task("audio"))
    learned.evaluate(task("audio"))
    assert len(calls) <= 4  # of six steps and two batches of evaluation


def test_layers_are_woven_ones_of_growing_stacks() -> None:
    learned = learner()
    assert all(isinstance(layer, WovenLayer) for layer in learned.method.layers.values())
    loose = [
        name for name, _ in learned.method.named_parameters()
        if not isinstance(learned.method.get_submodule(name.rpartition(".")[0]), GrowingStack)
    ]  # fmt: skip
    assert loose == []


def test_the_whole_model_equals_a_loop_over_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    learned = learner()
    for stage in STAGES:
        learned.learn(task(stage))
    woven = answers(learned, "pc")

    def each(layer: WovenLayer, x: Tensor, out: Tensor, route: Route) -> Tensor:
        assert route.uniform is not None
        return by_loop(layer, x, out, route.uniform)

    monkeypatch.setattr(WovenLayer, "forward", each)
    torch.testing.assert_close(answers(learned, "pc"), woven, atol=1e-4, rtol=1e-4)
