"""The comparison table: grouping, mean and spread, marks, units."""

from __future__ import annotations

import io
import statistics

import pytest
from rich.console import Console

from evolora.errors import ConfigError
from evolora.report import RunRecord, compare, summary_table, to_markdown
from evolora.report.tables import Value, is_best, short_count, text_of

METHODS = (
    "zero-shot", "linear-probe", "full-finetuning", "lora", "lora-per-task", "joint-lora",
    "moe-adapters",
)  # fmt: skip


def load(*folders):
    return [RunRecord.load(folder) for folder in folders]


def test_seeds_of_one_method_become_one_line_with_mean_and_deviation(make_run):
    runs = load(*(make_run("moe-adapters", seed=seed) for seed in (0, 1, 2)))
    (comparison,) = compare(runs)
    (group,) = comparison.groups
    value = group.value("last")
    lasts = [run.scores["last"] for run in runs]
    assert value.mean == pytest.approx(statistics.mean(lasts))
    assert value.spread == pytest.approx(statistics.stdev(lasts))


def test_one_seed_has_no_deviation(make_run):
    (comparison,) = compare(load(make_run("lora")))
    assert comparison.groups[0].value("last").spread is None


def test_other_settings_of_one_method_get_a_line_of_their_own(make_run):
    runs = load(make_run("lora"), make_run("lora", method={"r": 4}))
    (comparison,) = compare(runs)
    assert [group.label for group in comparison.groups] == ["lora (lo00)", "lora (lo01)"]


def test_runs_that_differ_in_routing_are_named_by_it(make_run):
    runs = load(make_run("moe-adapters"), make_run("moe-adapters", routing="oracle"))
    (comparison,) = compare(runs)
    labels = [group.label for group in comparison.groups]
    assert labels == ["moe-adapters (task-free)", "moe-adapters (oracle)"]


def test_streams_orders_and_label_spaces_are_never_mixed_in_one_table(make_run):
    runs = load(
        make_run("lora", tasks=("a", "b")),
        make_run("lora", tasks=("b", "a")),
        make_run("lora", tasks=("a", "b"), stream="other"),
        make_run("lora", tasks=("a", "b"), label_space="seen"),
    )
    assert len(compare(runs)) == 4


def test_a_score_that_one_seed_lacks_is_not_averaged_over_the_rest(make_run):
    runs = load(make_run("lora", seed=0), make_run("lora", seed=1))
    runs[1].matrix.values[0, 1] = float("nan")
    (comparison,) = compare(runs)
    assert comparison.groups[0].value("transfer") is None
    assert comparison.groups[0].value("last") is not None


def test_no_run_is_refused():
    with pytest.raises(ConfigError, match="at least one run"):
        compare([])


def test_uneven_seeds_are_said_under_the_table(make_run):
    uneven = load(make_run("lora", seed=0), make_run("lora", seed=1), make_run("zero-shot"))
    (comparison,) = compare(uneven)
    assert comparison.seeds_note().endswith("(lora: 0, 1; zero-shot: 0).")
    assert comparison.seeds_note() in to_markdown(uneven)
    assert compare(uneven[1:2])[0].seeds_note() == ""


def test_markdown_marks_the_best_scores_only(make_run):
    text = to_markdown(load(*(make_run(name, seed=seed) for name in METHODS for seed in (0, 1, 2))))
    lines = text.splitlines()[4:]
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in lines}
    assert len(rows) == 7
    last = {name: cells[2].strip() for name, cells in rows.items()}
    assert last["lora-per-task"].startswith("**") and not last["zero-shot"].startswith("**")
    assert rows["joint-lora"][0].strip() == "–"
    forgetting = {name: cells[3].strip() for name, cells in rows.items()}
    assert forgetting["zero-shot"] == "**0.0 ± 0.0**" and "±" in forgetting["moe-adapters"]
    assert not any("**" in cells[-1] for cells in rows.values())  # seconds: no winner
    assert text.startswith("mosaic/domains: 9 tasks, seeds 0, 1, 2")


def test_a_pipe_in_a_name_does_not_break_the_markdown_table(make_run):
    record = RunRecord.load(make_run("lora"))
    run = record.run.model_copy(update={"name": "a|b"})
    odd = RunRecord(folder="x", run=run, matrix=record.matrix)
    assert r"| a\|b |" in to_markdown([odd])


def test_the_terminal_table_shows_every_method_and_streams_apart(make_run, all_methods):
    runs = load(*all_methods, make_run("lora", tasks=("a", "b"), stream="other"))
    out = io.StringIO()
    Console(file=out, width=200).print(summary_table(runs))
    text = out.getvalue()
    for name in ("zero-shot", "moe-adapters", "routed", "other, 2 tasks"):
        assert name in text


def test_the_terminal_table_of_every_column_fits_80_columns(make_run, all_methods):
    out = io.StringIO()
    Console(file=out, width=80).print(summary_table(load(*all_methods)))
    assert "…" not in out.getvalue()
    assert all(title in out.getvalue() for title in ("Transfer", "getting", "Unseen", "Stored"))


def test_columns_without_any_value_are_left_out(make_run):
    (comparison,) = compare(load(make_run("lora"), make_run("zero-shot")))
    keys = [column.key for column in comparison.used_columns()]
    assert "selector_accuracy" not in keys and "last" in keys


def test_equal_looking_values_are_all_best():
    assert is_best(Value(mean=0.50004), 0.5, "percent")
    assert not is_best(Value(mean=0.4994), 0.5, "percent")
    assert not is_best(None, 0.5, "percent") and not is_best(Value(mean=0.5), None, "percent")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.7, "1.00 k"),
        (12_345, "12.3 k"),
        (999_600, "1.00 M"),
        (4_027_392, "4.03 M"),
        (51_059_712, "51.1 M"),
        (149_620_737, "150 M"),
        (7e9, "7.00 G"),
    ],
)
def test_counts_are_short(number, text):
    assert short_count(number) == text


def test_values_are_written_with_their_unit_and_spread():
    assert text_of(Value(mean=0.6814, spread=0.0123), "percent") == "68.1 ± 1.2"
    assert text_of(Value(mean=1234.5), "seconds") == "1,234"
    assert text_of(None, "percent") == "–"
