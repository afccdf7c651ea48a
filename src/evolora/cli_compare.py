"""`evolora compare`: methods × streams × orders × seeds, run and compared."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from evolora.cli_parts import AsJson, Quiet, print_json
from evolora.errors import ConfigError


def compare(
    configs: Annotated[
        list[Path],
        typer.Argument(metavar="CONFIG...", help="a comparison file, or configurations of runs"),
    ],
    seeds: Annotated[
        str, typer.Option(help="their number, or a list such as 0,3,5; default the file's")
    ] = "",
    orders: Annotated[
        str, typer.Option(help="default, reversed, shuffled-N or a stream's own, by commas")
    ] = "",
    reference: Annotated[
        str, typer.Option(help="method that differences are taken from, or best")
    ] = "",
    engine: Annotated[str, typer.Option(help="local or ray")] = "local",
    workers: Annotated[
        int | None, typer.Option(min=1, help="cells at a time; default the number of cores")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder; default runs/<first file's name>")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run a grid of methods, streams, orders and seeds, and compare what they reach.

    Finished cells are kept: started again, it goes on where it stopped. Exit code 1 when a cell
    failed; the others have run.
    """
    from evolora.sweep.comparison import run_comparison, unfinished
    from evolora.sweep.engines import make_engine
    from evolora.sweep.grid_file import read_grid

    grid = read_grid(
        configs,
        seeds=_seeds(seeds),
        orders=[word.strip() for word in orders.split(",")] if orders else None,
        reference=reference or None,
    )
    given = {"--seeds": seeds, "--orders": orders, "--reference": reference, "--out": out}
    options = [str(word) for pair in given.items() if pair[1] for word in pair]
    grid = replace(grid, command=shlex.join(["evolora", "compare", *map(str, configs), *options]))
    folder = out or Path("runs") / configs[0].stem
    value = run_comparison(grid, folder, make_engine(engine, workers), progress=not quiet)
    if as_json:
        print_json(value)
    else:
        from rich.console import Console

        from evolora.sweep.results import FILE, PAGE
        from evolora.sweep.table import print_comparison

        print_comparison(value, Console())
        print(f"comparison: {folder / FILE}, {folder / PAGE}")
    failed = unfinished(value)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


def report_comparison(folder: Path, page: Path, as_json: bool) -> None:
    """Write the page of a comparison once more, elsewhere, and print its tables."""
    from rich.console import Console

    from evolora.report.comparison import write_comparison_page
    from evolora.storage.files import read_json
    from evolora.sweep.results import FILE
    from evolora.sweep.table import print_comparison

    value = read_json(folder / FILE, kind="comparison")
    write_comparison_page(value, page)
    if as_json:
        print_json(value)
        return
    print_comparison(value, Console())
    print(f"report: {page}")


def _seeds(words: str) -> list[int] | None:
    """Return the seeds that ``--seeds`` names; None where it is left out."""
    if not words:
        return None
    try:
        numbers = [int(word) for word in words.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        numbers = list(range(numbers[0])) if "," not in words else numbers
    if not numbers or min(numbers) < 0:
        raise ConfigError(
            f"--seeds: expected a number of seeds, at least 1, or a list such as 0,3; got {words!r}"
        )
    return numbers
