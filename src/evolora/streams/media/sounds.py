"""One way to read a sound: mono, 16,000 samples a second, float32 in [-1, 1].

Channels are averaged. WAV, FLAC, OGG (Vorbis, Opus) and MP3 files are decoded by libsndfile.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evolora.errors import DataError
from evolora.streams.media.kinds import check_file, is_name, taken
from evolora.streams.media.resampling import resample

RATE = 16_000
"""Samples per second."""


def read_sound(source: Any, *, seconds: float | None = None, asked: str = "audio") -> Tensor:
    """Return a sound as float32 (samples,), mono, at 16 kHz.

    Args:
        source: name of a sound file, or a floating array or tensor (samples,) that is mono and at
            16 kHz already.
        seconds: at most that much from its beginning; None reads all.
        asked: what the user calls this input, for messages.

    Raises:
        DataError: missing, unreadable, empty, of another kind, or of values that are no sound.
    """
    most = None if seconds is None else math.ceil(seconds * RATE)
    if is_name(source):
        return _file(source, seconds, asked)[:most]
    if not isinstance(source, Tensor | np.ndarray):
        raise DataError(
            f"{asked} takes {taken('audio')}, or a mono array at 16 kHz; got "
            f"{type(source).__name__}"
        )
    wave = torch.as_tensor(source).detach().cpu()
    if wave.dim() != 1 or not wave.is_floating_point():
        raise DataError(
            f"{asked}: a sound in memory is floating (samples,) in [-1, 1], mono, at 16 kHz; got "
            f"{wave.dtype} {tuple(wave.shape)}"
        )
    return _checked(wave[:most].float(), asked)


def _file(name: Any, seconds: float | None, asked: str) -> Tensor:
    check_file(name, "audio", asked=asked)
    import soundfile

    try:
        with soundfile.SoundFile(str(name)) as file:
            rate = int(file.samplerate)
            # A little more than asked for: what lies behind the end shapes the last samples.
            frames = -1 if seconds is None else math.ceil((seconds + 0.1) * rate)
            values = file.read(frames, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        reason = str(error).strip().rstrip(".")
        raise DataError(f"cannot read the sound {str(name)!r}: {reason}") from error
    wave = torch.from_numpy(np.ascontiguousarray(values.mean(axis=1)))
    return resample(_checked(wave, str(name)), rate, RATE)


def _checked(wave: Tensor, name: str) -> Tensor:
    if not wave.numel():
        raise DataError(f"the sound {name!r} is empty")
    if not bool(torch.isfinite(wave).all()):
        raise DataError(f"the sound {name!r} has values that are no numbers (NaN or infinite)")
    return wave
