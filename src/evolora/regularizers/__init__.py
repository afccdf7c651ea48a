"""Losses on parameters and features that are added in training."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evolora.regularizers.peft_records import PeftRecords
    from evolora.regularizers.resora import Resora
    from evolora.regularizers.settings import ResoraConfig
    from evolora.regularizers.trainer import ResoraTrainerMixin

_PUBLIC = {
    "PeftRecords": "evolora.regularizers.peft_records",
    "Resora": "evolora.regularizers.resora",
    "ResoraConfig": "evolora.regularizers.settings",
    "ResoraTrainerMixin": "evolora.regularizers.trainer",
}

__all__ = ["PeftRecords", "Resora", "ResoraConfig", "ResoraTrainerMixin"]


def __getattr__(name: str) -> Any:
    """Import the public names on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'evolora.regularizers' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
