"""The page and the picture: self-contained, complete, well-formed, safe with any name."""

from __future__ import annotations

import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from evolora.errors import ConfigError, StorageError
from evolora.report import RunRecord, write_picture, write_report
from evolora.report.svg import HeatMap, Line, LineChart, color, ink

VOID = {"meta", "link", "br", "img"}


class Checker(HTMLParser):
    """Collects what a page loads, and finds tags that are not closed."""

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [v for k, v in attributes if k in ("src", "href", "xlink:href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def page_of(folders, tmp_path, title="Report"):
    out = write_report(
        [RunRecord.load(f) for f in folders], tmp_path / "out" / "report.html", title
    )
    return out.read_text(encoding="utf-8")


def check(text):
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    return checker


def test_the_page_is_one_file_that_loads_nothing(all_methods, tmp_path):
    text = page_of(all_methods, tmp_path)
    checker = check(text)
    assert checker.loads == ["data:,"]  # the empty icon
    without_namespace = text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|@import|url\(", without_namespace)
    assert len(text.encode()) < 3_000_000
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.html"]


def test_every_drawing_is_well_formed_and_has_a_label(all_methods, tmp_path):
    drawings = re.findall(r"<svg.*?</svg>", page_of(all_methods, tmp_path), flags=re.S)
    labels = [ElementTree.fromstring(drawing).get("aria-label") for drawing in drawings]
    # 7 matrices, 9 task panels, the mean, 2 route maps, 4 + 3 layers, 2 growth charts, 1 scale
    assert len([label for label in labels if label]) == 7 + 9 + 1 + 2 + 7 + 2 + 1


def test_every_part_of_the_comparison_is_on_the_page(all_methods, tmp_path):
    text = page_of(all_methods, tmp_path, "Nine domains")
    for part in (
        "<h1>Nine domains</h1>", "mosaic/domains", "0, 1, 2", "torch 2.13.0", "2026-03-01",
        "Which route answers which domain", "Which experts each task uses",
        "Growth of parameters", "(frozen)", "not evaluated", "Forgetting", "task-free",
    ):  # fmt: skip
        assert part in text, part
    assert len(re.findall(r"<tr><td data-value", text)) == 7


def test_the_matrix_is_drawn_with_its_values(make_run, tmp_path):
    folder = make_run("lora", tasks=("a", "b"))
    record = RunRecord.load(folder)
    text = page_of([folder], tmp_path)
    for i, j in np.ndindex(2, 2):
        value = 100 * record.matrix.values[i, j]
        assert f">{value:.1f}</text>" in text
        assert f"{'ab'[j]}, after {'ab'[i]}: {value:.1f} %" in text


def test_parts_without_data_are_left_out(make_run, tmp_path):
    text = page_of([make_run("lora"), make_run("zero-shot")], tmp_path)
    check(text)
    assert "Which route answers" not in text and "Which experts" not in text
    assert "±" not in text and "Bands span" not in text


def test_names_cannot_break_out_of_the_page(make_run, tmp_path):
    evil = '</title></script><script>alert("x")</script>&<b>'
    folder = make_run("moe-adapters", tasks=(evil, "b"), stream=evil)
    text = page_of([folder], tmp_path, evil)
    assert check(text).tags.count("script") == 1
    assert "<b>" not in text and 'alert("x")' not in text
    assert "&lt;/script&gt;" in text


def test_one_task_one_run_and_an_empty_history_still_make_a_page(make_run, tmp_path):
    record = RunRecord.load(make_run("moe-adapters", tasks=("only",)))
    bare = RunRecord(
        folder="bare", run=record.run.model_copy(update={"history": ()}), matrix=record.matrix
    )
    out = write_report([bare, record], tmp_path / "r.html")
    check(out.read_text())


def test_joint_training_is_shown_at_the_last_task_under_its_own_name(make_run, tmp_path):
    folder = make_run("joint-lora", tasks=("a", "b", "c"))
    run = json.loads((folder / "run.json").read_text())
    run["history"] = [run["history"][-1] | {"task": "all tasks"}]
    (folder / "run.json").write_text(json.dumps(run))
    experts = {"vision": {"tasks": {"all tasks": [[3, 1]]}, "frozen": [[]]}}
    routing = {"format_version": 1, "after": [], "experts": experts}
    (folder / "routing.json").write_text(json.dumps(routing))
    text = page_of([folder], tmp_path)
    check(text)
    assert "all tasks, expert 0: 75.0 % of selections" in text
    assert "joint-lora (3: 393 k)" in text


def test_a_pool_that_grew_is_shown_with_what_was_there_at_each_task(make_run, tmp_path):
    folder = make_run("moe-adapters", tasks=("a", "b"))
    experts = {"vision": {"tasks": {"a": [[3, 1]], "b": [[1, 1, 2]]}, "frozen": [[0]]}}
    routing = {"format_version": 1, "after": [], "experts": experts}
    (folder / "routing.json").write_text(json.dumps(routing))
    text = page_of([folder], tmp_path)
    check(text)
    assert "a, expert 0 (frozen): 75.0 % of selections" in text
    assert "b, expert 2: 50.0 % of selections" in text and text.count('class="none"') == 1
    experts["vision"]["tasks"]["b"].append([1])
    (folder / "routing.json").write_text(json.dumps(routing))
    with pytest.raises(StorageError, match="tasks with different layers"):
        RunRecord.load(folder)


def test_a_file_that_cannot_be_written_is_named(make_run, tmp_path):
    (tmp_path / "file").write_text("")
    record = RunRecord.load(make_run("lora", tasks=("a", "b")))
    with pytest.raises(StorageError, match="cannot write"):
        write_report([record], tmp_path / "file" / "r.html")
    with pytest.raises(StorageError, match="cannot write"):
        write_picture([record], tmp_path / "file" / "p.png")


def test_an_unfinished_run_shows_what_it_has(make_run, tmp_path):
    record = RunRecord.load(make_run("moe-adapters", tasks=("a", "b", "c")))
    record.matrix.values[1:] = np.nan
    record.matrix.baseline = None
    text = write_report([record], tmp_path / "r.html").read_text()
    check(text)
    assert text.count('class="none"') >= 6 and "(before)" not in text


def test_several_streams_get_a_section_each(make_run, tmp_path):
    folders = [make_run("lora"), make_run("lora", tasks=("x", "y"), stream="other")]
    text = page_of(folders, tmp_path)
    assert "<h2>Results: other, x first</h2>" in text and text.count("<h2>Results") == 2


def test_the_same_runs_give_the_same_bytes(all_methods, tmp_path):
    assert page_of(all_methods, tmp_path / "1") == page_of(all_methods, tmp_path / "2")


def test_a_browser_shows_sorts_and_fits_the_page(browser, all_methods, tmp_path):
    page_of(all_methods, tmp_path)
    page = tmp_path / "out" / "report.html"
    for width in (1200, 400):
        browser.open(page, width=width)
        browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert browser.faults == [] and browser.loads == [page.resolve().as_uri()]
        assert browser.run("document.documentElement.scrollWidth") <= width
    browser.click("table.sortable th:nth-child(4) button")
    last = browser.run(
        "[...document.querySelector('table.sortable').tBodies[0].rows]"
        ".map(row => parseFloat(row.cells[3].dataset.value))"
    )
    assert len(last) == 7 and last == sorted(last, reverse=True)
    assert browser.pdf().startswith(b"%PDF")


def test_no_run_is_refused_and_writes_nothing(tmp_path):
    with pytest.raises(ConfigError, match="at least one run"):
        write_report([], tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


def test_the_palette_gets_lighter_step_by_step_and_its_ink_can_be_read():
    def light(value):
        parts = [int(color(value)[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    steps = [light(x) for x in np.linspace(0, 1, 101)]
    assert all(b > a for a, b in itertools.pairwise(steps))
    for x in np.linspace(0, 1, 101):
        text = 1.0 if ink(x) == "on-dark" else 0.0056  # white, #111
        high, low = max(text, light(x)), min(text, light(x))
        assert (high + 0.05) / (low + 0.05) > 3.0
    assert color(-1) == color(0) and color(2) == color(1)


def test_a_gap_breaks_a_line_and_its_band():
    chart = LineChart(
        lines=[
            Line(
                label="m",
                style=0,
                values=(0.1, 0.2, None, 0.4, 0.5),
                low=(0.0, 0.1, None, 0.3, 0.4),
                high=(0.2, 0.3, None, 0.5, 0.6),
            )
        ],
        ticks=("0", "1", "2", "3", "4"),
        label="x",
        top=1.0,
        unit=lambda value: f"{value:.1f}",
    ).draw()
    assert len(re.findall("<polygon", chart)) == 2
    path = re.search(r'<path d="([^"]*)"/><circle', chart).group(1)
    assert path.count("M") == 2 and path.count("L") == 2


@pytest.mark.parametrize("log", [False, True])
def test_larger_values_are_drawn_higher_and_zero_at_the_bottom(log):
    chart = LineChart(
        lines=[Line(label="m", style=0, values=(0.0, 1e3, 1e5, 1e7))],
        ticks=("1", "2", "3", "4"),
        label="x",
        top=1e7,
        unit=str,
        log=log,
    ).draw()
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', chart)]
    assert heights == sorted(heights, reverse=True) and min(heights) >= 8.0
    if log:
        steps = -np.diff(heights[1:])
        assert steps[0] == pytest.approx(steps[1], abs=0.2)


def test_a_heat_map_hatches_what_was_not_evaluated():
    drawing = HeatMap(
        rows=["a"], columns=["x", "y"], cells=[[None, 1.0]], label="l", hover=lambda i, j: "h"
    ).draw()
    assert drawing.count('class="none"') == 1 and ">100</text>" in drawing


def test_the_picture_is_a_png_of_useful_size_and_repeats_bit_for_bit(all_methods, tmp_path):
    runs = [RunRecord.load(folder) for folder in all_methods]
    one = write_picture(runs, tmp_path / "a" / "p.png")
    two = write_picture(runs, tmp_path / "b.png")
    with Image.open(one) as image:
        assert image.format == "PNG" and image.width > 1500 and image.height > 500
        assert len(image.convert("RGB").getcolors(1 << 24)) > 200
    assert one.read_bytes() == two.read_bytes()


def test_a_picture_of_one_method_has_one_matrix(make_run, tmp_path):
    runs = [RunRecord.load(make_run("zero-shot", tasks=("only",)))]
    with Image.open(write_picture(runs, tmp_path / "p.png")) as image:
        assert image.width < 1600


def test_a_picture_of_runs_that_do_not_compare_or_of_another_kind_is_refused(make_run, tmp_path):
    first = RunRecord.load(make_run("lora"))
    second = RunRecord.load(make_run("lora", tasks=("x", "y"), stream="other"))
    with pytest.raises(ConfigError, match="one stream"):
        write_picture([first, second], tmp_path / "p.png")
    with pytest.raises(ConfigError, match=r"as \.png; got 'p\.gif'"):
        write_picture([first], tmp_path / "p.gif")
