"""Locks of folders: between processes, and after a process was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from evolora.errors import StorageError
from evolora.storage.lock import LOCK, locked

HOLD = """
import sys, time
from pathlib import Path
from evolora.storage.lock import locked
with locked(Path(sys.argv[1]), "run"):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_another_process_is_kept_out_and_told_who_is_in(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        with pytest.raises(StorageError) as caught, locked(tmp_path, "run"):
            pass
        assert f"process {process.pid}" in str(caught.value)
    finally:
        process.kill()
        process.wait()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path, "run"):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    assert not (tmp_path / LOCK).exists()


def test_one_process_cannot_lock_twice_and_can_lock_again(tmp_path: Path) -> None:
    with locked(tmp_path / "new", "run"):
        with pytest.raises(StorageError, match="in use"), locked(tmp_path / "new", "run"):
            pass
        assert (tmp_path / "new" / LOCK).exists()
    with locked(tmp_path / "new", "run"):
        pass


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StorageError, match="cannot make the folder"),
        locked(tmp_path / "file", "run"),
    ):
        pass
