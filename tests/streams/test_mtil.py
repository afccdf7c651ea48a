"""MTIL: published layouts, orders, splits, names, prompts, and what is said of missing data."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.streams import builders

from evolora.errors import DataError, StreamError
from evolora.streams import mtil
from evolora.streams.mtil_prompts import CLASS_COUNTS, FLOWERS, ORDERS, TEMPLATES, class_name
from evolora.streams.mtil_readers import benchmark_split
from evolora.streams.sampling import ImageFiles
from evolora.streams.task import Stream, Task


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mtil")
    for build in builders.ALL.values():
        build(folder)
    return folder


def only(stream: Stream) -> Task:
    (task,) = stream.tasks
    return task


def labels(data: object) -> list[int]:
    return [data[row].label for row in range(len(data))]  # type: ignore[index,arg-type]


def keys(data: object) -> list[str]:
    return [data[row].key for row in range(len(data))]  # type: ignore[index,arg-type]


def test_orders_and_counts_are_the_published_ones() -> None:
    assert ORDERS["I"][0] == "aircraft" and ORDERS["I"][-1] == "sun397"
    assert ORDERS["II"] == (
        *("cars", "food", "mnist", "pets", "flowers", "sun397"),
        *("aircraft", "caltech101", "dtd", "eurosat", "cifar100"),
    )
    # Spec 9.2: the permutation that takes order I to order II, 0-based.
    assert [ORDERS["I"].index(name) for name in ORDERS["II"]] == [9, 6, 7, 8, 5, 10, 0, 1, 3, 4, 2]
    assert sum(CLASS_COUNTS.values()) == 1201
    assert {name: len(templates) for name, templates in TEMPLATES.items()} == {
        **{"aircraft": 2, "caltech101": 34, "cifar100": 18, "dtd": 8, "eurosat": 3, "flowers": 1},
        **{"food": 1, "mnist": 1, "pets": 1, "cars": 9, "sun397": 2},
    }
    assert len(set(FLOWERS)) == 102
    for templates in TEMPLATES.values():
        assert len(set(templates)) == len(templates)


def test_first_templates_and_a_few_of_the_rest() -> None:
    firsts = {name: templates[0] for name, templates in TEMPLATES.items()}
    assert firsts == {
        "aircraft": "a photo of a {}, a type of aircraft.",
        "caltech101": "a photo of a {}.",
        "cifar100": "a photo of a {}.",
        "dtd": "a photo of a {} texture.",
        "eurosat": "a centered satellite photo of {}.",
        "flowers": "a photo of a {}, a type of flower.",
        "food": "a photo of a {}, a type of food.",
        "mnist": 'a photo of the number: "{}".',
        "pets": "a photo of a {}, a type of pet.",
        "cars": "a photo of a {}, a type of car.",
        "sun397": "a photo of a {}.",
    }
    assert TEMPLATES["cifar100"][9] == "a photo of the {}."
    assert TEMPLATES["cifar100"][-1] == "a photo of the big {}."
    assert TEMPLATES["caltech101"][10] == "a {} in a video game."
    assert TEMPLATES["caltech101"][-2:] == ("a drawing of the {}.", "a doodle of the {}.")
    assert TEMPLATES["dtd"][-1] == "a photo of the {} object."
    assert TEMPLATES["cars"][4] == "i love my {}!"


def test_class_names_are_rewritten_as_published() -> None:
    assert class_name("caltech101", "Faces_easy") == "centered face"
    assert class_name("caltech101", "faces") == "off-center face"
    assert class_name("caltech101", "water_lilly") == "water lilly"
    assert class_name("eurosat", "SeaLake") == "lake or sea"
    assert class_name("pets", "american_bulldog") == "American Bulldog"
    assert class_name("sun397", "/a/apartment_building/outdoor") == "apartment building/outdoor"
    assert class_name("mnist", "7") == "7 - seven"
    assert class_name("food", "apple_pie") == "apple pie"


def test_whole_stream_in_both_orders(root: Path) -> None:
    for name in ("I", "II"):
        stream = mtil.load(root=root, order=name)
        assert tuple(task.name for task in stream) == ORDERS[name]
        assert stream.label_protocol == "task"
        assert stream.name == "mtil" and str(root) in stream.source
    for task in stream:
        assert task.labels.templates == TEMPLATES[task.name]
        for data in (task.train, task.val, task.test):
            for row in range(len(data)):
                example = data[row]
                assert example.inputs["image"].dtype == torch.uint8
                assert 0 <= example.label < len(task.labels.classes)
        train, test = set(keys(task.train)), set(keys(task.test))
        assert len(train) == len(task.train) and not train & test


EXPECTED: dict[str, tuple[list[str], list[int], list[int], list[int]]] = {
    # class names, labels of train, val, test; None-like [] where a random split decides
    "aircraft": (["707-320", "F-16A/B", "BAE 146-200"], [2, 0, 1], [2, 0, 1], [2, 0, 1]),
    "dtd": (["banded", "polka-dotted"], [1, 0], [1, 0], [1, 0]),
    "food": (["apple pie", "waffles"], [0, 1], [], [0, 1]),
    "pets": (["Abyssinian", "American Bulldog"], [0, 1], [], [0, 1]),
    "cars": (["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], [1, 0], [], [1, 0]),
    "cifar100": (["apple", "lawn mower", "worm"], [0, 1, 2] * 4, [], [0, 1, 2] * 2),
    "flowers": (list(FLOWERS), [76, 0], [76, 0], [101, 101]),
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_official_splits_names_and_labels(root: Path, name: str) -> None:
    task = only(mtil.load(root=root, order=[name]))
    classes, train, val, test = EXPECTED[name]
    assert list(task.labels.classes) == classes
    assert (labels(task.train), labels(task.val), labels(task.test)) == (train, val, test)


def test_labels_point_at_the_right_files(root: Path) -> None:
    aircraft = only(mtil.load(root=root, order=["aircraft"]))
    assert keys(aircraft.train) == [f"images/000000{n}.jpg" for n in (1, 2, 3)]
    flowers = only(mtil.load(root=root, order=["flowers"]))
    assert keys(flowers.train) == ["jpg/image_00002.jpg", "jpg/image_00003.jpg"]
    assert flowers.labels.classes[76] == "passion flower"
    cifar = only(mtil.load(root=root, order=["cifar100"]))
    image = cifar.train[4].inputs["image"]  # second round, class 1
    assert image[:, 5, 7].tolist() == [1, 1, 200] and tuple(image.shape) == (3, 32, 32)


def test_random_splits_follow_the_benchmarks_generator(root: Path) -> None:
    task = only(mtil.load(root=root, order=["caltech101"]))
    assert task.labels.classes == ("off-center face", "centered face", "accordion", "water lilly")
    folders = ("Faces", "Faces_easy", "accordion", "water_lilly")
    files = [f"{folder}/image_{n:04d}.jpg" for folder in folders for n in range(1, 6)]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(42)).tolist()
    assert keys(task.train) == [files[row] for row in order[:16]]
    assert keys(task.test) == [files[row] for row in order[16:]]
    assert labels(task.test) == [row // 5 for row in order[16:]]
    again = only(mtil.load(root=root, order=["caltech101"], seed=7))
    assert keys(again.train) == keys(task.train)  # the seed does not touch published splits


def test_random_split_sizes_round_down() -> None:
    data = ImageFiles(paths=(Path("x"),) * 8677, labels=(0,) * 8677, keys=("k",) * 8677)
    train, test = benchmark_split(data)
    assert (len(train), len(test)) == (6941, 1736)  # Caltech101's size


def test_sun397_reads_nested_classes(root: Path) -> None:
    task = only(mtil.load(root=root, order=["sun397"]))
    assert task.labels.classes == ("abbey", "apartment building/outdoor", "youth hostel")
    for data in (task.train, task.test):
        for key, label in zip(keys(data), labels(data), strict=True):
            folders = ("a/abbey/", "a/apartment_building/outdoor/", "y/youth_hostel/")
            assert key.startswith(folders[label])


def test_mnist_plain_and_compressed(root: Path, tmp_path: Path) -> None:
    builders.mnist(tmp_path, compress=False)
    for folder in (root, tmp_path):
        task = only(mtil.load(root=folder, order=["mnist"]))
        assert task.labels.classes[3] == "3 - three"
        assert labels(task.train) == [n % 10 for n in range(20)]
        assert task.test[4].inputs["image"].unique().tolist() == [80]
        assert tuple(task.test[4].inputs["image"].shape) == (3, 28, 28)


def test_cars_from_csv_files(tmp_path: Path) -> None:
    base = tmp_path / "cars"
    for name in ("a.jpg", "b.jpg"):
        builders.save_image(base / name)
    builders.write(base / "train.csv", "image,label\na.jpg,Audi TT\nb.jpg,BMW M3\n")
    builders.write(base / "test.csv", "label,image\nBMW M3,b.jpg\n")
    task = only(mtil.load(root=tmp_path, order=["cars"]))
    assert task.labels.classes == ("Audi TT", "BMW M3")
    assert labels(task.train) == [0, 1] and labels(task.test) == [1]


def test_partial_data_is_said_to_be_partial(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        mtil.load(root=root, order=["dtd", "flowers"])
    assert "mtil/dtd has 2 classes, the published set 47" in caplog.text
    assert "mtil/flowers has 2 training and 2 test samples" in caplog.text


def test_shots_take_as_many_of_each_class_and_leave_the_test(root: Path) -> None:
    task = only(mtil.load(root=root, order=["cifar100"], shots=2))
    assert sorted(labels(task.train)) == [0, 0, 1, 1, 2, 2]
    assert len(task.test) == 6
    again = only(mtil.load(root=root, order=["cifar100"], shots=2))
    assert keys(again.train) == keys(task.train)
    others = [
        keys(only(mtil.load(root=root, order=["cifar100"], shots=2, seed=seed)).train)
        for seed in range(5)
    ]
    assert any(other != keys(task.train) for other in others)


def test_limit_is_balanced_over_classes_and_seeded(root: Path) -> None:
    task = only(mtil.load(root=root, order=["cifar100"], limit=6))
    assert sorted(labels(task.train)) == [0, 0, 1, 1, 2, 2]
    assert len(task.test) == 6
    small = only(mtil.load(root=root, order=["cifar100"], limit=2))
    assert len(set(labels(small.train))) == 2 and len(small.test) == 2


def test_all_missing_data_sets_are_listed_at_once(tmp_path: Path) -> None:
    builders.food(tmp_path)
    with pytest.raises(StreamError) as caught:
        mtil.load(root=tmp_path)
    message = str(caught.value)
    assert message.startswith("10 of 11 MTIL data sets cannot be read: aircraft: not in ")
    assert "food:" not in message and "\n" not in message
    for name in set(CLASS_COUNTS) - {"food"}:
        assert f"{name}: not in " in message
    assert str(tmp_path / "fgvc-aircraft-2013b") in message
    assert "data/images_variant_{train,val,test}.txt" in message
    assert "pickle, which is not opened" in message


def test_default_root_is_named_when_nothing_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StreamError, match="data/MNIST/raw"):
        mtil.load(order=["mnist"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"order": "III"}, "order must be one of 'I', 'II'; got 'III'"),
        ({"order": ["aircrafts"]}, "did you mean 'aircraft'"),
        ({"order": ["food", "food"]}, "names each data set once"),
        ({"order": []}, "names each data set once"),
        ({"source": "folder"}, "did you mean 'folders'"),
        ({"shots": 0, "order": ["food"]}, "shots must be at least 1; got 0"),
        ({"limit": -1, "order": ["food"]}, "limit must be at least 1; got -1"),
    ],
)
def test_wrong_options(root: Path, options: dict[str, object], says: str) -> None:
    with pytest.raises(StreamError) as caught:
        mtil.load(root=root, **options)  # type: ignore[arg-type]
    assert says in str(caught.value)


DAMAGE = {
    "unknown variant": (
        builders.aircraft,
        ("fgvc-aircraft-2013b/data/images_variant_test.txt", "0000007 Concorde\n"),
        "images_variant_test.txt, entry 1: 'Concorde' is not a known class",
    ),
    "pets line": (
        builders.pets,
        ("oxford-iiit-pet/annotations/test.txt", "Abyssinian_2\n"),
        "test.txt, entry 1: expected 'image class ...'",
    ),
    "class without folder": (
        builders.sun397,
        ("SUN397/ClassName.txt", "/a/abbey\n/z/zoo\n"),
        "SUN397/z/zoo is missing",
    ),
    "cut cifar": (
        builders.cifar100,
        ("cifar-100-binary/test.bin", "abc"),
        "must be a multiple of 3074 bytes; got 3",
    ),
    "bad mat": (
        builders.flowers,
        ("flowers-102/setid.mat", "not matlab"),
        "setid.mat is not a readable MATLAB file",
    ),
    "bad gzip": (
        builders.mnist,
        ("MNIST/raw/t10k-labels-idx1-ubyte.gz", "nonsense"),
        "t10k-labels-idx1-ubyte.gz is damaged",
    ),
    "list without images": (
        builders.food,
        ("food-101/meta/train.txt", "waffles/gone\n"),
        "images/waffles/gone.jpg is missing, but it is listed",
    ),
}


@pytest.mark.parametrize("case", sorted(DAMAGE))
def test_damaged_data_is_named_with_file_and_place(tmp_path: Path, case: str) -> None:
    build, (file, text), says = DAMAGE[case]
    build(tmp_path)
    builders.write(tmp_path / file, text)
    with pytest.raises(StreamError) as caught:
        mtil.load(root=tmp_path, order=[build.__name__])
    assert says in str(caught.value)


def test_short_idx_header_and_wrong_magic(tmp_path: Path) -> None:
    builders.mnist(tmp_path, compress=False)
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    good = path.read_bytes()
    for bad in (good[:7], good[:-1], b"\0\0\x08\x01" + good[4:], b""):
        path.write_bytes(bad)
        with pytest.raises(StreamError, match="train-images-idx3-ubyte is damaged"):
            mtil.load(root=tmp_path, order=["mnist"])


def test_python_version_of_cifar_is_explained(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    with pytest.raises(StreamError, match="the python version is a pickle"):
        mtil.load(root=tmp_path, order=["cifar100"])


def test_missing_scipy_is_a_hint(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(StreamError, match=r"needs scipy \(pip install 'evolora\[data\]'\)"):
        mtil.load(root=root, order=["flowers"])


def test_unreadable_image_is_an_error_on_access_only(tmp_path: Path) -> None:
    builders.food(tmp_path)
    builders.write(tmp_path / "food-101/images/waffles/train1.jpg", "not an image")
    task = only(mtil.load(root=tmp_path, order=["food"]))
    assert task.train[0].label == 0
    with pytest.raises(DataError, match=r"train1\.jpg"):
        task.train[1]


def test_listing_streams_does_not_import_torch() -> None:
    code = (
        "import sys, evolora.streams.mtil, evolora.streams.own_data\n"
        "import evolora.streams.class_incremental\n"
        "heavy = {'torch', 'PIL', 'numpy', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
