"""What is computed once: every result with caches is the result without them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.backbones.test_prefix import deep_backbone
from tests.conftest import toy_task
from torch import Tensor

from evolora.backbones.clip import DualEncoder
from evolora.config import EvaluationConfig, RunConfig
from evolora.errors import ConfigError, DataError
from evolora.learner import Learner, Progress
from evolora.methods.full_finetuning import FullFinetuningConfig
from evolora.methods.linear_probe import LinearProbeConfig
from evolora.methods.lora import LoRAPerTaskConfig, SequentialLoRAConfig
from evolora.methods.moe_adapters import MoEAdaptersConfig, OracleSelectorConfig
from evolora.methods.zero_shot import ZeroShotConfig
from evolora.routing.autoencoders import AutoEncoderTraining
from evolora.routing.route import BASE
from evolora.routing.selector import AutoEncoderSelectorConfig
from evolora.storage.state import export_state, load_state
from evolora.streams.sampling import Rows
from evolora.streams.task import Example, Stream, Subset, Task
from evolora.training.config import TrainingConfig
from evolora.training.continual import ContinualRun
from evolora.training.loop import TrainingError

TOP = (-1, -2)
MOE = MoEAdaptersConfig(
    num_experts=4,
    r=4,
    dropout=0.1,
    layers_to_transform=TOP,
    selector=AutoEncoderSelectorConfig(training=AutoEncoderTraining(hidden=4, steps=20)),
)
METHODS: dict[str, Any] = {
    "moe": MOE,
    "sequential": SequentialLoRAConfig(r=2, lora_dropout=0.1, layers_to_transform=TOP),
    "per-task": LoRAPerTaskConfig(r=2, layers_to_transform=TOP),
    "images only": SequentialLoRAConfig(r=2, layers_to_transform=TOP, towers=("vision",)),
    "prompts only": SequentialLoRAConfig(r=2, layers_to_transform=TOP, towers=("text",)),
    "probe": LinearProbeConfig(),
    "zero-shot": ZeroShotConfig(),
}


def settings(**given: Any) -> TrainingConfig:
    return TrainingConfig(
        **{
            "max_steps": 7,
            "warmup_steps": 2,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "augment": False,
            "max_classes_per_step": 2,
            **given,
        }
    )


def learner_of(method: Any, *, kind: str = "clip", cache: bool = True, **training: Any) -> Learner:
    return Learner(
        deep_backbone(kind),
        method=method,
        training=settings(**training),
        evaluation_batch_size=5,
        evaluation_cache=cache,
    )


def rows_through(backbone: DualEncoder, block: int, run: Any, tower: str = "vision") -> int:
    """Return how many rows went through a block while something ran."""
    rows: list[int] = []
    module = backbone.blocks(tower)[block]
    handle = module.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    run()
    handle.remove()
    return sum(rows)


def run_of(folder: Path, method: Any, *, evaluate: bool, **training: Any) -> ContinualRun:
    config = RunConfig(
        method=method,
        stream={"name": "toy"},
        training=settings(**training),
        evaluation=EvaluationConfig(batch_size=5, cache=evaluate),
    )
    tasks = tuple(toy_task(index, 20) for index in range(3))
    return ContinualRun(
        config, folder, stream=Stream(name="toy", tasks=tasks), backbone=deep_backbone("clip")
    )


# -- the same results ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("augment", [False, True])
def test_a_run_is_the_same_with_every_cache_on_and_off(
    name: str, augment: bool, tmp_path: Path
) -> None:
    plain = run_of(
        tmp_path / "off", METHODS[name], evaluate=False, prefix_cache="off", augment=augment
    )
    quick = run_of(tmp_path / "on", METHODS[name], evaluate=True, augment=augment)
    one, two = plain.run(), quick.run()
    assert (one.values == two.values).all() and (one.baseline == two.baseline).all()
    assert plain.record.routes == quick.record.routes
    states = [export_state(run.learner.method) for run in (plain, quick)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-3, atol=1e-5)
    assert plain.config.hash() == quick.config.hash()
    memory = plain.learner.samples.memory
    assert memory.prefixes is None and len(memory.crops) == len(memory.passes.kept) == 0


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("place", ["ram", "file"])
def test_memory_and_file_give_the_same(kind: str, place: str, tmp_path: Path) -> None:
    plain = learner_of(METHODS["sequential"], kind=kind, prefix_cache="off", max_steps=9)
    quick = learner_of(
        METHODS["sequential"],
        kind=kind,
        prefix_cache=place,
        prefix_cache_dtype="float32",
        prefix_cache_dir=str(tmp_path),
        max_steps=9,
    )
    for learner in (plain, quick):
        learner.learn(toy_task(0, 20))
    for key, value in export_state(plain.method).items():
        torch.testing.assert_close(export_state(quick.method)[key], value, rtol=1e-3, atol=1e-5)
    assert quick.evaluate(toy_task(0)) == plain.evaluate(toy_task(0))
    prefixes = quick.samples.memory.prefixes
    assert prefixes is not None and len(prefixes.kept) == 20 + 12
    assert (prefixes.kept.file is not None) == (place == "file")


def test_half_precision_is_close_and_takes_half_the_room() -> None:
    exact = learner_of(METHODS["sequential"])
    half = learner_of(METHODS["sequential"], prefix_cache="file")
    for learner in (exact, half):
        learner.learn(toy_task(0, 20))
    sizes = [learner.samples.memory.prefixes.kept.nbytes for learner in (exact, half)]
    assert sizes[0] == 2 * sizes[1] > 0
    one, two = export_state(exact.method), export_state(half.method)
    assert any(not torch.equal(one[key], two[key]) for key in one)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0.05, atol=5e-3)


@pytest.mark.parametrize("place", ["ram", "file"])
def test_a_cold_cache_in_the_middle_changes_no_bit(place: str) -> None:
    """As after a kill: the rest of the run meets samples in other company."""
    learner = learner_of(MOE, prefix_cache=place, save_steps=3, max_steps=8)
    saved: list[tuple[int, dict[str, Tensor], dict[str, Tensor]]] = []

    def save(step: int, moments: Mapping[str, Tensor]) -> None:
        state = {k: v.clone() for k, v in export_state(learner.method).items()}
        saved.append((step, state, {k: v.clone() for k, v in moments.items()}))

    learner.learn(toy_task(0, 20), save=save)
    for step, state, moments in saved:
        again = learner_of(MOE, prefix_cache=place, save_steps=3, max_steps=8)
        again.begin(toy_task(0, 20))
        load_state(again.method, state)
        again.learn(toy_task(0, 20), progress=Progress(step=step, moments=moments))
        for key, value in export_state(learner.method).items():
            assert torch.equal(export_state(again.method)[key], value), key


def test_room_for_a_part_of_the_samples_gives_the_same() -> None:
    plain = learner_of(METHODS["sequential"], max_steps=9)
    row = 4 * 5 * 32  # float32, 5 tokens, 32 wide
    small = learner_of(METHODS["sequential"], prefix_cache_bytes=7 * row, max_steps=9)
    for learner in (plain, small):
        learner.learn(toy_task(0, 20))
    kept = small.samples.memory.prefixes.kept
    assert len(kept) == 7 and kept.nbytes <= kept.limit_bytes
    for key, value in export_state(plain.method).items():
        assert torch.equal(export_state(small.method)[key], value)


@pytest.mark.parametrize("workers", [0, 2])
def test_readers_give_the_same(workers: int) -> None:
    learners = [
        learner_of(METHODS["sequential"], dataloader_num_workers=count, max_steps=6)
        for count in (0, workers)
    ]
    for learner in learners:
        learner.learn(toy_task(0, 20))
    for key, value in export_state(learners[0].method).items():
        assert torch.equal(export_state(learners[1].method)[key], value)


@pytest.mark.parametrize("method", [MOE, METHODS["sequential"]], ids=["moe", "lora"])
@pytest.mark.parametrize("layers", [TOP, None], ids=["top", "all"])
def test_gradient_checkpointing_learns_the_same(method: Any, layers: Any) -> None:
    config = dataclasses.replace(method, layers_to_transform=layers)
    plain, again = learner_of(config), learner_of(config, gradient_checkpointing=True)
    for learner in (plain, again):
        learner.learn(toy_task(0, 20))
    for key, value in export_state(plain.method).items():
        torch.testing.assert_close(export_state(again.method)[key], value, rtol=1e-4, atol=1e-6)
    untouched = deep_backbone("clip").model
    for name, module in again.backbone.model.named_modules():
        assert not module.training
        assert set(vars(module)) == set(vars(untouched.get_submodule(name)))


def test_gradient_checkpointing_runs_blocks_again() -> None:
    learner = learner_of(METHODS["sequential"], gradient_checkpointing=True, max_steps=2)
    attention = learner.backbone.blocks("vision")[3].self_attn
    calls: list[bool] = []
    attention.register_forward_hook(lambda *_: calls.append(attention.training))
    learner.learn(toy_task(0, 20))
    assert len(calls) == 4 and not any(calls), "twice per step, without dropout"


# -- computed once ---------------------------------------------------------------------------------


def test_blocks_below_run_once_per_sample_over_epochs_and_evaluations() -> None:
    learner = learner_of(METHODS["sequential"], max_steps=10)  # 80 rows of 20 samples
    task = toy_task(0, 20)
    backbone = learner.backbone
    assert rows_through(backbone, 0, lambda: learner.learn(task)) == 24  # filled up to 8 each
    assert rows_through(backbone, 0, lambda: learner.evaluate(task)) == 24  # 5, 5 and 2 of 12
    assert rows_through(backbone, 0, lambda: learner.evaluate(task)) == 0
    assert rows_through(backbone, 2, lambda: learner.evaluate(task)) == 12
    assert rows_through(backbone, 0, lambda: learner.learn(toy_task(1, 20))) == 24


def test_augmented_training_keeps_nothing_but_evaluation_does() -> None:
    learner = learner_of(METHODS["sequential"], augment=True, max_steps=10)
    task = toy_task(0, 20)
    assert rows_through(learner.backbone, 0, lambda: learner.learn(task)) == 80
    learner.evaluate(task)
    assert rows_through(learner.backbone, 0, lambda: learner.evaluate(task)) == 0


@pytest.mark.parametrize("name", ["zero-shot", "probe", "prompts only"])
def test_a_tower_without_experts_runs_once(name: str) -> None:
    learner = learner_of(METHODS[name], max_steps=10)
    task = toy_task(0, 20)
    trained = 0 if name == "zero-shot" else 24
    assert rows_through(learner.backbone, 0, lambda: learner.learn(task)) == trained
    assert rows_through(learner.backbone, 0, lambda: learner.evaluate(task)) == 24
    assert rows_through(learner.backbone, 0, lambda: learner.evaluate(task)) == 0


def test_answers_of_frozen_experts_are_kept() -> None:
    learner = learner_of(LoRAPerTaskConfig(r=2))
    first, second = toy_task(0, 20), toy_task(1, 20)
    learner.learn(first)
    before = learner.evaluate(first)
    learner.learn(second)
    rows = rows_through(learner.backbone, 3, lambda: learner.evaluate(first))
    assert rows == 0 and learner.evaluate(first) == before
    with torch.no_grad():
        for layer in learner.method.layers.values():
            layer.bank.B.frozen.add_(0.3)
    assert rows_through(learner.backbone, 3, lambda: learner.evaluate(first)) == 24
    plain = learner_of(LoRAPerTaskConfig(r=2), cache=False)
    for task in (first, second):
        plain.begin(task)
        plain.method.finish_task()
    load_state(plain.method, export_state(learner.method))
    assert learner.evaluate(first) == plain.evaluate(first)


def test_without_the_evaluation_cache_everything_runs_again() -> None:
    learner = learner_of(ZeroShotConfig(), cache=False)
    for _ in range(2):
        assert rows_through(learner.backbone, 0, lambda: learner.evaluate(toy_task(0))) == 12


def test_routing_features_come_from_the_pass_that_ran() -> None:
    learner = learner_of(MOE)
    task = toy_task(0, 20)
    learner.learn(task)
    learner.evaluate(task)
    base = rows_through(learner.backbone, 3, lambda: learner.features(task.test, "layers"))
    assert base == 0


def test_a_frozen_text_tower_runs_once_in_training() -> None:
    learner = learner_of(METHODS["images only"])
    task = toy_task(0, 20)
    rows = rows_through(learner.backbone, 0, lambda: learner.learn(task), tower="text")
    assert rows == len(task.labels.classes)


def test_prompts_below_the_experts_run_once_in_training() -> None:
    learner = learner_of(METHODS["sequential"])
    task = toy_task(0, 20)
    rows = rows_through(learner.backbone, 1, lambda: learner.learn(task), tower="text")
    assert rows == len(task.labels.classes)


# -- who is who ------------------------------------------------------------------------------------


class Other:
    """The same keys as a task's, other pixels."""

    def __init__(self, data: Any, shift: int) -> None:
        self.data, self.shift, self.reads = data, shift, 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Example:
        self.reads += 1
        example = self.data[index]
        image = (example.inputs["image"].int() + self.shift).clamp(0, 255).to(torch.uint8)
        return Example(inputs={"image": image}, label=example.label, key=example.key)


def test_equal_keys_are_not_equal_samples() -> None:
    learner, plain = learner_of(ZeroShotConfig()), learner_of(ZeroShotConfig(), cache=False)
    data = [Other(toy_task(0).test, shift) for shift in (0, 40)]
    for one in data:
        expected = plain.features(one, "layers")
        torch.testing.assert_close(learner.features(one, "layers"), expected)
    assert not torch.equal(learner.features(data[0], "layers"), learner.features(data[1], "layers"))


def test_a_sample_is_read_once_while_its_data_set_lives() -> None:
    learner = learner_of(ZeroShotConfig())
    data = Other(toy_task(0).test, 0)
    views: Sequence[Any] = (data, Subset(data, [3, 1]), Subset(Subset(data, [0, 3]), [1]))
    found = [learner.features(view, "pooled") for view in views]
    assert data.reads == len(data)
    torch.testing.assert_close(found[1], found[0][[3, 1]])
    torch.testing.assert_close(found[2], found[0][[3]])
    del data, views
    assert not learner.samples._known


def test_labels_are_those_of_the_view() -> None:
    learner = learner_of(ZeroShotConfig())
    data = toy_task(0).test
    renamed = Rows(data=data, indices=(0, 1, 2), labels=(2, 2, 2))
    for view, labels in ((data, [0, 1, 2]), (renamed, [2, 2, 2])):
        for _ in range(2):
            batch = next(iter(learner._batches(view, range(3))))
            assert batch.labels.tolist() == labels


def test_a_list_of_examples_is_read_each_time() -> None:
    learner = learner_of(ZeroShotConfig())
    examples = [toy_task(0).test[row] for row in range(4)]
    before = learner.features(examples, "pooled")
    examples[1] = toy_task(2).test[1]
    after = learner.features(examples, "pooled")
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]]) and not torch.equal(after[1], before[1])


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "training", "message"),
    [
        (METHODS["sequential"], {"augment": True}, "training.augment crops at random"),
        (SequentialLoRAConfig(r=2), {}, "block 0 of the vision tower.*layers_to_transform"),
        (FullFinetuningConfig(), {}, "full-finetuning trains the weights below every block"),
    ],
)
@pytest.mark.parametrize("place", ["ram", "file"])
def test_a_cache_that_cannot_be_had_is_refused_with_the_reason(
    method: Any, training: dict[str, Any], message: str, place: str
) -> None:
    with pytest.raises(ConfigError, match=f"prefix_cache: {place} is not possible: .*{message}"):
        learner_of(method, prefix_cache=place, **training)
    learner_of(method, **training)  # "auto" goes without


def test_checkpointing_of_other_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gradient_checkpointing: .* weights of full-finetuning"):
        learner_of(FullFinetuningConfig(), gradient_checkpointing=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prefix_cache": "disk"}, "prefix_cache must be 'auto' or 'off' or 'ram' or 'file'"),
        ({"prefix_cache_bytes": -1}, "prefix_cache_bytes must be at least 0; got -1"),
        ({"prefix_cache_dtype": "int8"}, "prefix_cache_dtype must be"),
    ],
)
def test_wrong_settings_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**given)


def test_activations_that_do_not_fit_are_refused() -> None:
    learner = learner_of(METHODS["sequential"], prefix_cache="file")
    embeddings: Any = learner.backbone.model.vision_model
    with torch.no_grad():
        embeddings.pre_layrnorm.weight.mul_(1e6)
    with pytest.raises(DataError, match="prefix_cache_dtype: float32"):
        learner.learn(toy_task(0, 20))


# -- a learning that breaks off --------------------------------------------------------------------


@pytest.mark.parametrize("method", [MOE, LoRAPerTaskConfig(r=2), LinearProbeConfig()])
def test_a_learning_that_fails_leaves_the_learner_as_it_was(method: Any) -> None:
    learner = learner_of(method)
    learner.learn(toy_task(0, 20))
    before = {key: value.clone() for key, value in export_state(learner.method).items()}
    score, costs = learner.evaluate(toy_task(0)), list(learner.costs)
    forward = learner.method.forward

    def broken(batch: Any) -> dict[str, Tensor]:
        terms = forward(batch)
        return {**terms, "loss": terms["loss"] * float("nan")}

    learner.method.forward = broken  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="the loss of green shapes is nan"):
        learner.learn(toy_task(1, 20))
    del learner.method.forward
    assert learner.task_names == ["red shapes"] and learner.costs == costs
    after = export_state(learner.method)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert learner.evaluate(toy_task(0)) == score
    fresh = learner_of(method)
    for each in (fresh, learner):
        if each is fresh:
            each.learn(toy_task(0, 20))
        each.learn(toy_task(1, 20))
    for key, value in export_state(fresh.method).items():
        assert torch.equal(export_state(learner.method)[key], value), key


# -- several tasks in one batch --------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        LoRAPerTaskConfig(r=2),
        MoEAdaptersConfig(num_experts=4, r=4, selector=OracleSelectorConfig()),
    ],
    ids=["lora", "moe"],
)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_rows_of_several_tasks_run_in_one_forward(method: Any, kind: str) -> None:
    learner = learner_of(method, kind=kind)
    for index in range(2):
        learner.learn(toy_task(index, 20))
    examples = [toy_task(row % 3).test[row] for row in range(9)]
    batch = learner.backbone.collate(examples)
    tasks = torch.tensor([row % 3 if row % 3 < 2 else BASE for row in range(9)])
    labels = toy_task(0).labels
    found: list[Any] = []
    with torch.no_grad():
        encoded = learner.backbone.encode_base(batch)

        def answer() -> None:
            found.append(learner.method.answer(batch, encoded, tasks, labels))

        assert rows_through(learner.backbone, 0, answer) == 6
        assert torch.equal(found[0].tasks, tasks)
        for row in range(9):
            one = torch.tensor([row])
            alone = learner.method.answer(batch.take(one), None, tasks[one], labels)
            torch.testing.assert_close(alone.scores[0], found[0].scores[row], rtol=1e-4, atol=1e-5)


def test_tasks_are_those_given(tmp_path: Path) -> None:
    task = Task(
        name="list",
        train=[toy_task(0).train[row] for row in range(12)],
        val=[],
        test=[toy_task(0).test[row] for row in range(6)],
        labels=toy_task(0).labels,
    )
    learner = learner_of(METHODS["sequential"])
    learner.learn(task)
    assert learner.evaluate(task).samples == 6
