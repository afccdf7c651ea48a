"""Entries of modalities: what leads each into a Q-Former, whichever method learns on it.

An encoder's tokens mean nothing to a Q-Former that has not seen them, so every method learns a
norm, query tokens and perhaps a projection for each new modality, and freezes them when the next
task begins. What the method adds to the Q-Former itself is its own matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from evolora.backbones.modalities import OWN, Entry, ModalitySpec
from evolora.errors import ConfigError, unknown_name
from evolora.experts.bank import GrowingStack
from evolora.randomness import generator
from evolora.routing.route import BASE

if TYPE_CHECKING:
    from evolora.backbones.base import Backbone, Batch
    from evolora.backbones.qformer import QFormer


class ModalityEntries(nn.Module):
    """The entries of all modalities but the model's own; those not learned yet are empty.

    Args:
        backbone: whose modalities they are.
        seed: run seed; projections derive from it.
    """

    def __init__(self, backbone: QFormer, *, seed: int) -> None:
        super().__init__()
        self.backbone, self.seed = backbone, seed
        self.of = nn.ModuleDict()
        for spec in backbone.specs.values():
            self._open(spec)

    def expand(self, spec: ModalitySpec) -> None:
        """Plug in a modality that the backbone did not know; the next task may bring it."""
        self.backbone.add_modality(spec)
        self._open(spec)

    def begin(self, tasks: Sequence[Sequence[str]], *, freeze: bool) -> None:
        """Make the entries of what the last task brings.

        Args:
            tasks: the modalities of all tasks so far.
            freeze: those that are there no longer train.

        Raises:
            ConfigError: a modality has no encoder.
        """
        for modality in tasks[-1]:
            if modality not in self.backbone.modalities:
                known = [name for name in self.backbone.modalities if name != "text"]
                raise unknown_name("modality", modality, known)
        if freeze:
            self.freeze()
        for modality in new_in(tasks, len(tasks) - 1):
            self._grow(modality, list(stages(tasks)))

    def freeze(self) -> None:
        """Freeze every entry for good."""
        for stack in self.modules():
            if isinstance(stack, GrowingStack):
                stack.freeze(range(len(stack)))

    def leave(self) -> None:
        """Let modalities enter as if nothing was learned."""
        self.backbone.let_in({})

    def full_tuning(self, tasks: Sequence[Sequence[str]], task: int) -> int:
        """Return what would train in a stage if Q-Former and projection did; 0 if none is new."""
        new = new_in(tasks, task)
        model: Any = self.backbone.model
        parts = (model.qformer, model.language_projection) if new else ()
        whole: int = sum(p.numel() for part in parts for p in part.parameters())
        entries = [stack for name in new for stack in self.of[name].modules()]
        stacks = [stack for stack in entries if isinstance(stack, GrowingStack)]
        return whole + sum(stack.frozen.numel() + stack.active.numel() for stack in stacks)

    def _open(self, spec: ModalitySpec) -> None:
        if spec.name == OWN:
            return
        backbone = self.backbone
        self.of[spec.name] = Entry(
            spec,
            tuple(backbone.queries.shape),
            backbone.reads,
            eps=backbone.own_norm.eps,
            device=backbone.device,
        )
        backbone.let_in(self._known())

    def _known(self) -> Mapping[str, Entry]:
        return {name: entry for name, entry in self.of.items() if isinstance(entry, Entry)}

    def _grow(self, modality: str, learned: Sequence[str]) -> None:
        """Make an entry from those before it: their newest queries, a norm of the same width."""
        own, known = self.backbone.own_norm, self._known()
        spec, earlier = self.backbone.specs[modality], learned[: learned.index(modality)]
        norm: Tensor | None = None
        if spec.width == len(own.weight):
            norm = torch.stack([own.weight, own.bias])
        for name in earlier:
            if self.backbone.specs[name].width == spec.width:
                norm = known[name].norm.all()[0]
        queries = known[earlier[-1]].queries.all()[0] if earlier else self.backbone.queries
        known[modality].grow(norm, queries, generator(self.seed, "entry", modality))


def stages(tasks: Sequence[Sequence[str]]) -> dict[str, int]:
    """Return learned modality -> the task that taught it, in order; the model's own is none."""
    found: dict[str, int] = {}
    for task, modalities in enumerate(tasks):
        for modality in modalities:
            if modality not in (OWN, "text"):
                found.setdefault(modality, task)
    return found


def new_in(tasks: Sequence[Sequence[str]], task: int) -> list[str]:
    """Return the modalities that a task brings."""
    return [modality for modality, first in stages(tasks).items() if first == task]


def the_new_one(tasks: Sequence[Sequence[str]], task: int, name: str) -> str | None:
    """Return the modality that a task brings; None where it has the model's own alone.

    Raises:
        ConfigError: the task has none that is new, or more than one.
    """
    new, seen = new_in(tasks, task), [one for one in tasks[task] if one != "text"]
    if len(new) > 1:
        raise ConfigError(
            f"task {name!r} brings {len(new)} new modalities ({', '.join(new)}); modalities are "
            "learned one after another"
        )
    if not new and OWN not in seen:
        raise ConfigError(
            f"task {name!r} has no new modality ({', '.join(seen) or 'none is named'}); the "
            f"paths of {', '.join(stages(tasks)) or 'none'} are finished and stay as they are"
        )
    return new[0] if new else None


def newest_stage(tasks: Sequence[Sequence[str]], batch: Batch, device: torch.device) -> Tensor:
    """Return (b,): the task that taught the newest modality of each row, or BASE."""
    found = torch.full((len(batch),), BASE, device=device)
    for modality, task in stages(tasks).items():
        has = batch.present.get(modality)
        if has is not None:
            found = torch.where(has, found.clamp_min(task), found)
    return found


def entries_of(backbone: Backbone, *, seed: int) -> ModalityEntries | None:
    """Return empty entries for a backbone that modalities are plugged into, else None."""
    from evolora.backbones.qformer import QFormer

    return ModalityEntries(backbone, seed=seed) if isinstance(backbone, QFormer) else None
