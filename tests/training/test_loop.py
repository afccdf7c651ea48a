"""The training loop: accumulation, clipping, precision, schedule, trackers, failures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import ToyImages, ToyProcessor, toy_model, toy_task
from tests.training.worker import TOY, toy_config, toy_run
from torch import Tensor

import evolora
from evolora.backbones.clip import DualEncoder
from evolora.errors import ConfigError, DataError, StorageError
from evolora.learner import Learner
from evolora.streams.task import Example, Stream
from evolora.training.batches import Share, ShuffledRows, TrainingBatches
from evolora.training.config import TrainingConfig, learning_rate
from evolora.training.continual import ContinualRun
from evolora.training.loop import TrainingError
from evolora.training.progress import Reporter

QUIET = dataclasses.replace(TOY["moe-adapters"], noise=False, dropout=0.0)
PLAIN: dict[str, Any] = {
    "max_steps": 4, "warmup_steps": 1, "learning_rate": 1e-2, "augment": False,
    "per_device_train_batch_size": 8,
}  # fmt: skip


def learn(method: Any, **training: Any) -> tuple[dict[str, Tensor], float | None]:
    """Return (state, last loss) after one toy task."""
    backbone = DualEncoder(toy_model(), ToyProcessor(), name="toy")
    settings = TrainingConfig(**{**PLAIN, **training})
    learner = Learner(backbone, method=method, training=settings, seed=1)
    loss = learner.learn(toy_task(0, 40))
    return dict(learner.method.state_dict()), loss


def close(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return all(torch.allclose(a[n].float(), b[n].float(), atol=1e-4, rtol=1e-3) for n in b)


def test_two_micro_batches_equal_one_batch_of_the_same_rows() -> None:
    """Holds without noise, dropout and augmentation, whose draws belong to the micro-step."""
    whole, loss = learn(QUIET)
    parts, loss_of_parts = learn(
        QUIET, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    counts = {name for name in whole if name.endswith("usage.counts")}
    prompts = {
        name for name in counts if name.startswith("layers.text")
    }  # seen once per micro-step
    for name in counts:
        assert torch.equal(parts[name], whole[name] * (2 if name in prompts else 1)), name
    assert close(parts, {k: v for k, v in whole.items() if k not in counts})
    assert loss_of_parts == pytest.approx(loss, abs=1e-4)


def test_the_gradient_is_clipped_to_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        gradients = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    learn(QUIET)
    free = norms.copy()
    norms.clear()
    learn(QUIET, max_grad_norm=min(free) / 2)
    assert len(norms) == len(free) == 4
    assert all(norm == pytest.approx(min(free) / 2, rel=1e-3) for norm in norms)


def test_bf16_trains_float32_weights_beside_full_precision_learners() -> None:
    full, loss = learn(QUIET)
    half, half_loss = learn(QUIET, mixed_precision="bf16")  # in one process, after the other
    again, _ = learn(QUIET)
    assert half_loss == pytest.approx(loss, rel=0.05) and half_loss != loss
    trained = [name for name in half if name.endswith("bank.A.active")]
    assert trained and all(half[name].dtype == torch.float32 for name in half if "bank" in name
                           and "slot" not in name)  # fmt: skip
    assert any(not torch.equal(half[name], full[name]) for name in trained)
    assert all(torch.equal(again[name], full[name]) for name in full)


def test_warm_up_longer_than_the_task_only_climbs() -> None:
    rates = [learning_rate(step, base=1.0, warmup=100, total=5) for step in range(5)]
    assert rates == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])
    _, loss = learn(QUIET, warmup_steps=100)
    assert loss is not None
    assert learning_rate(0, base=2.0, warmup=0, total=1) == 2.0


class DarkImages(ToyImages):
    """An unreadable sample among good ones."""

    def __getitem__(self, index: int) -> Example:
        if index == 5:
            raise DataError("cannot read image 'dark.png': damaged")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_unreadable_sample_is_one_line_also_from_a_worker(workers: int) -> None:
    backbone = DualEncoder(toy_model(), ToyProcessor(), name="toy")
    settings = TrainingConfig(**{**PLAIN, "dataloader_num_workers": workers})
    learner = Learner(backbone, method=QUIET, training=settings)
    task = dataclasses.replace(toy_task(0), train=DarkImages(0, 8, 1))
    with pytest.raises(DataError) as caught:
        learner.learn(task)
    assert str(caught.value) == "cannot read image 'dark.png': damaged"


@pytest.mark.slow
def test_reading_in_worker_processes_changes_nothing() -> None:
    mine, theirs = learn(QUIET), learn(QUIET, dataloader_num_workers=2)
    assert mine[1] == theirs[1]
    assert all(torch.equal(mine[0][name], theirs[0][name]) for name in mine[0])


def test_a_loss_that_is_no_number_stops_with_a_hint() -> None:
    with pytest.raises(TrainingError, match=r"loss of red shapes is nan at step \d.*learning_rate"):
        learn(QUIET, learning_rate=1e30, max_steps=8, warmup_steps=0)


def test_which_rows_a_step_sees_depends_on_nothing_that_ran_before() -> None:
    backbone = DualEncoder(toy_model(), ToyProcessor(), name="toy")
    config = TrainingConfig(max_steps=9, per_device_train_batch_size=2)
    batches = TrainingBatches(ToyImages(0, 7, 1), backbone, config, seed=0, task=0, share=Share())
    whole = list(batches.from_step(0))
    for step in (0, 1, 5, 8):
        rest = list(batches.from_step(step))
        assert [b.keys for b in rest] == [b.keys for b in whole[step:]]
        for a, b in zip(rest, whole[step:], strict=True):
            assert torch.equal(a.inputs["pixel_values"], b.inputs["pixel_values"])
            assert a.random == b.random
    for epoch in range(2):  # every row once per epoch
        rows = ShuffledRows(7, 0, "x").take(7 * epoch, 7)
        assert sorted(rows) == list(range(7))


def test_processes_share_the_rows_and_the_randomness_of_one_global_batch() -> None:
    backbone = DualEncoder(toy_model(), ToyProcessor(), name="toy")

    def batches(size: int, share: Share) -> list[Any]:
        config = TrainingConfig(max_steps=3, per_device_train_batch_size=size)
        data = ToyImages(0, 30, 1)
        feed = TrainingBatches(data, backbone, config, seed=0, task=0, share=share)
        return list(feed.from_step(0))

    one = batches(8, Share())
    two = [batches(4, Share(index=i, count=2)) for i in range(2)]
    for whole, first, second in zip(one, *two, strict=True):
        assert whole.keys == first.keys + second.keys
        pixels = torch.cat([first.inputs["pixel_values"], second.inputs["pixel_values"]])
        assert torch.equal(whole.inputs["pixel_values"], pixels)
        like = torch.empty(())
        drawn = [b.random.normal("k", (4, 3), like) for b in (first, second)]
        assert torch.equal(whole.random.normal("k", (8, 3), like), torch.cat(drawn))
        masks = [b.random.keep_mask("k", (4, 3), 0.5, like) for b in (first, second)]
        assert torch.equal(whole.random.keep_mask("k", (8, 3), 0.5, like), torch.cat(masks))
        text = [b.random.whole().normal("t", (5,), like) for b in (whole, first, second)]
        assert torch.equal(text[0], text[1]) and torch.equal(text[1], text[2])


def test_an_unknown_tracker_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown tracker 'tensorbord'; did you mean 'tensorb"):
        learn(QUIET, report_to=("tensorbord",))
    with pytest.raises(ConfigError, match="report_to must be a list"):
        TrainingConfig(report_to="tensorboard")  # type: ignore[arg-type]


def test_tensorboard_gets_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    toy_run(tmp_path / "run", "sequential-lora", report_to=("tensorboard",)).run()
    events = list((tmp_path / "run").rglob("events.out.tfevents*"))
    assert events and all(event.stat().st_size > 100 for event in events)
    assert (tmp_path / "run" / "log.jsonl").exists()


def test_the_log_has_each_step_and_each_task_once(tmp_path: Path) -> None:
    toy_run(tmp_path, "linear-probe", logging_steps=3).run()
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [(e["task"], e["step"]) for e in events if e["event"] == "step"]
    names = [toy_task(index).name for index in range(3)]
    assert steps == [(name, step) for name in names for step in (3, 6, 7)]
    assert [e["task"] for e in events if e["event"] == "task"] == names


def test_a_run_is_neither_overwritten_nor_mixed_with_another(tmp_path: Path) -> None:
    toy_run(tmp_path, "zero-shot").run()
    before = (tmp_path / "matrix.json").read_bytes()
    with pytest.raises(StorageError, match="already holds a run; continue it with --resume"):
        toy_run(tmp_path, "zero-shot").run()
    with pytest.raises(StorageError, match="holds a run of another configuration"):
        toy_run(tmp_path, "zero-shot", max_steps=9).run(resume=True)
    assert toy_run(tmp_path, "zero-shot").run(resume=True).tasks  # finished: nothing to do
    assert (tmp_path / "matrix.json").read_bytes() == before


def test_a_run_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(StorageError, match=r"cannot make the folder .*file/run"):
        toy_run(tmp_path / "file" / "run", "zero-shot").run()
    (tmp_path / "run" / "log.jsonl").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"cannot write .*log\.jsonl"):
        toy_run(tmp_path / "run", "zero-shot").run()


def test_a_rate_for_a_task_that_is_not_in_the_stream_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'red shape'; did you mean 'red shapes'"):
        toy_run(tmp_path, "zero-shot", learning_rates={"red shape": 1e-3})


def test_a_task_may_have_its_own_rate(tmp_path: Path) -> None:
    toy_run(tmp_path, "linear-probe", learning_rates={"green shapes": 0.5}).run()
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    peak = {
        name: max(e["learning_rate"] for e in events if e["event"] == "step" and e["task"] == name)
        for name in ("red shapes", "green shapes")
    }
    assert peak == pytest.approx({"red shapes": 5e-3, "green shapes": 0.5})


def test_a_class_incremental_run_fills_the_lower_triangle(tmp_path: Path) -> None:
    tasks = tuple(toy_task(index, 20) for index in range(3))
    run = ContinualRun(
        toy_config("sequential-lora"),
        tmp_path,
        stream=Stream(name="toy", tasks=tasks, label_protocol="seen"),
        backbone=DualEncoder(toy_model(), ToyProcessor(), name="toy"),
        reporter=Reporter(),
    )
    values = run.run().values
    known = [[not bool(torch.isnan(torch.tensor(v))) for v in row] for row in values]
    assert known == [[True, False, False], [True, True, False], [True, True, True]]
    again = run.learner.evaluate(tasks[1], labels=_union(tasks), offset=3)
    assert again.score == values[2][1]


def _union(tasks: tuple[Any, ...]) -> Any:
    classes = tuple(name for task in tasks for name in task.labels.classes)
    return evolora.streams.task.LabelSpace(classes=classes, templates=tasks[0].labels.templates)
