"""Which selector tells a method its tasks, built from the method's settings."""

from __future__ import annotations

from dataclasses import replace

from evolora.errors import ConfigError, unknown_name
from evolora.methods.base import Method
from evolora.routing.features import ALEXNET_WIDTH, AlexNetFeatures
from evolora.routing.selector import (
    AlwaysSelector,
    AutoEncoderSelector,
    AutoEncoderSelectorConfig,
    Helper,
    NoSelectorConfig,
    OracleSelector,
    OracleSelectorConfig,
    Router,
)
from evolora.routing.task_keys import (
    BoundedTaskKeySelector,
    BoundedTaskKeySelectorConfig,
    TaskKeySelector,
    TaskKeySelectorConfig,
)

SelectorConfig = (
    AutoEncoderSelectorConfig | TaskKeySelectorConfig | OracleSelectorConfig | NoSelectorConfig
)


def use_selector(
    method: Method,
    chosen: SelectorConfig,
    *,
    router: Router = "per-sample",
    helper: Helper = "none",
) -> None:
    """Let a selector tell the method's tasks: sets what it is, what it reads and the routing.

    ``router`` and ``helper`` are those of an :class:`AutoEncoderSelector`.
    """
    backbone = method.backbone
    widths = backbone.feature_widths()
    if isinstance(chosen, AutoEncoderSelectorConfig):
        method.routing = "oracle" if router == "oracle" else "task-free"
        if chosen.feature == "auto":
            chosen = replace(chosen, feature="max-pooled" if "max-pooled" in widths else "layers")
        width = ALEXNET_WIDTH
        if chosen.feature == "alexnet":
            shapes_only = backbone.device.type == "meta"
            weights = None if shapes_only else chosen.feature_path
            method.extractors["alexnet"] = AlexNetFeatures(weights)
        elif chosen.feature not in widths:
            raise unknown_name("selector feature", chosen.feature, widths)
        else:
            width = widths[chosen.feature]
        method.selector = AutoEncoderSelector(
            chosen, width, device=backbone.device, router=router, helper=helper
        )
    elif isinstance(chosen, TaskKeySelectorConfig):
        method.routing = "task-free"
        sizes = len(backbone.modalities), widths["modalities"]
        if isinstance(chosen, BoundedTaskKeySelectorConfig):
            method.selector = BoundedTaskKeySelector(chosen, *sizes, device=backbone.device)
        else:
            method.selector = TaskKeySelector(chosen, *sizes, device=backbone.device)
    elif isinstance(chosen, OracleSelectorConfig):
        method.routing = "oracle"
        method.selector = OracleSelector()
    elif isinstance(chosen, NoSelectorConfig):
        method.routing = "none"
        method.selector = AlwaysSelector(0)
    else:
        raise ConfigError(f"a selector is chosen by its configuration; got {chosen!r}")
