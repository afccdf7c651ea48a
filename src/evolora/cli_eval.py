"""The verb `evolora eval`: a saved learner on test sets, as they are or with more missing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from evolora.cli_parts import AsJson, Quiet, learner_of, print_json
from evolora.errors import ConfigError

if TYPE_CHECKING:
    from evolora.evaluation.robustness import Robustness, Tables
    from evolora.learner import Learner
    from evolora.streams.missing import Kind


def evaluate(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="run folder or artefact")],
    stream: Annotated[str, typer.Option(help="stream to test on; default the run's own")] = "",
    options: Annotated[
        list[str] | None, typer.Option("--set", help="option of the stream, e.g. root=DATA")
    ] = None,
    missing_rates: Annotated[
        str, typer.Option(help="test with these shares of incomplete samples, e.g. 0,0.5,0.9")
    ] = "",
    missing_kinds: Annotated[
        str, typer.Option(help="of text,image,both: what they lack; with it a curve is measured")
    ] = "",
    missing_seeds: Annotated[
        str, typer.Option(help="a table is drawn with each; default the run's own")
    ] = "",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Test a saved learner on a stream, without telling it the task.

    With --missing-rates or --missing-kinds: under tables of missing modalities of each kind at each
    rate, with the task inferred and told; writes robustness.json into the run folder, which
    `evolora report` shows.
    """
    curve = bool(missing_rates or missing_kinds)
    if missing_seeds and not curve:
        raise ConfigError("--missing-seeds goes with --missing-rates or --missing-kinds")
    from evolora.training.progress import Reporter, terminal_progress

    learner = learner_of(run_folder)
    name, settings = _source(run_folder, stream, options or [])
    with terminal_progress(not quiet) as bars:
        learner.reporter = Reporter(bars)
        if curve:
            found = _robustness(
                run_folder, learner, name, settings, missing_rates, missing_kinds, missing_seeds
            )
        else:
            _evaluate(run_folder, learner, name, settings, as_json)
            return
    if as_json:
        print_json(found.to_json())
    else:
        _print_robustness(run_folder, found)


def _source(folder: Path, stream: str, words: list[str]) -> tuple[str, dict[str, Any]]:
    """Return the name and options of the stream to test on."""
    from evolora.config_text import apply_overrides
    from evolora.storage.files import read_json

    own = folder / "config.json"
    if stream:
        return stream, apply_overrides({}, words)
    if not own.exists():
        raise ConfigError(f"{folder} does not say its stream (no config.json); give --stream")
    options = dict(read_json(own, kind="run")["config"]["stream"])
    return options.pop("name"), apply_overrides(options, words)


def _evaluate(
    folder: Path, learner: Learner, name: str, options: Mapping[str, Any], as_json: bool
) -> None:
    from evolora.config import load_stream
    from evolora.evaluation.outcomes import judged

    source = load_stream(name, **options)
    tasks = tuple(source)
    if source.label_protocol == "seen" or learner.backbone.answers == "heads":
        tasks = tuple(task for task in tasks if task.name in learner.task_names)
        if not tasks:
            raise ConfigError(
                f"none of the tasks of {name} is learned (learned: {', '.join(learner.task_names)})"
            )
    results = {
        task.name: learner.evaluate(task, labels=labels, offset=offset)
        for task, labels, offset in judged(tasks, source.label_protocol)
    }
    if as_json:
        print_json(
            {
                name: {
                    "score": r.score,
                    "samples": r.samples,
                    "routes": dict(r.routes),
                    "by_missing": dict(r.by_case),
                    "following": r.following,
                    "normalised": r.normalised,
                    "questions": r.questions,
                    "captions": r.captions,
                }
                for name, r in results.items()
            }
        )
        return
    from rich.console import Console
    from rich.table import Table

    asked = any(result.following is not None for result in results.values())
    forms = ("whatever format", "in format") if asked else ()
    if captioned := any(result.captions is not None for result in results.values()):
        forms = (*forms, "captions, CIDEr-D")
    table = Table("task", "score", *forms, "samples", "answered by", title=str(folder))
    for name, result in results.items():
        routes = ", ".join(f"{who} {count}" for who, count in result.routes.items())
        learned = "" if name in learner.task_names else " (not learned)"
        shares = (result.normalised, result.following) if asked else ()
        shown = ["–" if share is None else f"{100 * share:.1f} %" for share in shares]
        if captioned:
            shown.append("–" if result.captions is None else f"{result.captions:.2f} of 10")
        table.add_row(
            name + learned, f"{100 * result.score:.1f} %", *shown, str(result.samples), routes
        )
    Console().print(table)


def _robustness(
    folder: Path,
    learner: Learner,
    name: str,
    options: Mapping[str, Any],
    rates: str,
    kinds: str,
    seeds: str,
) -> Robustness:
    from evolora.config import load_stream
    from evolora.evaluation.robustness import FILE, robustness
    from evolora.storage.files import write_json
    from evolora.streams.missing_manifest import manifest_of, missing_settings

    known = missing_settings(options.get("missing"))
    chosen = _tables(rates, kinds, seeds, seed=known.seed if known else 0)
    complete = load_stream(name, **{k: v for k, v in options.items() if k != "missing"})
    found = robustness(
        learner, complete, chosen, trained=manifest_of(complete, options.get("missing"))
    )
    write_json(folder / FILE, found.to_json())
    return found


def _tables(rates: str, kinds: str, seeds: str, *, seed: int) -> Tables:
    from evolora.evaluation.robustness import KINDS, RATES, Tables

    return Tables(
        kinds=cast("tuple[Kind, ...]", _words(kinds)) or KINDS,  # checked there
        rates=tuple(sorted(_numbers("--missing-rates", rates, float))) or RATES,
        seeds=_numbers("--missing-seeds", seeds, int) or (seed,),
    )


def _words(text: str) -> tuple[str, ...]:
    """Return the words between commas, each once."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _numbers(flag: str, text: str, kind: type[Any]) -> tuple[Any, ...]:
    try:
        return tuple(dict.fromkeys(kind(word) for word in _words(text)))
    except ValueError as error:
        raise ConfigError(f"{flag} takes numbers between commas; got {text!r}") from error


def _print_robustness(folder: Path, found: Robustness) -> None:
    from rich.console import Console
    from rich.table import Table

    from evolora.evaluation.robustness import FILE

    title = str(folder)
    if found.trained:
        title += f", trained with {found.trained.kind} {100 * found.trained.rate:g} %"
    table = Table("missing", "rate", title=title)
    columns = ("AP", "AP, task\ntold", "task\nfound", "complete", "no text", "no image")
    for column in columns:
        table.add_column(column, justify="right")
    for point in found.points:
        shown = point.task_free or point.oracle
        assert shown is not None
        values = (
            point.task_free.ap if point.task_free else None,
            point.oracle.ap if point.oracle else None,
            point.task_identification,
            *(shown.by_missing.get(name) for name in ("complete", "text_missing", "image_missing")),
        )
        cells = ("-" if value is None else f"{100 * value:.1f}" for value in values)
        table.add_row(
            point.kind, f"{point.rate:g}", *cells, end_section=point.rate == max(found.tables.rates)
        )
    console = Console()
    console.print(table)
    console.print(f"written: {folder / FILE}; `evolora report` draws it", soft_wrap=True)
