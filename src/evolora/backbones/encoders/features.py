"""What another encoder made, once and for all, kept as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evolora.backbones.modalities import ModalitySpec, default_cue
from evolora.errors import DataError
from evolora.registry import ENCODERS


class AsIs(nn.Module):
    """No encoder: the samples hold what one has made of them."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the tokens (b, f, n, d)."""
        return tokens


@ENCODERS.register("features", summary="what another encoder made: (frames, tokens, width) arrays")
def features(
    name: str,
    model: nn.Module,
    processor: Any,
    *,
    width: int,
    tokens: int,
    frames: int = 1,
    cue: str | None = None,
) -> ModalitySpec:
    """Return a modality whose samples are features, made once by any encoder and kept as .npy."""
    shape = (frames, tokens, width)

    def read(value: Any) -> Tensor:
        try:
            array = np.load(value, allow_pickle=False) if isinstance(value, str) else value
            found = torch.as_tensor(np.asarray(array)).float()
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{name} features {value!r} cannot be read: {error}") from error
        if found.dim() == 2:
            found = found.unsqueeze(0)
        if tuple(found.shape) != shape:
            raise DataError(f"{name} features must be {shape}; got {tuple(found.shape)}")
        return found

    cue = default_cue(name) if cue is None else cue
    return ModalitySpec(name=name, encoder=AsIs(), width=width, read=read, frames=frames, cue=cue)
