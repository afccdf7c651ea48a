"""The embedded pairs of `mosaic/missing`, and how their texts are made."""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from PIL import Image

from evolora.assets import ROOT
from evolora.config import load_stream
from evolora.errors import ConfigError, DataError, StreamError
from evolora.streams.mosaic import build_missing, families, pair_suite, pairs, words
from evolora.streams.mosaic.missing import PackedPairs
from evolora.streams.mosaic.reading import read_packed
from evolora.streams.task import Stream

BOTH = pytest.mark.parametrize("labels", ["single", "multi"])


def stream(labels: str, **options: object) -> Stream:
    return load_stream("mosaic/missing", labels=labels, **options)


def splits(task: object) -> dict[str, PackedPairs]:
    return {name: getattr(task, name) for name in ("train", "val", "test")}


@BOTH
def test_there_are_at_least_five_tasks_with_enough_pairs_of_every_class(labels: str) -> None:
    found = stream(labels)
    assert len(found) >= 5 and found.label_protocol == "seen"
    names = [name for task in found for name in task.labels.classes]
    assert len(set(names)) == len(names)
    for task in found:
        assert task.modalities == ("image", "text")
        assert len(task.train) >= 250 and len(task.val) >= 30 and len(task.test) >= 90
        for part, least in (("train", 10), ("test", 3)):
            rows = splits(task)[part].labels
            hot = torch.tensor(rows)
            if labels == "single":
                hot = torch.nn.functional.one_hot(hot, len(task.labels.classes))
            assert hot.sum(0).min() >= least, task.name


def test_a_sample_is_a_picture_and_a_text_with_one_label() -> None:
    for task in stream("single"):
        assert task.metric == "accuracy" and not task.labels.multi_label
        example = task.train[0]
        assert set(example.inputs) == {"image", "text"}
        image = example.inputs["image"]
        assert image.shape == (3, 64, 64) and image.dtype == torch.uint8
        assert isinstance(example.label, int)
        assert [task.val[row].label for row in range(5)] == task.val.labels[:5]


def test_several_labels_are_zeros_and_ones_and_every_sample_has_one() -> None:
    counts = []
    for task in stream("multi"):
        assert task.metric == "macro-f1" and task.labels.multi_label
        for data in splits(task).values():
            for label in data.labels:
                assert len(label) == len(task.labels.classes)
                assert set(label) <= {0, 1} and sum(label) >= 1
                counts.append(sum(label))
        assert task.test[-1].label == task.test.labels[-1]
    assert sum(count > 1 for count in counts) > 0.2 * len(counts)


@BOTH
def test_no_text_holds_a_label_word_or_an_inflection_of_one(labels: str) -> None:
    found = stream(labels)
    words_of_labels = {
        word
        for task in found
        for name in task.labels.classes
        for word in re.findall(r"[a-z]+", name.lower())
        if word != "or"
    }
    forms = "|".join(
        f"{word}(s|es|ed|d|ing|er|r|ers)?" if not word.endswith("y") else f"{word[:-1]}(y|ies)"
        for word in sorted(words_of_labels)
    )
    pattern = re.compile(rf"\b({forms})\b")
    for task in found:
        for data in splits(task).values():
            for row in range(len(data)):
                text = data.text(row)
                assert 1 <= len(text.split()) <= 25 and text == text.lower()
                assert not pattern.search(text), f"{data.name}/{row}: {text}"


def test_no_object_and_no_picture_is_on_two_sides() -> None:
    packed, info = read_packed(None, "missing")
    sides: dict[tuple[int, int], set[int]] = defaultdict(set)
    pictures: dict[tuple[str, bytes], set[int]] = defaultdict(set)
    for row, (task, side, thing) in enumerate(
        zip(*(packed[name].tolist() for name in ("task", "split", "object")), strict=True)
    ):
        sides[task, thing].add(side)
        start, stop = packed["offsets"][row : row + 2].tolist()
        encoded = packed["bytes"][start:stop].numpy().tobytes()
        pictures[info["tasks"][task]["labels"], encoded].add(side)
    assert all(len(found) == 1 for found in sides.values())
    assert all(len(found) == 1 for found in pictures.values())


def test_every_family_is_licensed_and_was_not_pretrained_on() -> None:
    _, info = read_packed(None, "missing")
    terms = (ROOT / "mosaic" / "LICENSES.md").read_text(encoding="utf-8")
    for task in info["tasks"]:
        assert f"| missing | {task['name']} | {task['source']} | {task['license']} |" in terms
    tables = (families.EMOJI_SPLITS, families.ICON_SPLITS)
    sets = {prefix for table in tables for group in table.values() for prefix in group}
    known = {families.family_of(prefix) for prefix in sets}
    known |= {path.partition(":")[0] for path in re.findall(r"^- ([\w-]+):", terms, re.MULTILINE)}
    assert set(info["families"]) <= known | {"openclipart"}
    assert all(f"\n| {prefix} |" in terms for prefix in sets)
    assert not set(info["families"]) & {families.family_of(p) for p in families.EMOJI_PRETRAIN}


def test_limits_take_turns_among_classes_and_depend_on_the_seed_alone() -> None:
    task = stream("single", limit=24, test_limit=12, order=["things"]).tasks[0]
    assert [len(data) for data in splits(task).values()] == [24, 24, 12]
    assert sorted(task.train.labels) == sorted([*range(8)] * 3)

    def keys(**options: object) -> list[str]:
        (found,) = stream("multi", order=["icons-media"], limit=30, **options).tasks
        return [found.train[row].key for row in range(30)]

    assert keys(seed=1) == keys(seed=1) != keys(seed=2)


def test_order_takes_a_subset_and_an_unknown_choice_is_refused() -> None:
    assert [task.name for task in stream("single", order=["food", "animals"])] == [
        "food",
        "animals",
    ]
    with pytest.raises(ConfigError, match="did you mean 'food'"):
        stream("single", order=["fod"])
    with pytest.raises(StreamError, match="labels must be one of 'single', 'multi'"):
        stream("many")


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=r"missing\.json is missing; make it with: evolora data"):
        stream("single", root=tmp_path)
    source = ROOT / "mosaic"
    for case, stem in (("cut", "missing.safetensors"), ("garbled", "missing.json")):
        folder = tmp_path / case
        folder.mkdir()
        for name in ("missing.json", "missing.safetensors"):
            shutil.copy(source / name, folder)
        (folder / stem).write_bytes((source / stem).read_bytes()[:1000])
        with pytest.raises(StreamError, match=r"mosaic/missing in .* cannot be read"):
            stream("single", root=folder)
    shutil.copy(source / "missing.safetensors", tmp_path)
    info = json.loads((source / "missing.json").read_text(encoding="utf-8"))
    (tmp_path / "missing.json").write_text(json.dumps({**info, "format_version": 2}))
    with pytest.raises(StreamError, match="format_version 1 expected"):
        stream("single", root=tmp_path)


@pytest.mark.parametrize(
    ("keyword", "kept"),
    [
        ("parties", ()),
        ("Shopping Bag", ("bag",)),
        ("birdhouse", ()),
        ("Blackbirds", ()),
        ("the &quot;bird&quot; nest", ("the nest",)),
        ("cars", ()),
        ("scarf", ("scarf",)),
        ("navigate", ()),
        ("women", ()),
        ("of the", ()),
        ("42", ()),
    ],
)
def test_words_with_a_label_in_them_are_left_out(keyword: str, kept: tuple[str, ...]) -> None:
    stems = words.label_stems(["bird", "car", "party", "shop or market", "woman", "navigation"])
    assert words.usable_words([keyword], stems) == kept


def test_a_keyword_that_stands_for_a_label_is_found() -> None:
    objects = [(("animal", "ocean", str(n)), ("fish",)) for n in range(3)]
    objects += [(("animal", "pet", str(n)), ("mammal",)) for n in range(3)]
    assert words.telltale_words(objects) == {"ocean", "pet"}


def test_a_short_text_has_no_word_twice_and_depends_on_the_seed() -> None:
    keywords = ("fax machine", "fax", "machine", "paper", "office")
    texts = [words.short_text(keywords, str(seed)) for seed in range(20)]
    assert texts == [words.short_text(keywords, str(seed)) for seed in range(20)]
    assert len(set(texts)) > 1
    assert all(len(set(text.split())) == len(text.split()) for text in texts)


def test_objects_are_dealt_to_the_sides_by_share() -> None:
    side = pairs.sides([f"object {n}" for n in range(100)], "test")
    count = [list(side.values()).count(name) for name in ("train", "val", "test")]
    assert count == [65, 10, 25]
    assert side == pairs.sides(sorted(side, reverse=True), "test")


def test_keywords_of_several_labels_are_disjoint_among_the_tasks() -> None:
    seen: set[str] = set()
    for task in pair_suite.TASKS:
        if task.labels == "multi":
            own = {word for group in task.collect.args[0].values() for word in group}
            assert not own & seen
            seen |= own


def test_pairs_without_words_are_left_out_of_the_build() -> None:
    def pair(thing: str, *given: str) -> pairs.Pair:
        return pairs.Pair(
            "bird", "train", "f", lambda: Image.new("RGB", (64, 64)), ("bird",), given, thing, thing
        )

    stems = words.label_stems(["bird"])
    kept = build_missing.with_usable_words([pair("a", "bird"), pair("b", "birds", "nest")], stems)
    assert [(each.object, each.words) for each in kept] == [("b", ("nest",))]


def test_an_unknown_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="allowed: 'compact', 'large'"):
        build_missing.build(tmp_path, "huge")  # type: ignore[arg-type]
