"""Missing modalities: the published counts, tables that depend on every setting, and refusals."""

from __future__ import annotations

import json
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evolora.errors import DataError, StorageError, StreamError
from evolora.streams.missing import (
    KINDS,
    SPLITS,
    Incomplete,
    Missing,
    MissingConfig,
    draw_codes,
    own_codes,
)
from evolora.streams.missing_manifest import Manifest, with_missing
from evolora.streams.pairs import MODALITIES
from evolora.streams.sampling import Labelled, limited, make_task, pick
from evolora.streams.task import Example, LabelSpace, Stream, Subset


class Made:
    """Image + text samples in memory; those at ``codes`` other than 0 lack one to begin with."""

    def __init__(self, count: int, codes: dict[int, int] | None = None) -> None:
        self.labels = [row % 2 for row in range(count)]
        self.codes = [(codes or {}).get(row, 0) for row in range(count)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        inputs: dict[str, Any] = {}
        if self.codes[index] != 2:
            inputs["image"] = torch.full((3, 2, 2), index, dtype=torch.uint8)
        if self.codes[index] != 1:
            inputs["text"] = f"sample {index}"
        return Example(inputs=inputs, label=self.labels[index], key=str(index))


class Plain:
    """A data set that tells neither labels nor codes."""

    def __init__(self, inner: Made) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Example:
        return self.inner[index]


LABELS = LabelSpace(classes=("a", "b"))


def stream(*sizes: tuple[int, int, int], codes: dict[int, int] | None = None) -> Stream:
    tasks = tuple(
        make_task(
            f"t{number}",
            {split: Made(n, codes) for split, n in zip(SPLITS, sizes_of, strict=True)},
            LABELS,
            None,
            0,
            modalities=MODALITIES,
        )
        for number, sizes_of in enumerate(sizes)
    )
    return Stream(name="made", tasks=tasks, label_protocol="seen", source="memory")


def drawn(count: int, **settings: Any) -> tuple[int, ...]:
    return draw_codes(count, Missing(**settings), seed=0, task="t", split="train")


@pytest.mark.parametrize(
    ("count", "rate", "images", "texts", "complete"),
    [(10, 0.7, 3, 4, 3), (13, 0.7, 4, 5, 4), (13, 0.5, 3, 3, 7), (7, 0.3, 1, 1, 5)],
)
def test_g6_published_counts(
    count: int, rate: float, images: int, texts: int, complete: int
) -> None:
    found = Counter(drawn(count, kind="both", rate=rate))
    assert (found[2], found[1], found[0]) == (images, texts, complete)


def test_rounding_errors_of_floats_cost_no_sample() -> None:
    assert int(100 * 0.29) == 28
    assert Counter(drawn(100, kind="text", rate=0.29))[1] == 29
    assert Counter(drawn(21, kind="text", rate=1 / 3))[1] == 7


rates = st.floats(0, 1, allow_nan=False)


@given(st.integers(0, 60), st.sampled_from(KINDS), rates, rates, st.integers(0, 5))
def test_i14_a_table_is_deterministic_and_counts_are_exact(
    count: int, kind: Any, rate: float, ratio: float, seed: int
) -> None:
    missing = Missing(kind=kind, rate=rate, both_ratio=ratio)
    first, again = (draw_codes(count, missing, seed=seed, task="t", split="val") for _ in range(2))
    assert first == again and len(first) == count and set(first) <= {0, 1, 2}
    incomplete = sum(code > 0 for code in first)
    expected = 0 if kind == "none" else count * rate
    assert expected - 1 < incomplete <= expected + 1e-8
    if kind != "both":
        assert first.count({"text": 2, "image": 1}.get(kind, 2)) == 0
    if kind == "both":
        assert incomplete * ratio - 1 < first.count(2) <= incomplete * ratio + 1e-8


@given(st.lists(st.sampled_from([0, 0, 1, 2]), max_size=40), st.sampled_from(KINDS), rates)
def test_i14_no_sample_ever_loses_both(own: list[int], kind: Any, rate: float) -> None:
    codes = draw_codes(
        len(own), Missing(kind=kind, rate=rate), seed=1, task="t", split="test", own=own
    )
    assert all(code == before for code, before in zip(codes, own, strict=True) if before)
    newly = sum(code > 0 for code in codes) - sum(code > 0 for code in own)
    assert newly <= own.count(0) * rate + 1e-8


def test_i14_every_setting_is_in_the_key() -> None:
    base: dict[str, Any] = {"kind": "both", "rate": 0.5, "both_ratio": 0.5}
    where: dict[str, Any] = {"seed": 0, "task": "t", "split": "train"}

    def places(settings: dict[str, Any], place: dict[str, Any]) -> tuple[int, ...]:
        return draw_codes(200, Missing(**settings), **place)

    first = places(base, where)
    for name, other in (("seed", 1), ("task", "u"), ("split", "test")):
        assert places(base, {**where, name: other}) != first
    incomplete = [code > 0 for code in first]
    for name, value in (("kind", "text"), ("rate", 0.505), ("both_ratio", 0.51)):
        changed = places({**base, name: value}, where)
        agreeing = sum(a == (b > 0) for a, b in zip(incomplete, changed, strict=True))
        assert agreeing < 150, f"{name} does not choose other samples"


def test_a_lost_modality_is_absent_and_the_other_untouched() -> None:
    given_ = stream((20, 10, 10))
    (task,) = with_missing(given_, {"kind": "both", "rate": 0.7, "seed": 3}).tasks
    assert isinstance(task.train, Incomplete) and isinstance(task.train, Labelled)
    for row, code in enumerate(task.train.codes):
        example, before = task.train[row], given_.tasks[0].train[row]
        assert set(example.inputs) == [{"image", "text"}, {"image"}, {"text"}][code]
        assert (example.label, example.key) == (before.label, before.key)
        assert set(before.inputs) == {"image", "text"}
    assert task.train.labels == [row % 2 for row in range(20)]
    assert weakref.ref(task.train)() is task.train
    assert len(list(task.train)) == 20 and task.train[-1].key == "19"
    assert task.modalities == MODALITIES and task.labels is given_.tasks[0].labels


def test_the_stream_keeps_all_else_and_says_what_is_missing() -> None:
    given_ = stream((10, 5, 5), (10, 5, 5))
    made = with_missing(given_, {"kind": "image", "rate": 0.4, "test": {"kind": "text"}})
    assert (made.name, made.label_protocol) == ("made", "seen")
    expected = "memory; missing train image 40 %, val image 40 %, test text 40 %, seed 0"
    assert made.source == expected
    train, test = made.tasks[0].train, made.tasks[0].test
    assert Counter(train.codes) == {0: 6, 2: 4} and Counter(test.codes) == {0: 3, 1: 2}
    assert made.tasks[1].train.codes != train.codes
    again = made.reordered(["t1"])
    assert again.tasks[0].train is made.tasks[1].train
    assert with_missing(given_, "both").source == "memory; missing both 70 %, seed 0"
    assert with_missing(given_, None) is given_
    untouched = with_missing(given_, {"kind": "none"})
    assert untouched.tasks[0].train is given_.tasks[0].train


def test_samples_that_lack_a_modality_keep_what_they_have() -> None:
    codes = {0: 1, 3: 2}
    made = with_missing(stream((12, 4, 4), codes=codes), {"kind": "text", "rate": 1.0})
    train = made.tasks[0].train
    assert train.codes == tuple(2 if row == 3 else 1 for row in range(12))
    assert set(train[3].inputs) == {"text"} and set(train[0].inputs) == {"image"}
    assert own_codes(Subset(train, [3, 4])) == (2, 1)
    assert own_codes(pick(train, [3])) == (2,)


def test_a_sample_must_not_lose_its_only_modality() -> None:
    manifest = Manifest.draw(stream((12, 4, 4)), MissingConfig(kind="text", rate=1.0))
    with pytest.raises(StreamError, match=r"'t0', train, sample 3 has no image .* lose its text"):
        manifest.apply(stream((12, 4, 4), codes={3: 2}))
    view = Incomplete(data=Plain(Made(4, {2: 2})), codes=(0, 0, 1, 0))
    with pytest.raises(DataError, match="2 has no image to begin with and must not lose its text"):
        view[2]
    assert view.labels == (0, 1, 0, 1)


def test_a_manifest_survives_its_file(tmp_path: Path) -> None:
    given_ = stream((20, 0, 10), (13, 2, 4))
    settings = MissingConfig(kind="both", seed=4, test=Missing(kind="image", rate=0.5))
    manifest = Manifest.draw(given_, settings)
    manifest.save(tmp_path / "deep" / "manifest.json")
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["manifest.json"]
    loaded = Manifest.load(tmp_path / "deep" / "manifest.json")
    assert loaded == manifest
    content = json.loads((tmp_path / "deep" / "manifest.json").read_text())
    assert content["format_version"] == 1 and content["settings"]["seed"] == 4
    assert content["counts"]["t1"]["train"] == {
        "samples": 13, "complete": 4, "text_missing": 5, "image_missing": 4
    }  # fmt: skip
    assert len(content["codes"]["t0"]["train"]) == 20 and content["codes"]["t0"]["val"] == ""
    by_file = with_missing(given_, str(tmp_path / "deep" / "manifest.json"))
    by_settings = with_missing(given_, settings)
    for split in ("train", "test"):
        for mine, other in zip(by_file, by_settings, strict=True):
            assert getattr(mine, split).codes == getattr(other, split).codes


def test_a_manifest_fits_a_limited_and_reordered_stream(tmp_path: Path) -> None:
    given_ = stream((20, 4, 10), (20, 4, 10))
    small = replace(
        given_,
        tasks=tuple(replace(t, train=limited(t.train, 6, 0, "x")) for t in given_),
    ).reordered(["t1", "t0"])
    made = with_missing(small, {"kind": "text", "rate": 0.5})
    assert [task.name for task in made] == ["t1", "t0"] and made.tasks[0].train.codes.count(1) == 3
    Manifest.draw(given_, MissingConfig(kind="text")).apply(given_.reordered(["t1"]))


def test_a_manifest_for_other_data_is_refused() -> None:
    manifest = Manifest.draw(stream((20, 4, 10)), MissingConfig(kind="text"))
    with pytest.raises(StreamError, match=r"'t0', train: .* 20 samples, the stream has 19"):
        manifest.apply(stream((19, 4, 10)))
    other = replace(stream((20, 4, 10)).tasks[0], name="t9")
    with pytest.raises(StreamError, match=r"no task 't9'; did you mean 't0'\? \(known: t0\)"):
        manifest.apply(Stream(name="made", tasks=(other,)))
    images = replace(stream((20, 4, 10)).tasks[0], modalities=("image",))
    with pytest.raises(StreamError, match="'t0' has only image; a modality can be missing only"):
        manifest.apply(Stream(name="made", tasks=(images,)))
    with pytest.raises(StreamError, match="'t0' has only image"):
        with_missing(Stream(name="made", tasks=(images,)), "both")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 2}, "format_version 2, this Evolora reads up to 1"),
        ({"codes": {"t0": {"train": "0130"}}}, "t0.train: code '3' of sample 2 is out of range"),
        (
            {"codes": {"t0": {"train": [0, 1]}}},
            "t0.train must be a string of digits; got",
        ),
        ({"codes": {"t0": {"trian": "0"}}}, "trian: unknown setting; did you mean 'train'"),
        ({"codes": {"t0": "012"}}, "task 't0' needs a mapping of splits"),
        ({"codes": None}, "'codes' is missing or of the wrong type"),
        ({"settings": {"kind": "txt"}}, "missing kind must be one of .*; did you mean 'text'"),
        ({"settings": {"rate": 0.5}}, "say the kind, one of none, text, image, both"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "manifest.json"
    Manifest.draw(stream((4, 0, 4)), MissingConfig(kind="text")).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises((StreamError, StorageError), match=words) as error:
        Manifest.load(path)
    assert "manifest.json" in str(error.value)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ({"kind": "both", "rate": 1.5}, r"rate must be a number in \[0, 1\]; got 1.5"),
        ({"kind": "both", "rate": True}, "got True"),
        ({"kind": "both", "both_ratio": -0.1}, "both_ratio must be a number"),
        ({"kind": "both", "rat": 0.1}, "missing.rat: unknown setting; did you mean 'rate'"),
        ({"kind": "both", "test": {"seed": 1}}, "missing.test.seed: unknown setting"),
        ({"kind": "both", "test": "text"}, "missing.test must be a mapping"),
        ({"kind": "both", "seed": 0.5}, "seed must be a whole number; got 0.5"),
        ({"rate": 0.5}, "missing: say the kind"),
        ({"test": {"kind": "text"}}, "missing: say the kind"),
        ("boht", "'boht' is no file and no kind; did you mean 'both'"),
        (0.7, "expected settings .* got 0.7"),
    ],
)
def test_wrong_settings_are_refused_by_name(missing: Any, words: str) -> None:
    with pytest.raises(StreamError, match=words):
        with_missing(stream((4, 4, 4)), missing)
