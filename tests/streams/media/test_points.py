"""Point clouds: three formats and arrays, centred, of the number of points that is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from evolora.errors import DataError
from evolora.streams.media.points import read_points

CORNERS = np.array([[0, 0, 0], [2, 0, 0], [2, 1, 0], [0, 1, 0]], dtype=np.float32)
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], dtype=np.uint8)


def ply(kind: str, *, faces: bool = True) -> bytes:
    """Return a coloured rectangle of 2 x 1, one face of four corners."""
    header = [
        "ply", f"format {kind} 1.0", "comment made here", "element vertex 4",
        *(f"property float {axis}" for axis in "xyz"),
        *(f"property uchar {colour}" for colour in ("red", "green", "blue")),
        *(["element face 1", "property list uchar int vertex_indices"] if faces else []),
        "end_header",
    ]  # fmt: skip
    head = ("\n".join(header) + "\n").encode()
    if kind == "ascii":
        rows = [" ".join(map(str, [*p, *c])) for p, c in zip(CORNERS, COLOURS, strict=True)]
        return head + ("\n".join([*rows, "4 0 1 2 3"] if faces else rows) + "\n").encode()
    order = "<" if kind == "binary_little_endian" else ">"
    body = b"".join(
        p.astype(f"{order}f4").tobytes() + c.tobytes()
        for p, c in zip(CORNERS, COLOURS, strict=True)
    )
    ring = b"\x04" + np.arange(4, dtype=f"{order}i4").tobytes() if faces else b""
    return head + body + ring


def sorted_rows(cloud: torch.Tensor) -> list[list[float]]:
    return sorted(cloud.tolist())


@pytest.mark.parametrize("kind", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_vertices_of_a_ply_are_points(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.ply"
    path.write_bytes(ply(kind, faces=False))
    cloud = read_points(path, colours=True)
    assert cloud.dtype == torch.float32
    expected = np.hstack([CORNERS - [1, 0.5, 0], COLOURS / 255.0])
    assert np.allclose(cloud.numpy(), expected)
    assert read_points(path).shape == (4, 3)


@pytest.mark.parametrize("kind", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_points_of_a_mesh_are_drawn_by_area(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.ply"
    path.write_bytes(ply(kind))
    cloud = read_points(path, points=4_000, colours=True)
    assert cloud.shape == (4_000, 6)
    assert cloud[:, :3].mean(0).abs().max() < 1e-5
    # An even distribution over [0, 2] x [0, 1] has variances 1/3 and 1/12.
    assert np.allclose(cloud[:, :2].var(0).tolist(), [1 / 3, 1 / 12], rtol=0.08)
    assert float(cloud[:, 2].abs().max()) == 0
    assert float(cloud[:, 3:].min()) >= 0 and float(cloud[:, 3:].max()) <= 1


def test_big_triangles_get_more_points_than_small_ones(tmp_path: Path) -> None:
    text = "v 0 0 0\nv 3 0 0\nv 0 3 0\nv 10 0 0\nv 11 0 0\nv 10 1 0\nf 1/1/1 2/2/2 3\nf -3 -2 -1\n"
    path = tmp_path / "two.obj"
    path.write_text(text)
    cloud = read_points(path, points=2_000)
    near = float((cloud[:, 0] < cloud[:, 0].mean() + 3).float().mean())
    assert abs(near - 0.9) < 0.03
    assert torch.equal(cloud, read_points(path, points=2_000))
    assert not torch.equal(cloud, read_points(path, points=2_000, seed=1))


def test_points_are_even_over_a_triangle(tmp_path: Path) -> None:
    path = tmp_path / "one.obj"
    path.write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    cloud = read_points(path, points=8_000)
    # Of an even distribution over the unit right triangle: variances 1/18, covariance -1/36.
    found = torch.cov(cloud[:, :2].T)
    expected = torch.tensor([[1 / 18, -1 / 36], [-1 / 36, 1 / 18]])
    torch.testing.assert_close(found, expected, atol=3e-3, rtol=0)


def test_vertices_of_an_obj_may_be_coloured(tmp_path: Path) -> None:
    path = tmp_path / "points.obj"
    path.write_text("# cloud\nv 0 0 0 1 0 0\nv 2 0 0 0 1 0\n")
    assert read_points(path, colours=True).tolist() == [[-1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 1, 0]]


def test_points_are_thinned_or_repeated_to_the_number(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32) + 5
    path = tmp_path / "cloud.npy"
    np.save(path, values)
    centred = values - values.mean(0)
    assert np.allclose(read_points(path).numpy(), centred, atol=1e-5)
    fewer, more = read_points(values, points=6), read_points(torch.from_numpy(values), points=25)
    assert len({tuple(row) for row in fewer.tolist()}) == 6
    assert len(more) == 25 and len({tuple(row) for row in more.tolist()}) == 10
    np.savez(tmp_path / "cloud.npz", values)  # as LAVIS keeps Objaverse
    assert torch.equal(read_points(tmp_path / "cloud.npz"), read_points(path))
    grey = read_points(path, colours=True)
    assert grey.shape == (10, 6) and bool((grey[:, 3:] == 0.5).all())


def test_what_is_no_cloud_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must be \(n, 3\), or \(n, 6\).*got \(4, 2\)"):
        read_points(np.zeros((4, 2)))
    with pytest.raises(DataError, match="no numbers"):
        read_points(np.full((4, 3), np.nan))
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([{}, {}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot read the point cloud"):
        read_points(objects)
    np.savez(tmp_path / "two.npz", a=np.zeros((4, 3)), b=np.zeros(2))
    with pytest.raises(DataError, match=r"holds 2 arrays \(a, b\); expected 1"):
        read_points(tmp_path / "two.npz")
    for name, text, reason in (
        ("a.obj", "v 0 0\n", "fewer than 3 numbers"),
        ("b.obj", "v 0 0 0\nv 1 0 zero\n", "line 2, 'v 1 0 zero'"),
        ("c.obj", "v 0 0 0\nv 1 0 0\nf 1 2 3\n", "a face names a vertex"),
        ("d.obj", "# nothing\n", "has no vertices"),
        ("e.obj", "v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n", "without area"),
        ("a.ply", "ply\nformat ascii 1.0\nelement vertex 3\n", "header has no end"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=reason):
            read_points(tmp_path / name)
    whole = ply("binary_little_endian")
    (tmp_path / "cut.ply").write_bytes(whole[:-3])
    with pytest.raises(DataError, match="ends within"):
        read_points(tmp_path / "cut.ply")
    (tmp_path / "short.ply").write_bytes(ply("ascii")[:-12])
    with pytest.raises(DataError, match="ends after 4 rows"):
        read_points(tmp_path / "short.ply")
