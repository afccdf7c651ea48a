"""One way to read a point cloud: a given number of points, centred, with or without colours.

``.npy`` (or one array in ``.npz``) holds (n, 3), or (n, 6) with colours in [0, 1]; ``.ply`` and
``.obj`` hold vertices, or a mesh, of which points are drawn by area. Units are kept. Draws are the
same each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evolora.errors import DataError
from evolora.randomness import generator
from evolora.streams.media.kinds import check_file, is_name, taken
from evolora.streams.media.ply import read_ply

UNCOLOURED = 0.5
"""Grey of points without colours, where colours are asked for."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """Vertices (n, 3 | 6) and triangles of their indices (t, 3); none are points."""

    vertices: Floats
    triangles: NDArray[np.int64]


def read_points(
    source: Any, *, points: int | None = None, colours: bool = False, seed: int = 0,
    asked: str = "pc",
) -> Tensor:  # fmt: skip
    """Return a point cloud as float32 (points, 3), or (points, 6) with colours, centred.

    Args:
        source: name of a .npy, .ply or .obj file, or an array or tensor (n, 3 | 6).
        points: how many: some of more, drawn without repetition; fewer are repeated. None: all of
            a cloud; of a mesh, as many as it has vertices.
        colours: whether to return them; grey where the source has none.
        seed: of the draws.
        asked: what the user calls this input, for messages.

    Raises:
        DataError: missing, unreadable, of another kind, empty, or with values that are no numbers.
    """
    name = str(source) if is_name(source) else asked
    shape = _shape(source, name, asked)
    if not np.isfinite(shape.vertices).all():
        raise DataError(f"the point cloud {name!r} has values that are no numbers")
    draw = generator(seed, "points")
    wanted = points or len(shape.vertices)
    if len(shape.triangles):
        cloud = sample_surface(shape, wanted, draw)
    else:
        cloud = torch.from_numpy(shape.vertices)
        cloud = cloud[_chosen(len(cloud), wanted, draw)] if points else cloud
    cloud[:, :3] -= cloud[:, :3].mean(dim=0)
    if colours and cloud.shape[1] == 3:
        cloud = torch.cat([cloud, torch.full_like(cloud, UNCOLOURED)], dim=1)
    return cloud[:, : 6 if colours else 3].float().contiguous()


def sample_surface(shape: Shape, points: int, draw: torch.Generator) -> Tensor:
    """Return points (points, 3 | 6) of a mesh, evenly by area; float64.

    Raises:
        DataError: its triangles have no area.
    """
    corners = torch.from_numpy(shape.vertices[shape.triangles])
    sides = corners[:, 1:, :3] - corners[:, :1, :3]
    areas = torch.linalg.cross(sides[:, 0], sides[:, 1]).norm(dim=1)
    if not float(areas.sum()) > 0:
        raise DataError("a mesh without area has no surface to draw points from")
    bounds = areas.cumsum(0)
    place = torch.rand(points, generator=draw, dtype=torch.float64) * bounds[-1]
    chosen = corners[torch.searchsorted(bounds, place).clamp_max(len(areas) - 1)]
    first, second = torch.rand(2, points, generator=draw, dtype=torch.float64)
    # The square root makes it even over a triangle (Osada et al., 2002).
    root = first.sqrt()
    weights = torch.stack([1 - root, root * (1 - second), root * second], dim=1)
    return (weights.unsqueeze(-1) * chosen).sum(1)


def _chosen(count: int, wanted: int, draw: torch.Generator) -> Tensor:
    if count == wanted:
        return torch.arange(count)
    if count > wanted:
        return torch.randperm(count, generator=draw)[:wanted]
    more = torch.randint(count, (wanted - count,), generator=draw)
    return torch.cat([torch.arange(count), more])


def _shape(source: Any, name: str, asked: str) -> Shape:
    if is_name(source):
        if check_file(source, "pc", asked=asked) == "array":
            return _cloud(_array(Path(source)), name)
        return _ply(Path(source)) if _is_ply(Path(source)) else _obj(Path(source))
    if isinstance(source, Tensor | np.ndarray):
        return _cloud(torch.as_tensor(source).detach().cpu().numpy(), name)
    raise DataError(
        f"{asked} takes {taken('pc')}, or an array (n, 3 | 6); got {type(source).__name__}"
    )


def _cloud(values: NDArray[Any], name: str) -> Shape:
    if values.ndim != 2 or values.shape[1] not in (3, 6) or not len(values):
        raise DataError(
            f"the point cloud {name!r} must be (n, 3), or (n, 6) with colours; got {values.shape}"
        )
    if values.dtype.kind not in "fiu":
        raise DataError(f"the point cloud {name!r} must hold numbers; got {values.dtype}")
    return Shape(values.astype(np.float64), np.zeros((0, 3), np.int64))


def _array(path: Path) -> NDArray[Any]:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise DataError(f"cannot read the point cloud {str(path)!r}: {error}") from error
    if isinstance(found, np.ndarray):
        return found
    with found:
        if len(found.files) != 1:
            names = ", ".join(found.files)
            raise DataError(f"{str(path)!r} holds {len(found.files)} arrays ({names}); expected 1")
        one: NDArray[Any] = found[found.files[0]]
        return one


def _is_ply(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(3) == b"ply"


def _ply(path: Path) -> Shape:
    try:
        vertices, triangles = read_ply(path.read_bytes())
    except (ValueError, OSError) as error:
        raise DataError(f"cannot read the point cloud {str(path)!r}: {error}") from error
    return _checked(vertices, triangles, path)


def _obj(path: Path) -> Shape:
    """Return the vertices and faces of a Wavefront OBJ; a polygon is a fan of triangles."""
    vertices: list[list[float]] = []
    fans: list[list[int]] = []
    at = ""
    try:
        for line, text in enumerate(path.read_text("latin-1").splitlines(), 1):
            at = f"line {line}, {text.strip()!r}"
            key, *words = text.split() or [""]
            if key == "v":
                vertices.append([float(word) for word in words])
            elif key == "f":
                ids = [int(word.split("/")[0]) for word in words]
                ids = [one - 1 if one > 0 else len(vertices) + one for one in ids]
                fans += [[ids[0], ids[k], ids[k + 1]] for k in range(1, len(ids) - 1)]
    except (ValueError, OSError) as error:
        raise DataError(f"cannot read {str(path)!r}: {at}: {error}") from error
    # "x y z", "x y z w" or "x y z r g b"
    width = 6 if vertices and all(len(one) >= 6 for one in vertices) else 3
    if any(len(one) < 3 for one in vertices):
        raise DataError(f"cannot read {str(path)!r}: a vertex has fewer than 3 numbers")
    rows = np.asarray([one[:width] for one in vertices], dtype=np.float64)
    return _checked(rows, np.asarray(fans, dtype=np.int64).reshape(-1, 3), path)


def _checked(vertices: Floats, triangles: NDArray[np.int64], path: Path) -> Shape:
    if not len(vertices):
        raise DataError(f"{str(path)!r} has no vertices")
    if len(triangles) and (triangles.min() < 0 or triangles.max() >= len(vertices)):
        raise DataError(f"{str(path)!r}: a face names a vertex that is not there")
    return Shape(vertices, triangles)
