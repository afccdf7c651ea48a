"""The study of regularisers: what a cell trains, what is chosen, what a kill leaves, the tables."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from resora_study import cells, table, training
from resora_study.cells import Book, plan, read
from resora_study.conditions import CONDITIONS, DROP, NONE, RATES, conditions_of
from resora_study.data import Data, Side, Split, training_rows
from resora_study.hosts import HOSTS, host_of
from resora_study.model import Tops
from resora_study.training import Cell

WIDTH, ROWS = 192, 24


@pytest.fixture(scope="module")
def tops() -> Tops:
    return Tops()


def split(texts: bool) -> Split:
    draw = torch.Generator().manual_seed(0)

    def side(tokens: int) -> Side:
        return Side(
            torch.randn(ROWS, tokens, WIDTH, generator=draw),
            torch.randint(0, tokens if tokens < 17 else 1, (ROWS,), generator=draw),
        )

    numbers = torch.arange(ROWS) % 6
    if texts:
        return Split(side(17), text=side(8), captions=numbers)
    return Split(side(17), labels=numbers)


def data(task: str) -> Data:
    """Random activations of six classes or captions."""
    part = split(task == "retrieval")
    classes = torch.nn.functional.normalize(torch.randn(6, 192), dim=-1)
    return Data({name: part for name in ("train", "val", "test")}, classes)


def cell(**changed: Any) -> Cell:
    given: dict[str, Any] = {
        "stage": "test", "task": "retrieval", "host": "lora", "condition": NONE, "rate": 0.01,
        "strength": 0.0, "seed": 0,
    }  # fmt: skip
    return Cell(**{**given, **changed})


@pytest.mark.parametrize("host", HOSTS)
def test_every_condition_trains_every_host(
    host: str, tops: Tops, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "STEPS", 6)
    monkeypatch.setattr(training, "BATCH", 8)
    own, found = data("retrieval"), {}
    for name, condition in conditions_of(host).items():
        wanted = cell(host=host, condition=name, strength=condition.strengths[-1])
        found[name] = training.run(wanted, own, tops)
        assert {key: found[name][key] for key in asdict(wanted)} == asdict(wanted)
        assert 0.0 <= found[name]["score"] <= 100.0
    assert ("f_corr" in found) == (host != "adalora")
    for side in ("w_cos A", "w_cos B"):
        assert found["w_cos"][side] < 0.7 * found[NONE][side]
    numbers = {name: (line["w_cos A"], line["w_cos B"]) for name, line in found.items()}
    assert len(set(numbers.values())) == len(numbers), "each condition learns something else"


@pytest.mark.parametrize("host", HOSTS)
def test_silent_ranks_are_drawn_and_the_others_make_up_for_them(host: str, tops: Tops) -> None:
    batch, made = split(True), host_of(host, tops.new("retrieval"), 0, 10)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        plain = made.embed(batch)[0]
        none = made.embed_without_some_ranks(batch, 0.0, torch.Generator().manual_seed(0))[0]
        some = made.embed_without_some_ranks(batch, 0.5, torch.Generator().manual_seed(0))[0]
        again = made.embed_without_some_ranks(batch, 0.5, torch.Generator().manual_seed(0))[0]
    torch.testing.assert_close(none, plain)
    assert torch.equal(some, again) and not torch.allclose(some, plain, atol=1e-3)


def test_captions_that_are_equal_are_right_and_are_no_negatives() -> None:
    images = torch.eye(4)[:, :3]
    texts = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 0, 1.0], [0, 1.0, 0]])
    captions = torch.tensor([0, 0, 1, 2])
    found = training._recall(images, texts, captions)
    # images 0 and 1 share a caption: 0 finds it first; 1 finds another; 2 its own; 3 ties with all
    assert found["R@1 image to text"] == 75.0
    assert found["R@5 image to text"] == 100.0
    assert found["R@1 text to image"] == pytest.approx(66.667)

    class Scaled:
        scale = 10.0

    batch = Split(Side(torch.zeros(4, 1, 1), torch.zeros(4)), captions=captions)
    loss = training._loss(Scaled(), Data({}), batch, (images, images))  # type: ignore[arg-type]
    likeness = 10.0 * images @ images.T
    rows = [[0, 2, 3], [1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    expected = sum(
        float(likeness[own, seen].logsumexp(0) - likeness[own, own])
        for own, seen in enumerate(rows)
    )
    assert float(loss) == pytest.approx(expected / 4, rel=1e-5)


def test_shots_are_drawn_anew_for_each_seed() -> None:
    labels = torch.arange(60) % 3
    part = Split(Side(torch.zeros(60, 1, 1), torch.zeros(60)), labels=labels)
    rows = training_rows(part, 0)
    assert torch.bincount(labels[rows]).tolist() == [8, 8, 8]
    assert not torch.equal(rows, training_rows(part, 1))
    assert torch.equal(rows, training_rows(part, 0))


def finish(book: Book, host: str = "lora") -> list[Cell]:
    """Run a plan with made-up scores: the second strength is the best, but for DropLoRA's first."""
    done = []
    for one in plan("retrieval", host, book):
        if book.get(one) is None:
            ways = dict.fromkeys(table.WAYS, score(one))
            book.put(one, {**asdict(one), "score": score(one), **ways})
            done.append(one)
    return done


def score(one: Cell) -> float:
    strengths = CONDITIONS[one.condition].strengths
    liked = strengths[0] if one.condition == DROP else strengths[1]
    bonus = 5.0 if one.stage == "rate" and one.rate == RATES[1] else 0.0
    gain = {"w_cos": 2.0 + 0.1 * one.seed}.get(one.condition, 0.0)
    return 10.0 + one.seed + bonus + gain + float(one.strength == liked)


def test_conditions_choose_on_the_tuning_seeds_and_are_tested_once(tmp_path: Path) -> None:
    done = finish(Book(tmp_path / "cells.jsonl"))
    tests = [one for one in done if one.stage == "test"]
    assert len(tests) == 5 * len(CONDITIONS) and {one.rate for one in tests} == {RATES[1]}
    assert {one.strength for one in tests if one.condition == "w_cos"} == {0.1}
    assert {one.strength for one in tests if one.condition == DROP} == {0.05}
    tries = [one for one in done if one.stage == "strength"]
    counts = {name: sum(one.condition == name for one in tries) for name in CONDITIONS}
    assert set(counts.values()) == {8}, "as many tries for each"
    assert {one.seed for one in tries} == set(cells.TUNING_SEEDS)


def test_a_study_that_was_killed_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    whole, path = finish(Book(tmp_path / "whole.jsonl")), tmp_path / "cut.jsonl"
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:40]) + lines[40][:25])
    assert len(read(path)) == 40
    again = finish(Book(path))
    assert again == whole[40:]
    assert sorted(map(str, read(path))) == sorted(map(str, read(tmp_path / "whole.jsonl")))


def test_tables_hold_what_was_tested_and_paired_differences(tmp_path: Path) -> None:
    book = Book(tmp_path / "cells.jsonl")
    finish(book)
    shown = table.tables(read(book.path))
    rows = [line for line in shown.splitlines() if line.startswith("| w_cos |")]
    assert rows[0] == "| w_cos | – | – | – | – |", "nothing of classification was tested"
    # w_cos gains 2.0 to 2.4 by seed: mean 2.2, deviation 0.158, half width 2.776 * 0.158 / sqrt(5)
    assert rows[1].startswith("| w_cos | 15.2 ± 1.7 (0.1)<br>**+2.2 [+2.0, +2.4]** | –")
    plain = [line for line in shown.splitlines() if line.startswith("| none |")]
    assert plain[1].startswith("| none | 13.0 ± 1.6 (0.01) | –")
    assert table.interval([-1.0, 1.0, 0.0, 2.0, -1.0]) == "+0.2 [-1.4, +1.8]"
    lines = [line for line in read(book.path) if line["seed"] != 4]
    assert "±" not in table.tables(lines), "an arm without all seeds is not shown"
