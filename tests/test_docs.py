"""Documentation that runs: Python blocks, named commands, named files and links."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
OFFLINE = [
    page for page in PAGES if page.name != "README.md"
]  # the README loads a model of the hub


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.S | re.M)


@pytest.mark.parametrize("page", [page for page in OFFLINE if blocks(page)], ids=lambda p: p.name)
def test_python_blocks_run(page: Path) -> None:
    for block in blocks(page):
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_configurations_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"configs/[\w/-]+\.yaml", page.read_text()):
        assert (ROOT / name).exists(), name


def test_the_readme_s_learner_works_on_a_folder_of_folders(tmp_path: Path) -> None:
    """The README's Python, with the embedded model in place of the hub's and few steps."""
    from PIL import Image

    for task in ("kitchen", "toys"):
        for index, name in enumerate(("red", "blue")):
            for number in range(6):
                folder = tmp_path / "shop" / task / f"{name} {task}"
                folder.mkdir(parents=True, exist_ok=True)
                color = [(200, 30, 30 + number), (30, 30, 200 + number)][index]
                Image.new("RGB", (64, 64), color).save(folder / f"{number}.png")
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "photo.jpg")
    code = blocks(ROOT / "README.md")[0]
    code = code.replace("openai/clip-vit-base-patch16", str(ROOT / "src/evolora/assets/clip-tiny"))
    code = code.replace("r=64, num_experts=22, top_k=2)", "r=4, num_experts=4, top_k=2), "
                        "training=evolora.TrainingConfig(max_steps=3, warmup_steps=1, "
                        "per_device_train_batch_size=4)")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) == 3
