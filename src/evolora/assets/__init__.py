"""Embedded tiny backbones and data, found by name."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent


def embedded_backbones() -> list[str]:
    """Return the names of the backbones that ship with the package."""
    return sorted(path.parent.name for path in ROOT.glob("*/config.json"))


def embedded_backbone(name: str) -> Path | None:
    """Return the folder of an embedded backbone, or None if there is none of that name."""
    folder = ROOT / name
    return folder if name in embedded_backbones() else None
