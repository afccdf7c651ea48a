"""Embedded tiny backbones and data, found by name."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parent
ENCODERS = ("pointnet", "whisper")
"""``model_type`` of encoders of a modality, which are no backbones by themselves."""


def embedded_backbones() -> list[str]:
    """Return the names of the backbones that ship with the package."""
    return sorted(name for name, kind in _model_types().items() if kind not in ENCODERS)


def embedded_encoders() -> list[str]:
    """Return the names of the encoders of modalities that ship with the package."""
    return sorted(name for name, kind in _model_types().items() if kind in ENCODERS)


def embedded_backbone(name: str) -> Path | None:
    """Return the folder of an embedded backbone, or None if there is none of that name."""
    folder = ROOT / name
    return folder if name in embedded_backbones() else None


def _model_types() -> dict[str, str]:
    """Return name -> ``model_type`` of all embedded models."""
    return {
        path.parent.name: json.loads(path.read_text(encoding="utf-8")).get("model_type", "")
        for path in ROOT.glob("*/config.json")
    }
