"""What goes together in a recipe, and why the rest does not: one sentence for each refusal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from evolora.backbones.qformer_parts import QFORMER
from evolora.errors import ConfigError
from evolora.experts.factor_layer import SEES
from evolora.recipes.choices import KINDS, kind_of
from evolora.registry import ALLOCATIONS, EXPERTS, GATES, Registry

if TYPE_CHECKING:
    from evolora.backbones.base import Backbone
    from evolora.methods.recipe import RecipeConfig

WHOSE = {
    "private": "experts of a task's own",
    "budget": "experts of a task's own",
    "pool": "experts of a pool that tasks share",
    "shared": "one set of experts for all tasks",
    "modality": "experts of a modality's own",
}


def check_parts(recipe: RecipeConfig) -> None:
    """Refuse parts that do not go together, on whatever backbone.

    Raises:
        ConfigError: every reason, and what is allowed.
    """
    faults = list(_faults(recipe))
    if faults:
        raise ConfigError("; ".join(faults))
    if recipe.gate.type == "top-k":
        recipe.gate.pool(recipe)  # refuses to choose more experts than there are


def check_on(recipe: RecipeConfig, backbone: Backbone) -> None:
    """Refuse parts that do not go with a backbone.

    Raises:
        ConfigError: every reason, and what is allowed.
    """
    faults = list(_faults_on(recipe, backbone))
    if faults:
        raise ConfigError("; ".join(faults))


def _faults(recipe: RecipeConfig) -> Iterator[str]:
    experts, gate, selector = recipe.experts, recipe.gate, recipe.selector
    if gate.mixes != experts.made_of:
        yield (
            f"gate {gate.type!r} mixes {gate.mixes}, experts {experts.type!r} are "
            f"{experts.made_of}: use gate {_either(GATES, 'mixes', experts.made_of)}, or experts "
            f"{_either(EXPERTS, 'made_of', gate.mixes)}"
        )
    kind = kind_of(recipe.allocation)
    if kind not in gate.goes_with:
        allowed = [entry.name for entry in ALLOCATIONS if _kind(entry.name) in gate.goes_with]
        yield (
            f"gate {gate.type!r} {gate.because}; allocation {_name(recipe.allocation)} gives "
            f"{WHOSE[kind]}: use allocation {' or '.join(allowed)}"
        )
    if kind == "shared" and selector.type != "none":
        yield "allocation 'shared' leaves nothing to select: use selector none"
    if kind in ("private", "budget") and selector.type in ("none", "modality"):
        yield (
            f"allocation {_name(recipe.allocation)} gives each task experts of its own, and "
            f"selector {selector.type!r} does not tell the task: use task-keys, auto-encoder or "
            "oracle"
        )
    if (kind == "modality") != (selector.type == "modality") and kind in ("modality", "pool"):
        yield (
            f"allocation {_name(recipe.allocation)} and selector {selector.type!r} do not go "
            "together: allocation per-modality and selector modality need each other"
        )
    if getattr(selector, "helper", "none") != "none" and gate.type != "own":
        yield (
            f"selector.helper adds the experts of a second task, which gate {gate.type!r} does "
            "not: use helper none, or gate own"
        )
    if kind == "modality" and recipe.sites.type == "mlp":
        yield (
            "sites 'mlp' do not tell modalities apart: use sites q-former, or linear, attention or "
            "qkv in its towers"
        )


def _faults_on(recipe: RecipeConfig, backbone: Backbone) -> Iterator[str]:
    name, experts = type(backbone).__name__, recipe.experts.type
    towers = [one for one in recipe.towers_on(backbone) if one in backbone.towers]
    if recipe.selector.type == "modality":
        if not backbone.takes_modalities:
            yield (
                "selector modality needs a model that modalities are plugged into, as a Q-Former "
                f"(Blip2ForConditionalGeneration); {name} has its own only "
                f"({', '.join(backbone.modalities)}): use task-keys, auto-encoder or oracle"
            )
        elif wrong := [one for one in towers if one not in recipe.modality_towers]:
            yield (
                f"the tower {wrong[0]!r} reads all modalities of an input as one sequence, so that "
                f"none has its own experts there: use towers {QFORMER} and projection"
            )
    if recipe.experts.made_of == "factors":
        for tower in towers:
            sees = SEES.get(tower)
            if sees is None:
                yield (
                    f"experts {experts!r} are chosen by queries of image and text, which are made "
                    f"for towers {', '.join(SEES)}; {name} has {', '.join(backbone.towers)}: use "
                    "experts lora or bottleneck"
                )
                break
            lacking = [one for one in sees if one not in backbone.modalities]
            if lacking:
                yield (
                    f"experts {experts!r} in the tower {tower!r} are chosen by a sample's "
                    f"{lacking[0]}, and samples of {name} have {', '.join(backbone.modalities)} "
                    f"only: use towers {', '.join(_seen(backbone)) or 'of another model'}"
                )
    for loss in recipe.losses:
        if reason := loss.refuses(recipe, backbone):
            yield reason


def _seen(backbone: Backbone) -> list[str]:
    """Return the towers whose modalities the backbone has."""
    known = set(backbone.modalities)
    return [tower for tower in backbone.towers if set(SEES.get(tower, ("?",))) <= known]


def _kind(name: str) -> str:
    return KINDS.get(name, "budget")


def _name(allocation: object) -> str:
    return repr(getattr(allocation, "type", allocation))


def _either(registry: Registry[object], attribute: str, value: str) -> str:
    names = [e.name for e in registry if getattr(e.value, attribute, None) == value]
    return " or ".join(names)
