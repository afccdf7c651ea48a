"""The examples run as they are printed, on tiny models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import WORDS, WordTokenizer

ROOT = Path(__file__).parent.parent


def test_resora_in_a_fine_tuning_by_peft_and_the_trainer(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import PeftModel
    from tests.regularizers.peft_models import tiny_llama

    tiny_llama().unload().save_pretrained(tmp_path / "model")
    WordTokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "lines.txt").write_text("\n".join(" ".join(WORDS[i : i + 6]) for i in range(7)))
    words = [str(tmp_path / "model"), str(tmp_path / "lines.txt"), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "resora_peft.py"), *words],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "redundancy_down" in done.stdout and "task_loss" in done.stdout
    PeftModel.from_pretrained(tiny_llama().unload(), tmp_path / "out")
