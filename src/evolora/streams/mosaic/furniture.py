"""Reads Sweet Home 3D catalogues and draws their meshes from several sides."""

from __future__ import annotations

import io
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from evolora.streams.mosaic import render
from evolora.streams.mosaic.families import MESH_NOUNS


def mesh_noun(name: str) -> str | None:
    """Returns the class of a catalogue entry: the last word of its name, synonyms merged."""
    words = re.findall(r"[a-z]+", name.lower())
    return MESH_NOUNS.get(words[-1]) if words else None


def catalogue(path: Path) -> list[dict[str, str]]:
    """Returns the entries of a Sweet Home 3D catalogue whose model is an OBJ file."""
    with zipfile.ZipFile(path) as archive:
        text = archive.read("PluginFurnitureCatalog.properties").decode("latin-1")
    entries: dict[str, dict[str, str]] = defaultdict(dict)
    for key, number, value in re.findall(r"^(\w+)#(\d+)=(.*)$", text, re.MULTILINE):
        entries[number][key] = re.sub(
            r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m.group(1), 16)), value.strip()
        )
    return [entry for entry in entries.values() if entry.get("model", "").endswith(".obj")]


def mesh_views(
    path: Path, model: str, views: int, paper: tuple[int, int, int] = (255, 255, 255)
) -> list[Callable[[], Image.Image]]:
    loaded: list[render.Mesh] = []

    def draw(view: int) -> Image.Image:
        if not loaded:
            loaded.append(load_mesh(path, model))
        yaw = 0.5 + 2 * np.pi * view / views
        pitch = 0.25 + 0.3 * (view % 2)
        image = render.render_mesh(loaded[0], yaw, pitch, paper=paper)
        if view == views - 1:
            loaded.clear()
        return image

    return [partial(draw, view) for view in range(views)]


def load_mesh(path: Path, model: str) -> render.Mesh:
    """Returns a catalogue's mesh; each material has one color, its texture's mean."""
    with zipfile.ZipFile(path) as archive:
        text = archive.read(model).decode("latin-1")
        library = re.search(r"^mtllib\s+(.+)$", text, re.MULTILINE)
        folder = model.rpartition("/")[0]
        colors: dict[str, Sequence[float]] = {}
        if library and f"{folder}/{library.group(1).strip()}" in archive.namelist():
            materials = archive.read(f"{folder}/{library.group(1).strip()}").decode("latin-1")
            for name, body in re.findall(
                r"^newmtl\s+(\S+)(.*?)(?=^newmtl|\Z)", materials, re.MULTILINE | re.DOTALL
            ):
                colors[name] = _material_color(archive, folder, body)
    return render.parse_obj(text, colors)


def _material_color(archive: zipfile.ZipFile, folder: str, body: str) -> Sequence[float]:
    """Returns diffuse color times the mean of the texture, if there is one."""
    diffuse = re.search(r"^\s*Kd\s+(\S+)\s+(\S+)\s+(\S+)", body, re.MULTILINE)
    color = np.array([float(v) for v in diffuse.groups()]) if diffuse else np.full(3, 0.75)
    texture = re.search(r"^\s*map_Kd\s+(?:.*\s)?(\S+)\s*$", body, re.MULTILINE)
    if texture and f"{folder}/{texture.group(1)}" in archive.namelist():
        picture = Image.open(io.BytesIO(archive.read(f"{folder}/{texture.group(1)}")))
        mean = np.asarray(picture.convert("RGB").resize((1, 1), Image.Resampling.BOX))[0, 0] / 255
        color = mean * np.where(color.sum() > 0.05, color, 1.0)
    return [float(c) for c in color]
