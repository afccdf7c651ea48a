"""What a session checks, and what it keeps when it is interrupted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evolora.bench.session import DisagreementError, Session, relative_error
from evolora.bench.settings import Settings
from evolora.bench.timing import Variant
from evolora.errors import ConfigError

pytestmark = pytest.mark.usefixtures("no_calibration")
X = torch.randn(4, 4, requires_grad=True)


def variant(name: str, run, reference: Tensor | None = None) -> Variant:
    return Variant(name=name, run=run, forward_base="a", step_base="a", reference=reference)


def test_error_is_taken_against_float64_relative_to_the_largest_value() -> None:
    reference = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([1.0, -4.0 + 4e-3]), reference) == pytest.approx(
        1e-3, rel=1e-3
    )
    tiny = torch.tensor([1.0, -4.0 + 1e-9], dtype=torch.float64)
    assert 0 < relative_error(tiny, reference) < 1e-9  # nothing is rounded to float32


def test_a_variant_that_computes_something_else_is_not_timed() -> None:
    session = Session("tower", Settings(rounds=1))
    wrong = variant("b", lambda x: 2.0 * x, reference=X.detach().double())
    with pytest.raises(DisagreementError, match="'b' differs from its reference by 1"):
        session.compare("t", [variant("a", lambda x: x * 1.0), wrong], [X], rounds=1)


def test_not_a_number_is_a_disagreement_too() -> None:
    session = Session("tower", Settings())
    with pytest.raises(DisagreementError):
        session.check(variant("a", lambda x: x * float("nan"), X.detach().double()), X)


def test_a_comparison_fills_every_column() -> None:
    session = Session("tower", Settings())
    same = variant("a", lambda x: x * 1.0, reference=X.detach().double())
    session.compare("t", [same], [X], rounds=2)
    row = session.result.tables[0].cells["a"]
    assert row["forward"] == row["step"] == row["fastest step"] == 1.0
    assert row["error"] == 0.0 and row["saved MiB"] == 0.0


def test_an_interruption_keeps_the_whole_rounds_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evolora.bench.timing.MIN_SECONDS", 0.0)
    session, calls = Session("tower", Settings()), 0

    def run(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt
        return x * 1.0

    with pytest.raises(KeyboardInterrupt), session.running():
        session.compare("t", [variant("a", run)], [X], rounds=10**6)
    row = session.result.tables[0].cells["a"]
    assert not session.result.complete
    assert row["forward"] == row["step"] == 1.0 and "saved MiB" in row


def test_a_sweep_has_a_column_per_value_and_leaves_the_base_out() -> None:
    session = Session("layer", Settings())
    session.sweep(
        "s",
        "e",
        (1, 2),
        lambda e: ([variant("a", lambda x: x * 1.0), variant("b", lambda x: x * e)], [X]),
        rounds=1,
    )
    forward, step = session.result.tables
    assert list(forward.cells) == list(step.cells) == ["b"]
    assert set(forward.cells["b"]) == {"1", "fastest 1", "2", "fastest 2"}
    assert forward.texts()[0][0] == "b" and len(forward.texts()[0]) == 3


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"dtype": "float23"}, "did you mean 'float32'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"layers": 0}, "--layers must be at least 1; got 0"),
        ({"rounds": -1}, "--rounds must be at least 1"),
    ],
)
def test_settings_refuse_what_cannot_be(wrong: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Settings(**wrong)
