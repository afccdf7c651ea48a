"""Experience replay: what is remembered, how it comes back, and that it is forgotten less."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tests.conftest import toy_task
from tests.methods.forgetting import forgotten, learner_of
from tests.methods.pairs import pair_learner, pair_task

from evolora.backbones.batch import Batch
from evolora.errors import ConfigError, DataError
from evolora.learner import Learner
from evolora.methods.er import ER, ERConfig
from evolora.methods.lora import SequentialLoRAConfig
from evolora.methods.reservoir import Reservoir
from evolora.streams.task import LabelSpace
from evolora.training.batches import TrainingBatches


def filled(capacity: int, *rows: int, seed: int = 0) -> Reservoir:
    reservoir = Reservoir(capacity, 0.5)
    for task, count in enumerate(rows):
        reservoir.take_in(task, count, lambda chosen: [str(row) for row in chosen], seed)
    return reservoir


def batches(learner: Learner, task: int, data: Any, **settings: Any) -> list[Batch]:
    """What a learner would train a task on."""
    feed = TrainingBatches(
        data,
        learner.backbone,
        learner.training,
        seed=0,
        task=task,
        share=learner.share,
        replayed=learner.archive.replayed(learner._keys),
        **settings,
    )
    return list(feed.from_step(0))


def test_it_forgets_less_than_sequential_lora() -> None:
    plain, plain_new = forgotten(SequentialLoRAConfig(r=3))
    kept, kept_new = forgotten(ERConfig(r=3, capacity=12))
    assert plain > 0.2, "there is something to forget"
    assert kept < 0.6 * plain, (kept, plain)
    assert kept_new > plain_new - 0.1, "and learns what comes next"


def test_every_sample_seen_is_as_likely_to_be_remembered() -> None:
    counts = Counter(
        (task, row)
        for seed in range(400)
        for task, row, _ in filled(10, 12, 8, 20, seed=seed).entries.tolist()
    )
    assert sum(counts.values()) == 4000 and len(counts) == 40
    # 100 expected of each, standard deviation below 9
    assert max(abs(count - 100) for count in counts.values()) < 40
    by_task = [sum(c for (task, _), c in counts.items() if task == own) for own in range(3)]
    assert all(abs(got - 100 * rows) < 150 for got, rows in zip(by_task, (12, 8, 20), strict=True))


def test_a_small_stream_is_remembered_whole_and_the_same_each_time() -> None:
    reservoir = filled(50, 12, 8)
    assert sorted(reservoir.of_task(0)[0]) == list(range(12)) and len(reservoir) == 20
    assert torch.equal(filled(5, 30, 9).entries, filled(5, 30, 9).entries)
    assert not torch.equal(filled(5, 30, 9).entries, filled(5, 30, 9, seed=1).entries)


@pytest.mark.parametrize("share", [0.5, 0.25])
@pytest.mark.parametrize("cached", [True, False])
def test_a_share_of_every_batch_is_replayed_and_each_sample_equally_often(
    share: float, cached: bool
) -> None:
    learner = learner_of(ERConfig(r=2, capacity=6, share=share), max_steps=12)
    learner.learn(toy_task(0))
    learner.begin(toy_task(1))
    samples = {"samples": learner.samples} if cached else {}
    found = batches(learner, 1, toy_task(1).train, **samples)
    old: Counter[str] = Counter()
    for batch in found:
        assert batch.task == 1 and batch.step_tasks == batch.tasks
        assert batch.tasks.count(0) == 8 * share
        for key, own, label in zip(batch.keys, batch.tasks, batch.labels.tolist(), strict=True):
            assert key.startswith(f"{own}/1/") and int(key.split("/")[2]) % 3 == label
            old[key] += own == 0
    rows = learner.method.reservoir.of_task(0)[0]
    times = 12 * 8 * share / 6
    assert {k: v for k, v in old.items() if v} == {f"0/1/{row}": times for row in rows}
    assert not learner_of(ERConfig(r=2)).archive.replayed(list)


def test_the_loss_is_the_mean_over_rows_each_among_its_own_task_s_classes() -> None:
    learner = learner_of(ERConfig(r=2, capacity=6), max_steps=2, label_smoothing_factor=0.2)
    learner.learn(toy_task(0))
    learner.begin(toy_task(1))
    batch = batches(learner, 1, toy_task(1).train)[0]
    method = learner.method
    expected = torch.zeros(())
    for row, own in enumerate(batch.tasks):
        one = batch.take(torch.tensor([row]))
        alone = Batch(inputs=one.inputs, labels=one.labels, keys=one.keys, task=own)
        expected = expected + method(alone)["loss"].detach() / len(batch)
    torch.testing.assert_close(method(batch)["loss"].detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["prompts", "heads"])
def test_all_seen_classes_may_compete(kind: str) -> None:
    if kind == "heads":
        learner, make = pair_learner(ERConfig(r=2, capacity=6), "vilt", max_steps=2), pair_task
        assert isinstance(learner.method, ER) and learner.method.all_seen
    else:
        config = ERConfig(r=2, capacity=6, logit_scope="seen")
        learner, make = learner_of(config, max_steps=2), toy_task
    learner.learn(make(0))
    learner.begin(make(1))
    batch = batches(learner, 1, make(1).train)[0]
    classes = (*make(0).labels.classes, *make(1).labels.classes)
    space = LabelSpace(classes=classes, templates=make(0).labels.templates[:1])
    scores = learner.method.answer(batch, None, torch.zeros(8, dtype=torch.long), space).scores
    true = batch.labels + 3 * torch.tensor(batch.tasks)
    expected = -scores.gather(1, true.unsqueeze(1)).log().mean()
    torch.testing.assert_close(method_loss(learner, batch), expected, rtol=1e-3, atol=1e-4)


def method_loss(learner: Learner, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return learner.method(batch)["loss"]


@pytest.mark.parametrize("kind", ["vilt", "clip"])
@pytest.mark.parametrize("scope", ["seen", "task"])
def test_samples_come_back_with_what_they_lacked(kind: str, scope: Any) -> None:
    """With several labels per sample, too, of tasks with different numbers of classes."""
    config = ERConfig(r=2, capacity=9, logit_scope=scope)
    learner = pair_learner(config, kind, max_steps=3)
    learner.learn(pair_task(0, several=True))
    second = pair_task(1, several=True)
    second = type(second)(
        **{**vars(second), "labels": LabelSpace(classes=("one", "other"), multi_label=True),
           "train": Two(second.train), "val": (), "test": Two(second.test)}
    )  # fmt: skip
    learner.begin(second)
    for batch in batches(learner, 1, second.train):
        assert batch.labels.shape == (8, 3)
        for row, (own, key) in enumerate(zip(batch.tasks, batch.keys, strict=True)):
            code = int(key.split("/")[2].split("#")[0]) % 3 if own == 0 else None
            if code is not None:
                assert bool(batch.present["text"][row]) == (code != 1)
                assert bool(batch.present["image"][row]) == (code != 2)
        assert torch.isfinite(learner.method(batch)["loss"])


class Two:
    """Samples of the first two of three labels."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> Any:
        example = self.data[row]
        return type(example)(**{**vars(example), "label": example.label[:2]})


def test_gradient_checkpointing_and_few_classes_learn_too() -> None:
    """All prompts of a step run in one forward, so a block that runs again finds its route."""
    states = []
    for again in (False, True):
        learner = learner_of(
            ERConfig(r=2, capacity=6), max_steps=3, max_classes_per_step=2,
            gradient_checkpointing=again,
        )  # fmt: skip
        for index in range(2):
            learner.learn(toy_task(index))
        states.append(learner.method.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5)


def test_data_that_is_not_at_hand_or_not_the_same_is_refused(tmp_path: Any) -> None:
    learner = learner_of(ERConfig(r=2, capacity=6), max_steps=2)
    learner.learn(toy_task(0))
    learner.save_pretrained(tmp_path)

    def again() -> Learner:
        return Learner.from_pretrained(tmp_path, model=learner.backbone, training=learner.training)

    learner.method.remove()
    loaded = again()
    with pytest.raises(ConfigError, match=r"er replays 6 samples of task 'red shapes'.*recall"):
        loaded.learn(toy_task(1))
    assert loaded.task_names == ["red shapes"]
    with pytest.raises(ConfigError, match="unknown learned task 'green shapes'"):
        loaded.recall([toy_task(1)])
    other = toy_task(1)
    loaded.recall([type(other)(**{**vars(other), "name": "red shapes"})])
    with pytest.raises(DataError, match=r"not what was learned: row \d+ is now '1/1/\d+'"):
        loaded.learn(toy_task(1))
    loaded.recall([toy_task(0, rows=3)])
    with pytest.raises(DataError, match=r"row \d+ is remembered, it has 3"):
        loaded.learn(toy_task(1))
    loaded.recall([toy_task(0)])
    assert loaded.learn(toy_task(1)) is not None
    assert {task for task, *_ in loaded.method.reservoir.entries.tolist()} == {0, 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capacity": 0}, "capacity must be at least 1"),
        ({"share": 1.0}, r"share must be in \(0, 1\)"),
        ({"share": 0.0}, r"share must be in \(0, 1\)"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ERConfig(**settings)
