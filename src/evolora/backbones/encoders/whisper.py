"""Whisper's encoder on sounds (Radford et al., 2022): log-mel frames to 50 tokens a second.

    wave --16 kHz, mono--> windows of ``seconds`` --log-mel (WhisperFeatureExtractor)--> encoder

The encoder expects 30 seconds; a shorter window takes the first rows of its position table, which
costs in proportion. Silence fills what a sound is too short for.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.backbones.encoders.folders import encoder_folder, encoder_tensors
from evolora.backbones.modalities import ModalitySpec, default_cue
from evolora.errors import ConfigError, DataError
from evolora.registry import ENCODERS
from evolora.streams.media.sounds import RATE, read_sound

TOKENS = 50
"""Of a second."""


class Listener(nn.Module):
    """Whisper's encoder, with neighbouring tokens averaged.

    Args:
        encoder: ``WhisperEncoder``.
        pool: how many tokens become one.
    """

    def __init__(self, encoder: nn.Module, pool: int) -> None:
        super().__init__()
        self.encoder, self.pool = encoder, pool

    def forward(self, mels: Tensor) -> Tensor:
        """Return (b, f, n, d) of log-mel windows (b, f, bands, 2 n pool)."""
        states: Tensor = self.encoder(mels.flatten(0, 1)).last_hidden_state
        parts = states.view(*mels.shape[:2], -1, self.pool, states.shape[-1])
        return parts.mean(3)


@ENCODERS.register("whisper", summary="Whisper's encoder on sounds, from a folder of a checkpoint")
def whisper(
    name: str,
    model: nn.Module,
    processor: Any,
    *,
    weights: str,
    seconds: float = 4.0,
    frames: int = 1,
    pool: int = 1,
    cue: str | None = None,
) -> ModalitySpec:
    """Return a modality of sounds.

    Args:
        name: of the modality.
        model: the stock model, of which nothing is used.
        processor: its processor, likewise.
        weights: an embedded encoder ("audio-tiny"), or a local folder of a Whisper checkpoint.
        seconds: of a window; sounds are cut to, or filled up to, ``frames`` windows.
        frames: windows of a sound, one after another.
        pool: tokens that are averaged into one, of 50 a second.
        cue: see :class:`ModalitySpec`.

    Raises:
        ConfigError: the seconds do not fit the checkpoint or do not make whole tokens.
        DataError: no such checkpoint.
    """
    from transformers import WhisperFeatureExtractor

    folder = encoder_folder(weights)
    rows = round(seconds * TOKENS)
    if pool < 1 or rows < 1 or not math.isclose(rows, seconds * TOKENS) or rows % pool:
        raise ConfigError(
            f"{name}: {seconds} seconds are {seconds * TOKENS:g} tokens, of which {pool} each are "
            "to become one"
        )
    encoder = load_whisper(folder, rows)
    known = (folder / "preprocessor_config.json").is_file()
    bands = int(encoder.config.num_mel_bins)
    make: Any = WhisperFeatureExtractor
    mel = make.from_pretrained(folder) if known else make(feature_size=bands)
    samples = rows * RATE // TOKENS

    def read(value: Any) -> Tensor:
        wave = read_sound(value, seconds=frames * samples / RATE, asked=name)
        windows = F.pad(wave, (0, frames * samples - wave.numel())).view(frames, samples)
        found = mel(
            list(windows.numpy()), sampling_rate=RATE, padding=False, truncation=False,
            return_tensors="pt",
        )  # fmt: skip
        values: Tensor = found["input_features"]
        return values

    return ModalitySpec(
        name=name,
        encoder=Listener(encoder, pool),
        width=int(encoder.config.d_model),
        read=read,
        frames=frames,
        cue=default_cue(name) if cue is None else cue,
    )


def load_whisper(folder: Path, rows: int) -> Any:
    """Return the ``WhisperEncoder`` of a checkpoint, cut to the first rows of its position table.

    Only the encoder's tensors are used; the folder may hold no others.

    Raises:
        ConfigError: it has fewer rows.
        DataError: the folder is of no Whisper, or lacks tensors.
    """
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if written.get("model_type") != "whisper":
        raise DataError(f"{folder} is of type {written.get('model_type')!r}, not 'whisper'")
    config: Any = WhisperConfig(**written)
    if rows > config.max_source_positions:
        raise ConfigError(
            f"{folder} hears at most {config.max_source_positions / TOKENS:g} seconds at once; got "
            f"{rows / TOKENS:g}"
        )
    config.max_source_positions = rows
    found = {
        name.removeprefix("model.").removeprefix("encoder."): value
        for name, value in encoder_tensors(folder).items()
        if "decoder." not in name and "proj_out" not in name
    }
    key = "embed_positions.weight"
    try:
        found[key] = found[key][:rows]
        with torch.device("cpu"):
            encoder: Any = WhisperEncoder(config)
        encoder.load_state_dict(found)
    except (KeyError, RuntimeError, ValueError) as error:
        raise DataError(f"{folder} does not hold a Whisper encoder: {error}") from error
    return encoder.eval()
