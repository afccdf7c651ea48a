"""Bytes kept for backward, and the rise of the peak."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from evolora.bench.memory import saved_bytes

X = torch.randn(64, 32)
FLOATS = 4 * X.numel()


def test_a_storage_counts_once_however_many_views_are_kept() -> None:
    def run() -> Tensor:
        a = X * torch.ones((), requires_grad=True)
        return a.view(32, 64) * a.view(2, -1).view(32, 64) + (a.view(32, 64) ** 2)

    assert saved_bytes(run) == FLOATS + 0  # the scalar and X were there before


def test_parameters_inputs_and_cached_tensors_do_not_count() -> None:
    layer = nn.Linear(32, 32)
    cached = torch.randn(32, 32)

    def run() -> Tensor:
        return layer(X.clone().requires_grad_()) @ cached

    # The input of the Linear is the one thing the step makes and keeps.
    assert saved_bytes(run) == FLOATS


def test_what_no_gradient_needs_is_not_kept() -> None:
    layer = nn.Linear(32, 32).requires_grad_(False)
    assert saved_bytes(lambda: layer(X.clone().requires_grad_())) == 0


def test_a_loop_that_weights_full_outputs_keeps_one_per_expert() -> None:
    gates = torch.rand(5, requires_grad=True)

    def run() -> Tensor:
        out = X
        for gate in gates:
            out = out + gate * (X * 2)
        return out

    assert saved_bytes(run) >= 5 * FLOATS


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_peak_rises_by_what_a_call_has_in_use_at_once() -> None:
    """In a process of its own: the heap of this one may serve a block from what it has."""
    code = """
import torch
from evolora.bench.memory import peak_rise
mib = 2**20
def call():
    for _ in range(3):  # one after another, not at once
        torch.ones(40 * mib, dtype=torch.uint8)
rise = peak_rise(call, torch.device("cpu"))
again = peak_rise(lambda: None, torch.device("cpu"))
assert rise is not None and 36 * mib <= rise <= 60 * mib, rise
assert again is not None and again < 8 * mib, again
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
