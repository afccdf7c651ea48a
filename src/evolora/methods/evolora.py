"""Evolora: our own combination of parts, found by experiment on the validation splits.

Each task gets a LoRA of its own at every site, which nothing later touches; task keys in units of
the spread within tasks tell whose input it is, and what is far from every task is the base's. How
large the LoRA is and where it stands depends on what the model is: ``PARTS_FOR`` is the whole
method, and any of its parts can be given instead.

    y = base(x) + E_k(x) ,  k = the nearest task, or none       see methods/recipe.py

Ours. The parts are those of the methods it is made of: LoRA pairs (Hu et al., ICLR 2022), task keys
and the consistency of answers without a modality (DeLo, arXiv 2603.01632), keys in units of the
spread (after Hayes and Kanan, arXiv 1909.01520), ranks kept apart (after ReSoRA, arXiv
2507.20745). Pools, factors, budgets and woven adapters learned
less at equal parameters on the embedded streams (``docs/results.md``), so they are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

from evolora.backbones.base import Backbone
from evolora.errors import ConfigError
from evolora.methods.recipe import Recipe, RecipeConfig
from evolora.recipes.choices import EverySite
from evolora.recipes.experts import LinearSites, LoRAExperts, QFormerSites, QKVSites
from evolora.recipes.gates import OwnGate
from evolora.recipes.terms import Consistency
from evolora.registry import A_PART, METHODS, SOME_PARTS
from evolora.regularizers.settings import ResoraConfig
from evolora.routing.task_keys import BoundedTaskKeySelectorConfig

KEYS = BoundedTaskKeySelectorConfig(metric="mahalanobis", quantile=0.99, margin=2.0)
PRIVATE = RecipeConfig(
    experts=LoRAExperts(r=8, lora_alpha=32.0),
    gate=OwnGate(),
    allocation=EverySite(),
    selector=KEYS,
)
PAIRS = replace(
    PRIVATE,
    experts=LoRAExperts(r=24, lora_alpha=96.0),
    sites=QKVSites(),
    losses=(Consistency(),),
)
PARTS_FOR: Mapping[str, RecipeConfig] = {
    # image against class-name prompts (CLIP, SigLIP)
    "dual-encoder": PRIVATE,
    # image and text in one sequence, heads (ViLT)
    "one-stream": PAIRS,
    # image and text side by side, heads (CLIP as two streams)
    "two-stream": PAIRS,
    # a model that writes its answers
    "language": replace(
        PRIVATE,
        experts=LoRAExperts(r=4, lora_alpha=32.0),
        sites=LinearSites(target_modules=("all-linear",)),
    ),
    # modalities plugged into a Q-Former
    "q-former": replace(PRIVATE, sites=QFormerSites(), regularizers=(ResoraConfig(weight=1.0),)),
}
"""Kind of backbone -> the parts; where experiments find better ones, this is what changes."""


@dataclass(frozen=True, kw_only=True)
class EvoloraConfig:
    """Parts given instead of those for the backbone; see :class:`RecipeConfig`.

    Args:
        type: "evolora".
        experts, sites, gate, selector, allocation, regularizers, losses: as of a recipe; None is as
            ``PARTS_FOR`` says.
    """

    type: Literal["evolora"] = "evolora"
    experts: Any = field(default=None, metadata=A_PART)
    sites: Any = field(default=None, metadata=A_PART)
    gate: Any = field(default=None, metadata=A_PART)
    selector: Any = field(default=None, metadata=A_PART)
    allocation: Any = field(default=None, metadata=A_PART)
    regularizers: tuple[Any, ...] | None = field(default=None, metadata=SOME_PARTS)
    losses: tuple[Any, ...] | None = field(default=None, metadata=SOME_PARTS)

    def on(self, backbone: Backbone) -> RecipeConfig:
        """Return the recipe for a backbone.

        Raises:
            ConfigError: parts that are given do not go with those that are not.
        """
        kind = kind_of_backbone(backbone)
        given = {part.name: getattr(self, part.name) for part in fields(self)[1:]}
        given = {name: value for name, value in given.items() if value is not None}
        try:
            return replace(PARTS_FOR[kind], **given)
        except ConfigError as error:
            raise ConfigError(f"evolora on a {kind} model: {error}") from error


def kind_of_backbone(backbone: Backbone) -> str:
    """Return which of ``PARTS_FOR`` a backbone is."""
    if backbone.takes_modalities:
        return "q-former"
    if backbone.answers == "heads":
        return "one-stream" if backbone.one_stream else "two-stream"
    return "dual-encoder" if backbone.answers == "prompts" else "language"


@METHODS.register("evolora", summary="our own combination of parts, by what the backbone is")
class Evolora(Recipe):
    """The method; see the module docstring."""

    config_class: ClassVar[Any] = EvoloraConfig

    def parts_for(self, config: Any, backbone: Backbone) -> RecipeConfig:
        """Return the parts for the backbone, with those that are given in their places."""
        assert isinstance(config, EvoloraConfig)
        return config.on(backbone)
