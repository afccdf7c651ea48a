"""Collections of garbage are kept short throughout the contract."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def short_collections() -> None:
    """Every task ends with a garbage collection; it need not search what was imported."""
    gc.freeze()
