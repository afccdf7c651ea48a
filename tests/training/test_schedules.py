"""Learning rates: the schedule of PathWeave's released code, and that others keep their runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from evolora.config import parse_config
from evolora.errors import ConfigError
from evolora.training.config import TrainingConfig, learning_rate, legacy_rate, rate_of


def rate(step: int, **settings: int) -> float:
    return legacy_rate(step, base=1e-5, **{"warmup": 1000, "epoch": 1000, **settings})


def test_the_legacy_rates_of_the_specification() -> None:
    golden = {12: 7.939e-6, 14: 7.270e-6, 34: 5.45e-7}
    for k, expected in golden.items():
        assert rate(1000 * k) == pytest.approx(expected, rel=1e-3)
        assert rate(1000 * k) == rate(1000 * k + 999), "one rate for a whole inner epoch"
    assert legacy_rate(0, base=1e-5, warmup=0, epoch=1000) == 1e-5  # k = 0
    assert rate(40_000) == rate(47_000) == pytest.approx(0.0, abs=1e-20)


def test_legacy_warms_up_from_almost_nothing_and_is_flat_to_the_end_of_a_longer_epoch() -> None:
    assert rate(0) == 1e-8
    assert rate(500) == pytest.approx(0.5 * (1e-5 + 1e-8))
    assert rate(1000, epoch=5000) == rate(4999, epoch=5000) == 1e-5
    assert rate(5000, epoch=5000) < 1e-5
    assert legacy_rate(0, base=1e-9, warmup=10, epoch=20) == 1e-9


def test_a_run_goes_by_the_schedule_it_names() -> None:
    plain = TrainingConfig(max_steps=100, warmup_steps=10)
    legacy = TrainingConfig(
        max_steps=100, warmup_steps=10, lr_scheduler_type="legacy", steps_per_epoch=20
    )
    for step in (0, 5, 19, 20, 60, 99):
        cosine = learning_rate(step, base=1e-3, warmup=10, total=100)
        assert rate_of(plain, step, base=1e-3, total=100) == cosine
        known = legacy_rate(step, base=1e-3, warmup=10, epoch=20)
        assert rate_of(legacy, step, base=1e-3, total=100) == known != cosine
    for wrong in ({"lr_scheduler_type": "linear"}, {"steps_per_epoch": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            TrainingConfig(**wrong)  # type: ignore[arg-type]


def test_settings_that_came_later_leave_other_hashes_as_they_are(tmp_path: Path) -> None:
    run = {"method": "full-finetuning", "stream": "mosaic/domains"}
    plain = parse_config(run).hash()
    assert plain == "e76230c5ed34"  # as it was before there were such settings
    same = {"lr_scheduler_type": "cosine", "steps_per_epoch": 1000, "known_tasks": ()}
    assert parse_config({**run, "training": same}).hash() == plain
    for change in (
        {"training": {"lr_scheduler_type": "legacy"}},
        {"training": {"known_tasks": ("digits",)}},
        {"method": {"type": "full-finetuning", "towers": ("vision",)}},
    ):
        assert parse_config({**run, **change}).hash() != plain
