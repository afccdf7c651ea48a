"""A small Whisper encoder learns which instrument sounds at each moment, at which note."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from encoder_pretraining.training import probe, train
from evolora.storage.files import write_tensors
from evolora.streams.media.sounds import RATE
from evolora.streams.mosaic.modality_sources import Recording, recordings
from evolora.streams.mosaic.modality_views import clip, heard
from evolora.streams.mosaic.modality_words import SOUNDS

LOG = logging.getLogger("pretrain_encoders")
SECONDS, TOKENS, BANDS = 2.0, 100, 64
NOTES, UNKNOWN = 128, -100
NAMES = tuple(SOUNDS)
HELD = int(0.12 * RATE)  # samples behind an onset that count as one


@dataclass
class Stroke:
    """One recorded note or beat: its instrument (place in `NAMES`) and MIDI number."""

    wave: Tensor
    name: int
    note: int


def config_of() -> WhisperConfig:
    return WhisperConfig(
        num_mel_bins=BANDS, d_model=96, encoder_layers=3, encoder_attention_heads=4,
        encoder_ffn_dim=256, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=256,
        max_source_positions=TOKENS, dropout=0.1,
    )  # fmt: skip


def strokes(args: argparse.Namespace, side: str) -> list[Stroke]:
    found = [one for one in recordings(args.cache) if one.side == side]
    return [Stroke(torch.from_numpy(heard(s.path)), NAMES.index(s.name), _note(s)) for s in found]


def _note(source: Recording) -> int:
    return UNKNOWN if source.note is None else source.note


def mel(waves: Tensor) -> Tensor:
    """Returns log-mel frames (b, bands, 2 n) of sounds (b, samples)."""
    extract: Any = WhisperFeatureExtractor(feature_size=BANDS)
    found = extract(
        list(waves.numpy()), sampling_rate=RATE, padding=False, truncation=False,
        return_tensors="pt",
    )  # fmt: skip
    values: Tensor = found["input_features"]
    return values


def mixture(bank: Sequence[Stroke], draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns a sound of one to four strokes, and (3, tokens): instrument, note, onset."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=draw))

    def whole(end: int) -> int:
        return int(torch.randint(end, (), generator=draw))

    wave, labels = torch.zeros(round(SECONDS * RATE)), torch.full((3, TOKENS), UNKNOWN)
    labels[2] = 0
    step = len(wave) // TOKENS
    # Rare instruments are heard as often as frequent ones.
    known = sorted({stroke.name for stroke in bank})
    name = known[whole(len(known))]
    own = [stroke for stroke in bank if stroke.name == name]
    count = 1 + whole(4)
    slot = len(wave) // count
    for index in range(count):
        stroke = own[whole(len(own))]
        shift = 0 if stroke.note == UNKNOWN else whole(9) - 4
        start = min(index * slot + round(uniform(0, 0.3) * slot), len(wave) - 2 * step)
        end = min(len(wave), start + round(uniform(0.5, 1.0) * slot))
        played = _shifted(stroke.wave, shift)[: end - start] * uniform(0.3, 1.0)
        fade = min(480, len(played))
        played[-fade:] *= torch.linspace(1, 0, fade)
        wave[start : start + len(played)] += played
        first, last = start // step, max(start // step + 1, (start + len(played)) // step)
        labels[0, first:last] = stroke.name
        labels[1, first:last] = UNKNOWN if stroke.note == UNKNOWN else stroke.note + shift
        labels[2, first : first + HELD // step] = 1
    noise = torch.randn(len(wave), generator=draw)
    return wave + noise * 10 ** uniform(-4.5, -2.0), labels


def _shifted(wave: Tensor, semitones: int) -> Tensor:
    """Returns a recording played faster or slower, which moves its pitch."""
    length = round(len(wave) / 2 ** (semitones / 12))
    return F.interpolate(wave[None, None], size=length, mode="linear")[0, 0]


def masked(mels: Tensor, draw: torch.Generator) -> Tensor:
    """Returns frames with a random slope over bands, and some bands and moments hidden."""
    slope = torch.randn(len(mels), 2, 1, 1, generator=draw) * 0.15
    place = torch.linspace(-1, 1, mels.shape[1])[:, None]
    found = mels + slope[:, 0] * place + slope[:, 1]
    for row in found:
        band, moment = (
            torch.randint(BANDS - 8, (), generator=draw),
            torch.randint(mels.shape[2] - 16, (), generator=draw),
        )
        row[band : band + 8] = row.mean()
        row[:, moment : moment + 16] = row.mean()
    return found


class Heads(nn.Module):
    """What the tokens are asked for."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.name, self.note = nn.Linear(width, len(NAMES)), nn.Linear(width, NOTES)
        self.onset, self.whole = nn.Linear(width, 2), nn.Linear(width, len(NAMES))

    def forward(self, mels: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss."""
        states = self.encoder(mels).last_hidden_state
        losses = [
            F.cross_entropy(head(states).flatten(0, 1), target.flatten(), label_smoothing=0.05,
                            ignore_index=UNKNOWN)
            for head, target in zip(
                (self.name, self.note, self.onset), labels.unbind(1), strict=True
            )
        ]  # fmt: skip
        clip_name = labels[:, 0].amax(1)
        losses.append(F.cross_entropy(self.whole(states.mean(1)), clip_name, label_smoothing=0.05))
        return torch.stack(losses).nan_to_num().sum()


def stage_sounds(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    draw = torch.Generator().manual_seed(args.seed)
    bank = strokes(args, "pretrain")
    config = config_of()
    encoder: Any = WhisperEncoder(config)
    untrained = {name: value.clone() for name, value in encoder.state_dict().items()}

    def batch() -> tuple[Tensor, ...]:
        waves, labels = zip(*(mixture(bank, draw) for _ in range(args.batch)), strict=True)
        return masked(mel(torch.stack(waves)), draw), torch.stack(labels)

    train(Heads(encoder, config.d_model), batch, args)
    encoder.eval()
    out = args.out or args.assets / "audio-tiny"
    config.dtype = "float32"
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.half() for name, value in encoder.state_dict().items()}
    write_tensors(out / "model.safetensors", tensors, {"format": "pt"})
    config.save_pretrained(out)
    WhisperFeatureExtractor(feature_size=BANDS, chunk_length=2).save_pretrained(out)
    _tidy(out)
    encoder.load_state_dict({name: value.float() for name, value in tensors.items()})
    _report(args, encoder, "trained")
    encoder.load_state_dict(untrained)
    _report(args, encoder, "random weights")
    _report(args, None, "log-mel alone")


def _tidy(out: Any) -> None:
    written = json.loads((out / "config.json").read_text())
    written["architectures"] = ["WhisperEncoder"]
    (out / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    os.chmod(out / "config.json", 0o644)


def _report(args: argparse.Namespace, encoder: Any, title: str) -> None:
    """Prints linear probes of train -> test recordings, in clips as the stream has them."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for side in ("train", "test"):
        bank = strokes(args, side)
        waves, labels = [], []
        for stroke in bank:
            for count in (1, 2, 3):
                fellows = [s for s in bank if s.name == stroke.name]
                others = [fellows[int(torch.randint(len(fellows), (), generator=draw))]
                          for _ in range(count - 1)]  # fmt: skip
                played = [stroke, *others]
                whole = torch.zeros(round(SECONDS * RATE))
                made = torch.from_numpy(clip([s.wave.numpy() for s in played]))
                whole[: len(made)] = made
                waves.append(whole)
                step = -1
                if count == 2 and UNKNOWN not in (stroke.note, others[0].note):
                    step = (others[0].note > stroke.note) + 2 * (others[0].note < stroke.note)
                pitch = -1 if stroke.note == UNKNOWN or count > 1 else (
                    (stroke.note >= 48) + (stroke.note >= 72)
                )  # fmt: skip
                labels.append((stroke.name, pitch, count, step))
        mels = mel(torch.stack(waves))
        with torch.inference_mode():
            states = (
                torch.cat([encoder(part).last_hidden_state for part in mels.split(64)])
                if encoder is not None
                else mels.transpose(1, 2)
            )
        # The stream's clips take the first 1.5 seconds; five parts of them keep the order.
        parts = states[:, : states.shape[1] * 3 // 4].unflatten(1, (5, -1)).mean(2).flatten(1)
        found.append((parts, torch.tensor(labels)))
    for column, asked in enumerate(("instrument", "pitch", "count", "rises or falls")):
        probe(title, asked, found, column)
