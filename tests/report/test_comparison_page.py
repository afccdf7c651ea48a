"""The page of a comparison: what it says, and that a browser shows, sorts and prints it."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from tests.report.comparisons import simulated
from tests.report.test_page import check

from evolora.errors import StorageError
from evolora.report.comparison import write_comparison_page
from evolora.report.strips import Axis, interval, round_axis

FULL = ("domains", "missing", "modalities", "instructions")
A4 = 718  # px: a sheet of A4 less the page's margins
TABLE = "#overview ~ .scroll table"  # the first one
ROWS = f"[...document.querySelector('{TABLE}').tBodies[0].rows]"
FIRST_WORDS = f"{ROWS}.map(row => row.cells[0].dataset.value)"
# What sticks out of its frame; a hidden element has no width.
CUT = """[...document.querySelectorAll('.scroll, pre, dd, p, h2, h3')]
  .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML.slice(0, 200))"""


def page_of(comparison, folder):
    return write_comparison_page(comparison, folder / "comparison.html").read_text()


def test_the_page_is_one_small_file_that_loads_nothing(tmp_path):
    text = page_of(simulated(20, FULL), tmp_path)
    checker = check(text)
    assert [place for place in checker.loads if not place.startswith("#")] == ["data:,"]
    without_namespace = text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|@import|url\(", without_namespace)
    assert len(text.encode()) < 1_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.html"]
    anchors = [place[1:] for place in checker.loads if place.startswith("#")]
    assert all(f'id="{place}"' in text for place in anchors)
    for drawing in re.findall(r"<svg.*?</svg>", re.sub(r"<svg x=.*?</svg>", "", text)):
        ElementTree.fromstring(drawing)


def test_every_part_is_on_the_page(tmp_path):
    found = simulated(5, FULL)
    text = page_of(found, tmp_path)
    for part in (
        "<h1>Comparison: mosaic</h1>",
        "5 methods on 4 streams, 3 seeds, 1 order of tasks: 56 of 60 cells finished, 1 failed, "
        "3 not applicable. This comparison is not complete yet.",
        "2 h 05 min", "evolora 0.1.0, torch 2.13.0", "evolora compare mosaic.yaml --seeds 3",
        ">Mean rank<", ">Average accuracy<", "0002abcdef", "commonest answer", ">10.9<",
        ">zero-shot</span>", ">blind</span>", ">joint</span>", ">task told</span>",
        ">reference</span>", "zero-shot has no names of classes here", "Log: cells/output.log",
        "DataError: &lt;no&gt; sample", ">seed 2<",
    ):  # fmt: skip
        assert part in text, part
    assert text.count('<table class="heat"') == 5 * 4 - 1


def test_numbers_are_those_of_the_comparison(tmp_path):
    found = simulated(4, ("domains",))
    text = page_of(found, tmp_path)
    (stream,) = found["streams"]
    for one in stream["methods"]:
        last = one["metrics"]["last"]
        assert f">{100 * last['mean']:.1f} ± {100 * last['std']:.1f}</td>" in text
        if one["method"] == stream["reference"]:
            continue
        pair = one["paired"]["last"]
        said = [f"{100 * pair[key]:+.1f}".replace("-", "−") for key in ("mean", "low", "high")]
        assert f">{said[0]} <small>[{said[1]}, {said[2]}]</small></td>" in text
    values = [cell["matrix"]["values"][-1][0] for cell in found["cells"][:3]]
    assert re.search(rf'<td class="c\d+">{100 * sum(values) / 3:.1f}</td>', text)


def test_one_seed_has_no_interval_and_one_method_no_difference(tmp_path):
    text = page_of(simulated(3, ("domains",), (7,)), tmp_path)
    assert "<small>" not in text and "--seeds" not in text
    text = page_of(simulated(1, ("domains",)), tmp_path)
    assert "Differences from" not in text.replace("<dt>Differences from</dt>", "")


def test_a_comparison_without_any_finished_cell_has_a_page(tmp_path):
    found = simulated(2, ("domains",))
    for cell in found["cells"]:
        cell |= {"state": "waiting", "matrix": None, "metrics": {}, "seconds": None}
    for one in found["streams"][0]["methods"]:
        one |= {"state": "waiting", "n": 0, "metrics": {}, "paired": {}, "routing": None}
    found["streams"][0] |= {"tasks": [], "source": "", "reference": None}
    found["ranks"]["methods"] = []
    text = page_of(found, tmp_path)
    check(text)
    assert "nothing can be ranked" in text and ">not run yet</td>" in text and ">all</td>" in text


def test_names_cannot_break_out_of_the_page(tmp_path):
    evil = '</title></script><script>alert("x")</script>&<b>'
    found = simulated(2, ("domains",))
    found["title"] = found["versions"]["torch"] = evil
    for name in ("domains", "mosaic/domains", "zero-shot", "default", "compact version", "digits"):
        text = page_of(_renamed(found, name, evil), tmp_path)
        assert check(text).tags.count("script") == 1 and "<b>" not in text, name


def _renamed(value, old, new):
    if isinstance(value, dict):
        return {_renamed(k, old, new): _renamed(v, old, new) for k, v in value.items()}
    if isinstance(value, list):
        return [_renamed(one, old, new) for one in value]
    return new if value == old else value


def test_what_is_not_a_comparison_is_refused_and_writes_nothing(tmp_path):
    with pytest.raises(StorageError, match=r"comparison\.json: title: .*valid string"):
        write_comparison_page(simulated() | {"title": None}, tmp_path / "c.html")
    with pytest.raises(StorageError, match="format 2 is not readable"):
        write_comparison_page(simulated() | {"format_version": 2}, tmp_path / "c.html")
    assert not list(tmp_path.iterdir())


def test_an_axis_has_round_ticks_within_its_range():
    axis = round_axis([-0.37, 0.0, 0.058])
    assert axis.ticks == pytest.approx([-0.2, 0.0]) and (axis.low, axis.high) == (-0.37, 0.058)
    assert round_axis([0.0, 0.0]).share(0.0) == 0.5
    assert axis.at(-0.37) == "0.0%" and axis.at(1.0) == "100.0%"


def test_an_interval_without_zero_is_filled_and_one_that_goes_on_has_an_arrow():
    axis = Axis(low=-0.1, high=0.1, ticks=[0.0])
    assert 'class="strip up sure"' in interval(axis, 0.05, (0.01, 0.09), "up")
    unsure = interval(axis, 0.05, (-0.04, 0.5), "even")
    assert "sure" not in unsure and unsure.count("<path") == 1
    assert "<line" not in interval(axis, 0.05, None, "even")


@pytest.fixture(scope="module")
def shown(browser, tmp_path_factory):
    """Return the browser and the page of 20 methods on 4 streams with 3 seeds."""
    folder = tmp_path_factory.mktemp("shown")
    return browser, write_comparison_page(simulated(20, FULL), folder / "comparison.html")


def test_the_page_opens_without_a_fault_and_loads_itself_alone(shown):
    browser, page = shown
    browser.open(page, width=1200)
    assert browser.faults == [] and browser.loads == [page.resolve().as_uri()]
    assert browser.run("document.title") == "Comparison: mosaic"


def test_a_fault_of_a_page_would_be_seen(browser, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text("<img src='no.png'><script>console.error('one'); nothing.at_all;</script>")
    browser.open(broken, width=400)
    assert "one" in browser.faults and any("ReferenceError" in said for said in browser.faults)
    assert any(place.endswith("no.png") for place in browser.loads)


def test_tables_sort_by_a_click_and_by_the_keyboard(shown):
    browser, page = shown
    browser.open(page, width=1200)
    words = browser.run(FIRST_WORDS)
    assert words != sorted(words)
    browser.click(f"{TABLE} th:first-child button")
    assert browser.run(FIRST_WORDS) == sorted(words)
    heads = f"[...document.querySelectorAll('{TABLE} th')].map(h => h.getAttribute('aria-sort'))"
    assert browser.run(heads)[:3] == ["ascending", None, None]
    browser.run(f"document.querySelector('{TABLE} th:nth-child(2) button').focus()")
    browser.press("Enter", 13, "\r")
    ranks = [float(rank) for rank in browser.run(f"{ROWS}.map(row => row.cells[1].dataset.value)")]
    assert ranks == sorted(ranks) and ranks[0] < ranks[-1]
    assert browser.run(heads)[:3] == [None, "ascending", None]
    browser.press(" ", 32, " ")
    again = browser.run(f"{ROWS}.map(row => row.cells[1].dataset.value)")
    assert [float(rank) for rank in again] == ranks[::-1]
    browser.press("Tab", 9)
    assert browser.run("document.activeElement.textContent") == "domains"
    browser.press("Enter", 13, "\r")
    scores = browser.run(f"{ROWS}.map(row => row.cells[3].dataset.value)")
    numbers = [float(score) for score in scores if score]
    assert numbers == sorted(numbers, reverse=True) and len(numbers) == 20
    browser.press("Tab", 9)  # missing: the method that cannot run there is last both ways
    for _ in range(2):
        browser.press("Enter", 13, "\r")
        assert browser.run(FIRST_WORDS)[-1] == "zero-shot"


def test_every_figure_has_a_size_and_its_dots_lie_within(shown):
    browser, page = shown
    browser.open(page, width=1200)
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    sizes = browser.run(
        "[...document.querySelectorAll('svg:not(.shapes, svg svg), .heat')].map(e =>"
        " { const b = e.getBoundingClientRect(); return [b.width, b.height]; })"
    )
    assert len(sizes) > 300 and all(wide > 10 and high > 10 for wide, high in sizes)
    outside = browser.run(
        "[...document.querySelectorAll('td.plot')].filter(cell =>"
        " { const c = cell.getBoundingClientRect();"
        "   return [...cell.querySelectorAll('circle, use, line')].some(e =>"
        "     { const b = e.getBoundingClientRect();"
        "       return b.left < c.left || b.right > c.right || b.bottom > c.bottom + 1; }); })"
        ".length"
    )
    assert outside == 0


@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_a_phone(shown, dark):
    browser, page = shown
    browser.open(page, width=400, dark=dark)
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") <= 400
    small = browser.run(
        "[...document.querySelectorAll('body *')].filter(e => e.innerText && !e.children.length)"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)).reduce((a, b) => Math.min(a, b))"
    )
    assert small >= 10
    back = browser.run("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")


def test_the_forest_and_its_numbers_fit_a_phone_without_scrolling(shown):
    browser, page = shown
    browser.open(page, width=400)
    edge = browser.run("document.querySelector('.keep td.number').getBoundingClientRect().right")
    assert edge <= 400


def test_nothing_is_cut_on_paper_and_folds_are_open(shown):
    browser, page = shown
    browser.open(page, width=A4, media="print")
    browser.run("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.run("document.querySelectorAll('details:not([open])').length") == 0
    assert browser.run(CUT) == []
    assert browser.run("document.documentElement.scrollWidth") <= A4
    browser.run("window.dispatchEvent(new Event('afterprint'))")
    assert browser.run("document.querySelectorAll('details[open]').length") == 0


def test_the_page_prints_and_folds_are_closed_again(browser, tmp_path):
    small = write_comparison_page(simulated(), tmp_path / "small.html")
    browser.open(small, width=1200, dark=True)
    paper = browser.pdf(printBackground=True)
    pages = int(re.findall(rb"/Count (\d+)", paper)[-1])
    assert paper.startswith(b"%PDF") and 3 <= pages <= 8  # one with every fold closed
    assert browser.run("document.querySelectorAll('details[open]').length") == 0
