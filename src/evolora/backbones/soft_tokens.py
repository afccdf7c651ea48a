"""Soft tokens: from what a sample has to the prompts of a Q-Former's language model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evolora.backbones.answer_tokens import NO_ANSWER
from evolora.backbones.batch import Batch
from evolora.backbones.families import PROJECTION
from evolora.backbones.modalities import Entry
from evolora.backbones.qformer_parts import QFORMER
from evolora.backbones.soft_prompts import Piece, packed
from evolora.randomness import StepRandom, derive_seed
from evolora.routing.route import BASE, Route
from evolora.routing.spans import TokenSpans

if TYPE_CHECKING:
    from evolora.backbones.qformer import QFormer

SEEN = "seen "
"""A modality's name behind it names what the encoder made, where it is kept."""


def has(batch: Batch, modality: str) -> Tensor:
    """Return (b,) bool: which rows have a modality, says the data."""
    found = batch.present.get(modality)
    return torch.ones_like(batch.labels, dtype=torch.bool) if found is None else found


def prompts(backbone: QFormer, batch: Batch, route: Route) -> tuple[Tensor, TokenSpans]:
    """Return prompts (b, n, d), each ending at the right, and where what stands in them."""
    pieces: list[Piece] = []
    for modality, spec in backbone.specs.items():
        given = has(batch, modality)
        rows = torch.nonzero(given)[:, 0]
        soft = soft_tokens(backbone, batch, modality, rows, route) if len(rows) else None
        if soft is None:
            continue
        cue = torch.tensor(backbone.instructions.plain(spec.cue) if spec.cue else [])
        if len(cue):
            told = backbone.embed(cue.long().to(backbone.device)).to(soft.dtype)
            pieces.append(Piece("text", told.expand(len(batch), -1, -1), given))
        if len(rows) < len(batch):
            soft = soft.new_zeros(len(batch), *soft.shape[1:]).index_copy(0, rows, soft)
        pieces.append(Piece(modality, soft, given))
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
    pieces.append(Piece("text", backbone.embed(ids), mask))
    present = torch.stack([has(batch, name) for name in backbone.modalities], dim=1)
    width = None if batch.step_sizes is None else _whole_width(backbone, batch.step_sizes)
    return packed(pieces, backbone.modalities, present, width)


def soft_tokens(
    backbone: QFormer, batch: Batch, modality: str, rows: Tensor, route: Route
) -> Tensor | None:
    """Return the soft tokens (k, frames * q, d) of rows that have a modality; None if unseen.

    It puts the route of these rows' frames in place for the Q-Former and the projection.
    """
    spec = backbone.specs[modality]
    own = _route_of(backbone, batch, modality, rows.repeat_interleave(spec.frames), route)
    entry = None
    if backbone.host.enabled and not own.nobody:
        entry = backbone.entries.get(modality)
    entry = entry if entry is not None and len(entry) else None
    if entry is None and (spec.width != backbone.reads or spec.projected(backbone.reads)):
        return None
    name = SEEN + modality
    tokens = backbone.base_results(batch.take(rows), (name,))[name].flatten(0, 1)
    for tower in (QFORMER, PROJECTION):
        backbone.host.set_route(tower, own)
    asked, mask = (
        batch.inputs[part][rows].repeat_interleave(spec.frames, dim=0)
        for part in ("asked_ids", "asked_mask")
    )
    soft: Tensor = backbone.call(
        _gather, backbone=backbone, entry=entry, tokens=tokens, asked=asked, mask=mask
    )
    return soft.reshape(len(rows), -1, soft.shape[-1])


def _gather(
    backbone: QFormer, entry: Entry | None, tokens: Tensor, asked: Tensor, mask: Tensor
) -> Tensor:
    """Return what the queries gather of an encoder's tokens (k, n, d), projected (k, q, d)."""
    model: Any = backbone.model
    queries = backbone.queries if entry is None else entry.queries.all()[0]
    queries = queries.to(model.query_tokens.dtype).expand(len(tokens), -1, -1)
    norm = backbone.own_norm
    into = norm(tokens.to(norm.weight.dtype)) if entry is None else entry(tokens)
    inputs = {"query_embeds": queries}
    if backbone.asks:
        ones = torch.ones_like(queries[..., 0], dtype=mask.dtype)
        inputs |= {"input_ids": asked, "attention_mask": torch.cat([ones, mask], dim=1)}
    whole = model.qformer(
        encoder_hidden_states=into.to(next(model.qformer.parameters()).dtype),
        encoder_attention_mask=torch.ones_like(tokens[..., 0], dtype=torch.long),
        **inputs,
    ).last_hidden_state
    found = whole[:, : queries.shape[1]].to(model.language_projection.weight.dtype)
    projected: Tensor = model.language_projection(found)
    return projected


def _route_of(backbone: QFormer, batch: Batch, modality: str, rows: Tensor, route: Route) -> Route:
    """Return the route of a modality's frames, which are of the given rows."""
    random = None
    if route.random is not None:
        random = _random_of(backbone, route.random, batch, modality)
    if route.paths is None:
        return replace(route.take(rows), random=random, spans=None)
    path = route.paths.get(modality, BASE)
    return Route.of(path, len(rows), device=backbone.device, random=random)


def _random_of(backbone: QFormer, random: StepRandom, batch: Batch, modality: str) -> StepRandom:
    """Return the randomness of a modality's frames."""
    seed, sizes = derive_seed(random.seed, modality), batch.step_sizes
    if sizes is None:
        return StepRandom(seed)
    given = sizes[:, 3 + list(backbone.specs).index(modality)]
    frames = backbone.specs[modality].frames
    before = int(given[: random.first_row].sum())
    return StepRandom(seed, first_row=frames * before, global_rows=frames * int(given.sum()))


def _whole_width(backbone: QFormer, sizes: Tensor) -> int:
    """Return a width that the prompts of every process have room in."""
    number, width = int(backbone.queries.shape[0]), int(sizes[:, 0].max())
    for place, spec in enumerate(backbone.specs.values()):
        if bool(sizes[:, 3 + place].any()):
            width += spec.frames * number + len(backbone.instructions.plain(spec.cue))
    return width


def as_long_as_others(batch: Batch, padding: int) -> Batch:
    """Return the batch as wide as the widest of all processes: noise is drawn per position."""
    if batch.step_sizes is None:
        return batch
    text, answer, asked = batch.step_sizes[:, :3].amax(dim=0).tolist()
    inputs = dict(batch.inputs)
    left = text - inputs["input_ids"].shape[1]
    inputs["input_ids"] = F.pad(inputs["input_ids"], (left, 0), value=padding)
    inputs["attention_mask"] = F.pad(inputs["attention_mask"], (left, 0))
    right = answer - inputs["answer_ids"].shape[1]
    inputs["answer_ids"] = F.pad(inputs["answer_ids"], (0, right), value=NO_ANSWER)
    for name in ("asked_ids", "asked_mask"):
        inputs[name] = F.pad(inputs[name], (0, asked - inputs[name].shape[1]))
    return replace(batch, inputs=inputs)
