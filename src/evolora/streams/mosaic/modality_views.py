"""Draws an object as a picture, a film, a depth map or a cloud of points, and plays recordings.

Everything but the first two functions is a pure function of its arguments, a seeded generator
among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from evolora.streams.mosaic.furniture import load_mesh
from evolora.streams.mosaic.modality_sources import Thing
from evolora.streams.mosaic.modality_words import COLORS
from evolora.streams.mosaic.render import (
    Floats,
    Mesh,
    mesh_depth,
    pad_to_square,
    render_mesh,
)

FRAMES = 4
POINTS = 512
RATE = 16_000  # samples per second
SECONDS = 1.5  # of a clip

_PITCH = (0.15, 0.5)  # height angle of the camera, radians
_STEP = 0.45  # turn between two frames, radians
_SHIFT = 8  # pixels between two frames
_CAMERA = {"near": 2.0, "middle": 3.2, "far": 5.0}  # distance from the middle, in radii
_VIEW = 0.55  # half the picture's width at distance 1
_TURNS = {"upright": 0.0, "lying": 0.5, "inverted": 1.0}  # about the viewing axis, in pi
_FADE = 480  # samples

Wave = NDArray[np.float32]


def upright(thing: Thing) -> Mesh:
    """Returns an object's mesh on its feet (y is up), in metres, its box around the origin."""
    mesh = load_mesh(thing.path, thing.model)
    triangles = mesh.triangles @ np.asarray(thing.rotation).reshape(3, 3).T
    low, high = triangles.min(axis=(0, 1)), triangles.max(axis=(0, 1))
    scale = np.asarray(thing.size) / np.maximum(high - low, 1e-9)
    return Mesh((triangles - (low + high) / 2) * scale, mesh.colors)


def animated(path: Path) -> list[Image.Image]:
    """Returns `FRAMES` frames of an animated picture at equal distances, on white."""
    frames = []
    with Image.open(path) as moving:
        count: int = getattr(moving, "n_frames", 1)
        for index in range(FRAMES):
            moving.seek(index * count // FRAMES)
            frames.append(pad_to_square(moving.convert("RGBA")))
    return frames


def painted(mesh: Mesh, color: str) -> Mesh:
    """Returns the mesh in one color; what is lighter stays a little lighter."""
    light = mesh.colors @ np.array([0.3, 0.59, 0.11])
    share = 0.65 + 0.35 * light / max(float(light.max()), 1e-9)
    return Mesh(mesh.triangles, share[:, None] * np.asarray(COLORS[color]) / 255)


def picture(mesh: Mesh, random: np.random.Generator) -> Image.Image:
    """Returns the object from some side in front of it, above."""
    return _drawn(mesh, random.uniform(-0.9, 0.9), random.uniform(*_PITCH))


def _drawn(mesh: Mesh, yaw: float, pitch: float, reach: float | None = None) -> Image.Image:
    return render_mesh(mesh, yaw, pitch, reach=reach, oversample=1)


def film(mesh: Mesh, motion: str, random: np.random.Generator) -> list[Image.Image]:
    """Returns `FRAMES` frames of the object turning, passing by, coming nearer or going away.

    Args:
        mesh: what is filmed.
        motion: key of `modality_words.MOTIONS`; it turns to the left if its front goes left.
        random: chooses the side it is seen from.
    """
    yaw, pitch, wide = random.uniform(-0.9, 0.9), random.uniform(*_PITCH), _radius(mesh)
    steps = np.arange(FRAMES) - (FRAMES - 1) / 2
    if motion in ("left", "right"):
        sign = 1 if motion == "right" else -1
        return [_drawn(mesh, yaw + sign * s * _STEP, pitch, wide) for s in steps]
    if motion in ("nearer", "away"):
        reaches = wide * np.geomspace(2.4, 1.0, FRAMES)
        ordered = reaches if motion == "nearer" else reaches[::-1]
        return [_drawn(mesh, yaw, pitch, float(reach)) for reach in ordered]
    still = _drawn(mesh, yaw, pitch, 1.7 * wide)
    down = 1 if motion == "down" else -1
    return [ImageChops.offset(still, 0, round(down * s * _SHIFT)) for s in steps]


def depth_map(mesh: Mesh, distance: str, random: np.random.Generator) -> NDArray[np.uint8]:
    """Returns inverse depth [64, 64]: 255 at one radius from the camera, 0 where nothing is.

    Args:
        mesh: what is measured.
        distance: key of `modality_words.DISTANCES`.
        random: chooses the side it is seen from and the distance, within 6 %.
    """
    radius = _radius(mesh)
    away = _CAMERA[distance] * random.uniform(0.94, 1.06)
    yaw, pitch = random.uniform(-0.9, 0.9), random.uniform(*_PITCH)
    depth = mesh_depth(mesh, yaw, pitch, reach=away * _VIEW * radius)
    return np.nan_to_num(np.clip(255 / (away - depth / radius), 0, 255)).astype(np.uint8)


def cloud(
    mesh: Mesh, pose: str, random: np.random.Generator, points: int = POINTS
) -> tuple[Floats, NDArray[np.uint8]]:
    """Returns points on the object's surface, metres [points, 3], and their colors [points, 3].

    Args:
        mesh: what is scanned.
        pose: key of `modality_words.POSES`.
        random: chooses the points and the turn about the vertical axis.
        points: how many.
    """
    sides = mesh.triangles[:, 1:] - mesh.triangles[:, :1]
    area = np.linalg.norm(np.cross(sides[:, 0], sides[:, 1]), axis=1)
    chosen = random.choice(len(area), points, p=area / area.sum())
    first, second = np.sqrt(random.random(points)), random.random(points)
    weights = np.stack([1 - first, first * (1 - second), first * second], axis=1)
    found = np.einsum("pc,pcx->px", weights, mesh.triangles[chosen])
    tip, yaw = np.pi * _TURNS[pose], random.uniform(0, 2 * np.pi)
    tipped = found @ _turn(tip, 0, 1).T @ _turn(yaw, 2, 0).T
    return tipped, (mesh.colors[chosen] * 255).astype(np.uint8)


def _turn(angle: float, first: int, second: int) -> Floats:
    matrix = np.eye(3)
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[second, first], matrix[first, second] = np.sin(angle), -np.sin(angle)
    return matrix


def _radius(mesh: Mesh) -> float:
    """Returns how far the mesh reaches from the middle of its box."""
    return float(np.linalg.norm(mesh.triangles, axis=2).max())


def clip(strokes: Sequence[Wave]) -> Wave:
    """Returns `SECONDS` of sound: the recordings one after another, each with the same time."""
    whole = np.zeros(round(SECONDS * RATE), dtype=np.float32)
    slot = len(whole) // len(strokes)
    for index, stroke in enumerate(strokes):
        part = stroke[: slot - _FADE].copy()
        part[-_FADE:] *= np.linspace(1, 0, _FADE, dtype=np.float32)[-len(part) :]
        whole[index * slot : index * slot + len(part)] = part
    return whole


def heard(path: Path) -> Wave:
    """Returns a recording's first `SECONDS` from its onset on, mono, at `RATE`, peak 0.8."""
    import soundfile

    with soundfile.SoundFile(path) as file:
        rate = file.samplerate
        wave = file.read(round((SECONDS + 0.5) * rate), always_2d=True).mean(axis=1)
    spectrum = np.fft.rfft(wave)
    length = round(len(wave) * RATE / rate)
    kept = np.zeros(length // 2 + 1, dtype=complex)
    shared = min(len(kept), len(spectrum))
    kept[:shared] = spectrum[:shared]
    resampled = np.fft.irfft(kept, length)
    peak = max(float(np.abs(resampled).max()), 1e-9)
    onset = int(np.argmax(np.abs(resampled) > 0.03 * peak))
    return (0.8 / peak * resampled[onset : onset + round(SECONDS * RATE)]).astype(np.float32)
