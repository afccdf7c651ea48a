"""One LoRA per task at the sites that a budget buys: `lora-per-task` with `allocation`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.backbones.test_prefix import deep_backbone
from tests.conftest import ToyProcessor, toy_model, toy_task
from tests.contract.cases import answer, base_scores, digest, mixed_batch, toy_backbone
from tests.methods.pairs import pair_learner, pair_task
from tests.training.caching import learner_of, rows_through, settings

from evolora.allocation.settings import (
    GradientAllocationConfig,
    RandomAllocationConfig,
    UniformAllocationConfig,
)
from evolora.allocation.value import Allocation
from evolora.backbones.clip import DualEncoder
from evolora.cli import main
from evolora.config import EvaluationConfig, RunConfig, read_config
from evolora.errors import ConfigError, StorageError
from evolora.evaluation.cost import measure_cost
from evolora.evaluation.inspection import inspect_config, inspect_run
from evolora.learner import Learner
from evolora.methods.lora import LoRAPerTask, LoRAPerTaskConfig
from evolora.routing.route import BASE
from evolora.routing.task_keys import TaskKeySelectorConfig
from evolora.storage.state import export_state
from evolora.streams.task import Stream
from evolora.training.config import TrainingConfig
from evolora.training.continual import ContinualRun

R = 2
GRADIENT = GradientAllocationConfig(budget=6, sample=10)
TRAINING = TrainingConfig(
    max_steps=4,
    warmup_steps=1,
    per_device_train_batch_size=6,
    learning_rate=1e-2,
    label_smoothing_factor=0.0,
)


def make(allocation: Any = GRADIENT, **given: Any) -> Learner:
    method = LoRAPerTaskConfig(r=R, allocation=allocation, **given)
    return Learner(toy_backbone("clip"), method=method, training=TRAINING)


def teach(learner: Learner, count: int = 2) -> Learner:
    for index in range(count):
        learner.learn(toy_task(index))
    return learner


def own(learner: Learner, task: int) -> list[str]:
    """Keys of the sites that have an expert of a task."""
    method = learner.method
    assert method.allocation is not None
    found = method.allocation.of(method.task_names[task]).experts
    return [site.replace(".", "/") for site in found]


def all_stacks(learner: Learner) -> dict[str, torch.Tensor]:
    return {key: layer.bank.A.all().clone() for key, layer in learner.method.layers.items()}


def test_experts_stand_where_the_budget_put_them_and_nowhere_else() -> None:
    learner = teach(make(), 3)
    for task in range(3):
        assert len(own(learner, task)) == 6
    assert own(learner, 0) != own(learner, 1)  # tasks differ in what they need
    for key, layer in learner.method.layers.items():
        assert len(layer.bank) == sum(key in own(learner, task) for task in range(3))


def test_only_the_new_experts_train_and_the_counts_say_so() -> None:
    learner = make()
    base = digest(learner.backbone.model)
    for task in range(3):
        before = all_stacks(learner)
        learner.learn(toy_task(task))
        places = [learner.method.layers[key].bank for key in own(learner, task)]
        size = sum(R * (bank.d_in + bank.d_out) for bank in places)
        assert learner.costs[task].trainable_parameters == size
        stored = size + (learner.costs[task - 1].stored_parameters if task else 0)
        assert learner.costs[task].stored_parameters == stored  # scores are no parameters
        for key, stack in before.items():
            assert torch.equal(learner.method.layers[key].bank.A.all()[: len(stack)], stack)
    assert digest(learner.backbone.model) == base
    assert measure_cost(learner.method).trainable_parameters == 0


def test_a_new_task_starts_as_the_base_and_an_old_one_stays() -> None:
    learner = make()
    batch = mixed_batch(learner.backbone)
    learner.learn(toy_task(0))
    before = answer(learner, batch, 0)
    assert not torch.equal(before, base_scores("clip", batch, 0))
    learner.begin(toy_task(1))
    assert torch.equal(answer(learner, batch, 1), base_scores("clip", batch, 1))  # no expert yet
    learner = teach(make(), 3)
    assert torch.equal(answer(learner, batch, 0), before)
    assert torch.equal(answer(learner, batch, BASE), base_scores("clip", batch, BASE))


def test_a_site_without_an_expert_of_the_task_is_exactly_the_base() -> None:
    learner = teach(make(), 2)
    method: Any = learner.method
    batch = mixed_batch(learner.backbone)
    only_second = [key for key in own(learner, 1) if key not in own(learner, 0)]
    assert only_second
    with torch.no_grad():  # whatever another task's expert is there
        before = answer(learner, batch, 0), answer(learner, batch, 1)
        for key in only_second:
            method.layers[key].bank.B.frozen.add_(1.0)
        assert torch.equal(answer(learner, batch, 0), before[0])
        assert not torch.equal(answer(learner, batch, 1), before[1])
        for key in own(learner, 0):  # without its own ones it is the base
            bank = method.layers[key].bank
            bank.B.frozen[method.layers[key].places.of_task(0)] = 0.0
        assert torch.equal(answer(learner, batch, 0), base_scores("clip", batch, 0))


def test_mixed_rows_get_what_they_get_alone() -> None:
    learner = teach(make(GradientAllocationConfig(budget=4, sample=10)), 3)
    batch = mixed_batch(learner.backbone)
    tasks = torch.tensor([0, 1, 2, BASE, 2, 1, 0, 0, 1])
    with torch.no_grad():
        mixed = learner.method.embed(batch, None, tasks)
        for row, task in enumerate(tasks.tolist()):
            alone = learner.method.embed(
                batch.take(torch.tensor([row])), None, torch.tensor([task])
            )
            torch.testing.assert_close(mixed[row], alone[0], rtol=1e-4, atol=1e-5)


def test_every_allocated_expert_trains() -> None:
    stacks = []
    for steps in (1, 2):  # B is zero at first, so that A moves in the second step
        learner = make()
        learner.training = TrainingConfig(**{**vars(TRAINING), "max_steps": steps})
        learner.learn(toy_task(0))
        stacks.append({key: layer.bank for key, layer in learner.method.layers.items()})
    for key in own(learner, 0):
        one, two = (found[key] for found in stacks)
        assert bool(one.B.all().any()), key
        assert not torch.equal(one.A.all(), two.A.all()), key


def test_the_same_seed_allocates_the_same_and_scorers_differ() -> None:
    first, second = teach(make(), 2), teach(make(), 2)
    assert first.method.allocation == second.method.allocation
    by_chance = teach(make(RandomAllocationConfig(budget=6)), 2)
    assert own(by_chance, 0) != own(by_chance, 1)
    alike = teach(make(UniformAllocationConfig(budget=6)), 2)
    assert own(alike, 0) == own(alike, 1)
    towers = [key.split("/")[0] for key in own(alike, 0)]
    assert towers.count("vision") == towers.count("text") == 3


def test_saved_loaded_and_taught_on(tmp_path: Path) -> None:
    learner = teach(make(), 2)
    learner.save_pretrained(tmp_path)
    assert Allocation.load(tmp_path / "allocation.json") == learner.method.allocation
    (tmp_path / "allocation.json").unlink()  # it is for readers: the tensors know
    loaded = Learner.from_pretrained(tmp_path, model=toy_backbone("clip"), training=TRAINING)
    assert loaded.method.allocation == learner.method.allocation
    batch = mixed_batch(learner.backbone)
    for task in (0, 1):
        assert torch.equal(answer(learner, batch, task), answer(loaded, batch, task))
    learner.learn(toy_task(2))
    loaded.learn(toy_task(2))
    mine, theirs = export_state(learner.method), export_state(loaded.method)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert loaded.method.allocation == learner.method.allocation
    assert learner.method.allocation is not None
    assert learner.method.allocation.tasks[:2] == loaded.method.allocation.tasks[:2]


def test_an_allocation_is_taken_from_a_file_edited_or_not(tmp_path: Path) -> None:
    learner = teach(make(), 2)
    assert learner.method.allocation is not None
    path = tmp_path / "mine.json"
    found, names = learner.method.allocation, learner.task_names
    moved = next(iter(found.of(names[0]).experts))
    free = next(site for site in found.sites if site not in found.of(names[0]).experts)
    found.changed(names[0], {moved: 0, free: 1}).save(path)
    again = teach(make(str(path)), 2)
    assert own(again, 1) == own(learner, 1)
    assert free.replace(".", "/") in own(again, 0) and moved.replace(".", "/") not in own(again, 0)
    again.save_pretrained(tmp_path / "artefact")
    path.unlink()  # an artefact does not need it
    loaded = Learner.from_pretrained(tmp_path / "artefact", model=toy_backbone("clip"))
    assert loaded.method.allocation == again.method.allocation
    with pytest.raises(StorageError, match=r"mine.json is missing"):
        loaded.learn(toy_task(2))
    assert loaded.task_names == again.task_names  # half a task is none


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    learner = teach(make(), 1)
    assert learner.method.allocation is not None
    path, name = tmp_path / "a.json", learner.task_names[0]
    site = next(iter(learner.method.allocation.of(name).experts))
    learner.method.allocation.changed(name, {site: 2}).save(path)
    with pytest.raises(ConfigError, match=r"at most 1 expert per site and task; .* wants 2 at"):
        make(str(path)).learn(toy_task(0))
    learner.method.allocation.save(path)
    with pytest.raises(ConfigError, match=r"a.json: unknown task of the allocation 'green shapes'"):
        make(str(path)).learn(toy_task(1))
    with pytest.raises(StorageError, match=rf"task '{name}': unknown site"):
        make(str(path), target_modules=("out_proj",)).learn(toy_task(0))
    with pytest.raises(ConfigError, match=r"or the path of a \.json file"):
        LoRAPerTaskConfig(allocation="gradient")


def run_of(folder: Path, allocation: Any = GRADIENT, **training: Any) -> ContinualRun:
    config = RunConfig(
        method=LoRAPerTaskConfig(r=R, lora_dropout=0.1, allocation=allocation),
        stream={"name": "toy"},
        training=settings(max_steps=6, save_steps=3, **training),
        evaluation=EvaluationConfig(batch_size=5),
    )
    tasks = tuple(toy_task(index, 20) for index in range(3))
    backbone = DualEncoder(toy_model(), ToyProcessor(), name="toy")
    return ContinualRun(config, folder, stream=Stream(name="toy", tasks=tasks), backbone=backbone)


class Killed(Exception):
    pass


@pytest.mark.parametrize("task", [0, 1, 2])
def test_killed_in_the_middle_of_a_task_a_run_goes_on_bit_for_bit(
    task: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_of(tmp_path / "whole")
    whole.run()
    killed = run_of(tmp_path / "killed")
    save = killed._save

    def die(done: int, step: int, moments: Any) -> None:
        save(done, step, moments)
        if (done, step) == (task, 3):
            raise Killed

    monkeypatch.setattr(killed, "_save", die)
    with pytest.raises(Killed):
        killed.run()
    looked: list[int] = []
    again = run_of(tmp_path / "killed")
    preview = again.learner.method.preview

    def look(index: int, samples: Any) -> None:
        looked.append(index)
        preview(index, samples)

    monkeypatch.setattr(again.learner.method, "preview", look)
    again.run(resume=True)
    assert looked == list(range(task + 1, 3))  # what was decided is not decided again
    for name in ("experts.safetensors", "allocation.json", "matrix.json", "routing.json"):
        one, two = (tmp_path / folder / name for folder in ("whole", "killed"))
        assert one.read_bytes() == two.read_bytes(), name


def test_a_run_that_breaks_off_leaves_no_row() -> None:
    learner = teach(make(), 1)
    before = learner.method.allocation
    learner.training = TrainingConfig(**{**vars(TRAINING), "learning_rate": 1e30})
    with pytest.raises(Exception, match="loss"):
        learner.learn(toy_task(1))
    assert learner.method.allocation == before and len(learner.method.allocator.rows()) == 1
    learner.training = TRAINING
    learner.learn(toy_task(1))
    assert learner.method.allocation == teach(make(), 2).method.allocation


def deep(path: Path, blocks: Sequence[Sequence[int]], towers: Sequence[str]) -> str:
    """A file that puts experts of toy tasks into blocks of towers of a deep toy CLIP."""
    method = LoRAPerTask(LoRAPerTaskConfig(r=R, allocation=GRADIENT), deep_backbone("clip"))
    assert method.allocator is not None
    tasks = []
    for index, own_blocks in enumerate(blocks):
        wanted = [f"{tower}.{block}.q_proj" for tower in towers for block in own_blocks]
        tasks.append({"task": toy_task(index).name, "experts": dict.fromkeys(wanted, 1)})
    value = {"format_version": 1, "sites": list(method.allocator.names), "tasks": tasks}
    path.write_text(json.dumps(value))
    return str(path)


def test_what_lies_below_a_task_s_lowest_expert_runs_once(tmp_path: Path) -> None:
    path = deep(tmp_path / "a.json", [(2, 3), (1,), (3,)], ("vision",))
    learner = learner_of(LoRAPerTaskConfig(r=R, allocation=path), max_steps=10)
    host = learner.backbone.host
    assert host.lowest("vision") is None
    trained = []
    for index in range(3):
        task = toy_task(index, 20)
        trained.append(rows_through(learner.backbone, 2, lambda task=task: learner.learn(task)))
    assert [host.lowest("vision", task) for task in range(3)] == [2, 1, 3]
    assert host.lowest("vision") == 1 and host.lowest("vision", BASE) is None
    assert host.lowest("text") is None
    # 80 rows in 10 steps of 8; below the experts of the third task, 20 samples once (24: filled up)
    assert trained == [80, 80, 24]


@pytest.mark.parametrize("towers", [("vision",), ("text",), ("vision", "text")])
def test_caches_change_no_result(towers: tuple[str, ...], tmp_path: Path) -> None:
    path = deep(tmp_path / "a.json", [(2, 3), (1,), (3,)], towers)
    method = LoRAPerTaskConfig(r=R, lora_dropout=0.1, allocation=path)
    found = []
    for cache in (True, False):
        kept: dict[str, Any] = {} if cache else {"prefix_cache": "off"}
        learner = learner_of(method, cache=cache, **kept)
        scores = []
        for index in range(3):
            learner.learn(toy_task(index, 20))
            scores += [learner.evaluate(toy_task(i, 20)).score for i in range(3)]
        found.append((scores, export_state(learner.method)))
    (scores, state), (plain_scores, plain_state) = found
    assert scores == plain_scores
    for name, value in state.items():
        torch.testing.assert_close(value, plain_state[name], rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("kind", ["vilt", "clip-fusion"])
def test_pairs_with_missing_modalities_are_allocated_and_learned(kind: str, tmp_path: Path) -> None:
    floors = {"text": 0.5} if kind == "clip-fusion" else {}
    method = LoRAPerTaskConfig(
        r=R,
        allocation=GradientAllocationConfig(
            budget=3, unit="layers", sample=1.0, floors=floors, reduction="norm_of_mean"
        ),
        selector=TaskKeySelectorConfig(),
    )
    learner = pair_learner(method, kind)
    for index in range(2):
        learner.learn(pair_task(index))
    allocation = learner.method.allocation
    assert allocation is not None
    for task in learner.task_names:
        assert sum(allocation.per_tower(task).values()) == 3 * 4
        if kind == "clip-fusion":
            assert allocation.per_tower(task)["text"] >= 4
    learner.save_pretrained(tmp_path)
    loaded = Learner.from_pretrained(tmp_path, model=learner.backbone)
    assert loaded.method.allocation == allocation
    for index in range(2):
        assert loaded.evaluate(pair_task(index)) == learner.evaluate(pair_task(index))


def config_of(path: Path, **allocation: Any) -> Path:
    """A configuration of the embedded tiny CLIP, in JSON (which is YAML)."""
    method = {"type": "lora-per-task", "r": R, "allocation": {"type": "gradient", **allocation}}
    value = {"method": method, "backbone": "clip-tiny", "stream": "mosaic/domains"}
    path.write_text(json.dumps(value))
    return path


def test_inspect_counts_a_budget_without_data(tmp_path: Path) -> None:
    config = read_config(config_of(tmp_path / "a.yaml", budget=5))
    result = inspect_config(config, tasks=3)
    assert result.allocation is not None
    places = [result.allocation.of(f"task {index}").experts for index in range(3)]
    assert [len(experts) for experts in places] == [5, 5, 5]
    sizes = {site.name: site.parameters for site in result.sites}
    assert sum(sizes.values()) == result.parameters["experts"] == sum(result.trainable)
    assert {name for name, size in sizes.items() if size} == set(places[0])
    for site in result.sites:
        assert bool(site.flops) == (site.name in places[2])
    for tower, cost in result.training.items():
        layers = [int(name.split(".")[1]) for name in places[2] if name.startswith(tower)]
        assert cost.lowest == min(layers)


def test_inspect_shows_where_a_run_put_its_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["training.max_steps=1", "training.warmup_steps=0", "evaluation.baseline=false"]
    words += [
        "stream.order=[digits,flags]",
        "stream.limit=8",
        "stream.test_limit=4",
        "training.per_device_train_batch_size=4",
    ]
    path = config_of(tmp_path / "a.yaml", budget=5, sample=4)
    settled = read_config(path, words)
    ContinualRun(settled, tmp_path / "run").run()
    found = Allocation.load(tmp_path / "run" / "allocation.json")
    result = inspect_run(tmp_path / "run")
    assert result.allocation == found and len(found.tasks) == 2
    stored = json.loads((tmp_path / "run" / "run.json").read_text())["history"]
    assert result.trainable == [entry["trainable_parameters"] for entry in stored]
    assert result.stored_bytes == [entry["stored_bytes"] for entry in stored]
    with pytest.raises(SystemExit) as end:
        main(["inspect", str(tmp_path / "run")])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert found.table() in shown
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "run"), "--json"])
    assert Allocation.from_json(json.loads(capsys.readouterr().out)["allocation"]) == found
    with pytest.raises(SystemExit) as end:
        main(["inspect", str(tmp_path / "run"), "seed=3"])
    assert end.value.code == 2 and "settings are fixed" in capsys.readouterr().err
