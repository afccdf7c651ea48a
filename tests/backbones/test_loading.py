"""Finding a backbone by name without a network."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest
import torch

from evolora.backbones import loading
from evolora.backbones.loading import load_dual_encoder
from evolora.errors import DataError


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
