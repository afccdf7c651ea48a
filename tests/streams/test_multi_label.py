"""Class-balanced choices among samples with several labels."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolora.errors import StreamError
from evolora.streams.pairs import MODALITIES, Pair, Pairs
from evolora.streams.sampling import balanced, few_per_class, generator, hold_out, make_task
from evolora.streams.task import LabelSpace, Stream

multi_hot = st.lists(st.tuples(*[st.integers(0, 1)] * 3), min_size=1, max_size=40)


def per_class(labels: list[tuple[int, ...]], rows: list[int]) -> list[int]:
    return [sum(labels[row][place] for row in rows) for place in range(len(labels[0]))]


def test_a_limit_takes_rare_classes_as_often_as_common_ones() -> None:
    labels = [(1, 0, 0)] * 50 + [(0, 1, 0)] * 6 + [(0, 1, 1)] * 4 + [(0, 0, 0)] * 20
    rows = balanced(labels, 16, generator(0, "x"))
    assert rows == sorted(set(rows)) and len(rows) == 16
    counts = per_class(labels, rows)
    without = sum(labels[row] == (0, 0, 0) for row in rows)
    assert counts[2] == 4  # all there are of the third class
    assert max(counts[0], counts[1], without) - min(counts[0], counts[1], without) <= 1
    assert rows != balanced(labels, 16, generator(1, "x"))


@given(multi_hot, st.integers(1, 50))
def test_a_limit_gives_as_many_different_rows_as_asked(
    labels: list[tuple[int, ...]], limit: int
) -> None:
    rows = balanced(labels, limit, generator(0, "x"))
    assert rows == sorted(set(rows)) and len(rows) == min(limit, len(labels))


@given(multi_hot, st.floats(0.05, 0.9))
def test_every_class_keeps_a_row_and_rows_are_split(
    labels: list[tuple[int, ...]], fraction: float
) -> None:
    kept, held = hold_out(labels, fraction, generator(0, "x"))
    assert sorted(kept + held) == list(range(len(labels)))
    before, after = per_class(labels, list(range(len(labels)))), per_class(labels, kept)
    assert all(a >= 1 for a, b in zip(after, before, strict=True) if b)


def test_hold_out_gives_about_the_fraction_of_every_class() -> None:
    labels = [(1, 0)] * 60 + [(1, 1)] * 20 + [(0, 1)] * 20
    kept, held = hold_out(labels, 0.25, generator(0, "x"))
    assert per_class(labels, held)[1] == 10 and 20 <= per_class(labels, held)[0] <= 25
    assert hold_out(labels, 0.0, generator(0, "x")) == (list(range(100)), [])
    assert len(kept) + len(held) == 100


def test_shots_of_samples_with_several_labels_are_refused() -> None:
    with pytest.raises(StreamError, match=r"one class per sample is needed here; row 0 has \(1, 0"):
        few_per_class([(1, 0)], 1, generator(0, "x"))


def test_a_task_is_judged_by_the_metric_its_labels_need() -> None:
    labels = [(1, 0), (1, 1), (0, 1), (0, 0)] * 3
    rows = [
        Pair(image=None, text=f"words {row}", label=label, key=str(row))
        for row, label in enumerate(labels)
    ]
    splits = {"train": Pairs(rows=rows), "test": Pairs(rows=rows[:4])}
    space = LabelSpace(classes=("a", "b"), multi_label=True)
    task = make_task("genres", splits, space, 8, 0, modalities=MODALITIES)
    assert (task.metric, task.modalities) == ("macro-f1", MODALITIES)
    found = Counter(task.train[row].label for row in range(len(task.train)))
    assert len(task.train) == 8 and set(found) == set(labels) and len(task.test) == 4
    stream = Stream(name="s", tasks=(task,), label_protocol="seen")
    again = stream.reordered(["genres"]).tasks[0]
    assert again is task and stream.reordered(["genres"]).label_protocol == "seen"
    single = make_task(
        "one",
        {"train": Pairs(rows=[Pair(image=None, text="x", label=0, key="0")] * 2)}
        | {"test": Pairs(rows=[Pair(image=None, text="x", label=0, key="0")])},
        LabelSpace(classes=("a",)),
        None,
        0,
    )
    assert (single.metric, single.modalities) == ("accuracy", ("image",))
