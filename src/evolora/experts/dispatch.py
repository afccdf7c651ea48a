"""Dispatch: which of the exact formulations of :mod:`evolora.experts.mixing` is the fastest one.

With n tokens that share a route, R = k * r active rank and e experts in the pool:

    one route for all rows              shared   (frozen linear experts: see experts/merge.py)
    per sample, n >= 16 and R <= 2 n    gather   cost does not depend on e
    per sample, n >= 16 and R >  2 n    sorted   copying factors costs more than sorting tokens
    n < 16, e * r <= 128                stacked  one product over the whole pool
    per token, e * r <= 64              stacked
    otherwise                           sorted

"sorted" means rows sorted by expert: one product per expert ("segments"), or one ``grouped_mm``
where the segments are short ("grouped"). The numbers depend on the machine: they are fields of
:class:`Thresholds`, have defaults per type of device, and ``evolora bench route --fit`` writes what
it measured to a file that takes precedence.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from evolora.errors import StorageError, unknown_name
from evolora.storage.files import read_json, write_json

Formulation = Literal["auto", "shared", "gather", "stacked", "grouped", "segments"]
FORMULATIONS: tuple[str, ...] = get_args(Formulation)


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Where one formulation becomes faster than another (defaults: CPU, float32).

    Args:
        gather_min_tokens: tokens per route below which a batched product degenerates.
        gather_max_rank_per_token: largest k * r / n at which copying factors pays.
        stacked_max_rows_single: largest e * r of a stacked product with few tokens per route.
        stacked_max_rows_token: largest e * r of a stacked product with a route per token.
        segments_min_rows: rows per expert from which a product per expert beats ``grouped_mm``.
        fold_min_tokens: tokens one route must have served before a weight is folded for it.
    """

    gather_min_tokens: int = 16
    gather_max_rank_per_token: float = 2.0
    stacked_max_rows_single: int = 128
    stacked_max_rows_token: int = 64
    segments_min_rows: int = 12
    fold_min_tokens: int = 2048


DEFAULTS: dict[str, Thresholds] = {
    "cpu": Thresholds(),
    # A product per expert needs their sizes on the host: never on a GPU.
    "cuda": Thresholds(
        stacked_max_rows_single=1024, stacked_max_rows_token=256, segments_min_rows=2**31
    ),
}
"""Thresholds by type of device; other types use the GPU's."""


def choose(
    experts: int,
    r: int,
    rows: int,
    tokens: int,
    k: int,
    *,
    per_token: bool = False,
    thresholds: Thresholds | None = None,
) -> Formulation:
    """Return the formulation for a shape.

    Args:
        experts: experts of the bank, e.
        r: rank of one expert.
        rows: samples with a route of their own; 1 when all share one.
        tokens: tokens of a sample, n.
        k: experts per route.
        per_token: whether every token has a route of its own.
        thresholds: default: the CPU's.
    """
    limits = thresholds or DEFAULTS["cpu"]
    if rows == 1 and not per_token:
        return "shared"
    alone = per_token or tokens == 1
    if not alone and tokens >= limits.gather_min_tokens:
        if k * r <= limits.gather_max_rank_per_token * tokens:
            return "gather"
    else:
        stacked = limits.stacked_max_rows_token if per_token else limits.stacked_max_rows_single
        if experts * r <= stacked:
            return "stacked"
    long = rows * tokens * k >= limits.segments_min_rows * experts
    return "segments" if long else "grouped"


def thresholds_file() -> Path:
    """Return where fitted thresholds are kept for this user."""
    return Path.home() / ".cache" / "evolora" / "dispatch.json"


def save_thresholds(device: str, thresholds: Thresholds, path: Path | None = None) -> Path:
    """Write the thresholds of one type of device ("cpu", "cuda"); others in the file stay."""
    path = path or thresholds_file()
    table = load_thresholds(path) if path.exists() else {}
    table[device] = thresholds
    values = {name: asdict(entry) for name, entry in table.items()}
    write_json(path, {"format_version": 1, "thresholds": values})
    _thresholds_for.cache_clear()
    return path


def load_thresholds(path: Path) -> dict[str, Thresholds]:
    """Return the thresholds of a file, by type of device.

    Raises:
        StorageError: unreadable, an unknown field, or a value that is not a number above zero.
    """
    table = read_json(path, kind="threshold table").get("thresholds")
    if not isinstance(table, dict):
        raise StorageError(f"{path} has no 'thresholds' by device")
    return {device: _checked(path, device, values) for device, values in table.items()}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def thresholds_for(device: str) -> Thresholds:
    """Return the thresholds of a type of device: fitted ones if there are any, else defaults.

    The user's file is read once per process, and again after :func:`save_thresholds`.
    """
    return _thresholds_for(device)


@lru_cache(maxsize=8)
def _thresholds_for(device: str) -> Thresholds:
    path = thresholds_file()
    fitted = load_thresholds(path) if path.exists() else {}
    return fitted.get(device) or DEFAULTS.get(device, DEFAULTS["cuda"])


def _checked(path: Path, device: str, values: Any) -> Thresholds:
    if not isinstance(values, dict):
        raise StorageError(f"{path}: the thresholds of {device!r} are not an object")
    known = {field.name: field.default for field in fields(Thresholds)}
    for name, value in values.items():
        if name not in known:
            raise StorageError(f"{path}: {unknown_name('threshold', name, known)}")
        kinds = (int, float) if isinstance(known[name], float) else (int,)
        if not isinstance(value, kinds) or isinstance(value, bool) or value < 0:
            wanted = "a number" if float in kinds else "an integer"
            raise StorageError(f"{path}: {device}.{name} must be {wanted} from 0; got {value!r}")
    return Thresholds(**values)
