"""Spans: which positions of a fused sequence belong to which modality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Span:
    """The part of a sequence that one modality fills.

    Args:
        start, stop: its positions.
        head: positions at its beginning that speak for the whole sequence (a class token); a mean
            over the modality leaves them out.
    """

    start: int
    stop: int
    head: int = 0


@dataclass(frozen=True, eq=False)
class Spans:
    """Where each modality stands in a batch of fused sequences: a value, part of their route.

    Args:
        of: modality -> its span, in the order of the backbone's ``modalities``.
        mask: (b, n) bool; the position holds something and is no padding.
        present: (b, m) bool; the sample has the modality, says the data. What a sequence holds in
            place of a missing one is a constant.
    """

    of: Mapping[str, Span]
    mask: Tensor
    present: Tensor

    def means(self, hidden: Tensor) -> Tensor:
        """Return the mean (b, m, d) of hidden states (b, n, d) over each modality's positions.

        Padding does not count, nor do heads; constants in place of a missing modality do.
        """
        return self._weights.to(hidden.dtype) @ hidden

    def heads(self, hidden: Tensor) -> Tensor:
        """Return the states (b, m, d) at the first position of each modality."""
        return hidden[:, [span.start for span in self.of.values()]]

    def positions(self, modality: str) -> Tensor:
        """Return (n,) bool: the positions of a modality, heads and padding included."""
        where = torch.zeros(self.mask.shape[1], dtype=torch.bool, device=self.mask.device)
        where[self.of[modality].start : self.of[modality].stop] = True
        return where

    def has(self, modality: str) -> Tensor:
        """Return (b,) bool: which samples have a modality."""
        return self.present[:, list(self.of).index(modality)]

    @property
    def real(self) -> Tensor:
        """(b, n) bool: the position holds something and is no padding."""
        return self.mask

    def take(self, rows: Tensor) -> Spans:
        """Return the same for some of the rows."""
        return replace(self, mask=self.mask[rows], present=self.present[rows])

    @cached_property
    def _weights(self) -> Tensor:
        """Weights (b, m, n) of a mean over each modality."""
        counted = torch.zeros(
            len(self.mask), len(self.of), self.mask.shape[1], device=self.mask.device
        )
        for row, span in enumerate(self.of.values()):
            part = slice(span.start + span.head, span.stop)
            counted[:, row, part] = self.mask[:, part].float()
        return counted / counted.sum(dim=2, keepdim=True)


@dataclass(frozen=True, eq=False)
class TokenSpans:
    """Where each modality's tokens stand where that differs from row to row, as in a prompt.

    It speaks of the whole prompt; of a later step of generation, which sees one token, nothing.

    Args:
        of: modality -> (b, n) bool, its tokens; padding is of none.
        present: (b, m) bool; the sample has the modality, says the data.
        answer: (b, n) bool, tokens of an answer that is learned; None of a prompt alone.
    """

    of: Mapping[str, Tensor]
    present: Tensor
    answer: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """(b, n) bool: the position holds something of the prompt and is no padding."""
        return torch.stack(list(self.of.values())).any(dim=0)

    @property
    def real(self) -> Tensor:
        """(b, n) bool: the position holds something, of prompt or answer, and is no padding."""
        return self.mask if self.answer is None else self.mask | self.answer

    def means(self, hidden: Tensor) -> Tensor:
        """Return the mean (b, m, d) of hidden states (b, n, d) over each modality's tokens.

        Zero where a row has none.
        """
        return self._weights.to(hidden.dtype) @ hidden

    def has(self, modality: str) -> Tensor:
        """Return (b,) bool: which samples have a modality."""
        return self.present[:, list(self.of).index(modality)]

    def take(self, rows: Tensor) -> TokenSpans:
        """Return the same for some of the rows."""
        answer = None if self.answer is None else self.answer[rows]
        of = {name: where[rows] for name, where in self.of.items()}
        return TokenSpans(of, self.present[rows], answer)

    @cached_property
    def _weights(self) -> Tensor:
        """Weights (b, m, n) of a mean over each modality."""
        counted = torch.stack([where.float() for where in self.of.values()], dim=1)
        return counted / counted.sum(dim=2, keepdim=True).clamp_min(1.0)
