"""Depth maps before the model's own image encoder: alone, or a picture and its depth map.

PathWeave's "depth" is the pair, two frames of one sample, so its scores are of RGB and depth
together; ``frames=1`` asks for depth alone (specification, B12). Training changes both alike, not
each by itself as the released code.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from evolora.backbones.encoders.vision import Augment, of_pictures
from evolora.backbones.modalities import ModalitySpec
from evolora.errors import ConfigError, DataError
from evolora.registry import ENCODERS
from evolora.streams.images import read_image
from evolora.streams.media.depth_maps import read_depth


@ENCODERS.register("depth", summary="depth maps, or pictures with theirs, seen as images")
def depth(
    name: str,
    model: nn.Module,
    processor: Any,
    *,
    frames: int = 1,
    near: float | None = None,
    far: float | None = None,
    cue: str | None = None,
    augment: Augment = "none",
) -> ModalitySpec:
    """Return a modality of depth maps (1 frame) or of pairs (picture, depth map) (2 frames).

    ``near`` and ``far`` in metres, see :func:`evolora.streams.media.depth_maps.read_depth`;
    ``augment`` as of the "vision" encoder.
    """
    if frames not in (1, 2):
        raise ConfigError(f"{name}: depth has 1 frame, or 2 (picture, depth map); got {frames}")
    map_of = partial(read_depth, near=near, far=far, asked=name)

    def read(value: Any) -> list[Tensor]:
        several = isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 4
        given = list(value) if several else [value]
        if len(given) != frames:
            takes = "a pair: picture, depth map" if frames == 2 else "one depth map"
            raise DataError(f"{name} takes {takes}; got {len(given)}")
        return [*(read_image(one) for one in given[:-1]), map_of(given[-1])]

    return of_pictures(name, model, processor, read, frames=frames, cue=cue, augment=augment)
