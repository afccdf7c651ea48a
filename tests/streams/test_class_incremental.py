"""Class-incremental streams: steps, orders, labels within a step, and the published settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.streams import builders

from evolora.errors import StreamError
from evolora.streams import class_incremental
from evolora.streams.task import Example, LabelSpace, Stream, Task


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cifar")
    builders.cifar100(root, classes=[f"class_{n}" for n in range(100)])
    return root


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    builders.tiny_imagenet(root, classes=8)
    return root


def first_pixel(example: Any) -> int:
    """Return the class number that the CIFAR fixture paints into the red plane."""
    return int(example.inputs["image"][0, 0, 0])


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_cifar_in_equal_steps_covers_every_class_once(cifar: Path, steps: int) -> None:
    stream = class_incremental.load(dataset="cifar100", root=cifar, steps=steps)
    assert stream.label_protocol == "seen" and len(stream) == steps
    names = [name for task in stream for name in task.labels.classes]
    assert sorted(names) == sorted(f"class {n}" for n in range(100))
    for task in stream:
        assert len(task.labels.classes) == 100 // steps
        assert task.labels.templates == ("a bad photo of a {}.",)
        assert len(task.train) == 4 * len(task.labels.classes)
        assert len(task.test) == 2 * len(task.labels.classes)


def test_labels_are_those_of_the_step(cifar: Path) -> None:
    stream = class_incremental.load(dataset="cifar100", root=cifar, steps=10, seed=3)
    for task in stream:
        for data in (task.train, task.test):
            for row in range(len(data)):
                example = data[row]
                assert task.labels.classes[example.label] == f"class {first_pixel(example)}"


def test_order_depends_on_the_seed_alone(cifar: Path) -> None:
    def order(**options: Any) -> list[str]:
        stream = class_incremental.load(dataset="cifar100", root=cifar, steps=10, **options)
        return [name for task in stream for name in task.labels.classes]

    assert order(seed=1) == order(seed=1) == order(seed=1, limit=5)
    assert order(seed=1) != order(seed=2)
    assert order(class_order=range(100)) == [f"class {n}" for n in range(100)]
    published = order(class_order="published")
    assert published[:4] == ["class 87", "class 0", "class 52", "class 58"]
    assert len(set(published)) == 100


def test_published_orders_are_permutations() -> None:
    for dataset, classes in (("cifar100", 100), ("tiny-imagenet", 200)):
        order = class_incremental._published_order("published", dataset)
        assert sorted(order) == list(range(classes))


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_tiny_imagenets_published_settings(steps: int) -> None:
    groups = class_incremental._groups(list(range(200)), steps, 100)
    assert [len(group) for group in groups] == [100] + [100 // steps] * steps
    assert [n for group in groups for n in group] == list(range(200))


def test_tiny_imagenet_layout(tiny: Path) -> None:
    stream = class_incremental.load(
        dataset="tiny-imagenet", root=tiny, steps=2, base_classes=4, class_order=range(8)
    )
    assert [len(task.labels.classes) for task in stream] == [4, 2, 2]
    # Two classes share their first synonym, so both show all.
    assert stream.tasks[0].labels.classes == ("crane, machine", "crane, bird", "thing 0", "thing 1")
    second = stream.tasks[1]
    assert [second.train[row].label for row in range(6)] == [0, 0, 0, 1, 1, 1]
    assert second.train[0].key == "train/n00000004/images/n00000004_0.JPEG"
    assert [second.test[row].key for row in range(2)] == [
        "val/images/val_4.JPEG",
        "val/images/val_5.JPEG",
    ]


def test_root_may_be_the_data_sets_own_folder(cifar: Path, tiny: Path) -> None:
    own = {"cifar100": cifar / "cifar-100-binary", "tiny-imagenet": tiny / "tiny-imagenet-200"}
    for dataset, root in own.items():
        assert len(class_incremental.load(dataset=dataset, root=root, steps=2)) == 2


def test_limit_and_templates(cifar: Path) -> None:
    stream = class_incremental.load(
        dataset="cifar100", root=cifar, steps=10, limit=10, templates=["art of a {}."]
    )
    for task in stream:
        assert sorted(task.train[row].label for row in range(len(task.train))) == list(range(10))
        assert len(task.test) == 10
        assert task.labels.templates == ("art of a {}.",)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 3}, "100 classes less 0 base classes do not split into 3 equal steps"),
        ({"steps": 0}, "do not split into 0"),
        ({"steps": 5, "base_classes": 99}, "100 classes less 99 base classes"),
        ({"steps": 5, "base_classes": -10}, "less -10 base classes"),
        ({"steps": 5, "class_order": [0, 1]}, "permutation of 0 to 99; got 2 numbers"),
        ({"steps": 5, "class_order": [0] * 100}, "100 numbers, 1 different"),
        ({"steps": 5, "class_order": "publishd"}, "did you mean 'published'"),
        ({"steps": 5, "dataset": "cifar10"}, "did you mean 'cifar100'"),
    ],
)
def test_wrong_options(cifar: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(StreamError) as caught:
        class_incremental.load(**{"dataset": "cifar100", "root": cifar, **options})
    assert says in str(caught.value)


def test_missing_data_says_where_it_looked(tmp_path: Path) -> None:
    for dataset, layout in (("cifar100", "train.bin"), ("tiny-imagenet", "wnids.txt")):
        with pytest.raises(StreamError) as caught:
            class_incremental.load(dataset=dataset, root=tmp_path, steps=5)
        assert f"{dataset} cannot be read: not in {tmp_path}" in str(caught.value)
        assert layout in str(caught.value)


def test_damaged_tiny_imagenet_is_named(tmp_path: Path) -> None:
    builders.tiny_imagenet(tmp_path)
    base = tmp_path / "tiny-imagenet-200"
    good = (base / "val/val_annotations.txt").read_text(encoding="utf-8")
    builders.write(base / "val/val_annotations.txt", good + "\nval_9.JPEG\tn77777777\t0")
    with pytest.raises(StreamError, match="entry 5: 'n77777777' is not a class"):
        class_incremental.load(dataset="tiny-imagenet", root=tmp_path, steps=2)
    builders.write(base / "val/val_annotations.txt", good)
    builders.write(base / "words.txt", "n00000000\tcrane")
    with pytest.raises(StreamError, match="no name for class 'n00000001'"):
        class_incremental.load(dataset="tiny-imagenet", root=tmp_path, steps=2)


@pytest.mark.parametrize("dataset", ["mosaic-digits", "mosaic-fashion"])
def test_embedded_data_in_five_steps(dataset: str) -> None:
    stream = class_incremental.load(dataset=dataset, steps=5, limit=8)
    assert len(stream) == 5 and stream.label_protocol == "seen"
    assert len({name for task in stream for name in task.labels.classes}) == 10
    for task in stream:
        assert {task.train[row].label for row in range(len(task.train))} == {0, 1}
        assert len(task.train) == 8 and len(task.test) == 8


def test_embedded_data_without_a_label_list_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain:
        """A data set that offers samples only."""

        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> Example:
            image = torch.full((3, 2, 2), index, dtype=torch.uint8)
            return Example(inputs={"image": image}, label=index % 10, key=str(index))

    names = LabelSpace(classes=tuple(f"digit {n}" for n in range(10)))
    task = Task(name="digits", train=Plain(), val=Plain(), test=Plain(), labels=names)
    asked: list[Any] = []

    def domains(**options: Any) -> Stream:
        asked.append(options)
        return Stream(name="mosaic/domains", tasks=(task,))

    monkeypatch.setattr("evolora.streams.mosaic.domains.load", domains)
    stream = class_incremental.load(dataset="mosaic-digits", steps=5, class_order=range(10))
    assert asked == [{"order": ["digits"]}]
    last = stream.tasks[-1]
    assert last.labels.classes == ("digit 8", "digit 9")
    assert [first_pixel(last.train[row]) for row in range(4)] == [8, 9, 18, 19]
    assert [last.test[row].label for row in range(4)] == [0, 1, 0, 1]
