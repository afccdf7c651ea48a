"""What kind of backbone it is: who may be asked for class prompts, and for which tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from evolora.errors import ConfigError, UnsuitableError
from evolora.streams.task import LabelSpace

if TYPE_CHECKING:
    from evolora.backbones.base import Backbone, PromptBackbone


def check_labels(backbone: Backbone, labels: LabelSpace) -> None:
    """Refuse a task whose answers are not what the backbone gives.

    Raises:
        ConfigError: texts asked of a classifier, or classes of a model that writes.
    """
    writes = backbone.answers == "text"
    if labels.text and not writes:
        raise ConfigError(
            f"the task is answered by texts, {type(backbone).__name__} tells classes apart; use a "
            "model that writes (evolora ls backbones)"
        )
    if writes and not labels.text:
        raise ConfigError(
            f"the task has classes, {type(backbone).__name__} writes its answers; give the task "
            "texts (LabelSpace.of_texts)"
        )


def prompts_of(backbone: Backbone) -> PromptBackbone:
    """Return the backbone if it answers by prompts.

    Raises:
        UnsuitableError: it answers by heads.
    """
    if backbone.answers != "prompts":
        raise UnsuitableError(
            f"{type(backbone).__name__} has no class prompts, which this method needs; they are "
            "those of a dual encoder (CLIPModel, SiglipModel)"
        )
    return cast("PromptBackbone", backbone)
