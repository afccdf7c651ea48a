"""Cells on a local Ray cluster of several nodes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from evolora.sweep.comparison import run_comparison
from evolora.sweep.engines import make_engine
from evolora.sweep.grid_file import read_grid

FILE = {
    "streams": {
        "small": {
            "stream": {
                "name": "mosaic/domains",
                "order": ["digits", "flags"],
                "limit": 16,
                "test_limit": 10,
            },
            "training": {"max_steps": 2, "per_device_train_batch_size": 4, "augment": False},
        }
    },
    "methods": [
        "linear-probe",
        "map",
        {"name": "bad", "method": {"type": "sequential-lora", "target_modules": ["nowhere"]}},
    ],
    "seeds": 2,
}


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A connected cluster of two nodes with one CPU each."""
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes()
    yield ray
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
def test_cells_run_on_all_nodes_and_end_as_in_processes(nodes: Any, tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(FILE))
    grid = read_grid([path])
    engine = make_engine("ray", None)
    assert engine.workers == 2
    found = run_comparison(grid, tmp_path / "ray", engine, progress=False)
    assert nodes.is_initialized()  # a cluster that is not the engine's stays
    local = run_comparison(grid, tmp_path / "local", make_engine("local", 1), progress=False)
    for one, other in zip(found["cells"], local["cells"], strict=True):
        assert (one["state"], one["matrix"]) == (other["state"], other["matrix"])
    states = [cell["state"] for cell in found["cells"]]
    assert states == ["finished", "not applicable", "failed"] * 2
    before = (tmp_path / "ray" / found["cells"][0]["folder"] / "run.json").stat().st_mtime_ns
    again = run_comparison(grid, tmp_path / "ray", make_engine("ray", 1), progress=False)
    after = (tmp_path / "ray" / again["cells"][0]["folder"] / "run.json").stat().st_mtime_ns
    assert before == after


def test_without_ray_the_message_says_what_to_install(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(FILE))
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from evolora.cli import main\n"
        f"main(['compare', {json.dumps(str(path))}, '--engine', 'ray', '--out', "
        f"{json.dumps(str(tmp_path / 'out'))}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert "pip install 'evolora[ray]'" in done.stderr
    assert not (tmp_path / "out").exists()
