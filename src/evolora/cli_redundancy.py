"""`evolora inspect FOLDER --redundancy`: how much of their rank learned updates use."""

from __future__ import annotations

import sys
from pathlib import Path

from evolora.cli_parts import print_json
from evolora.errors import ConfigError

WIDE = 160
"""Columns of a table that goes to a file or a pipe."""


def show_redundancy(folder: Path, figure: Path | None, as_json: bool) -> None:
    """Print a table (or JSON) of a run's or PEFT adapter's layers; write a page of maps."""
    if not folder.is_dir():
        raise ConfigError(f"--redundancy reads the folder of a run or adapter; got {folder}")
    from evolora.evaluation.spectra import SIDES, spectra_of
    from evolora.report.spectra import columns_of, rows_of, write_spectra

    found = spectra_of(folder)
    if figure is not None:
        print(f"figure: {write_spectra(found, figure)}", file=sys.stderr)
    if as_json:
        print_json(found.to_json())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "layer", "rank", title=f"{found.source}: ranks used, means over a layer's experts"
    )
    for side in SIDES:
        for title in columns_of(side):
            table.add_column(title, justify="right")
    for layer, size, numbers in rows_of(found):
        table.add_row(layer, size, *(f"{value:.2f}" for value in numbers))
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)
