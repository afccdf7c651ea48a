"""Files are whole or as they were; every failure is one StorageError that names the path."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evolora.errors import StorageError
from evolora.storage.files import (
    read_json,
    read_tensors,
    sweep_temporary,
    write_bytes,
    write_json,
    write_tensors,
)


class FullDisk:
    """A file whose disk is full after a few bytes."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def write(self, content: bytes) -> None:
        self.file.write(content[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.fdopen
    monkeypatch.setattr(os, "fdopen", lambda handle, mode: FullDisk(opened(handle, mode)))


def failing(name: str, error: BaseException) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(os, name, fail)

    return apply


FAULTS = {
    "full while writing": full_disk,
    "full at fsync": failing("fsync", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    "rename refused": failing("replace", PermissionError(errno.EACCES, "Permission denied")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "matrix.json"
    target.write_text("old")
    with monkeypatch.context() as patched:
        FAULTS[fault](patched)
        with pytest.raises(StorageError, match=r"cannot write .*matrix\.json: (No space|Perm)"):
            write_bytes(target, b"new content")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["matrix.json"]
    write_bytes(target, b"new content")
    assert target.read_bytes() == b"new content"


def test_ctrl_c_during_a_write_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing("replace", KeyboardInterrupt())(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(tmp_path / "a.json", b"new")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_a_folder_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(StorageError, match=r"cannot write .*runs/a/run\.json: "):
        write_json(tmp_path / "runs" / "a" / "run.json", {"format_version": 1})
    assert (tmp_path / "runs").read_text() == "a file"


def test_sweeping_removes_only_what_killed_writes_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".hidden").write_text("mine")
    (tmp_path / "run.partial").write_text("mine")
    with monkeypatch.context() as patched:  # a kill -9: nothing is cleaned up
        patched.setattr(os, "unlink", lambda _: None)
        failing("replace", OSError("killed"))(patched)
        with pytest.raises(StorageError):
            write_bytes(tmp_path / "run.json", b"half")
    assert len(list(tmp_path.iterdir())) == 3
    sweep_temporary(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "run.partial"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ('{"format_version": 1,', "not valid JSON .line 1.: corrupt run"),
        ("[1, 2]", "no format_version"),
        ('{"a": 1}', "no format_version"),
        ('{"format_version": 7}', "format_version 7, this Evolora reads up to 1; update evolora"),
        ('{"format_version": "1"}', "format_version '1', which is none"),
        ('{"format_version": 0}', "format_version 0, which is none"),
    ],
)
def test_json_that_is_not_ours_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(StorageError, match=message) as caught:
        read_json(tmp_path / "run.json", kind="run")
    assert "run.json" in str(caught.value) and "\n" not in str(caught.value)


def test_json_that_is_missing_binary_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no run at .*: run\.json is missing"):
        read_json(tmp_path / "run.json", kind="run")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StorageError, match=r"cannot read .*b\.json"):
        read_json(tmp_path / "b.json", kind="run")
    (tmp_path / "c.json").mkdir()
    with pytest.raises(StorageError, match=r"cannot read .*c\.json"):
        read_json(tmp_path / "c.json", kind="run")


def test_tensors_come_back_bit_for_bit_whatever_their_layout(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    tensors = {
        "transposed": base.T,
        "view": base[2:],
        "shared": base,
        "empty": torch.empty(0, 3),
        "int": torch.tensor([2**62]),
        "half": base.to(torch.bfloat16),
        "nan": torch.tensor([float("nan"), -0.0]),
    }
    sha256 = write_tensors(tmp_path / "a.safetensors", tensors, {})
    back = read_tensors(tmp_path / "a.safetensors", sha256=sha256)
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype and back[name].shape == value.shape
        assert torch.equal(
            back[name].contiguous().view(torch.uint8), value.contiguous().view(torch.uint8)
        )


@pytest.mark.parametrize("metadata", [{}, {"format": "evolora"}])
def test_no_tensors_at_all_are_written_and_read(metadata: dict[str, str], tmp_path: Path) -> None:
    sha256 = write_tensors(tmp_path / "a.safetensors", {}, metadata)
    assert read_tensors(tmp_path / "a.safetensors", sha256=sha256) == {}


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "text"])
def test_damaged_tensors_are_refused_by_name(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    sha256 = write_tensors(path, {"x": torch.randn(9)}, {})
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        damaged = {"truncated": content[:-5], "flipped": content, "text": b"not tensors"}[damage]
        path.write_bytes(bytes(damaged))
    with pytest.raises(StorageError, match=r"a\.safetensors"):
        read_tensors(path, sha256=sha256)
    if damage in ("truncated", "text"):  # found without a hash too
        with pytest.raises(StorageError, match=r"a\.safetensors is not a readable safetensors"):
            read_tensors(path)


def test_written_json_is_readable_by_others(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"format_version": 1, "name": "étude"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["name"] == "étude"
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644
