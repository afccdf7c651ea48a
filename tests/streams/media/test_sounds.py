"""Sounds: what a file becomes, how it is resampled, and what the authors' features are."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from evolora.errors import DataError
from evolora.streams.media.fbank import beats_windows, kaldi_fbank
from evolora.streams.media.resampling import resample
from evolora.streams.media.sounds import RATE, read_sound


def tone(frequency: float, rate: int, seconds: float = 0.5) -> Tensor:
    time = torch.arange(round(rate * seconds), dtype=torch.float64) / rate
    return (0.5 * torch.sin(2 * math.pi * frequency * time)).float()


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "opus", "mp3"])
def test_a_file_is_read_as_mono_at_16_khz(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"tone.{ending}"
    left, right = tone(440, 48_000).numpy(), tone(880, 48_000).numpy()
    kind = {"opus": {"format": "OGG", "subtype": "OPUS"}}.get(ending, {})
    soundfile.write(path, np.stack([left, right], axis=1), 48_000, **kind)
    wave = read_sound(path)
    assert wave.dtype == torch.float32 and wave.dim() == 1
    assert abs(len(wave) - 8_000) < 1_200  # MP3 and Opus pad
    expected = (tone(440, RATE) + tone(880, RATE)) / 2
    spectrum = torch.fft.rfft(wave[:8_000].double()).abs()
    assert set(spectrum.topk(2).indices.tolist()) == {220, 440}
    if ending in ("wav", "flac"):
        torch.testing.assert_close(wave[200:-200], expected[200:-200], atol=2e-4, rtol=0)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 44_101])
def test_resampling_keeps_what_both_rates_can_hold(rate: int) -> None:
    for frequency in (100.0, 1_000.0, 3_000.0):
        found = resample(tone(frequency, rate), rate, RATE)
        assert len(found) == math.ceil(round(rate / 2) * RATE / rate)
        expected = tone(frequency, RATE, 0.6)[: len(found)]
        torch.testing.assert_close(found[400:-400], expected[400:-400], atol=2e-4, rtol=0)


def test_resampling_removes_what_the_lower_rate_cannot_hold() -> None:
    found = resample(tone(11_000, 44_100), 44_100, RATE)
    assert float(found[400:-400].abs().max()) < 1e-3
    assert resample(torch.ones(5), RATE, RATE).tolist() == [1.0] * 5


def test_resampling_agrees_with_scipy_on_a_chord() -> None:
    signal = pytest.importorskip("scipy.signal")
    chord = tone(300, 44_100) + tone(1_234, 44_100) / 3 + tone(4_321, 44_100) / 5
    reference = signal.resample_poly(chord.double().numpy(), 160, 441, window=("kaiser", 9.0))
    found = resample(chord, 44_100, RATE)
    torch.testing.assert_close(
        found[400:-400], torch.from_numpy(reference[400:-400]).float(), atol=2e-3, rtol=0
    )


def test_only_the_beginning_is_read_where_that_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    soundfile.write(path, tone(440, 44_100, 3.0).numpy(), 44_100)
    part = read_sound(path, seconds=0.5)
    assert len(part) == 8_000
    torch.testing.assert_close(part, read_sound(path)[:8_000])
    held = tone(440, RATE)
    assert torch.equal(read_sound(held.numpy(), seconds=0.01), held[:160])


def test_what_is_no_sound_is_named(tmp_path: Path) -> None:
    damaged = tmp_path / "a.wav"
    damaged.write_bytes(b"RIFF\x00\x00\x00\x00WAVEfmt ")
    with pytest.raises(DataError, match=r"cannot read the sound .*a\.wav'"):
        read_sound(damaged)
    silent = tmp_path / "b.wav"
    soundfile.write(silent, np.zeros(0, np.float32), RATE)
    with pytest.raises(DataError, match="is empty"):
        read_sound(silent)
    with pytest.raises(DataError, match=r"floating \(samples,\).*got torch.int16 \(4,\)"):
        read_sound(torch.zeros(4, dtype=torch.int16))
    with pytest.raises(DataError, match="NaN"):
        read_sound(torch.tensor([0.0, float("nan")]))
    with pytest.raises(DataError, match=r"audio takes sounds \(\.wav.*got int"):
        read_sound(3)


def test_filter_banks_are_those_of_an_independent_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    wave = tone(700, RATE) + 0.1 * torch.randn(8_000, generator=draw)
    filters = mel_filter_bank(
        257, 128, 20.0, 8_000.0, RATE, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True
    )
    expected = spectrogram(
        wave.double().numpy() * 2**15, window_function(400, "povey", periodic=False), 400, 160,
        fft_length=512, power=2.0, center=False, preemphasis=0.97, mel_filters=filters,
        log_mel="log", mel_floor=1.192092955078125e-07, remove_dc_offset=True,
    ).T  # fmt: skip
    found = kaldi_fbank(wave)
    assert found.shape == expected.shape == (1 + (8_000 - 400) // 160, 128)
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), atol=1e-3, rtol=1e-4)


def test_authors_windows_are_normalised_and_padded_with_zeros() -> None:
    windows = beats_windows(tone(700, RATE, 6.0))
    assert windows.shape == (2, 512, 128)
    frames = 1 + (6 * RATE - 400) // 160
    whole = windows.flatten(0, 1)
    expected = (kaldi_fbank(tone(700, RATE, 6.0)) - 15.41663) / 13.11164
    torch.testing.assert_close(whole[:frames], expected, atol=1e-4, rtol=1e-4)
    assert bool((whole[frames:] == 0).all())
    assert beats_windows(tone(700, RATE, 20.0)).shape == (2, 512, 128)
    with pytest.raises(DataError, match="shorter than a frame"):
        kaldi_fbank(torch.zeros(399))
