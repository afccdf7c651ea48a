"""`mosaic/instructions` built from a few packages of a few files each, in the packages' layouts."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from evolora.config import load_stream
from evolora.errors import DataError
from evolora.streams.mosaic import build_instructions, scenes
from evolora.streams.mosaic.build_instructions import few_colors
from evolora.streams.mosaic.families import EMOJI_SPLITS, FLAG_SPLITS, ICON_SPLITS
from evolora.streams.mosaic.instruction_samples import furniture_facts, shape_questions
from evolora.streams.mosaic.instruction_suite import TASKS
from evolora.streams.mosaic.instruction_words import emoji_noun

EMOJI = {"cat face": "1F431", "red heart": "2764", "palm tree": "1F334", "taxi": "1F695"}
COUNTRIES = {"FR": ("France", "1F1EB-1F1F7"), "JP": ("Japan", "1F1EF-1F1F5")}
SVG = 'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"'
CUBE = "\n".join(
    [f"v {x} {y} {z}" for x in (0, 3) for y in (0, 1) for z in (0, 1)]
    + ["f 1 2 4 3", "f 5 7 8 6", "f 1 5 6 2", "f 3 4 8 7", "f 1 3 7 5", "f 2 6 8 4"]
)


def rectangle(color: str, width: int = 20) -> str:
    return f'<rect x="4" y="6" width="{width}" height="18" fill="{color}"/>'


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("resvg_py")
    root = tmp_path_factory.mktemp("cache")

    def write(name: str, content: object) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))

    prefixes = [p for t in (EMOJI_SPLITS, FLAG_SPLITS, ICON_SPLITS) for g in t.values() for p in g]
    about = {"name": "x", "author": {"name": "y"}, "license": {"spdx": "MIT"}}
    write("iconify/package/collections.json", dict.fromkeys(prefixes, about))
    names = [*(label.replace(" ", "-") for label in EMOJI), "fr", "jp", "bell", "clock"]
    for number, prefix in enumerate(dict.fromkeys(prefixes)):
        icons = {
            name: {"body": rectangle(f"#{40 * place:02x}{7 * number % 256:02x}80", 8 + place)}
            for place, name in enumerate(names)
        }
        write(f"iconify/package/json/{prefix}.json", {"icons": icons, "width": 32, "height": 32})
    groups = {"0": "smileys-emotion", "1": "animals-nature", "2": "travel-places", "9": "flags"}
    group = {"red heart": 0, "taxi": 2}
    entries = [{"label": k, "hexcode": v, "group": group.get(k, 1)} for k, v in EMOJI.items()]
    entries += [
        {"label": f"flag: {name}", "hexcode": code, "group": 9} for name, code in COUNTRIES.values()
    ]
    write("emojibase/package/meta/groups.json", {"groups": groups})
    write("emojibase/package/en/data.json", entries)
    for part, count in (("train", 40), ("test", 12)):
        asked = []
        for image in range(count):
            color, shape = ("red", "blue")[image % 2], ("circle", "triangle")[image // 2 % 2]
            asked += [["what color is the shape?", color, image], ["what shape?", shape, image]]
            path = root / "easy-vqa/easy_vqa/data" / part / "images" / f"{image}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (image * 5, len(part) * 9, 20)).save(path)
        write(f"easy-vqa/easy_vqa/data/{part}/questions.json", asked)
    furniture = root / "furniture/usr/share/sweethome3d/furniture"
    furniture.mkdir(parents=True)
    lines, models = [], {}
    for number in range(1, 25):
        noun, model = ("table", "lamp")[number % 2], f"m{number}/m.obj"
        lines += [f"name#{number}=Old {noun}", f"model#{number}=/{model}", f"creator#{number}=A"]
        size = {"width": 100 + number, "depth": 40, "height": 40 + 120 * (number % 2)}
        lines += [f"{key}#{number}={value}" for key, value in size.items()]
        models[model] = CUBE.replace("v 3", f"v {2 + number / 9}")
    with zipfile.ZipFile(furniture / "Test.sh3f", "w") as archive:
        archive.writestr("PluginFurnitureCatalog.properties", "\n".join(lines))
        for model, text in models.items():
            archive.writestr(model, text)
    for number in range(24):
        folder = ("food/fruit", "animals/birds")[number % 2]
        terms = "<dc:title>x</dc:title> PublicDomain"
        body = rectangle("#c01010", 6 + number)
        name = f"{'abcdefghijklmnopqrstuvwxyz'[number]}.svg"
        write(
            f"clip-art/usr/share/openclipart/svg/{folder}/{name}",
            f"<svg {SVG}>{body}</svg><!--{terms}-->",
        )
    return root


WITHOUT_FONTS = tuple(task for task in TASKS if task.name != "scripts")


@pytest.fixture(scope="module")
def built(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built")
    lines: list[str] = []
    build_instructions.build(out, "compact", cache, lines.append, WITHOUT_FONTS)
    assert [line.split(":")[0] for line in lines] == [task.name for task in WITHOUT_FONTS]
    return out


def test_what_is_built_is_a_stream_of_all_tasks(built: Path) -> None:
    stream = load_stream("mosaic/instructions", root=built)
    assert [task.name for task in stream] == [task.name for task in WITHOUT_FONTS]
    said = {
        task.name: {answer for row in range(len(task.train)) for answer in task.train[row].label}
        for task in stream
    }
    assert said["emoji"] == {"a cat", "a heart", "a tree", "a car"}
    assert said["flags"] == {"France", "Japan"}
    assert said["icons"] == {"alarm, notification, reminder", "time, watch, alarm"}
    assert said["shapes"] == {"red", "blue", "circle", "triangle", "yes", "no"}
    assert said["furniture"] == {"table", "lamp", "yes", "no", "50", "150"}
    assert said["clip-art"] == {"A drawing of a red fruit.", "A drawing of a red bird."}
    assert "MIT" in (built / "LICENSES.md").read_text()


def test_two_builds_are_equal(cache: Path, built: Path, tmp_path: Path) -> None:
    build_instructions.build(tmp_path, "compact", cache, tasks=WITHOUT_FONTS)
    for file in built.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_the_large_size_takes_all_and_a_picture_is_kept_once(
    cache: Path, built: Path, tmp_path: Path
) -> None:
    build_instructions.build(tmp_path, "large", cache, tasks=WITHOUT_FONTS[:1])
    (task,) = load_stream("mosaic/instructions", root=tmp_path)
    (compact,) = load_stream("mosaic/instructions", root=built, order=["shapes"])
    assert len(task.train) == 36 * 3 == len(compact.train) and len(task.test) == 12 * 3
    packed = task.train.packed
    assert len(packed["offsets"]) - 1 == 40 + 12
    with pytest.raises(DataError, match="allowed: 'compact', 'large'"):
        build_instructions.build(tmp_path, "huge", cache)  # type: ignore[arg-type]


def test_questions_about_one_picture_agree_with_what_it_shows(cache: Path) -> None:
    by_picture: dict[str, list[tuple[str, str]]] = {}
    for question in shape_questions(cache, "compact"):
        by_picture.setdefault(question.picture, []).append((question.text, question.answers[0]))
    for asked in by_picture.values():
        (_, color), (_, shape), (text, yes) = asked
        words = {"red", "blue", "circle", "triangle"} & set(
            text.rstrip("?.").replace("?", "").split()
        )
        assert (yes == "yes") == bool(words & {color, shape})


@pytest.mark.parametrize(
    ("noun", "width", "height", "expected"),
    [
        ("sofa", 200, 80, {"furniture": "sofa", "wider": "yes", "height": "100"}),
        ("door", 90, 210, {"furniture": "door", "wider": "no", "height": "200"}),
        ("chair", 90, 80, {"furniture": "chair", "height": "100"}),
        ("bottle", 8, 20, {"furniture": "bottle", "wider": "no"}),
        ("plant", 700, 1100, {"furniture": "plant", "wider": "no"}),
        ("table", 100, 26, {"furniture": "table", "wider": "yes", "height": "50"}),
    ],
)
def test_a_thing_is_asked_what_its_size_answers_well(
    noun: str, width: float, height: float, expected: dict[str, str]
) -> None:
    assert furniture_facts(noun, width, height) == expected


@pytest.mark.parametrize(
    ("label", "noun"),
    [
        ("cat face", "cat"),
        ("grinning cat", None),
        ("eight o’clock", "clock"),
        ("two-thirty", "clock"),
        ("hot dog", None),
        ("computer mouse", None),
        ("bird of a tree", None),
        ("anchor", None),
    ],
)
def test_an_emoji_shows_one_noun_or_none(label: str, noun: str | None) -> None:
    assert emoji_noun(label) == noun


def test_things_of_a_scene_do_not_overlap_and_stand_everywhere() -> None:
    import random

    rng = random.Random(0)
    seen = set()
    for _ in range(300):
        one, two = scenes.places(rng)
        assert max(abs(one[0] - two[0]), abs(one[1] - two[1])) >= scenes.SIDE
        seen.add(one)
    assert len(seen) == 8  # the middle leaves no room for another
    assert scenes.box_of((16, 32)) == "[250, 500, 750, 1000]"


@pytest.mark.parametrize(
    ("ink", "name"),
    [
        ((200, 20, 20), "red"), ((240, 140, 20), "orange"), ((240, 230, 20), "yellow"),
        ((20, 160, 30), "green"), ((30, 60, 220), "blue"), ((150, 30, 200), "purple"),
        ((110, 60, 20), "brown"), ((10, 10, 10), "black"), ((128, 128, 130), "gray"),
    ],
)  # fmt: skip
def test_the_color_of_a_drawing_is_named(ink: tuple[int, int, int], name: str) -> None:
    drawing = Image.new("RGB", (64, 64), "white")
    drawing.paste(ink, (10, 10, 40, 50))
    assert scenes.color_name(drawing) == name


def test_a_drawing_without_a_main_color_is_colorful_and_an_empty_one_white() -> None:
    drawing = Image.new("RGB", (64, 64), "white")
    assert scenes.color_name(drawing) == "white"
    for place, ink in enumerate(((200, 20, 20), (30, 60, 220), (20, 160, 30))):
        drawing.paste(ink, (10 + 10 * place, 10, 20 + 10 * place, 50))
    assert scenes.color_name(drawing) == "colorful"


def test_few_colors_are_of_the_picture_itself() -> None:
    drawing = Image.new("RGB", (64, 64), (9, 99, 199))
    drawing.paste((250, 1, 2), (0, 0, 30, 30))
    assert few_colors(drawing).tobytes() == drawing.tobytes()
    many = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    assert len(few_colors(many).getcolors()) <= 48 < len(many.getcolors())
