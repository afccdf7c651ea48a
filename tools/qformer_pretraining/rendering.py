"""Renders objects of `mosaic/modalities`: those of no split to train, those of "val" for scores."""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import replace
from random import Random

import numpy as np
from numpy.typing import NDArray

from clip_pretraining.config import IMAGE_SIZE
from evolora.randomness import derive_seed
from evolora.storage.files import write_json
from evolora.streams.mosaic.modality_sources import objects
from evolora.streams.mosaic.modality_views import painted, upright
from evolora.streams.mosaic.modality_words import COLORS
from evolora.streams.mosaic.render import Mesh, render_mesh
from qformer_pretraining.objects import FILE, SIDES

LOG = logging.getLogger("pretrain_qformer")
BLUE = (0, 0, 255)  # paper that an object without color never looks like
PLAIN = "gray"  # a color of the stream that has none
YAW, PITCH = 1.2, (0.1, 0.55)  # radians; a little more than the stream's


def planes(mesh: Mesh, yaw: float, pitch: float) -> NDArray[np.uint8]:
    """Returns [2, 64, 64]: how bright a mesh is in white, and how much of a pixel it covers."""
    gray = painted(mesh, PLAIN)
    white = replace(gray, colors=gray.colors * 255 / COLORS[PLAIN][0])
    seen = np.asarray(render_mesh(white, yaw, pitch, IMAGE_SIZE, BLUE))
    return np.stack([seen[..., 0], 255 - (seen[..., 2] - seen[..., 0])])


def stage_objects(args: argparse.Namespace) -> None:
    """Writes ``--views`` renders of each object: to train, and to score by."""
    things = objects(args.cache)
    for side in SIDES:
        chosen = [thing for thing in things if thing.side == side]
        rendered, rows = [], []
        for number, thing in enumerate(chosen):
            if number % 10 == 0:
                LOG.info("%s: %d of %d objects", side, number, len(chosen))
            draw = Random(derive_seed(args.seed, "qformer-objects", thing.key))
            mesh = upright(thing)
            for _ in range(args.views):
                rendered.append(planes(mesh, draw.uniform(-YAW, YAW), draw.uniform(*PITCH)))
                rows.append((thing.name, thing.shape or ""))
        temporary = args.work / f".{FILE}-{side}.npy"
        np.save(temporary, np.stack(rendered))
        os.replace(temporary, args.work / f"{FILE}-{side}.npy")
        write_json(args.work / f"{FILE}-{side}.json", {"format_version": 1, "rows": rows})
        LOG.info("%d renders of %d objects to %s", len(rows), len(chosen), side)
