"""The embedded questions and captions of `mosaic/modalities`."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

from evolora.assets import ROOT
from evolora.config import load_stream
from evolora.errors import ConfigError, StreamError
from evolora.evaluation.answers.formats import demanded, follows, parse_formats
from evolora.evaluation.answers.majority import majority_baseline
from evolora.evaluation.answers.tally import AnswerTally
from evolora.registry import ANSWER_METRICS
from evolora.streams.mosaic import families
from evolora.streams.mosaic.modalities import PackedItems
from evolora.streams.mosaic.modality_suite import TASKS
from evolora.streams.mosaic.modality_words import ANSWERS, KINDS, MODALITIES, WORDINGS
from evolora.streams.task import Stream, Task

SHAPES = {
    "image": ((3, 64, 64), torch.uint8),
    "video": ((4, 3, 64, 64), torch.uint8),
    "audio": ((24000,), torch.float32),
    "depth": ((3, 64, 64), torch.uint8),
    "pc": ((512, 6), torch.float32),
}
MAJORITY = {"image": 13.8, "video": 15.2, "audio": 26.3, "depth": 21.2, "pc": 18.4}


@pytest.fixture(scope="module")
def stream() -> Stream:
    return load_stream("mosaic/modalities")


def splits(task: Task) -> dict[str, PackedItems]:
    return {name: getattr(task, name) for name in ("train", "val", "test")}


def test_each_task_has_its_modality_in_the_shape_that_is_promised(stream: Stream) -> None:
    assert [task.name for task in stream] == list(MODALITIES) == [row.name for row in TASKS]
    for task in stream:
        assert len(task.train) >= 750 and len(task.val) >= 40 and len(task.test) >= 140
        assert task.modalities == (task.name, "text") and task.metric == "exact-match"
        for row in range(0, len(task.test), 9):
            value = task.test[row].inputs[task.name]
            assert (tuple(value.shape), value.dtype) == SHAPES[task.name]
            assert set(task.test[row].inputs) == {task.name, "text"}
            assert value.float().std() > 0
        with pytest.raises(IndexError):
            task.test[len(task.test)]


def test_values_are_in_their_units(stream: Stream) -> None:
    by_name = {task.name: task.test for task in stream}
    depth = by_name["depth"][0].inputs["depth"]
    assert torch.equal(depth[0], depth[1]) and depth.min() == 0
    for row in range(0, 150, 15):
        assert 0.1 < by_name["audio"][row].inputs["audio"].abs().max() <= 1
        cloud = by_name["pc"][row].inputs["pc"]
        assert cloud[:, :3].abs().max() < 20 and cloud[:, 3:].min() >= 0 and cloud.max() < 20
        assert cloud[:, 3:].max() <= 1


def test_what_is_near_is_brighter_than_what_is_far(stream: Stream) -> None:
    brightest = defaultdict(list)
    (depth,) = (task.train for task in stream if task.name == "depth")
    for row in range(len(depth)):
        if depth.kind(row) == "distance":
            example = depth[row]
            brightest[example.label[0]].append(int(example.inputs["depth"].max()))
    assert min(brightest["near"]) > max(brightest["far"])


def test_no_source_is_in_two_splits_of_any_modality(stream: Stream) -> None:
    found = defaultdict(set)
    for task in stream:
        for split, data in splits(task).items():
            for row in range(len(data)):
                found[data.group(row)].add(split)
    assert len(found) > 400
    assert all(len(sides) == 1 for sides in found.values())


def test_every_answer_is_a_word_of_its_question_or_a_caption(stream: Stream) -> None:
    for task in stream:
        formats = parse_formats(task.answer_format)
        for data in splits(task).values():
            for row in range(len(data)):
                kind, example = data.kind(row), data[row]
                assert kind in KINDS[task.name]
                pattern = "|".join(re.escape(one).replace(r"\{\}", ".+") for one in WORDINGS[kind])
                assert re.fullmatch(pattern, example.inputs["text"])
                assert follows(formats, example.label[0], example.label)
                sentence = demanded(formats, example.label).name == "sentence"
                assert sentence == (kind == "caption")
                assert sentence or (len(example.label) == 1 and example.label[0] in ANSWERS[kind])


def test_answers_of_a_kind_are_about_equally_common(stream: Stream) -> None:
    for task in stream:
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for row in range(len(task.train)):
            counts[task.train.kind(row)][task.train[row].label[0]] += 1
        assert set(counts) == set(KINDS[task.name])
        for kind in set(counts) - {"caption", "what", "sound", "emoji"}:
            assert len(counts[kind]) == len(ANSWERS[kind])
            assert max(counts[kind].values()) <= min(counts[kind].values()) + 3, (task.name, kind)


def test_the_files_are_small_and_their_terms_permissive() -> None:
    folder = ROOT / "mosaic"
    size = sum((folder / f"modalities.{kind}").stat().st_size for kind in ("json", "safetensors"))
    assert size <= 3_200_000
    terms = (folder / "LICENSES.md").read_text(encoding="utf-8")
    for task in TASKS:
        assert f"| modalities | {task.name} | {task.source} | {task.licence} |" in terms
        for word in re.findall(r"CC-BY-[\w.]+|[\w.]+-SA[\w.-]*|GPL[\w.-]*", task.licence):
            assert word in families.PERMISSIVE, f"{task.name}: {word}"


def test_the_commonest_answers_score_what_the_page_says(stream: Stream) -> None:
    found = {task.name: round(100 * majority_baseline(task).score, 1) for task in stream}
    assert found == MAJORITY
    page = Path(__file__).parents[2] / "docs" / "streams.md"
    lines = page.read_text(encoding="utf-8").splitlines()
    for name, score in found.items():
        assert any(line.startswith(f"| {name} |") and f"| {score} |" in line for line in lines)


def test_captions_are_judged_by_themselves_beside_the_exact_answers(stream: Stream) -> None:
    task = next(iter(stream))
    rows = range(len(task.test))
    right = [task.test[row].label for row in rows]
    captions = [row for row in rows if task.test.kind(row) == "caption"]
    tally = AnswerTally(ANSWER_METRICS.get(task.metric), parse_formats(task.answer_format))
    said = [one[0] if row in captions else "nothing" for row, one in zip(rows, right, strict=True)]
    tally.add(list(rows), said, right)
    assert tally.score() == pytest.approx(len(captions) / len(rows))
    alone = ANSWER_METRICS.get("cider-d").score(
        [said[row] for row in captions], [right[row] for row in captions]
    )
    assert tally.captions() == alone.mean > 3
    other = AnswerTally(ANSWER_METRICS.get("rouge-l"), parse_formats(task.answer_format))
    other.add(list(rows), said, right)
    assert other.captions() is None


def test_blind_limits_and_order(stream: Stream) -> None:
    blind = load_stream("mosaic/modalities", blind=True, order=["pc", "audio"], limit=20)
    assert [task.name for task in blind] == ["pc", "audio"]
    for task in blind:
        assert task.modalities == ("text",) and len(task.train) == len(task.test) == 20
        assert set(task.train[3].inputs) == {"text"}
    with pytest.raises(ConfigError, match="did you mean 'depth'"):
        load_stream("mosaic/modalities", order=["deph"])
    with pytest.raises(StreamError, match="evolora data build mosaic/modalities"):
        load_stream("mosaic/modalities", root="nowhere")
