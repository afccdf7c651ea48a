"""Routing features from outside the backbone. The backbone's own come free with its base pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from evolora.backbones.base import Batch
from evolora.errors import DataError

FeatureExtractor = Callable[[Batch], Tensor]
"""From a batch to routing features (b, f); frozen, not part of what a method saves."""

ALEXNET_WIDTH = 256 * 13 * 13
"""Width of AlexNet's conv5 map at 224 px."""
ALEXNET_CONVS = (
    (3, 64, 11, 4, 2),
    (64, 192, 5, 1, 2),
    (192, 384, 3, 1, 1),
    (384, 256, 3, 1, 1),
    (256, 256, 3, 1, 1),
)
"""(in, out, kernel, stride, padding) of AlexNet's five convolutions (Krizhevsky 2014 variant)."""


class AlexNetFeatures(nn.Module):
    """conv5 of AlexNet before its activation, (b, 43264) at 224 px: the authors' DDAS features.

    Args:
        path: ``.safetensors`` or ``.pth`` file of ImageNet weights under the usual names
            ("features.0.weight", ...); a ``.pth`` is read with ``weights_only=True``. None leaves
            the weights as initialised (shapes only).
    """

    def __init__(self, path: str | Path | None = None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, (c_in, c_out, kernel, stride, padding) in enumerate(ALEXNET_CONVS):
            layers.append(nn.Conv2d(c_in, c_out, kernel, stride, padding))
            if index < 4:
                layers.append(nn.ReLU())
            if index in (0, 1):
                layers.append(nn.MaxPool2d(3, 2))
        self.features = nn.Sequential(*layers)
        if path is not None:
            self._load(Path(path))
        self.eval().requires_grad_(False)

    def forward(self, batch: Batch) -> Tensor:
        """Return (b, 43264) features of the batch's normalised pixels (b, 3, 224, 224)."""
        pixels = batch.inputs["pixel_values"]
        result: Tensor = self.to(pixels.device).features(pixels).flatten(1)
        return result

    def _load(self, path: Path) -> None:
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                state = load_file(path)
            else:
                state = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # torch and safetensors raise many kinds for a bad file
            raise DataError(f"cannot read AlexNet weights from {path}: {error}") from error
        wanted = {name: state[name] for name in self.state_dict() if name in state}
        missing = sorted(set(self.state_dict()) - set(wanted))
        if missing:
            raise DataError(
                f"{path} holds no AlexNet: it lacks {missing[0]} and {len(missing) - 1} more"
            )
        self.load_state_dict(wanted)
