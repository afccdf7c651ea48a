"""The model's own image encoder over pictures, or frames of a video one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from evolora.backbones.modalities import ModalitySpec, default_cue
from evolora.errors import ConfigError, DataError
from evolora.registry import ENCODERS
from evolora.streams.images import random_crop_frames, read_image, resize_square
from evolora.streams.media.kinds import check_file, is_name, kind_of
from evolora.streams.media.videos import equally_spaced, read_video

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Of image values in [0, 1], where no processor says so (CLIP's, which BLIP-2 uses)."""
Augment = Literal["none", "crop", "crop-flip"]


class Frames(nn.Module):
    """The model's own image encoder over frames, up to its last norm, of which each path has one.

    Args:
        vision: ``vision_model`` of a BLIP-2 or InstructBLIP.
        processor: tells mean and deviation of the values; None takes CLIP's.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, vision: nn.Module, processor: Any = None) -> None:
        super().__init__()
        self._vision = (vision,)  # part of the model, not of this
        images = getattr(processor, "image_processor", None)
        for name, key, default in (
            ("mean", "image_mean", MEAN),
            ("deviation", "image_std", DEVIATION),
        ):
            values = torch.tensor(tuple(getattr(images, key, default) or default), device="cpu")
            self.register_buffer(name, values.view(3, 1, 1))

    def forward(self, frames: Tensor) -> Tensor:
        """Return (b, f, n, d) of uint8 frames (b, f, 3, s, s)."""
        vision: Any = self._vision[0]
        images = frames.flatten(0, 1)
        weight = vision.embeddings.patch_embedding.weight
        pixels = (images.float() / 255.0 - self.mean) / self.deviation
        hidden = vision.embeddings(pixels.to(weight.dtype))
        states: Tensor = vision.encoder(inputs_embeds=hidden).last_hidden_state
        return states.view(*frames.shape[:2], *states.shape[1:])


@ENCODERS.register("vision", summary="the model's own image encoder, frame by frame")
def vision(
    name: str,
    model: nn.Module,
    processor: Any,
    *,
    frames: int = 1,
    cue: str | None = None,
    augment: Augment = "none",
) -> ModalitySpec:
    """Return a modality of pictures: one, or several as frames (video).

    Of more images than ``frames``, as many are taken at equal distances; the last of fewer is
    repeated. ``augment``: where training augments, all frames are cropped alike ("crop"), and half
    of the samples mirrored ("crop-flip"; not where left and right are asked for).
    """

    def read(value: Any) -> list[Tensor]:
        if is_name(value) and frames > 1 and _moves(value):
            return read_video(value, frames=frames, asked=name)
        if is_name(value) and frames == 1:
            check_file(value, "image", asked=name)
        images = _several(value)
        if not images or (frames == 1 and len(images) > 1):
            raise DataError(
                f"{name} takes {'one image' if frames == 1 else 'images'}; got {len(images)}"
            )
        return [read_image(images[place]) for place in equally_spaced(len(images), frames)]

    return of_pictures(name, model, processor, read, frames=frames, cue=cue, augment=augment)


def of_pictures(
    name: str,
    model: nn.Module,
    processor: Any,
    read: Any,
    *,
    frames: int,
    cue: str | None,
    augment: Augment,
) -> ModalitySpec:
    """Return a modality whose ``read`` gives uint8 pictures (3, h, w), seen by the model's encoder.

    Raises:
        ConfigError: an unknown augmentation.
    """
    if augment not in (known := ("none", "crop", "crop-flip")):
        raise ConfigError(f"augment must be one of {', '.join(known)}; got {augment!r}")
    config: Any = model.config
    size = config.vision_config.image_size
    side = int(size if isinstance(size, int) else size[0])

    def changed(pictures: Tensor, draw: torch.Generator) -> Tensor:
        return random_crop_frames(pictures, draw, flip=augment == "crop-flip")

    return ModalitySpec(
        name=name,
        encoder=Frames(model.get_submodule("vision_model"), processor),
        width=int(config.vision_config.hidden_size),
        read=lambda value: torch.stack([resize_square(one, side) for one in read(value)]),
        frames=frames,
        cue=default_cue(name) if cue is None else cue,
        augment=None if augment == "none" else changed,
    )


def _moves(file: str | Path) -> bool:
    """Return whether a name is that of a video, or of a folder of its frames.

    A still picture is a video without motion; what is neither is refused.
    """
    if Path(file).is_dir():
        return True
    kind = kind_of(file)
    if kind != "picture":
        check_file(file, "video")
    return kind != "picture"


def _several(value: Any) -> list[Any]:
    many = isinstance(value, Tensor | np.ndarray) and value.ndim == 4
    return list(value) if many or isinstance(value, list | tuple) else [value]
