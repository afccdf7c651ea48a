"""Frozen zero-shot: the untouched base model answers everything.

The floor of every comparison, and the ceiling of Transfer for methods that send unseen inputs to
the base (MoE-Adapters, arXiv 2403.11549, section 6.1: 69.4 in order I).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from evolora.methods.base import Method
from evolora.registry import METHODS


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig:
    """Nothing to set.

    Args:
        type: "zero-shot".
    """

    type: Literal["zero-shot"] = "zero-shot"


@METHODS.register("zero-shot", summary="the untouched base model (no learning)")
class ZeroShot(Method):
    """The base model with no experts."""

    config_class = ZeroShotConfig
    needs_prompts = True
    trains = False
    writes = True
