"""Counts of PathWeave at the published shape, on the meta device."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from evolora.config import read_config
from evolora.evaluation.inspection import Inspection, inspect_config

CONFIG = Path(__file__).parents[2] / "configs/pathweave/mcl.yaml"
STAGES = ("video", "audio", "depth", "pc")


@functools.cache
def found() -> Inspection:
    return inspect_config(read_config(CONFIG))


def test_each_stage_trains_what_was_published() -> None:
    image, *stages = found().trainable_parts
    assert image == {} and found().trainable[0] == 0
    for path, parts in enumerate(stages):
        assert parts["experts"] == 1_002_120  # 72 sites of rank 8
        assert parts["projection_adapters"] == 43_017
        assert parts.get("in_adapters", 0) == path * 5_184
        gates = {0: 0, 1: 251_904, 2: 377_856, 3: 503_808}[path]
        assert parts.get("gates_and_noise", 0) == gates
    assert [parts["entries"] for parts in stages] == [
        24_576 + 2 * 1_408, 24_576 + 2 * 768 + 1_082_752,
        24_576 + 2 * 1_408, 24_576 + 2 * 512 + 722_304,
    ]  # fmt: skip
    assert found().trainable == [0, 1_072_529, 2_411_089, 1_460_753, 2_312_401]


def test_the_share_that_is_saved_is_the_published_one() -> None:
    assert found().full_tuning == [0, 188_837_376, 189_918_848, 188_837_376, 189_557_888]
    saved = dict(zip(STAGES, found().saved[1:], strict=True))
    assert saved["audio"] == pytest.approx(0.98730, abs=5e-6)
    assert round(100 * (saved["audio"] or 0), 2) == 98.73
    assert found().saved[0] is None


def test_every_attention_linear_of_the_qformer_is_a_site() -> None:
    names = [site.name for site in found().sites if site.tower == "qformer"]
    assert len(names) == 72
    assert sum(".crossattention." in name for name in names) == 6 * 4
    assert [site.name for site in found().sites if site.tower == "projection"] == [
        "projection.0.projection"
    ]
    assert found().parameters["experts"] == 4 * 1_002_120


def test_stages_of_the_embedded_stream_train_less_than_a_fiftieth_of_the_model() -> None:
    config = CONFIG.parents[1] / "mosaic/modalities/pathweave.yaml"
    inspected = inspect_config(read_config(config))
    image, *stages = inspected.trainable
    assert image == 0 and stages == [36_371, 54_683, 45_731, 49_131]
    # r = 6: (4 n_s + 2 n_c) (2 h r + r + h + 1) + 2 n_c (e r + r + h r + h + 1), h = e = 128
    adapters = (4 * 3 + 4 * 2) * (2 * 128 * 6 + 6 + 128 + 1)
    assert inspected.trainable_parts[1]["experts"] == adapters
    assert max(stages) <= 0.02 * inspected.backbone_parameters
