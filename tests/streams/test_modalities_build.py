"""`mosaic/modalities` built from a few meshes, emoji and recordings in the packages' layouts."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from evolora.config import load_stream
from evolora.streams.mosaic import build_modalities
from evolora.streams.mosaic.build_modalities import fixed_serial, pack_cloud
from evolora.streams.mosaic.families import EMOJI_SPLITS, FLAG_SPLITS, ICON_SPLITS
from evolora.streams.mosaic.modalities import DECODERS
from evolora.streams.mosaic.modality_sources import (
    animations,
    midi_number,
    object_name,
    objects,
    recordings,
)
from evolora.streams.mosaic.modality_views import film, painted, upright
from evolora.streams.mosaic.modality_words import MODALITIES
from evolora.streams.mosaic.render import Mesh
from evolora.streams.mosaic.sources import TONES

CUBE = "\n".join(
    [f"v {x} {y} {z}" for x in (0, 3) for y in (0, 1) for z in (0, 1)]
    + ["f 1 2 4 3", "f 5 7 8 6", "f 1 5 6 2", "f 3 4 8 7", "f 1 3 7 5", "f 2 6 8 4"]
)
NUMBERS = dict.fromkeys(MODALITIES, (6, 2, 4))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cache")

    def write(name: str, content: object) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())

    def sound(pitch: float, form: str) -> bytes:
        wave, written = np.sin(np.arange(12000) * pitch), io.BytesIO()
        soundfile.write(written, wave, 22050, format=form)
        return written.getvalue()

    prefixes = [p for t in (EMOJI_SPLITS, FLAG_SPLITS, ICON_SPLITS) for g in t.values() for p in g]
    about = {"name": "x", "author": {"name": "y"}, "license": {"spdx": "MIT"}}
    write("iconify/package/collections.json", dict.fromkeys(prefixes, about))
    groups = {"groups": {"0": "travel-places"}, "subgroups": {"7": "time"}}
    write("emojibase/package/meta/groups.json", groups)
    codes = [f"1F55{number}" for number in range(9)]
    entries = [{"label": f"{c} o'clock", "hexcode": c, "group": 0, "subgroup": 7} for c in codes]
    write("emojibase/package/en/data.json", entries)
    (root / "fluent-anim-2/package/assets").mkdir(parents=True)
    for number, code in enumerate(codes):
        frames = [Image.new("RGB", (32, 32), (20 * number, 30 * step, 99)) for step in range(6)]
        moving = io.BytesIO()
        frames[0].save(moving, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
        write(f"fluent-anim-1/package/assets/{code.lower()}.webp", moving.getvalue())
    for tone in TONES:
        for note in ("C2", "C4", "C6"):
            content = sound(0.01 * midi_number(note), "FLAC")
            write(f"tone-{tone}/package/{note}.mp3", content)
    for number in range(5):
        write(f"scsynth-samples/package/samples/bd_{number}.flac", sound(0.1 + number, "FLAC"))
    lines, models = [], {}
    for number in range(1, 25):
        noun, model = ("table", "lamp")[number % 2], f"m{number}/m.obj"
        lines += [f"name#{number}=Old {noun}", f"model#{number}=/{model}", f"creator#{number}=A"]
        size = {"width": 100 + number, "depth": 40, "height": 40 + 120 * (number % 2)}
        lines += [f"{key}#{number}={value}" for key, value in size.items()]
        models[model] = CUBE.replace("v 3", f"v {2 + number / 9}")
    folder = root / "furniture/usr/share/sweethome3d/furniture"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "Test.sh3f", "w") as archive:
        archive.writestr("PluginFurnitureCatalog.properties", "\n".join(lines))
        for model, text in models.items():
            archive.writestr(model, text)
    return root


def test_two_builds_are_equal_and_a_stream_of_all_modalities(cache: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        build_modalities.build(tmp_path / name, "compact", cache, numbers=NUMBERS)
    for name in ("modalities.json", "modalities.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    stream = load_stream("mosaic/modalities", root=tmp_path / "one")
    assert [task.name for task in stream] == list(MODALITIES)
    pretrain = {
        source.key
        for listed in (objects(cache), animations(cache), recordings(cache))
        for source in listed
        if source.side == "pretrain"
    }
    assert pretrain
    for task in stream:
        assert (len(task.val), len(task.test)) == (4, 12)
        items = NUMBERS[task.name][0]
        assert len(task.train) >= 3 * items  # all that can be asked
        used = {data.group(row) for data in (task.train, task.test) for row in range(len(data))}
        assert used and not used & pretrain


def test_names_notes_and_sides(cache: Path) -> None:
    assert object_name("Old oak table") == "table" and object_name("Rocking horse") is None
    assert [midi_number(note) for note in ("C4", "Cs4", "A4", "B1")] == [60, 61, 69, 35]
    sides = [source.side for source in objects(cache)]
    assert {side: sides.count(side) for side in set(sides)} == {
        "pretrain": 6, "train": 10, "val": 2, "test": 6
    }  # fmt: skip


def test_what_turns_right_moves_its_front_to_the_right() -> None:
    front = np.array([[-0.2, 0, 1], [0.2, 0, 1], [0, 0.4, 1.0]])
    back = front * [1, 1, -1]
    mesh = Mesh(np.stack([front, back]), np.array([[1.0, 0, 0], [0, 0, 1.0]]))
    places = []
    for frame in film(mesh, "right", np.random.default_rng(0)):
        pixels = np.asarray(frame).astype(int)
        reds = np.argwhere(pixels[..., 0] - pixels[..., 2] > 30)
        blues = np.argwhere(pixels[..., 2] - pixels[..., 0] > 30)
        places.append(reds[:, 1].mean() - blues[:, 1].mean())
    assert places == sorted(places) and places[-1] - places[0] > 10


def test_films_show_the_motion_that_they_are_named_for(cache: Path) -> None:
    thing = next(one for one in objects(cache) if one.name == "table")
    mesh = upright(thing)
    assert np.ptp(mesh.triangles, axis=(0, 1)) == pytest.approx(thing.size)
    lots = np.random.default_rng
    near = [np.asarray(frame) for frame in film(painted(mesh, "red"), "nearer", lots(0))]
    covered = [int((frame != 255).any(axis=2).sum()) for frame in near]
    assert covered == sorted(covered) and covered[0] < covered[-1] / 3
    right = film(painted(mesh, "red"), "right", lots(0))
    left = film(painted(mesh, "red"), "left", lots(0))
    assert [frame.tobytes() for frame in right] == [frame.tobytes() for frame in left[::-1]]
    up = [np.asarray(frame) for frame in film(painted(mesh, "red"), "up", lots(0))]
    tops = [int((frame != 255).any(axis=(1, 2)).argmax()) for frame in up]
    assert tops == sorted(tops, reverse=True) and tops[0] > tops[-1]


def test_what_is_packed_comes_back() -> None:
    lots = np.random.default_rng(0)
    points, colors = lots.normal(size=(512, 3)), lots.integers(0, 256, (512, 3)).astype(np.uint8)
    cloud = DECODERS["pc"](pack_cloud(points, colors)).numpy()
    order = np.lexsort(points.T)
    assert np.abs(cloud[:, :3] - points[order]).max() <= np.abs(points).max() / 254 + 1e-6
    assert np.allclose(cloud[:, 3:] * 255, colors[order])
    wave, files = np.sin(np.arange(24000) / 20).astype(np.float32) / 2, []
    for _ in range(2):
        written = io.BytesIO()
        soundfile.write(written, wave, 16000, format="OGG", subtype="OPUS")
        files.append(fixed_serial(written.getvalue()))
    assert files[0] == files[1]
    heard = DECODERS["audio"](files[0]).numpy()
    assert len(heard) == 24000 and np.abs(heard - wave)[2000:-2000].mean() < 0.05
