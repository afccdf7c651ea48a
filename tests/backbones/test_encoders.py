"""Encoders of modalities: from files and tensors to (b, frames, n, d) for a Q-Former."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from tests.backbones.qformers import SIDE, qformer
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from evolora.assets import ROOT, embedded_backbones, embedded_encoders
from evolora.backbones.encoders.pointnet import PointNet, PointNetConfig, save_pointnet
from evolora.backbones.modalities import ModalitySpec, make_modality
from evolora.backbones.qformer import QFormer
from evolora.errors import ConfigError, DataError
from evolora.storage.files import write_tensors
from evolora.streams.task import Example

SMALL = PointNetConfig(points=40, width=12, hidden=8, groups=3, neighbours=5)


def plug(name: str, **options: Any) -> ModalitySpec:
    backbone = qformer()
    return make_modality(name, options, backbone.model, backbone.processor)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=40, num_mel_bins=16, d_model=16, encoder_layers=2, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, max_source_positions=100, max_target_positions=20, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, init_std=0.3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("whisper")
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    return folder


def wave(seconds: float) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    time = torch.arange(round(16_000 * seconds)) / 16_000
    noise = torch.randn(len(time), generator=draw)
    return 0.3 * torch.sin(2 * math.pi * 440 * time) + 0.02 * noise


def test_whisper_hears_as_the_stock_model_does(checkpoint: Path, tmp_path: Path) -> None:
    spec = plug("audio", encoder="whisper", weights=str(checkpoint), seconds=2.0)
    assert (spec.width, spec.frames, spec.cue) == (16, 1, " audio: ")
    stock = WhisperForConditionalGeneration.from_pretrained(checkpoint).eval()
    mel = WhisperFeatureExtractor(feature_size=16, chunk_length=2)
    heard = mel(wave(1.5).numpy(), sampling_rate=16_000, return_tensors="pt").input_features
    with torch.no_grad():
        expected = stock.model.encoder(heard).last_hidden_state
        path = tmp_path / "sound.wav"
        soundfile.write(path, wave(1.5).numpy(), 16_000, subtype="FLOAT")
        found = spec.tokens(spec.read(str(path))[None])
    assert found.shape == (1, 1, 100, 16)
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)


def test_whisper_takes_the_first_rows_of_its_positions_and_pools(checkpoint: Path) -> None:
    spec = plug("audio", encoder="whisper", weights=str(checkpoint), seconds=1.0, frames=2, pool=5)
    long, short = spec.read(wave(3.0)), spec.read(wave(1.2))
    assert long.shape == short.shape == (2, 16, 100)
    torch.testing.assert_close(long[0], short[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(long[1], short[1], atol=0.1)
    with torch.no_grad():
        both = spec.tokens(torch.stack([long, short]))
        plain = plug("audio", encoder="whisper", weights=str(checkpoint), seconds=1.0)
        single = plain.tokens(long[:1][None])
    assert both.shape == (2, 2, 10, 16)
    torch.testing.assert_close(both[0, 0], single[0, 0].view(10, 5, 16).mean(1))
    table: Any = plain.encoder.get_submodule("encoder.embed_positions")
    stock = WhisperForConditionalGeneration.from_pretrained(checkpoint)
    assert torch.equal(table.weight, stock.model.encoder.embed_positions.weight[:50])


def test_a_folder_with_the_encoder_alone_is_enough(checkpoint: Path, tmp_path: Path) -> None:
    stock = WhisperForConditionalGeneration.from_pretrained(checkpoint).eval()
    stock.model.encoder.save_pretrained(tmp_path)
    heard = wave(1.0)
    found = []
    for folder in (checkpoint, tmp_path):
        spec = plug("audio", encoder="whisper", weights=str(folder), seconds=1.0)
        found.append(spec.tokens(spec.read(heard)[None]))
    assert torch.equal(*found)


def test_wrong_sounds_and_folders_are_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hears at most 2 seconds at once; got 4"):
        plug("audio", encoder="whisper", weights=str(checkpoint), seconds=4.0)
    with pytest.raises(ConfigError, match=r"1\.01 seconds are 50\.5 tokens"):
        plug("audio", encoder="whisper", weights=str(checkpoint), seconds=1.01)
    with pytest.raises(ConfigError, match="of which 7 each"):
        plug("audio", encoder="whisper", weights=str(checkpoint), seconds=1.0, pool=7)
    with pytest.raises(DataError, match="no encoder 'nowhere'"):
        plug("audio", encoder="whisper", weights="nowhere")
    save_pointnet(tmp_path, PointNet(SMALL))
    with pytest.raises(DataError, match="is of type 'pointnet', not 'whisper'"):
        plug("audio", encoder="whisper", weights=str(tmp_path))
    picture = tmp_path / "x.png"
    Image.new("RGB", (4, 4)).save(picture)
    spec = plug("audio", encoder="whisper", weights=str(checkpoint), seconds=1.0)
    with pytest.raises(DataError, match=r"x\.png is a picture; audio takes sounds"):
        spec.read(str(picture))
    for config in ((checkpoint / "config.json").read_bytes(), b'{"model_type": "whisper"}'):
        (tmp_path / "config.json").write_bytes(config)
        with pytest.raises(DataError, match="does not hold a Whisper encoder"):
            plug("audio", encoder="whisper", weights=str(tmp_path), seconds=1.0)


@pytest.fixture
def cloud_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_pointnet(tmp_path / "net", PointNet(SMALL), dtype=torch.float32)
    return tmp_path / "net"


def test_pointnet_is_loaded_as_it_was_saved(cloud_folder: Path) -> None:
    spec = plug("pc", encoder="pointnet", weights=str(cloud_folder))
    torch.manual_seed(0)
    made = PointNet(SMALL).eval()
    cloud = spec.read(torch.randn(40, 3))
    assert cloud.shape == (1, 40, 3)
    found = spec.tokens(cloud[None])
    assert found.shape == (1, 1, 4, 12)
    assert torch.equal(found, made(cloud))


def test_pointnet_sees_a_set_and_its_size(cloud_folder: Path) -> None:
    encoder: Any = plug("pc", encoder="pointnet", weights=str(cloud_folder)).encoder.encoder
    draw = torch.Generator().manual_seed(0)
    clouds = torch.randn(3, 40, 3, generator=draw)
    found = encoder(clouds)
    mixed = clouds[:, torch.randperm(40, generator=draw)]
    torch.testing.assert_close(encoder(mixed), found)
    torch.testing.assert_close(encoder(clouds[1:2])[0], found[1], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(encoder(2 * clouds), found, atol=1e-3)


def test_pointnet_refuses_other_files(cloud_folder: Path) -> None:
    write_tensors(cloud_folder / "model.safetensors", {"all.bias": torch.zeros(3)}, {})
    with pytest.raises(DataError, match="does not fit a pointnet"):
        plug("pc", encoder="pointnet", weights=str(cloud_folder))
    (cloud_folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"has no \.safetensors file"):
        plug("pc", encoder="pointnet", weights=str(cloud_folder))


def test_vision_reads_videos_folders_and_still_pictures(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (9, 5), (grey,) * 3) for grey in (0, 80, 160, 240)]
    pictures[0].save(tmp_path / "moving.gif", save_all=True, append_images=pictures[1:])
    pictures[2].save(tmp_path / "still.png")
    spec = plug("video", encoder="vision", frames=2)

    def greys(value: Any) -> list[float]:
        found = spec.read(value)
        assert found.shape == (2, 3, SIDE, SIDE) and found.dtype == torch.uint8
        return [float(frame.float().mean().round()) for frame in found]

    assert greys(str(tmp_path / "moving.gif")) == [0, 240]
    assert greys(tmp_path / "still.png") == [160, 160]
    assert greys([tmp_path / "still.png", pictures[3]]) == [160, 240]
    soundfile.write(tmp_path / "a.wav", np.zeros(99), 16_000)
    with pytest.raises(DataError, match=r"a\.wav is a sound; video takes videos"):
        spec.read(tmp_path / "a.wav")
    with pytest.raises(DataError, match=r"a\.wav is a sound; image takes pictures"):
        plug("image", encoder="vision").read(str(tmp_path / "a.wav"))


def test_depth_is_a_map_or_a_pair(tmp_path: Path) -> None:
    metres = np.linspace(1, 2, 12).reshape(3, 4)
    np.save(tmp_path / "d.npy", metres)
    picture = torch.full((3, 3, 4), 9, dtype=torch.uint8)
    alone, pair = plug("depth", encoder="depth"), plug("depth", encoder="depth", frames=2)
    found = pair.read([picture, str(tmp_path / "d.npy")])
    assert found.shape == (2, 3, SIDE, SIDE)
    assert bool((found[0] == 9).all())
    assert torch.equal(found[1:], alone.read(str(tmp_path / "d.npy")))
    with pytest.raises(DataError, match="depth takes a pair: picture, depth map; got 1"):
        pair.read(str(tmp_path / "d.npy"))
    with pytest.raises(DataError, match="depth takes one depth map; got 2"):
        alone.read([picture, picture])
    with pytest.raises(ConfigError, match="depth has 1 frame, or 2"):
        plug("depth", encoder="depth", frames=3)


def test_a_pair_is_augmented_alike_and_only_where_training_augments() -> None:
    base = qformer()
    options = {"encoder": "depth", "frames": 2, "augment": "crop-flip"}
    backbone = QFormer(base.model, base.processor, modalities={"depth": options})
    draw = torch.Generator().manual_seed(3)
    one = torch.randint(256, (3, SIDE, SIDE), dtype=torch.uint8, generator=draw)
    example = Example(inputs={"depth": [one, one], "text": "what"}, label="box", key="1")
    plain = backbone.prepare(example)["depth"]
    assert torch.equal(plain[0], one) and torch.equal(plain[1], one)
    drawn = [backbone.prepare(example, draw)["depth"] for _ in range(8)]
    assert all(torch.equal(found[0], found[1]) for found in drawn)
    assert len({found.sum().item() for found in drawn}) > 1
    with pytest.raises(ConfigError, match="augment must be one of none, crop, crop-flip"):
        plug("depth", encoder="depth", augment="flop")


def test_embedded_encoders_are_small_and_no_backbones() -> None:
    assert embedded_encoders() == ["audio-tiny", "pointnet-tiny"]
    assert not set(embedded_encoders()) & set(embedded_backbones())
    for name, limit in (("audio-tiny", 800_000), ("pointnet-tiny", 500_000)):
        assert sum(file.stat().st_size for file in (ROOT / name).iterdir()) < limit
    low, high = (wave(1.5) * scale for scale in (0.1, 1.0))
    sounds = plug("audio", encoder="whisper", weights="audio-tiny", seconds=1.5)
    with torch.no_grad():
        found = sounds.tokens(torch.stack([sounds.read(low), sounds.read(high)]))
        clouds = plug("pc", encoder="pointnet")
        tokens = clouds.tokens(clouds.read(torch.rand(600, 6))[None])
    assert found.shape == (2, 1, 75, 96) and bool(found.isfinite().all())
    assert tokens.shape == (1, 1, 16, 128) and bool(tokens.isfinite().all())
