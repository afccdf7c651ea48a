"""Turns drawings, letters and meshes into square RGB images on paper of one color.

Everything here is a pure function of its arguments: no file is fetched, no randomness is drawn.
Drawings that are not square are padded, never stretched, since a distorted flag is another flag.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from evolora.errors import DataError

IMAGE_SIZE = 64  # pixels, both sides
_OVERSAMPLE = 2  # meshes are drawn at twice the size and averaged down
_DEPTH_STEPS = 256  # of the z-buffer in a pixel
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")

Floats = NDArray[np.float64]


def pad_to_square(image: Image.Image, size: int = IMAGE_SIZE, paper: str = "white") -> Image.Image:
    """Returns the image scaled to fit, centered on a square of paper; alpha is put over paper."""
    if image.mode != "RGB":
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, paper), rgba).convert("RGB")
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (size, size), paper)
    canvas.paste(image, ((size - width) // 2, (size - height) // 2))
    return canvas


def on_board(image: Image.Image, board: str, ink: str = "white") -> Image.Image:
    """Returns a dark-on-white picture as a drawing in ``ink`` on a board of one color.

    The darker a pixel, the more ink covers the board; the colors of the picture are lost.
    """
    cover = ImageOps.invert(image.convert("L"))
    return Image.composite(
        Image.new("RGB", image.size, ink), Image.new("RGB", image.size, board), cover
    )


def square_svg(svg: str) -> str:
    """Returns the drawing with a square `viewBox` around it and no size of its own.

    resvg calls sizes in mm or pt without a `viewBox`, and some DOCTYPEs, an "invalid size". Taking
    the numbers as they are gives the box that such files were drawn in.
    """
    svg = re.sub(r"<!DOCTYPE[^>\[]*(\[[^\]]*\])?[^>]*>", "", svg, count=1)
    opening = re.search(r"<svg\b[^>]*>", svg)
    if opening is None:
        raise DataError("not an SVG drawing: it has no <svg> element")
    tag = opening.group(0)
    found = {key: re.search(rf'\s{key}\s*=\s*["\']([^"\']*)["\']', tag) for key in _SIZE_KEYS}
    texts = {key: match.group(1) for key, match in found.items() if match}
    box = [float(n) for n in _NUMBER.findall(texts.get("viewBox", ""))]
    if len(box) != 4:
        sides = [_NUMBER.search(texts.get(key, "")) for key in ("width", "height")]
        box = [0.0, 0.0, *(float(m.group(0)) if m else 100.0 for m in sides)]
    left, top, width, height = box
    side = max(width, height)
    left, top = left - (side - width) / 2, top - (side - height) / 2
    for match in found.values():
        tag = tag.replace(match.group(0), "", 1) if match else tag
    tag = tag.replace("<svg", f'<svg viewBox="{left:g} {top:g} {side:g} {side:g}"', 1)
    return svg[: opening.start()] + tag + svg[opening.end() :]


_SIZE_KEYS = ("viewBox", "width", "height")


def render_svg(svg: str, size: int = IMAGE_SIZE, paper: str = "#ffffff") -> Image.Image:
    """Returns the drawing on paper ("#rrggbb"), padded to a square.

    Raises:
        DataError: resvg-py is not installed, or it cannot draw this file.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise DataError("drawing SVG needs the package 'resvg-py' (pip install it)") from error
    try:
        png = resvg_py.svg_to_bytes(
            svg_string=square_svg(svg),
            width=size,
            height=size,
            background=paper,
            skip_system_fonts=True,
        )
    except ValueError as error:
        raise DataError(f"resvg cannot draw this SVG: {error}") from error
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


def icon_svg(icons: Mapping[str, Any], name: str) -> str:
    """Returns the SVG text of one drawing of an Iconify set.

    Args:
        icons: the set's JSON (keys `icons`, `width`, `height`, ...).
        name: key in `icons["icons"]`.
    """
    icon = icons["icons"][name]
    box = [
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    ]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{" ".join(str(b) for b in box)}">{icon["body"]}</svg>'
    )


def render_snippet(
    font: ImageFont.FreeTypeFont,
    lines: Sequence[str],
    size: int = IMAGE_SIZE,
    margin: int = 3,
) -> Image.Image:
    """Returns lines of text, black on white, scaled to fill the square up to `margin` pixels."""
    text = "\n".join(lines)
    probe = ImageDraw.Draw(Image.new("L", (1, 1)))
    left, top, right, bottom = probe.multiline_textbbox((0, 0), text, font=font, align="center")
    width, height = max(1, round(right - left)), max(1, round(bottom - top))
    page = Image.new("L", (width, height), 255)
    ImageDraw.Draw(page).multiline_text((-left, -top), text, font=font, fill=0, align="center")
    inner = pad_to_square(page, size - 2 * margin)
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(inner, (margin, margin))
    return canvas


@dataclass(frozen=True)
class Mesh:
    """Triangles in space with one color each."""

    triangles: Floats  # [n, 3 corners, 3 coordinates]
    colors: Floats  # [n, 3], 0..1


def parse_obj(text: str, colors: Mapping[str, Sequence[float]]) -> Mesh:
    """Returns the mesh of a Wavefront OBJ file; polygons are split into fans.

    Args:
        text: content of the OBJ file.
        colors: material name -> RGB in 0..1; unknown materials become light grey.
    """
    corners: list[list[float]] = []
    faces: list[tuple[int, int, int]] = []
    shades: list[Sequence[float]] = []
    current: Sequence[float] = (0.75, 0.75, 0.75)
    for line in text.splitlines():
        key, _, rest = line.strip().partition(" ")
        if key == "v":
            corners.append([float(number) for number in rest.split()[:3]])
        elif key == "usemtl":
            current = colors.get(rest.strip(), (0.75, 0.75, 0.75))
        elif key == "f":
            ids = [int(part.split("/")[0]) for part in rest.split()]
            ids = [i - 1 if i > 0 else len(corners) + i for i in ids]
            fan = [(ids[0], ids[k], ids[k + 1]) for k in range(1, len(ids) - 1)]
            faces.extend(fan)
            shades.extend([current] * len(fan))
    if not faces:
        raise DataError("the OBJ file has no faces")
    points = np.asarray(corners, dtype=np.float64)
    return Mesh(points[np.asarray(faces)], np.asarray(shades, dtype=np.float64))


def render_mesh(
    mesh: Mesh,
    yaw: float,
    pitch: float = 0.4,
    size: int = IMAGE_SIZE,
    paper: tuple[int, int, int] = (255, 255, 255),
    reach: float | None = None,
    oversample: int = _OVERSAMPLE,
) -> Image.Image:
    """Returns the mesh seen from outside, shaded by a light over the viewer's shoulder.

    Each triangle is covered by a grid of points closer together than a pixel, so there are no
    pinholes; a z-buffer keeps the nearest point of each pixel.

    Args:
        mesh: triangles with colors.
        yaw: turn about the vertical axis, radians.
        pitch: camera height angle, radians.
        size: pixels of both sides.
        paper: color behind the mesh.
        reach: half the picture's width in the mesh's unit; None for what shows all of it.
        oversample: pixels drawn for the side of each pixel returned; 1 is quick and has jags.
    """
    pixels = size * oversample
    seen = _seen(mesh, yaw, pitch, pixels, reach)
    normals = np.cross(seen[:, 1] - seen[:, 0], seen[:, 2] - seen[:, 0])
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    light = np.array([0.35, 0.55, 0.76])
    shade = np.abs(normals @ light) / np.maximum(length[:, 0], 1e-12)
    shaded = np.clip(mesh.colors * (0.35 + 0.65 * shade[:, None]), 0, 1)
    nearest = _nearest(seen, pixels)
    image = np.tile(np.asarray(paper, dtype=np.uint8), (pixels * pixels, 1))
    hit = nearest >= 0
    image[hit] = (shaded[nearest[hit] & 0xFFFFFFFF] * 255).astype(np.uint8)
    picture = Image.fromarray(image.reshape(pixels, pixels, 3))
    return picture.resize((size, size), Image.Resampling.BOX)


def mesh_depth(
    mesh: Mesh, yaw: float, pitch: float, size: int = IMAGE_SIZE, reach: float | None = None
) -> Floats:
    """Returns how far each pixel's point is before the mesh's middle, [size, size]; else NaN.

    Args:
        mesh: triangles.
        yaw: turn about the vertical axis, radians.
        pitch: camera height angle, radians.
        size: pixels of both sides.
        reach: half the picture's width in the mesh's unit, which is the unit of the depth as well.
    """
    nearest = _nearest(_seen(mesh, yaw, pitch, size, reach), size)
    scale = _scale(mesh, yaw, pitch, size, reach)
    depth = ((nearest >> 32) / _DEPTH_STEPS - 4 * size) / scale
    return np.where(nearest >= 0, depth, np.nan).reshape(size, size)


def _scale(mesh: Mesh, yaw: float, pitch: float, pixels: int, reach: float | None) -> float:
    """Returns pixels per unit of the mesh."""
    if reach is not None:
        return pixels / (2 * reach)
    seen = mesh.triangles @ _rotation(yaw, pitch).T
    extent = seen.max(axis=(0, 1)) - seen.min(axis=(0, 1))
    return float((pixels - 4 * _OVERSAMPLE) / max(float(extent[:2].max()), 1e-9))


def _seen(mesh: Mesh, yaw: float, pitch: float, pixels: int, reach: float | None) -> Floats:
    """Returns the triangles as the camera sees them, in pixels around the picture's middle."""
    seen = mesh.triangles @ _rotation(yaw, pitch).T
    low, high = seen.min(axis=(0, 1)), seen.max(axis=(0, 1))
    return np.asarray((seen - (low + high) / 2) * _scale(mesh, yaw, pitch, pixels, reach))


def _rotation(yaw: float, pitch: float) -> Floats:
    """Returns the matrix that turns the object by `yaw` and lifts the camera by `pitch`."""
    cy, sy, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    lift = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    return np.asarray(lift @ turn)


def _nearest(triangles: Floats, pixels: int) -> NDArray[np.int64]:
    """Returns the z-buffer [pixels * pixels]; x right, y up, z towards the viewer, in pixels.

    One integer holds depth (high bits) and triangle (low bits); -1 where there is nothing.
    """
    edges = triangles[:, [1, 2, 0], :2] - triangles[:, :, :2]
    longest = np.linalg.norm(edges, axis=2).max(axis=1)
    steps = 2 ** np.ceil(np.log2(np.maximum(longest * 1.5, 1.0))).astype(np.int64)
    nearest = np.full(pixels * pixels, -1, dtype=np.int64)
    for step in np.unique(steps):
        chosen = np.flatnonzero(steps == step)
        grid = _barycentric(int(step))
        for block in np.array_split(chosen, 1 + len(chosen) * len(grid) // 2_000_000):
            points = np.einsum("gc,tcx->tgx", grid, triangles[block])
            column = np.clip(points[..., 0] + pixels / 2, 0, pixels - 1).astype(np.int64)
            row = np.clip(pixels / 2 - points[..., 1], 0, pixels - 1).astype(np.int64)
            depth = ((points[..., 2] + 4 * pixels) * _DEPTH_STEPS).astype(np.int64)
            packed = (depth << 32) + block[:, None]
            np.maximum.at(nearest, (row * pixels + column).ravel(), packed.ravel())
    return nearest


def _barycentric(step: int) -> Floats:
    """Returns the weights [points, 3] of a triangular grid with `step` cells per edge."""
    first, second = np.meshgrid(np.arange(step + 1), np.arange(step + 1), indexing="ij")
    keep = first + second <= step
    a, b = first[keep] / step, second[keep] / step
    return np.stack([a, b, 1 - a - b], axis=1)
