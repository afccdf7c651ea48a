"""`evolora inspect FOLDER --redundancy`: how much of their rank learned updates use."""

from __future__ import annotations

import sys
from pathlib import Path

from evolora.cli_parts import print_json
from evolora.errors import ConfigError, StorageError

WIDE = 1000
"""Columns of a table that goes to a file or a pipe: names are never cut there."""


def show_redundancy(folder: Path, figure: Path | None, as_json: bool) -> None:
    """Print a table (or JSON) of a run's or PEFT adapter's layers; write a page of maps."""
    try:
        known = folder.is_dir()
    except OSError as error:  # one that may not be looked at
        raise StorageError(f"cannot read {folder}: {error.strerror or error}") from error
    if not known:
        raise ConfigError(f"--redundancy reads the folder of a run or adapter; got {folder}")
    from evolora.evaluation.spectra import SIDES, spectra_of
    from evolora.report.spectra import columns_of, left_out_of, rows_of, text_of, write_spectra

    found = spectra_of(folder)
    if figure is not None:
        print(f"figure: {write_spectra(found, figure)}", file=sys.stderr)
    if as_json:
        print_json(found.to_json())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{found.source}: ranks used, means over a layer's experts")
    table.add_column("layer", overflow="fold")
    table.add_column("rank")
    for side in SIDES:
        for title in columns_of(side):
            table.add_column(title, justify="right")
    for layer, size, numbers in rows_of(found):
        table.add_row(layer, size, *(text_of(value) for value in numbers))
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)
    if found.left_out:
        print(left_out_of(found), file=sys.stderr)
