"""The embedded questions of `mosaic/instructions`."""

from __future__ import annotations

import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from tests.test_cli import evolora

from evolora.assets import ROOT
from evolora.config import load_stream
from evolora.errors import ConfigError, StreamError
from evolora.evaluation.answers.boxes import read_box
from evolora.evaluation.answers.formats import demanded, follows, parse_formats
from evolora.evaluation.answers.majority import majority_baseline
from evolora.registry import ANSWER_METRICS
from evolora.streams.mosaic import families, instruction_words
from evolora.streams.mosaic.instruction_suite import TASKS
from evolora.streams.mosaic.instructions import PackedQuestions
from evolora.streams.mosaic.reading import read_packed
from evolora.streams.task import Stream, Task

NAMES = ["shapes", "emoji", "flags", "scripts", "icons", "furniture", "clip-art", "scenes"]


@pytest.fixture(scope="module")
def stream() -> Stream:
    return load_stream("mosaic/instructions")


def splits(task: Task) -> dict[str, PackedQuestions]:
    return {name: getattr(task, name) for name in ("train", "val", "test")}


def answers(data: PackedQuestions) -> list[tuple[str, ...]]:
    return [data[row].label for row in range(len(data))]


def test_there_are_eight_tasks_with_enough_questions_and_forms_of_their_own(
    stream: Stream,
) -> None:
    assert [task.name for task in stream] == NAMES == [row.name for row in TASKS]
    assert len({task.answer_format for task in stream}) == 8
    for task in stream:
        assert len(task.train) == 400 and len(task.val) >= 35 and len(task.test) >= 115
        assert task.modalities == ("image", "text") and task.labels.text
        example = task.test[len(task.test) - 1]
        image = example.inputs["image"]
        assert image.shape == (3, 64, 64) and image.dtype == torch.uint8
        assert set(example.inputs) == {"image", "text"} and example.label
        with pytest.raises(IndexError):
            task.test[len(task.test)]


def test_every_right_answer_has_the_form_that_its_question_asks_for(stream: Stream) -> None:
    asked = {
        "letter": "letter", "yes-no": "yes or no", "number": "number", "words": "word|name|country",
        "phrase": "phrase", "list": "[Ll]ist", "sentence": "sentence", "box": r"\[x1, y1, x2, y2\]",
    }  # fmt: skip
    for task in stream:
        formats = parse_formats(task.answer_format)
        metric = ANSWER_METRICS.get(task.metric)
        seen = set()
        for data in splits(task).values():
            for row in range(len(data)):
                example = data[row]
                assert follows(formats, example.label[0], example.label), example
                form = demanded(formats, example.label)
                seen.add(form)
                assert re.search(asked[form.name], example.inputs["text"], re.IGNORECASE)
        assert seen == set(formats)
        right = answers(task.test)
        perfect = metric.score([one[0] for one in right], right)
        assert perfect.mean > 0.95 * metric.largest or task.metric == "cider-d-share"


def test_every_question_is_answered_in_test_by_something_learned_in_train(stream: Stream) -> None:
    for task in stream:
        learned = {one for said in answers(task.train) for one in said}
        wrong = [said for said in answers(task.test) if said[0] not in learned]
        if task.name == "clip-art":  # color and noun are known, not always together
            words = {word for text in learned for word in text.split()}
            assert all(word in words for said in wrong for word in said[0].split())
        else:
            assert not wrong


def test_options_name_the_right_script_under_its_letter(stream: Stream) -> None:
    task = stream.tasks[3]
    letters: Counter[str] = Counter()
    for row in range(len(task.train)):
        example = task.train[row]
        letter, name = example.label
        options = dict(re.findall(r"^([A-D])\. (.+)$", example.inputs["text"], re.MULTILINE))
        assert options[letter] == name and list(options) == list("ABCD")
        assert set(options.values()) <= set(instruction_words.SCRIPTS)
        assert sorted(options.values()) == list(options.values())
        letters[letter] += 1
    assert min(letters.values()) > 70


def test_boxes_lie_in_the_scene_and_frame_the_thing(stream: Stream) -> None:
    task = stream.tasks[-1]
    for row in range(len(task.test)):
        example = task.test[row]
        box = read_box(example.label[0])
        assert box is not None and box[2] - box[0] == box[3] - box[1] == 500
        x1, y1, x2, y2 = (round(side * 64 / 1000) for side in box)
        image = example.inputs["image"].int()
        inside = image[:, y1:y2, x1:x2].flatten(1)
        # the thing differs from its ground, which the corners of its box show
        assert (inside - image[:, y1 : y1 + 1, x1]).abs().sum(0).gt(60).float().mean() > 0.08


def test_no_family_and_no_picture_is_on_two_sides(stream: Stream) -> None:
    packed, _ = read_packed(None, "instructions")
    sides: dict[tuple[int, int], set[int]] = defaultdict(set)
    pictures: dict[bytes, set[int]] = defaultdict(set)
    columns = ("task", "split", "family", "picture")
    for task, side, family, picture in zip(*(packed[c].tolist() for c in columns), strict=True):
        sides[task, family].add(side)
        start, stop = packed["offsets"][picture : picture + 2].tolist()
        pictures[packed["bytes"][start:stop].numpy().tobytes()].add(side)
    assert all(len(found) == 1 for found in sides.values())
    assert all(len(found) == 1 for found in pictures.values())
    assert len(pictures) == len(packed["offsets"]) - 1  # each is kept once
    vendors = {"emoji": families.EMOJI_SPLITS, "scenes": families.EMOJI_SPLITS}
    vendors |= {"flags": families.FLAG_SPLITS, "icons": families.ICON_SPLITS}
    for task in stream:
        groups = {name: {d.group(i) for i in range(len(d))} for name, d in splits(task).items()}
        for split, prefixes in vendors.get(task.name, {}).items():
            assert groups[split] <= {families.family_of(prefix) for prefix in prefixes}
        pretrained = (*families.EMOJI_PRETRAIN, *families.FLAG_PRETRAIN)
        assert not set.union(*groups.values()) & set(map(families.family_of, pretrained))


def test_the_packed_file_is_small_and_what_its_manifest_says() -> None:
    import hashlib

    packed, info = read_packed(None, "instructions")
    file = ROOT / "mosaic" / "instructions.safetensors"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == info["sha256"]
    assert file.stat().st_size < 4_000_000
    assert int(packed["picture"].max()) == len(packed["offsets"]) - 2
    for column in ("question", "answers"):
        assert int(packed[column].max()) < len(packed["text_offsets"]) - 1
    for row, task in zip(TASKS, info["tasks"], strict=True):
        assert task["metric"] == row.metric and task["answer_format"] == row.answer_format
        assert task["templates"] == list(row.templates)


def test_every_task_is_licensed() -> None:
    terms = (ROOT / "mosaic" / "LICENSES.md").read_text(encoding="utf-8")
    for task in TASKS:
        assert f"| instructions | {task.name} | {task.source} | {task.licence} |" in terms
        for word in re.findall(r"CC-BY-[\w.]+|[\w.]+-SA[\w.-]*|GPL[\w.-]*", task.licence):
            assert word in families.PERMISSIVE, f"{task.name}: {word}"


MAJORITY = {
    "shapes": 18.3, "emoji": 7.5, "flags": 3.3, "scripts": 27.5,
    "icons": 5.8, "furniture": 17.5, "clip-art": 9.9, "scenes": 10.8,
}  # fmt: skip


def test_the_commonest_answers_score_what_the_page_says(stream: Stream) -> None:
    found = {task.name: round(100 * majority_baseline(task).score, 1) for task in stream}
    assert found == MAJORITY
    page = Path(__file__).parents[2] / "docs" / "streams.md"
    lines = page.read_text(encoding="utf-8").splitlines()
    for name, score in found.items():
        assert any(line.startswith(f"| {name} |") and f"| {score} |" in line for line in lines)


def test_blind_is_the_same_without_any_image(stream: Stream) -> None:
    blind = load_stream("mosaic/instructions", blind=True)
    assert "without the pictures" in blind.source
    for seen, unseen in zip(stream, blind, strict=True):
        assert unseen.modalities == ("text",) and unseen.metric == seen.metric
        for name, data in splits(unseen).items():
            assert len(data) == len(splits(seen)[name])
            for row in range(len(data)):
                assert set(data[row].inputs) == {"text"}
            mine, other = data[0], splits(seen)[name][0]
            assert (mine.key, mine.label) == (other.key, other.label)
            assert mine.inputs["text"] == other.inputs["text"]


def test_limits_and_order_choose_and_depend_on_the_seed_alone() -> None:
    def keys(**options: object) -> list[str]:
        (task,) = load_stream("mosaic/instructions", order=["flags"], limit=30, **options)
        assert [len(data) for data in splits(task).values()] == [30, 30, 12]
        return [task.train[row].key for row in range(30)]

    assert keys(seed=1, test_limit=12) == keys(seed=1, test_limit=12)
    assert keys(seed=1, test_limit=12) != keys(seed=2, test_limit=12)
    with pytest.raises(ConfigError, match="did you mean 'flags'"):
        load_stream("mosaic/instructions", order=["flag"])


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match="evolora data build mosaic/instructions"):
        load_stream("mosaic/instructions", root=tmp_path)
    for name in ("instructions.json", "instructions.safetensors"):
        shutil.copy(ROOT / "mosaic" / name, tmp_path)
    (tmp_path / "instructions.safetensors").write_bytes(b"no")
    with pytest.raises(StreamError, match="cannot be read"):
        load_stream("mosaic/instructions", root=tmp_path)


def test_the_program_prints_the_majority() -> None:
    done = evolora("data", "majority", "mosaic/instructions", "--set", "order=[flags]", "--json")
    assert '"score": 0.0333' in done.stdout and '"answer_format": "words:3"' in done.stdout
