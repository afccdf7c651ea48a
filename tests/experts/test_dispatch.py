"""The dispatch rule on measured crossovers, and the file of fitted thresholds."""

from __future__ import annotations

import json

import pytest

from evolora.errors import StorageError
from evolora.experts import dispatch
from evolora.experts.dispatch import (
    DEFAULTS,
    Thresholds,
    choose,
    load_thresholds,
    save_thresholds,
    thresholds_for,
)

SORTED = {"grouped", "segments"}
# (b, n, r, k, e) -> forms within 10 % of the best, forward and step (768 -> 768, one CPU thread)
PER_SAMPLE = [
    ((64, 1, 4, 1, 16), {"gather", "stacked"}),
    ((64, 1, 16, 1, 16), {"grouped"}),
    ((64, 1, 16, 2, 64), {"grouped"}),
    ((64, 1, 64, 2, 22), {"grouped"}),
    ((64, 1, 64, 1, 64), {"grouped"}),
    ((32, 16, 4, 1, 16), {"gather", "segments"}),
    ((32, 16, 16, 2, 64), {"gather", "segments"}),
    ((32, 16, 64, 2, 22), {"segments", "grouped"}),
    ((32, 16, 64, 1, 64), {"grouped", "segments"}),
    ((64, 50, 4, 1, 16), {"gather"}),
    ((64, 50, 16, 2, 64), {"gather", "segments"}),
    ((64, 50, 64, 2, 22), {"gather", "segments"}),
    ((8, 197, 4, 2, 64), {"gather", "segments"}),
    ((8, 197, 16, 2, 64), {"gather", "segments"}),
    ((8, 197, 64, 2, 22), {"gather", "segments"}),
    ((8, 197, 64, 1, 64), {"gather", "segments"}),
]
PER_TOKEN = [  # (r, k, e) of 8 x 197 tokens
    ((16, 2, 4), {"stacked"}),
    ((16, 2, 8), {"stacked", "segments"}),
    ((16, 2, 16), {"segments", "grouped"}),
    ((16, 2, 64), {"segments"}),
    ((16, 2, 128), {"segments", "grouped"}),
    ((64, 1, 22), {"segments", "grouped"}),
    ((4, 2, 64), {"segments"}),
]


@pytest.mark.parametrize(("shape", "fast"), PER_SAMPLE)
def test_a_route_per_sample(shape: tuple[int, ...], fast: set[str]) -> None:
    b, n, r, k, e = shape
    assert choose(e, r, b, n, k) in fast


@pytest.mark.parametrize(("shape", "fast"), PER_TOKEN)
def test_a_route_per_token(shape: tuple[int, ...], fast: set[str]) -> None:
    r, k, e = shape
    assert choose(e, r, 8, 197, k, per_token=True) in fast


def test_one_route_for_all_rows_is_shared() -> None:
    assert choose(64, 16, 1, 197, 2) == "shared"
    assert choose(64, 16, 1, 197, 2, per_token=True) != "shared"


def test_a_gpu_is_never_asked_for_the_lengths_of_segments() -> None:
    for b, n, r, k, e in [shape for shape, _ in PER_SAMPLE]:
        assert choose(e, r, b, n, k, thresholds=DEFAULTS["cuda"]) != "segments"


def test_every_threshold_moves_the_choice() -> None:
    def chosen(shape, token=False, **limits):
        b, n, r, k, e = shape
        return choose(e, r, b, n, k, per_token=token, thresholds=Thresholds(**limits))

    few = (8, 8, 8, 2, 64)
    assert chosen(few) in SORTED and chosen(few, gather_min_tokens=8) == "gather"
    assert chosen(few, stacked_max_rows_single=1024) == "stacked"
    assert chosen(few, True, stacked_max_rows_token=1024) == "stacked"
    wide = (8, 20, 64, 2, 64)
    assert chosen(wide) in SORTED and chosen(wide, gather_max_rank_per_token=7.0) == "gather"
    assert chosen(wide, segments_min_rows=0) == "segments"
    assert chosen(wide, segments_min_rows=10**6) == "grouped"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user without a threshold file, whose cache is read anew."""
    monkeypatch.setattr(dispatch, "thresholds_file", lambda: tmp_path / "dispatch.json")
    dispatch._thresholds_for.cache_clear()
    yield tmp_path / "dispatch.json"
    dispatch._thresholds_for.cache_clear()


def test_fitted_thresholds_take_precedence_for_their_device(home) -> None:
    assert thresholds_for("cpu") == DEFAULTS["cpu"]
    assert thresholds_for("xpu") == DEFAULTS["cuda"]
    fitted = Thresholds(gather_min_tokens=5, gather_max_rank_per_token=1.5)
    assert save_thresholds("cpu", fitted) == home
    assert thresholds_for("cpu") == fitted and thresholds_for("cuda") == DEFAULTS["cuda"]
    save_thresholds("cuda", Thresholds(segments_min_rows=7))
    assert load_thresholds(home) == {"cpu": fitted, "cuda": Thresholds(segments_min_rows=7)}
    assert thresholds_for("cuda").segments_min_rows == 7


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"cpu": {"gather_min_token": 3}}, "unknown threshold 'gather_min_token'; did you mean"),
        ({"cpu": {"gather_min_tokens": -1}}, "cpu.gather_min_tokens must be an integer from 0"),
        ({"cpu": {"gather_min_tokens": 1.5}}, r"must be an integer from 0; got 1\.5"),
        ({"cpu": {"gather_max_rank_per_token": "2"}}, "must be a number from 0; got '2'"),
        ({"cpu": {"gather_min_tokens": True}}, "must be an integer from 0; got True"),
        ({"cpu": 3}, "the thresholds of 'cpu' are not an object"),
        ([], "no 'thresholds' by device"),
    ],
)
def test_a_bad_file_is_one_clear_error(home, content, words) -> None:
    home.write_text(json.dumps({"format_version": 1, "thresholds": content}))
    with pytest.raises(StorageError, match=words):
        thresholds_for("cpu")
