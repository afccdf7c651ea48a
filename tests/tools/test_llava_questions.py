"""What the tiny LLaVA is asked in pretraining: answers are right, pictures show what they say."""

from __future__ import annotations

import re
from random import Random

import pytest
import torch

from llava_pretraining.about_scenes import SCENE
from llava_pretraining.about_texts import TEXT, Words
from llava_pretraining.about_things import THING, Thing
from llava_pretraining.asking import turns
from llava_pretraining.forms import options, yes_no
from llava_pretraining.scenes import COLORS, JITTER, SHAPES, Item, Scene, draw_scene, picture
from llava_pretraining.subjects import plain

OTHERS = ("moon", "tea", "cup", "jar", "sun")
OWL = Thing("owl", "emoji", ("bird", "wolf"), OTHERS)
ITEM = re.compile(rf"\b(?:the|an?) (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})\b")


def asked(name: str, count: int = 300) -> list[tuple[Scene, str, str]]:
    """Return scenes with a question of a format that has no options, and its answer."""
    draw, found = Random(0), []
    while len(found) < count:
        scene = draw_scene(draw)
        turn = SCENE[name][1](scene, draw)
        if turn is not None and not re.search(r"\(?[Aa][.)] |Choose", turn[0]):
            found.append((scene, *turn))
    return found


def meant(scene: Scene, text: str) -> list[list[Item]]:
    """Return, for each "the red star" or "the star" in a text, the items that it may mean."""
    return [
        [item for item in scene.items if item.shape == shape and color in ("", item.color)]
        for color, shape in ITEM.findall(text)
    ]


def test_scenes_show_what_they_say() -> None:
    draw = Random(0)
    for _ in range(100):
        scene = draw_scene(draw)
        shown = picture(scene, draw).int()
        assert 1 <= len(scene.items) <= 6
        ground = shown[0, 0]
        assert (ground - torch.tensor(COLORS[scene.ground])).abs().max() <= JITTER
        free = torch.ones(64, 64, dtype=torch.bool)
        for item in scene.items:
            left, top, right, bottom = item.box
            assert item.color != scene.ground
            assert free[top : bottom + 1, left : right + 1].all(), "items touch"
            free[top : bottom + 1, left : right + 1] = False
            part = shown[top : bottom + 1, left : right + 1]
            ink = (part - ground).abs().sum(2) > 0
            for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1]):
                assert edge.any(), "smaller than its box"
            mean = part[ink].float().mean(0)
            assert (mean - torch.tensor(COLORS[item.color])).abs().max() <= JITTER
        assert (shown[free] == ground).all()


def test_colors_and_shapes_are_those_of_the_scene() -> None:
    for scene, question, answer in asked("color"):
        shape = next((shape for shape in SHAPES if re.search(rf"\b{shape}\b", question)), None)
        assert [i.color for i in scene.items if shape in (None, i.shape)] == [answer]
    for scene, question, answer in asked("shape"):
        color = next((color for color in COLORS if color in question), None)
        assert [i.shape for i in scene.items if color in (None, i.color)] == [answer]
    for scene, _, answer in asked("ground"):
        assert scene.ground == answer


def test_numbers_are_those_of_the_items() -> None:
    numbers = ("one", "two", "three", "four", "five", "six")
    for scene, question, answer in asked("count"):
        spelt = "with a word" in question
        assert (numbers.index(answer) + 1 if spelt else int(answer)) == len(scene.items)


def test_what_is_said_to_be_there_is_there() -> None:
    said = []
    for scene, question, answer in asked("there"):
        (found,) = meant(scene, question)
        assert bool(found) is (answer == "yes")
        said.append(answer)
    assert 100 < said.count("yes") < 200


def test_boxes_are_of_the_item_that_is_asked_for() -> None:
    for scene, question, answer in asked("box"):
        ((item,),) = meant(scene, question)
        sides = [int(side) for side in re.findall(r"\d+", answer)]
        assert [round(side * 64 / 1000) for side in sides] == list(item.box)


def test_sides_are_right() -> None:
    for scene, question, answer in asked("side"):
        ((item,),) = meant(scene, question)
        x, y = item.center
        halves = {"left": x < 32, "right": x > 32, "top": y < 32, "bottom": y > 32}
        half = re.search(r"in the (\w+) half", question)
        assert halves[answer] if half is None else halves[half[1]] is (answer == "yes")


def test_what_is_wider_or_taller_is() -> None:
    for scene, question, answer in asked("stretch"):
        ((item,),) = meant(scene, question)
        wider = item.width > item.height
        if answer in ("wider", "taller"):
            assert wider is (answer == "wider")
        else:
            assert (("wider than high" in question) is wider) is (answer == "yes")


def test_comparisons_are_right() -> None:
    for scene, question, answer in asked("compare"):
        (one,), (two,) = meant(scene, question)
        if question.startswith("Which"):
            larger = max((one, two), key=lambda item: item.width * item.height)
            assert meant(scene, answer) == [[larger]]
        else:
            assert (one.center[0] < two.center[0]) is (answer == "yes")


def test_captions_name_all_items_from_left_to_right() -> None:
    for scene, question, answer in asked("scene"):
        named = meant(scene, answer[0].lower() + answer[1:])
        assert len(named) == len(scene.items)
        assert all(item in found for item, found in zip(scene.items, named, strict=True))
        assert ("background" in question) is answer.endswith(f" on {scene.ground}.")


def test_a_letter_is_that_of_the_answer() -> None:
    draw, letters = Random(0), set()
    for _ in range(1000):
        question, answer = options("What?", "owl", OTHERS, draw)
        if answer == "owl":
            assert "owl" in question
            continue
        assert re.search(rf"\(?{answer}[.)] owl\b", question)
        letters.add(answer)
    assert letters == {*"ABCDE", *"abcde"}


def test_yes_goes_with_what_is_true() -> None:
    draw = Random(0)
    found = {yes_no(("true?", "false?"), draw) for _ in range(100)}
    assert {answer for question, answer in found if question.startswith("true?")} == {"yes"}
    assert {answer for question, answer in found if question.startswith("false?")} == {"no"}


@pytest.mark.parametrize("name", THING)
def test_named_pictures_are_called_by_their_name(name: str) -> None:
    draw = Random(0)
    for _ in range(50):
        turn = THING[name][1](OWL, draw)
        assert turn is not None
        question, answer = turn
        if answer in ("yes", "no"):
            assert ("owl" in question) is (answer == "yes")
        elif len(answer) > 1:
            assert ("emoji" if name == "kind" else "owl") in answer
        else:
            assert re.search(rf"\(?{answer}[.)] (owl|emoji)\b", question)


def test_texts_are_repeated_and_their_ends_found() -> None:
    draw, text = Random(0), Words("wolf", ("dog",), OTHERS)
    for _ in range(100):
        question, answer = TEXT["repeat"][1](text, draw) or ("", "")
        assert question.endswith(answer) and "wolf" in answer.lower()
        question, answer = TEXT["ends"][1](text, draw) or ("", "")
        said = question[question.index(": ") + 2 : -1].split(", ")
        assert answer == said[0 if "first" in question else -1]
        question, answer = TEXT["option"][1](text, draw) or ("", "")
        if question.startswith("What is option"):
            assert f"{question[15]}. {answer}" in question
        question, answer = TEXT["among"][1](text, draw) or ("", "")
        sought, said = re.match(r"Is (\w+) in this list: ([^?]*)", question).groups()  # type: ignore[union-attr]
        assert (sought in said.split(", ")) is (answer == "yes")


def test_words_without_neighbors_are_not_asked_for_any() -> None:
    bare = Words("the", (), OTHERS)
    assert {TEXT[name][1](bare, Random(0)) for name in ("like", "related")} == {None}


def test_turns_are_in_different_formats() -> None:
    found = turns(OWL, 3, Random(0))
    assert len(found) == 3 and len({question for question, _ in found}) == 3


def test_names_lose_the_numbers_of_variants() -> None:
    assert plain("pen 2") == "pen" and plain("2 pens") == "2 pens"
