"""Texts as token tensors: one at a time, as small integers, padded when they meet in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evolora.errors import ConfigError, DataError


def token_ids(processor: Any, text: Any, length: int) -> Tensor:
    """Return the tokens (n,) int32 of a text with its special tokens, cut to ``length``.

    Raises:
        ConfigError: the backbone has no tokenizer.
        DataError: it is no text.
    """
    tokenizer = tokenizer_of(processor)
    if not isinstance(text, str):
        raise DataError(f"expected a text (str); got {type(text).__name__}")
    ids = tokenizer(text, truncation=True, max_length=length)["input_ids"]
    return torch.tensor(ids, dtype=torch.int32)


def tokenizer_of(processor: Any) -> Any:
    """Return the tokenizer of a processor; ConfigError where there is none."""
    if processor is None:
        raise ConfigError("this backbone was built without a processor; it has shapes only")
    return getattr(processor, "tokenizer", processor)


def padded(texts: Sequence[Tensor], length: int, padding: int) -> dict[str, Tensor]:
    """Return {"input_ids", "attention_mask"} (b, length) int64 of token rows."""
    ids = torch.full((len(texts), length), padding, dtype=torch.int64)
    mask = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, tokens in enumerate(texts):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def longest(mask: Tensor) -> int:
    """Return the number of columns of a mask (b, n) that hold anything; all where it is a shape."""
    if mask.is_meta:
        return mask.shape[1]
    return int(mask.any(dim=0).nonzero().max()) + 1


def interpolated(table: Tensor, length: int) -> Tensor:
    """Return a position table (length, d) made of a shorter one (n, d), bilinearly.

    The first and the last row stay what they are (MAP and RebQ lengthen ViLT's table so too); rows
    drawn at random, which stay frozen, would make nonsense of every text.
    """
    rows = table.detach().float().T.unsqueeze(0)
    longer = torch.nn.functional.interpolate(rows, size=length, mode="linear", align_corners=True)
    return longer[0].T.to(table.dtype).contiguous()
