"""Depth maps: metres and 16 bits are spread over the grey levels, 8 bits are taken as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evolora.errors import DataError
from evolora.streams.media.depth_maps import read_depth


def test_metres_become_grey_levels_and_holes_black(tmp_path: Path) -> None:
    metres = np.array([[1.0, 2.0], [3.0, np.nan]], dtype=np.float32)
    np.save(tmp_path / "a.npy", metres)
    found = read_depth(tmp_path / "a.npy")
    assert found.dtype == torch.uint8 and found.shape == (3, 2, 2)
    assert found[0].tolist() == [[1, 128], [255, 0]]
    assert torch.equal(found[0], found[2])
    assert read_depth(metres, near=0.0, far=4.0)[0].tolist() == [[64, 128], [192, 0]]
    assert read_depth(torch.tensor([[2.0, 2.0]]))[1].tolist() == [[1, 1]]


def test_sixteen_bits_are_millimetres(tmp_path: Path) -> None:
    values = np.array([[1_000, 2_000], [3_000, 0]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert read_depth(tmp_path / "a.png")[0].tolist() == [[1, 128], [255, 0]]
    assert read_depth(tmp_path / "a.png", near=0.0, far=4.0)[0].tolist() == [[64, 128], [192, 0]]


def test_eight_bits_are_taken_as_they_are(tmp_path: Path) -> None:
    values = np.array([[7, 200]], dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert read_depth(tmp_path / "a.png").tolist() == [[[7, 200]]] * 3
    held = torch.from_numpy(values).expand(3, -1, -1)
    assert torch.equal(read_depth(held), held)


def test_what_is_no_depth_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must be \(h, w\) metres; got \(2, 2, 3\)"):
        read_depth(np.zeros((2, 2, 3)))
    with pytest.raises(DataError, match="no value above 0"):
        read_depth(np.zeros((2, 2)))
    (tmp_path / "a.obj").write_text("v 0 0 0\n")
    with pytest.raises(DataError, match=r"a\.obj is a point cloud or mesh; --depth takes pictures"):
        read_depth(tmp_path / "a.obj", asked="--depth")
    (tmp_path / "b.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match="cannot read the depth map"):
        read_depth(tmp_path / "b.npy")
