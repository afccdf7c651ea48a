"""Fitness: whether a method can work on a backbone at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evolora.errors import UnsuitableError

if TYPE_CHECKING:
    from evolora.backbones.base import Backbone
    from evolora.methods.base import Method


def check_backbone(method: Method, config: Any, backbone: Backbone) -> None:
    """Refuse a backbone that a method cannot work on.

    Raises:
        UnsuitableError: says what the method needs.
    """
    kind = type(backbone).__name__
    if method.needs_prompts and backbone.answers == "heads":
        raise UnsuitableError(f"{config.type} answers by class-name prompts; {kind} has none")
    if backbone.answers == "text" and not method.writes:
        raise UnsuitableError(f"{config.type} learns classes; {kind} writes its answers")
    if method.needs_one_stream and not backbone.one_stream:
        raise UnsuitableError(
            f"{config.type} needs image and text in one sequence, as in ViltModel; "
            f"{kind} runs them apart or has one only"
        )
    if method.needs_modalities and not backbone.takes_modalities:
        raise UnsuitableError(
            f"{config.type} needs a model that modalities are plugged into, as a Q-Former "
            f"(Blip2ForConditionalGeneration); {kind} has its own only"
        )
