"""Killed in every stage, PathWeave on the embedded Q-Former ends where it would have ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from evolora.errors import EvoloraError
from kill_and_resume import Run, main, timeless

CONFIG = Path(__file__).parents[2] / "configs/mosaic/modalities/pathweave.yaml"


@pytest.mark.slow
def test_pathweave_on_the_embedded_model_resumes_after_a_kill_in_every_stage(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    few = ["stream.limit=12", "stream.test_limit=4", "training.per_device_train_batch_size=4"]
    main([str(CONFIG), "--out", str(tmp_path), "--into", "0.3", *few])
    said = capfd.readouterr().out
    for stage in ("video", "audio", "depth", "pc", "evaluation after pc"):
        assert f"killed in {stage}: " in said
    assert "the same to the bit: matrix.json" in said


def test_what_differs_is_named_and_a_run_that_fails_is_an_error(tmp_path: Path) -> None:
    runs = []
    for name, score in (("whole", "1.0"), ("killed", "0.5")):
        run = Run(tmp_path / name, ["no-such.yaml"])
        (run.folder / "checkpoints/a").mkdir(parents=True)
        for file in ("routing.json", "experts.safetensors", "evolora.json"):
            (run.folder / file).write_text("{}")
        (run.folder / "matrix.json").write_text(score)
        (run.folder / "checkpoints/a/tensors.safetensors").write_text(name)
        (run.folder / "log.jsonl").write_text(f'{{"event": "task", "seconds": {score}}}')
        runs.append(run)
    assert runs[0].differs(runs[1]) == ["matrix.json", "checkpoints/a/tensors.safetensors"]
    assert timeless({"a": [{"seconds_learn": 1, "b": 2}]}) == {"a": [{"b": 2}]}
    (runs[1].folder / "log.jsonl").write_text('{"event": "step", "step": 1}\n{"event": "st')
    assert runs[0].differs(runs[1])[-1] == "log.jsonl"
    with pytest.raises(EvoloraError, match="ended with 2, not with 0"):
        runs[0].live()
