"""Resampling of sounds by a windowed sinc, phase by phase.

    y[j] = sum_k h(k - t_j) x[k],   t_j = j * rate / wanted
    h(t) = c sinc(c t) kaiser(t / T),   c = ROLLOFF * min(1, wanted / rate),   T = LOBES / c

Samples beyond the ends are zero. As the rates have a common divisor, t_j has ``up`` fractional
parts only, each with its own row of taps.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

LOBES, ROLLOFF, BETA = 24, 0.95, 9.0
"""Zero crossings each way, share of the band that is kept, shape of the Kaiser window."""
CHUNK = 1 << 16
"""Samples made at once."""


def resample(wave: Tensor, rate: int, wanted: int) -> Tensor:
    """Return a sound at another rate.

    Args:
        wave: float32 (samples,).
        rate: of the sound, per second.
        wanted: of the result, which has ceil(samples * wanted / rate) samples.
    """
    if rate == wanted:
        return wave
    divisor = math.gcd(rate, wanted)
    up, down = wanted // divisor, rate // divisor
    taps = _taps(up, down)
    half = taps.shape[1] // 2
    padded = torch.nn.functional.pad(wave, (half, half + 1))
    length = math.ceil(wave.numel() * up / down)
    reach = torch.arange(taps.shape[1])
    parts = []
    for first in range(0, length, CHUNK):
        place = torch.arange(first, min(first + CHUNK, length)) * down
        start, phase = place // up, place % up
        windows = padded[start[:, None] + reach]
        parts.append((windows * taps[phase]).sum(1))
    return torch.cat(parts)


@lru_cache(maxsize=8)
def _taps(up: int, down: int) -> Tensor:
    """Return h (up, taps): row p is the filter of outputs p / up after an input sample."""
    cutoff = ROLLOFF * min(1.0, up / down)
    reach = LOBES / cutoff
    half = math.ceil(reach)
    place = torch.arange(-half, half + 1, dtype=torch.float64)
    time = place[None] - torch.arange(up, dtype=torch.float64)[:, None] / up
    inside = (1 - (time / reach) ** 2).clamp_min(0)
    window = torch.special.i0(BETA * inside.sqrt()) / torch.special.i0(torch.tensor(BETA))
    taps = cutoff * torch.sinc(cutoff * time) * window * (time.abs() <= reach)
    unit: Tensor = taps / taps.sum(1, keepdim=True)
    return unit.float()
