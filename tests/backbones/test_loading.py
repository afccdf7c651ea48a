"""Finding a backbone by name without a network."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from evolora.backbones import loading
from evolora.backbones.clip import DualEncoder
from evolora.backbones.clip_fusion import ClipFusion
from evolora.backbones.loading import load_backbone, load_dual_encoder
from evolora.backbones.vilt import Vilt
from evolora.errors import ConfigError, DataError
from evolora.streams.task import Example


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(loading, "getproxies", dict)
    monkeypatch.setattr(loading, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_a_hub_name_without_a_network_is_refused_at_once(no_network: None) -> None:
    start = time.perf_counter()
    with pytest.raises(DataError, match="not in the hub cache, and the hub cannot be reached"):
        load_dual_encoder("openai/never-cached")
    assert time.perf_counter() - start < 10


def test_a_cached_hub_name_needs_no_network(
    no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from evolora.assets import embedded_backbone

    asked: list[tuple[Any, ...]] = []

    def snapshot(name: str, *, revision: str | None, local_files_only: bool) -> str:
        asked.append((name, revision, local_files_only))
        return str(embedded_backbone("clip-tiny"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    backbone = load_dual_encoder("someone/clip", revision="abc")
    assert asked == [("someone/clip", "abc", True)] and backbone.name == "someone/clip"
    weights = backbone.model.state_dict()
    assert all(
        torch.equal(weights[name], value)
        for name, value in load_dual_encoder("clip-tiny").model.state_dict().items()
    )


def test_a_proxy_may_reach_what_we_cannot(no_network: None, monkeypatch: Any) -> None:
    assert not loading._hub_answers()
    monkeypatch.setattr(loading, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert loading._hub_answers()


def saved_vilt(folder: Path, *, inside: bool = False) -> Path:
    """Write a toy ViLT with its processor, or a masked language model that holds it."""
    from tests.conftest import WordTokenizer, toy_vilt
    from transformers import ViltForMaskedLM, ViltImageProcessorPil

    model = toy_vilt()
    if inside:
        whole = ViltForMaskedLM(model.config)
        whole.vilt.load_state_dict(model.state_dict())
        model = whole
    model.save_pretrained(folder)
    tokenizer = WordTokenizer()
    tokenizer.save_pretrained(folder)
    ViltImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("inside", [False, True])
def test_a_vilt_folder_is_known_by_its_config(tmp_path: Path, inside: bool) -> None:
    from tests.conftest import toy_vilt

    folder = saved_vilt(tmp_path / "vilt", inside=inside)
    backbone = load_backbone(str(folder))
    assert isinstance(backbone, Vilt) and backbone.name == str(folder)
    assert backbone.fingerprint() == Vilt(toy_vilt()).fingerprint()
    example = Example(inputs={"text": "a red dot"}, label=0, key="x")
    batch = backbone.collate([example])
    assert torch.equal(batch.inputs["pixel_values"], torch.ones(1, 3, 16, 16))
    assert backbone.encode_base(batch).embedding.shape == (1, 32)
    assert load_backbone(str(folder), text_length=20).describe()["text_length"] == 20


def test_clip_goes_by_the_type_asked_for() -> None:
    assert type(load_backbone("clip-tiny")) is DualEncoder
    assert type(load_backbone("clip-tiny", type="clip-fusion")) is ClipFusion


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "clip-fusoin"}, "unknown backbone 'clip-fusoin'; did you mean 'clip-fusion'"),
        ({"type": "vilt"}, "expected a ViltModel, got CLIPModel"),
        ({"text_length": 50}, "text_length: a backbone of type 'dual-encoder' has no such option"),
    ],
)
def test_wrong_types_and_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_backbone("clip-tiny", **options)


def test_weights_that_lack_a_part_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved_vilt(tmp_path / "vilt")
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "pooler" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"weights lack pooler\.dense\.bias and 1 more"):
        load_backbone(str(folder))


def test_a_learner_wraps_a_plain_vilt() -> None:
    from tests.conftest import ToyProcessor, toy_vilt

    from evolora.learner import Learner
    from evolora.methods.linear_probe import LinearProbeConfig

    learner = Learner(toy_vilt(), ToyProcessor(), method=LinearProbeConfig())
    assert isinstance(learner.backbone, Vilt)
