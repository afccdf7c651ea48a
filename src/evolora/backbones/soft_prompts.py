"""Prompts of soft tokens and text: put together row by row, and where what stands in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from evolora.routing.spans import TokenSpans


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of prompts.

    Args:
        modality: whose tokens they are.
        tokens: (b, n, d).
        given: (b,) or (b, n) bool, which of them a row really has.
    """

    modality: str
    tokens: Tensor
    given: Tensor


def packed(
    pieces: Sequence[Piece], modalities: Sequence[str], present: Tensor, width: int | None = None
) -> tuple[Tensor, TokenSpans]:
    """Return prompts (b, n, d) with what a row has at the right, in order, and their spans.

    Args:
        pieces: in the order of a prompt.
        modalities: names of the spans, in order.
        present: (b, m) for the spans.
        width: n; None is that of the longest row.
    """
    tokens = torch.cat([piece.tokens for piece in pieces], dim=1)
    given = torch.cat([_each(piece) for piece in pieces], dim=1)
    kinds = torch.cat(
        [
            torch.full((piece.tokens.shape[1],), list(modalities).index(piece.modality))
            for piece in pieces
        ]
    ).to(given.device)
    order = torch.sort(given.int(), dim=1, stable=True).indices
    longest = int(given.sum(dim=1).max()) if width is None else min(width, tokens.shape[1])
    order = order[:, tokens.shape[1] - longest :]
    tokens = tokens.gather(1, order.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
    given, kinds = given.gather(1, order), kinds[order]
    if width is not None and width > longest:
        extra = (width - longest, 0)
        tokens = F.pad(tokens, (0, 0, *extra))
        given, kinds = F.pad(given, extra), F.pad(kinds, extra)
    of = {name: given & (kinds == place) for place, name in enumerate(modalities)}
    tokens = tokens.masked_fill(~given.unsqueeze(2), 0.0)
    return tokens, TokenSpans(of, present)


def token_means(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean (b, d) of states (b, n, d) where the mask (b, n) is set."""
    weights = mask.to(states.dtype).unsqueeze(2)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1.0)


def _each(piece: Piece) -> Tensor:
    if piece.given.dim() == 2:
        return piece.given
    return piece.given.unsqueeze(1).expand(-1, piece.tokens.shape[1])
