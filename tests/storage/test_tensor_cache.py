"""TensorCache: what goes in comes out, bounded, in memory and in a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from evolora.errors import DataError, StorageError
from evolora.storage import tensor_cache
from evolora.storage.tensor_cache import MappedFile, TensorCache

PLACES = pytest.mark.parametrize("in_file", [False, True], ids=["ram", "file"])
ROW = 4 * 4  # bytes of four floats


def cache(rows: int, in_file: bool = False, **settings: Any) -> TensorCache:
    return TensorCache(rows * ROW, file=MappedFile() if in_file else None, **settings)


def row(value: float) -> torch.Tensor:
    return torch.full((4,), float(value))


@PLACES
def test_what_goes_in_comes_out_bit_for_bit(in_file: bool) -> None:
    kept = cache(10, in_file)
    value = torch.randn(2, 2)
    before = value.clone()
    assert torch.equal(kept.put("a", value), before)
    value += 1  # what is kept is a copy
    assert torch.equal(kept.get("a"), before)
    assert kept.get("b") is None and "a" in kept and len(kept) == 1
    kept.drop("a")
    assert kept.get("a") is None and kept.nbytes == 0


@PLACES
def test_the_first_answer_is_rounded_like_all_later_ones(in_file: bool) -> None:
    kept = cache(10, in_file, dtype=torch.float16)
    value = torch.randn(4)
    first = kept.put("a", value)
    assert first.dtype == torch.float16 and torch.equal(first, kept.get("a"))
    assert kept.nbytes == 8
    assert torch.equal(kept.put("b", torch.arange(3)), torch.arange(3))  # integers stay


def test_a_value_beyond_the_range_is_refused() -> None:
    with pytest.raises(DataError, match=r"up to 1e\+05 do not fit in torch.float16"):
        cache(10, dtype=torch.float16).put("a", row(1e5))


@PLACES
def test_the_longest_unused_makes_room(in_file: bool) -> None:
    kept = cache(3, in_file)
    for name in "abc":
        kept.put(name, row(ord(name)))
    kept.get("a")
    kept.put("d", row(ord("d")))
    assert list(kept) == ["c", "a", "d"] and kept.nbytes == 3 * ROW
    assert all(torch.equal(kept.get(name), row(ord(name))) for name in "acd")
    kept.put("large", torch.zeros(100))
    assert "large" not in kept and len(kept) == 3


def test_a_scan_keeps_what_fits_and_gives_way_in_the_next_generation() -> None:
    kept = cache(3, scan=True)
    for epoch in range(3):
        hits = sum(kept.get(name) is not None for name in range(5))
        assert hits == (0 if epoch == 0 else 3)
        for name in range(5):
            kept.put(name, row(name))
    kept.new_generation()
    kept.get(1)
    kept.put("new", row(9))
    assert set(kept) == {1, 2, "new"}


def test_a_file_gives_room_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_cache, "FILE_CHUNK", 1)  # grows by single pages
    kept = cache(8, True)
    for name in range(200):
        kept.put(name, row(name))
    assert kept.file is not None
    assert os.fstat(kept.file._file.fileno()).st_size <= 3 * 65536
    assert [float(kept.get(name)[0]) for name in range(192, 200)] == list(range(192, 200))


def test_a_full_disk_keeps_nothing_new_and_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    kept = cache(8, True)
    assert torch.equal(kept.put("a", row(1)), row(1))
    assert "a" not in kept and kept.nbytes == 0


def test_a_folder_that_is_not_there_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot make a cache file in .*nowhere"):
        MappedFile(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_a_file_leaves_nothing_behind(tmp_path: Path) -> None:
    kept = TensorCache(1000, file=MappedFile(tmp_path))
    kept.put("a", row(1))
    assert not list(tmp_path.iterdir())


def test_what_inference_mode_kept_may_be_trained_on() -> None:
    kept = cache(3)
    with torch.inference_mode():
        kept.put("a", row(2))
    weight = torch.ones(4, requires_grad=True)
    (weight * kept.get("a")).sum().backward()
    assert torch.equal(weight.grad, row(2))
