"""Which selector tells a method its tasks, built from the method's settings."""

from __future__ import annotations

from evolora.errors import ConfigError
from evolora.methods.base import Method
from evolora.routing.features import ALEXNET_WIDTH, AlexNetFeatures
from evolora.routing.selector import (
    AlwaysSelector,
    AutoEncoderSelector,
    AutoEncoderSelectorConfig,
    NoSelectorConfig,
    OracleSelector,
    OracleSelectorConfig,
)
from evolora.routing.task_keys import TaskKeySelector, TaskKeySelectorConfig

SelectorConfig = (
    AutoEncoderSelectorConfig | TaskKeySelectorConfig | OracleSelectorConfig | NoSelectorConfig
)


def use_selector(method: Method, chosen: SelectorConfig) -> None:
    """Let a selector tell the method's tasks: sets what it is, what it reads and the routing."""
    backbone = method.backbone
    widths = backbone.feature_widths()
    if isinstance(chosen, AutoEncoderSelectorConfig):
        method.routing = "task-free"
        width = ALEXNET_WIDTH
        if chosen.feature == "alexnet":
            shapes_only = backbone.device.type == "meta"
            weights = None if shapes_only else chosen.feature_path
            method.extractors["alexnet"] = AlexNetFeatures(weights)
        else:
            width = widths[chosen.feature]
        method.selector = AutoEncoderSelector(chosen, width, device=backbone.device)
    elif isinstance(chosen, TaskKeySelectorConfig):
        method.routing = "task-free"
        method.selector = TaskKeySelector(
            chosen, len(backbone.modalities), widths["modalities"], device=backbone.device
        )
    elif isinstance(chosen, OracleSelectorConfig):
        method.routing = "oracle"
        method.selector = OracleSelector()
    elif isinstance(chosen, NoSelectorConfig):
        method.routing = "none"
        method.selector = AlwaysSelector(0)
    else:
        raise ConfigError(f"a selector is chosen by its configuration; got {chosen!r}")
