"""A small PointNet of ours on point clouds: one token of all points, one of each neighbourhood.

    x_p    = (p / s, ln s [, colour]),  s = largest distance from the centre
    whole  = max_p MLP(x_p)                                      (Qi et al., CVPR 2017)
    near_c = max_{p in the k nearest of c} MLP(x_p, (p - c) / s) for centres c
    tokens = W_0 whole,  W_1 [near_c, whole, c / s]

Centres are spread by farthest point sampling, from the point farthest from the middle on, so that
nothing is drawn and no sample depends on another. The size enters by ln s.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evolora.backbones.encoders.folders import encoder_folder, encoder_tensors
from evolora.backbones.modalities import ModalitySpec, default_cue
from evolora.errors import DataError
from evolora.registry import ENCODERS
from evolora.storage.files import read_json, write_json, write_tensors
from evolora.streams.media.points import read_points

KIND = "pointnet"


@dataclass(frozen=True, kw_only=True)
class PointNetConfig:
    """Sizes.

    Args:
        points: of a cloud.
        width: d of a token.
        hidden: width of the layers per point.
        groups: neighbourhoods; there is one token more.
        neighbours: points of each.
        colours: whether a point has a colour.
    """

    points: int = 512
    width: int = 128
    hidden: int = 64
    groups: int = 15
    neighbours: int = 32
    colours: bool = False


class PointNet(nn.Module):
    """See the module's docstring."""

    def __init__(self, config: PointNetConfig) -> None:
        super().__init__()
        self.config = config
        inputs, inner = (7 if config.colours else 4), 2 * config.hidden
        self.whole = _per_point(inputs, config.hidden)
        self.near = _per_point(inputs + 3, config.hidden)
        self.all = nn.Linear(inner, config.width)
        self.each = nn.Linear(2 * inner + 3, config.width)

    def forward(self, clouds: Tensor) -> Tensor:
        """Return (b, 1, 1 + groups, d) of centred clouds (b, points, 3 | 6)."""
        places = clouds[..., :3]
        size = places.norm(dim=-1).amax(dim=1).clamp_min(1e-6)[:, None, None]
        places = places / size
        points = torch.cat(
            [places, size.log().expand(-1, places.shape[1], 1), clouds[..., 3:]], dim=-1
        )
        whole = self.whole(points).amax(dim=1)
        centres = _spread(places, self.config.groups)
        apart = (places[:, None] - centres[:, :, None]).square().sum(-1)
        nearest = apart.topk(self.config.neighbours, dim=-1, largest=False).indices
        around = points.gather(1, nearest.flatten(1)[..., None].expand(-1, -1, points.shape[-1]))
        around = around.view(*nearest.shape, -1)
        local = torch.cat([around, around[..., :3] - centres[:, :, None]], dim=-1)
        near = self.near(local).amax(dim=2)
        seen = torch.cat([near, whole[:, None].expand_as(near), centres], dim=-1)
        return torch.cat([self.all(whole)[:, None], self.each(seen)], dim=1)[:, None]


def save_pointnet(folder: Path, encoder: PointNet, *, dtype: torch.dtype = torch.float16) -> None:
    """Write config.json and model.safetensors."""
    write_json(
        folder / "config.json",
        {"format_version": 1, "model_type": KIND, **asdict(encoder.config)},
    )
    tensors = {name: value.to(dtype) for name, value in encoder.state_dict().items()}
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})


def load_pointnet(folder: Path) -> PointNet:
    """Return the encoder of a folder that :func:`save_pointnet` wrote.

    Raises:
        DataError: it is of another type, or its tensors do not fit.
        StorageError: a file is damaged.
    """
    written = read_json(folder / "config.json", kind="point cloud encoder")
    sizes = {key: value for key, value in written.items() if key != "format_version"}
    if sizes.pop("model_type", None) != KIND:
        raise DataError(f"{folder} is of type {written.get('model_type')!r}, not {KIND!r}")
    try:
        with torch.device("cpu"):
            encoder = PointNet(PointNetConfig(**sizes))
        encoder.load_state_dict(encoder_tensors(folder))
    except (TypeError, RuntimeError) as error:
        raise DataError(f"{folder} does not fit a {KIND}: {error}") from error
    return encoder.eval()


@ENCODERS.register("pointnet", summary="a small PointNet on point clouds and meshes")
def pointnet(
    name: str,
    model: nn.Module,
    processor: Any,
    *,
    weights: str = "pointnet-tiny",
    frames: int = 1,
    cue: str | None = None,
) -> ModalitySpec:
    """Return a modality of point clouds.

    Args:
        name: of the modality.
        model: the stock model, of which nothing is used.
        processor: its processor, likewise.
        weights: an embedded encoder, or a local folder of one.
        frames: clouds of a sample, as a list.
        cue: see :class:`ModalitySpec`.
    """
    encoder = load_pointnet(encoder_folder(weights))
    config = encoder.config

    def read(value: Any) -> Tensor:
        clouds = list(value) if isinstance(value, list | tuple) else [value]
        if len(clouds) != frames:
            raise DataError(f"{name} takes {frames} point cloud(s); got {len(clouds)}")
        found = [
            read_points(one, points=config.points, colours=config.colours, asked=name)
            for one in clouds
        ]
        return torch.stack(found)

    return ModalitySpec(
        name=name,
        encoder=_Clouds(encoder),
        width=config.width,
        read=read,
        frames=frames,
        cue=default_cue(name) if cue is None else cue,
    )


class _Clouds(nn.Module):
    """The encoder over several clouds of a sample."""

    def __init__(self, encoder: PointNet) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, clouds: Tensor) -> Tensor:
        found: Tensor = self.encoder(clouds.flatten(0, 1))
        return found.view(*clouds.shape[:2], *found.shape[2:])


def _per_point(inputs: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.LayerNorm(hidden),
        nn.GELU(),
        nn.Linear(hidden, hidden),
        nn.GELU(),
        nn.Linear(hidden, 2 * hidden),
    )


def _spread(places: Tensor, count: int) -> Tensor:
    """Return ``count`` of the points (b, p, 3), each the farthest from those before it."""
    rows = torch.arange(len(places), device=places.device)
    apart = places.square().sum(-1)
    chosen = []
    for number in range(count):
        place = places[rows, apart.argmax(dim=1)]
        chosen.append(place)
        found = (places - place[:, None]).square().sum(-1)
        apart = found if number == 0 else torch.minimum(apart, found)
    return torch.stack(chosen, dim=1)
