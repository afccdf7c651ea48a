"""Log-mel filter banks as Kaldi makes them, which BEATs and AST look at (specification, 1.1).

    frame = 25 ms every 10 ms, mean removed, x[n] - 0.97 x[n-1], Povey window (hann ^ 0.85)
    fbank = ln max(mel |fft_512(frame)|^2, eps),   mel(f) = 1127 ln(1 + f / 700), 20 Hz to 8 kHz

Frames lie inside the sound (no padding): n = 1 + (samples - 400) // 160.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from evolora.errors import DataError
from evolora.streams.media.sounds import RATE

WINDOW, HOP, POINTS = 400, 160, 512
LOWEST, PREEMPHASIS = 20.0, 0.97
MEAN, DEVIATION = 15.41663, 6.55582
"""Of BEATs' features; they are divided by twice the deviation."""
SCALE = 2**15


def kaldi_fbank(wave: Tensor, *, mels: int = 128) -> Tensor:
    """Return the log-mel filter bank (frames, mels) of a sound at 16 kHz.

    Args:
        wave: float32 (samples,) in [-1, 1], which is scaled by 2^15 as the authors do.
        mels: number of filters.

    Raises:
        DataError: it is shorter than a frame, 25 ms.
    """
    if wave.numel() < WINDOW:
        raise DataError(f"a sound of {wave.numel()} samples is shorter than a frame ({WINDOW})")
    frames = (wave.double() * SCALE).unfold(0, WINDOW, HOP)
    frames = frames - frames.mean(1, keepdim=True)
    earlier = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
    hann = torch.hann_window(WINDOW, periodic=False, dtype=torch.float64)
    shaped = (frames - PREEMPHASIS * earlier) * hann**0.85
    power = torch.fft.rfft(shaped, POINTS).abs().square()
    energies: Tensor = power @ _filters(mels).T
    return energies.clamp_min(torch.finfo(torch.float32).eps).log().float()


def beats_windows(wave: Tensor, *, windows: int = 2, length: int = 512) -> Tensor:
    """Return (windows, length, 128) normalised frames of a sound, cut or padded with zeros."""
    found = (kaldi_fbank(wave) - MEAN) / (2 * DEVIATION)
    found = F.pad(found[: windows * length], (0, 0, 0, max(0, windows * length - len(found))))
    return found.view(windows, length, -1)


def _filters(mels: int) -> Tensor:
    """Return triangles in mel (mels, 257) over the bins of the transform."""

    def mel(frequency: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(frequency / 700.0)

    ends = mel(torch.tensor([LOWEST, RATE / 2], dtype=torch.float64))
    edges = torch.linspace(float(ends[0]), float(ends[1]), mels + 2, dtype=torch.float64)
    bins = mel(torch.arange(POINTS // 2 + 1, dtype=torch.float64) * RATE / POINTS)
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    return torch.minimum(rising, falling).clamp_min(0)
