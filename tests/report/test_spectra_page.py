"""The page of an inspection of redundancy, in a browser."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.report.browser import Browser

from evolora.evaluation.spectra import Spectra, UpdateSpread, spread_of
from evolora.report.spectra import write_spectra

KINDS = ("crossattention.value", "attention.value", "self_attn.out_proj")
RANK, BLOCKS = 4, 12


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two towers of twelve blocks."""
    draw, updates = torch.Generator().manual_seed(0), []
    for tower in ("text_model", "vision_model"):
        for block in range(BLOCKS):
            for kind in KINDS:
                a, b = (torch.randn(RANK, width, generator=draw) for width in (16, 12))
                name = f"{tower}.encoder.layers.{block}.{kind}"
                spreads = spread_of(a, b * torch.linspace(1, block / BLOCKS, RANK).unsqueeze(1))
                updates.append(UpdateSpread(layer=name, expert=None, rank=RANK, spreads=spreads))
    found = Spectra(source="runs/one", updates=tuple(updates), left_out=("conv",))
    return write_spectra(found, tmp_path_factory.mktemp("page") / "page.html")


@pytest.mark.parametrize("width", [1200, 400])
def test_it_opens_without_a_fault_and_fits(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width)
    assert browser.faults == [] and browser.loads == [page.resolve().as_uri()]
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.querySelectorAll('svg text.cell').length") == 6 * 6 * BLOCKS
    assert "conv" in browser.run("document.body.innerText")
    labels = browser.run("[...document.querySelectorAll('svg text.tick')].map(t => t.textContent)")
    assert not any("…" in label for label in labels)
    name = "document.querySelector('tbody td').getBoundingClientRect().width"
    assert 100 < browser.run(name) < 0.5 * width


def test_layers_are_sorted_by_a_click(browser: Browser, page: Path) -> None:
    browser.open(page, width=1200)
    place = browser.run(
        "[...document.querySelectorAll('thead th')].findIndex(h => h.innerText.includes('erank B'))"
    )
    browser.click(f"thead th:nth-child({place + 1}) button")
    values = browser.run(
        "[...document.querySelectorAll('tbody tr')]"
        f".map(row => Number(row.cells[{place}].dataset.value))"
    )
    assert len(values) == len(KINDS) * 2 * BLOCKS
    assert values in (sorted(values), sorted(values, reverse=True)) and values[0] != values[-1]
