"""The artefact: what it holds, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import ToyProcessor, toy_model, toy_task
from tests.training.worker import PLUGGED, TOY

from evolora.backbones.clip import DualEncoder
from evolora.errors import DataError, EvoloraError, StorageError
from evolora.learner import Learner
from evolora.training.config import TrainingConfig

FAST = TrainingConfig(max_steps=2, warmup_steps=0, per_device_train_batch_size=4)


def toy_backbone(kind: str = "clip", seed: int = 0, name: str = "toy") -> DualEncoder:
    return DualEncoder(toy_model(kind, seed), ToyProcessor(), name=name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artefact") / "a"
    learner = Learner(toy_backbone(), method=TOY["moe-adapters"], training=FAST)
    for index in range(2):
        learner.learn(toy_task(index))
    learner.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def load(folder: Path, **options: Any) -> Learner:
    return Learner.from_pretrained(folder, toy_backbone(), **options)


def edit(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / "evolora.json").read_text())
    for path, value in changes.items():
        place = record
        *parents, last = path.split("__")
        for parent in parents:
            place = place[int(parent) if isinstance(place, list) else parent]
        if value is KeyError:
            del place[last]
        else:
            place[last] = value
    (folder / "evolora.json").write_text(json.dumps(record))


def test_it_holds_safetensors_json_and_a_card_and_nothing_else(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {
        "evolora.json", "experts.safetensors", "README.md",
    }  # fmt: skip
    record = json.loads((saved / "evolora.json").read_text())
    assert record["format_version"] == 1
    assert [task["name"] for task in record["tasks"]] == ["red shapes", "green shapes"]
    card = (saved / "README.md").read_text()
    assert card.startswith("---\n") and "| red shapes | 3 |" in card
    assert record["backbone"]["sha256"] in card
    assert str(Path.cwd()) not in card + json.dumps(record)


def test_it_loads_with_the_same_method_tasks_and_costs(saved: Path) -> None:
    learner = load(saved)
    assert learner.method.config == TOY["moe-adapters"]
    assert learner.task_names == ["red shapes", "green shapes"]
    assert learner.method.labels == [toy_task(0).labels, toy_task(1).labels]
    assert not learner.method.trainable() or not learner.method.training
    assert len(learner.costs) == 2


def test_saving_what_was_loaded_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    load(saved).save_pretrained(tmp_path)
    for name in ("evolora.json", "experts.safetensors", "README.md"):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


@pytest.mark.parametrize(("kind", "seed"), [("clip", 1), ("siglip", 0)])
def test_another_backbone_is_refused_with_the_wanted_one(kind: str, seed: int, saved: Path) -> None:
    with pytest.raises(StorageError) as caught:
        Learner.from_pretrained(saved, toy_backbone(kind, seed))
    wanted = toy_backbone().fingerprint()[:12]
    assert f"was learned on CLIPModel 'toy' with weights sha256 {wanted}" in str(caught.value)
    assert toy_backbone(kind, seed).fingerprint()[:12] in str(caught.value)


def test_one_changed_weight_is_another_backbone(saved: Path) -> None:
    model = toy_model()
    model.logit_scale.data += 1e-6
    with pytest.raises(StorageError, match="was learned on CLIPModel"):
        Learner.from_pretrained(saved, model, ToyProcessor())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version 2, this Evolora reads up to 1; update evolora"),
        ({"method__type": "later"}, "made by method 'later', which is not installed here .known: "),
        ({"method__type": KeyError}, "made by method None"),
        ({"method__r": "wide"}, "corrupt: method.r: "),
        ({"method__rr": 3}, "corrupt: method.rr: unknown setting"),
        ({"method__r": 8}, "has shape"),
        ({"method": KeyError}, "corrupt: 'method' is missing"),
        ({"backbone": KeyError}, "corrupt: 'backbone' is missing"),
        ({"backbone__sha256": KeyError}, "corrupt: 'sha256' is missing"),
        ({"tasks": KeyError}, "corrupt: 'tasks' is missing"),
        ({"tasks": 3}, "corrupt: "),
        ({"tasks__0__classes": []}, "corrupt: a label space needs at least one class"),
        ({"tasks__0__name": KeyError}, "corrupt: 'name' is missing"),
        ({"cost": [{"x": 1}]}, "corrupt: "),
        ({"tensors": KeyError}, "corrupt: 'tensors' is missing"),
        ({"tensors__sha256": "0"}, "experts.safetensors is truncated or altered"),
        ({"seed": KeyError}, "corrupt: 'seed' is missing"),
    ],
)
def test_a_damaged_index_is_one_error(changes: dict[str, Any], message: str, copy: Path) -> None:
    edit(copy, **changes)
    with pytest.raises(StorageError, match=message) as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_files_are_named(copy: Path) -> None:
    (copy / "experts.safetensors").rename(copy / "elsewhere")
    with pytest.raises(StorageError, match=r"cannot read .*experts\.safetensors: No such file"):
        load(copy)
    (copy / "evolora.json").write_text('{"format_version": 1,')
    with pytest.raises(StorageError, match=r"evolora\.json is not valid JSON"):
        load(copy)
    (copy / "evolora.json").unlink()
    with pytest.raises(StorageError, match=r"no artefact at .*: evolora\.json is missing"):
        load(copy)


def test_an_artefact_of_a_nameless_backbone_asks_for_it(tmp_path: Path) -> None:
    Learner(toy_backbone(name=""), method=TOY["zero-shot"]).save_pretrained(tmp_path)
    with pytest.raises(StorageError, match=r"a CLIPModel that had no name .*; pass it as model="):
        Learner.from_pretrained(tmp_path)
    assert load(tmp_path).task_names == []


@pytest.mark.parametrize("name", sorted(set(TOY) - set(PLUGGED)))
def test_every_method_survives_save_and_load(name: str, tmp_path: Path) -> None:
    learner = Learner(toy_backbone(), method=TOY[name], training=FAST)
    tasks = [toy_task(0), toy_task(1)]
    if learner.method.joint:
        learner.learn_jointly(tasks)
    else:
        for task in tasks:
            learner.learn(task)
    learner.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    images = [toy_task(index).test[row].inputs["image"] for index in range(3) for row in range(3)]
    assert loaded.predict(images) == learner.predict(images)
    for task in tasks:
        assert loaded.predict(images, task=task.name) == learner.predict(images, task=task.name)
        assert loaded.evaluate(task) == learner.evaluate(task)


def test_a_file_in_the_place_of_the_folder_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file")
    with pytest.raises(StorageError, match="cannot write"):
        Learner(toy_backbone(), method=TOY["zero-shot"]).save_pretrained(tmp_path / "a")
    with pytest.raises(EvoloraError):
        load(tmp_path / "a")


def test_an_artefact_whose_backbone_is_gone_says_where_it_looked(tmp_path: Path) -> None:
    name = str(tmp_path / "gone")
    Learner(toy_backbone(name=name), method=TOY["zero-shot"]).save_pretrained(tmp_path / "a")
    with pytest.raises(DataError, match=r"no backbone '.*gone'"):
        Learner.from_pretrained(tmp_path / "a")


def test_how_the_backbone_was_wrapped_is_remembered(tmp_path: Path) -> None:
    from tests.backbones.test_loading import saved_vilt

    from evolora.backbones.clip_fusion import ClipFusion
    from evolora.backbones.loading import load_backbone
    from evolora.backbones.vilt import Vilt
    from evolora.methods.linear_probe import LinearProbeConfig

    fused = Learner(load_backbone("clip-tiny", type="clip-fusion"), method=LinearProbeConfig())
    fused.save_pretrained(tmp_path / "fused")
    assert isinstance(Learner.from_pretrained(tmp_path / "fused").backbone, ClipFusion)
    folder = str(saved_vilt(tmp_path / "vilt"))
    long = Learner(load_backbone(folder, text_length=20), method=LinearProbeConfig())
    long.save_pretrained(tmp_path / "long")
    again = Learner.from_pretrained(tmp_path / "long").backbone
    assert isinstance(again, Vilt) and again.text_length == 20
    plain = load_backbone(folder).model
    given = Learner.from_pretrained(tmp_path / "long", plain).backbone
    assert isinstance(given, Vilt) and given.fingerprint() == again.fingerprint()
