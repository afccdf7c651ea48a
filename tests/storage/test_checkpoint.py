"""A damaged checkpoint is noticed, named and skipped; the one before it is used."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.training.worker import toy_run

from evolora.errors import StorageError
from evolora.storage.checkpoint import Checkpoint, load_newest, save_checkpoint


def save(folder: Path, task: int, step: int) -> None:
    tensors = {"weight": torch.full((64,), float(step))}
    state = {"record": {"matrix": [[0.25, None]], "seconds": 1.5}, "log_bytes": 10}
    save_checkpoint(folder, Checkpoint(task=task, step=step, tensors=tensors, state=state))


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-40] ^= 4
    path.write_bytes(bytes(content))


def other_digit(path: Path) -> None:
    """Damage that is still valid JSON: a score that was never measured."""
    text = path.read_text()
    assert "0.25" in text
    path.write_text(text.replace("0.25", "0.75"))


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "tensors truncated": ("tensors.safetensors", halve),
    "tensors flipped": ("tensors.safetensors", flip),
    "tensors missing": ("tensors.safetensors", Path.unlink),
    "tensors empty": ("tensors.safetensors", lambda path: path.write_bytes(b"")),
    "state truncated": ("state.json", halve),
    "state with another digit": ("state.json", other_digit),
    "state empty": ("state.json", lambda path: path.write_bytes(b"")),
    "state a list": ("state.json", lambda path: path.write_text("[]")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_used(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1, 200)
    save(tmp_path, 1, 400)
    name, apply = DAMAGES[damage]
    apply(tmp_path / "001-000400" / name)
    with caplog.at_level(logging.WARNING):
        found = load_newest(tmp_path)
    assert found is not None and (found.task, found.step) == (1, 200)
    assert torch.equal(found.tensors["weight"], torch.full((64,), 200.0))
    assert found.state["record"]["matrix"] == [[0.25, None]]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "001-000400" in caplog.text


def test_all_damaged_is_one_error_that_says_what_to_do(tmp_path: Path) -> None:
    for step in (200, 400):
        save(tmp_path, 0, step)
        halve(tmp_path / f"000-{step:06d}" / "tensors.safetensors")
    with pytest.raises(StorageError, match=r"none of the 2 checkpoints .* is intact; delete it"):
        load_newest(tmp_path)


def test_no_checkpoint_yet_is_none(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "never") is None
    (tmp_path / "000-000100").mkdir()  # killed before its state.json was written
    (tmp_path / "000-000100" / "tensors.safetensors").write_bytes(b"half")
    assert load_newest(tmp_path) is None


def test_the_newest_is_found_by_number_not_by_letter(tmp_path: Path) -> None:
    save(tmp_path, 999, 0)
    save(tmp_path, 1000, 0)
    newest = load_newest(tmp_path)
    assert newest is not None and newest.task == 1000
    save(tmp_path, 1000, 999_999)
    save(tmp_path, 1000, 1_000_000)
    newest = load_newest(tmp_path)
    assert newest is not None and newest.step == 1_000_000


def test_two_checkpoints_are_kept_and_leftovers_of_kills_are_removed(tmp_path: Path) -> None:
    save(tmp_path, 0, 1)
    (tmp_path / "000-000002").mkdir()
    (tmp_path / "000-000002" / "tensors.safetensors").write_bytes(b"no state followed")
    (tmp_path / "000-000001" / ".state.json.abc.partial").write_bytes(b"half")
    save(tmp_path, 0, 3)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
    assert names == [
        f"000-00000{n}/{f}" for n in (1, 3) for f in ("state.json", "tensors.safetensors")
    ]
    save(tmp_path, 1, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000-000003", "001-000000"]


def test_saving_a_step_again_never_leaves_new_tensors_under_an_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evolora.storage import checkpoint

    save(tmp_path, 0, 1)
    save(tmp_path, 0, 2)
    with monkeypatch.context() as patched:

        def killed(*_: object) -> None:
            raise StorageError("killed before the state")

        patched.setattr(checkpoint, "write_json", killed)
        with pytest.raises(StorageError):
            save(tmp_path, 0, 2)
    found = load_newest(tmp_path)
    assert found is not None and found.step == 1


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy_run(tmp_path / "whole", "sequential-lora").run()
    toy_run(tmp_path / "run", "sequential-lora").run()
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    flip(newest / "tensors.safetensors")
    toy_run(tmp_path / "run", "sequential-lora").run(resume=True)
    assert newest.name in caplog.text
    for name in ("matrix.json", "experts.safetensors", "evolora.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for place in (tmp_path / "run" / "checkpoints").iterdir():
        halve(place / "state.json")
    with pytest.raises(StorageError, match="none of the 2 checkpoints"):
        toy_run(tmp_path / "run", "sequential-lora").run(resume=True)
