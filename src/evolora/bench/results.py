"""What benches hand over: tables of numbers, the numbers that goals are about, the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Value = float | str | None

_FORMATS = {"saved MiB": ".0f", "peak MiB": ".0f", "error": ".0e", "ms": ".2f", "img/s": ".0f"}


@dataclass(kw_only=True)
class Table:
    """Named rows of numbers under named columns.

    Args:
        title: what was measured.
        columns: headings, in order; a heading also decides how its numbers are written.
        note: one line under the table.
        axis: what the columns count, for tables that are drawn as a chart; "" for others.
        cells: row -> column -> value; filled while measuring.
    """

    title: str
    columns: Sequence[str]
    note: str = ""
    axis: str = ""
    cells: dict[str, dict[str, Value]] = field(default_factory=dict)

    def put(self, row: str, **values: Value) -> None:
        """Set values of a row, which is added when it is new."""
        self.cells.setdefault(row, {}).update(values)

    def texts(self) -> list[list[str]]:
        """Return the rows as they are shown, the row's name first."""
        return [
            [row, *(show(column, values.get(column)) for column in self.columns)]
            for row, values in self.cells.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; :meth:`from_json` reads them back."""
        return {
            "title": self.title,
            "columns": list(self.columns),
            "note": self.note,
            "axis": self.axis,
            "rows": [{"name": row, **values} for row, values in self.cells.items()],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Table:
        """Return the table that :meth:`to_json` wrote."""
        rows = {row.pop("name"): row for row in (dict(row) for row in values["rows"])}
        return cls(
            title=values["title"],
            columns=values["columns"],
            note=values["note"],
            axis=values["axis"],
            cells=rows,
        )


@dataclass(kw_only=True)
class Result:
    """What one bench measured.

    Args:
        bench: its name.
        settings: what it was run with (JSON values).
        environment: the machine (JSON values).
        tables: in the order they were measured.
        measured: goal -> number.
        complete: False when it was interrupted.
        seconds: wall-clock time it took.
    """

    bench: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)
    complete: bool = False
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; :meth:`from_json` reads them back."""
        return {**vars(self), "tables": [table.to_json() for table in self.tables]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Result:
        """Return the result that :meth:`to_json` wrote."""
        tables = [Table.from_json(table) for table in values["tables"]]
        return cls(**{**values, "tables": tables})


def show(column: str, value: Value) -> str:
    """Return a table's value as text."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else format(value, _FORMATS.get(column, ".2f"))
