"""Registries: found by name, listed, never overwritten silently, open to other packages."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from evolora import registry
from evolora.errors import ConfigError
from evolora.registry import BACKBONES, METHODS, STREAMS, Registry


def empty() -> Registry[Any]:
    return Registry(kind="thing", modules=())


def test_registered_things_are_found_listed_and_sorted() -> None:
    things = empty()
    things.register("b", summary="second")(int)
    things.register("a", summary="first")(str)
    assert things.get("a") is str and "b" in things and "c" not in things
    assert things.names() == ["a", "b"]
    assert [entry.summary for entry in things] == ["first", "second"]


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    things = empty()
    things.register("moe-adapters", summary="x")(int)
    with pytest.raises(ConfigError, match=r"unknown thing 'moe-adaptors'; did you mean 'moe-ad.*'"):
        things.get("moe-adaptors")


def test_a_name_cannot_be_taken_twice_but_a_module_may_be_imported_again() -> None:
    things = empty()

    def make() -> type:
        class Same:
            pass

        return Same

    first, again = make(), make()
    things.register("a", summary="x")(first)
    things.register("a", summary="x")(again)
    assert things.get("a") is again
    with pytest.raises(ConfigError, match="thing 'a' is already registered by"):
        things.register("a", summary="x")(int)


def test_entry_points_of_other_packages_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def points(group: str) -> list[EntryPoint]:
        asked.append(group)
        return [EntryPoint(name="x", value="json:loads", group=group)]

    monkeypatch.setattr(registry, "entry_points", points)
    assert empty().names() == []
    assert asked == ["evolora.things"]


@pytest.mark.parametrize("things", [METHODS, STREAMS, BACKBONES], ids=lambda r: r.kind)
def test_every_entry_has_a_one_line_summary(things: Registry[Any]) -> None:
    entries = list(things)
    assert entries
    for entry in entries:
        assert entry.summary and "\n" not in entry.summary and len(entry.summary) <= 100


def test_every_method_names_itself_in_its_configuration() -> None:
    for entry in METHODS:
        assert entry.value.config_class.type == entry.name


def test_importing_evolora_and_its_registry_does_not_import_torch() -> None:
    code = (
        "import sys, evolora, evolora.registry, evolora.config; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
