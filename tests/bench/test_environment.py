"""The description of the machine."""

from __future__ import annotations

import json

from evolora.bench.environment import describe
from evolora.bench.settings import Settings


def test_it_names_versions_processor_and_how_fast_it_is() -> None:
    found = describe(Settings())
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"] and found["clock"] == "process CPU time"
    assert all(rate > 0 for rate in found["gemm_gflops"].values()) and found["copy_gb_per_s"] > 0
    assert describe(Settings(wall=True))["clock"] == "wall clock"
