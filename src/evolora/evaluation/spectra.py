"""How much of its rank a low-rank update uses: spectra of A, B and dW, of a run or a PEFT adapter.

    effective rank   exp(H(sigma / sum sigma)), H the entropy; between 1 and r
    stable rank      ||.||_F^2 / ||.||_2^2
    correlation      mean |cosine| of pairs of ranks: rows of A, columns of B, and of the update
                     those of b_k a_k^T, which are the products of both

The singular values of dW = B A come from an r x r product: B = Q_B R_B, A^T = Q_A R_A, and those of
R_B R_A^T are theirs. A scale changes none of these numbers.

Where PEFT puts something between the factors (AdaLoRA's and KaSA's diagonal, DeLoRA's unit lengths
and the widths of the base's columns), A is what the update has of it. Of HiRA, whose update is the
base times B A entry by entry, the numbers are those of B A.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evolora.errors import ConfigError, StorageError
from evolora.regularizers.peft_factors import PREFIXES, as_ranks
from evolora.storage.artefact import INDEX, TENSORS
from evolora.storage.files import read_json, read_tensors

ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FACTOR = re.compile(rf"^(?P<layer>.*)\.(?P<prefix>{'|'.join(PREFIXES)})_A(?P<weight>\.weight)?$")
SIDES = ("A", "B", "update")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of one matrix; see the module docstring. Of a matrix of zeros all are 0."""

    effective_rank: float
    stable_rank: float
    correlation: float


@dataclass(frozen=True, kw_only=True)
class UpdateSpread:
    """Of one update.

    Args:
        layer: its name.
        expert: which of the layer's experts it is; None where there is one.
        rank: r.
        spreads: "A", "B" and "update"; no "update" of pools whose factors are paired anew for
            each input.
    """

    layer: str
    expert: int | None
    rank: int
    spreads: Mapping[str, Spread]

    @property
    def idle(self) -> bool:
        """Whether it writes nothing: its B is zero, as before training."""
        return self.spreads["B"].stable_rank == 0.0


@dataclass(frozen=True, kw_only=True)
class Spectra:
    """Of every update of a run or an adapter.

    Args:
        source: the folder.
        updates: by the names of their layers, whose numbers count as such.
        left_out: layers whose factors do not stand in pairs of ranks (grouped convolutions,
            block-diagonal factors).
    """

    source: str
    updates: tuple[UpdateSpread, ...]
    left_out: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        updates = [asdict(update) for update in self.updates]
        return {"source": self.source, "updates": updates, "left_out": list(self.left_out)}

    def by_layer(self) -> dict[str, list[UpdateSpread]]:
        """Return the updates of each layer."""
        found: dict[str, list[UpdateSpread]] = {}
        for update in self.updates:
            found.setdefault(update.layer, []).append(update)
        return found


def mean_spread(updates: list[UpdateSpread], side: str) -> Spread | None:
    """Return the means over updates of one side's numbers; None where none has them.

    Idle updates do not count beside others.
    """
    at_work = [update for update in updates if not update.idle] or updates
    spreads = [asdict(update.spreads[side]) for update in at_work if side in update.spreads]
    if not spreads:
        return None
    return Spread(**{
        name: sum(spread[name] for spread in spreads) / len(spreads) for name in spreads[0]
    })  # fmt: skip


def spectra_of(folder: Path) -> Spectra:
    """Return the spectra of a run, an artefact or a folder of a PEFT adapter.

    Raises:
        ConfigError: there is no such folder, or no update in it that stands in pairs of factors.
        StorageError: a file is missing or damaged.
    """
    try:
        kinds = [name for name in (INDEX, ADAPTER) if (folder / name).exists()]
    except OSError as error:  # of a folder that may not be looked into
        raise StorageError(f"cannot read {folder}: {error.strerror or error}") from error
    if not kinds:
        raise ConfigError(
            f"{folder} is no finished run, artefact or PEFT adapter: it has neither {INDEX} nor "
            f"{ADAPTER}"
        )
    found = list(_of_artefact(folder) if kinds[0] == INDEX else _of_adapter(folder))
    updates, left_out = [], []
    for one in sorted(found, key=lambda each: _in_order(each.layer)):
        if one.a is None or one.b is None:
            left_out.append(one.layer)
            continue
        if not (one.a.isfinite().all() and one.b.isfinite().all()):
            raise ConfigError(
                f"{folder}: the factors of {one.layer} hold values that are not finite, so they "
                "have no spectrum: did its training diverge?"
            )
        for expert in range(len(one.a)):
            number = expert if len(one.a) > 1 else None
            spreads = spread_of(one.a[expert], one.b[expert])
            if not one.paired:
                del spreads["update"]
            updates.append(
                UpdateSpread(layer=one.layer, expert=number, rank=one.a.shape[1], spreads=spreads)
            )
    if not updates:
        raise ConfigError(f"{folder} holds no low-rank updates that stand in pairs of factors")
    return Spectra(source=str(folder), updates=tuple(updates), left_out=tuple(left_out))


@dataclass(frozen=True, eq=False)
class _Found:
    """The updates of a layer: A (e, r, d_in) and B (e, r, d_out), None where it has no such.

    ``paired`` says whether the k-th rank of A goes with the k-th of B.
    """

    layer: str
    a: Tensor | None = None
    b: Tensor | None = None
    paired: bool = True


def _in_order(layer: str) -> list[tuple[bool, int, str]]:
    """Return what layers are sorted by: block 2 stands before block 10."""
    parts = re.split(r"(\d+)", layer)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


@torch.no_grad()
def spread_of(a: Tensor, b: Tensor) -> dict[str, Spread]:
    """Return the spread of A (r, d_in), of B given by its columns (r, d_out), and of their dW."""
    a, b = a.double(), b.double()
    reads, writes = _cosines(a), _cosines(b)
    return {
        "A": _spread(torch.linalg.svdvals(a), reads),
        "B": _spread(torch.linalg.svdvals(b), writes),
        "update": _spread(update_values(a, b), reads * writes),
    }


def update_values(a: Tensor, b: Tensor) -> Tensor:
    """Return the singular values of B A, of A (r, d_in) and the columns of B (r, d_out)."""
    left, right = torch.linalg.qr(b.T).R, torch.linalg.qr(a.T).R
    found: Tensor = torch.linalg.svdvals(left @ right.T)
    return found


def effective_rank(values: Tensor) -> float:
    """Return exp of the entropy of singular values; 0 where all are zero."""
    total = values.sum()
    if total == 0:
        return 0.0
    share = values / total
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


def stable_rank(values: Tensor) -> float:
    """Return the sum of squares of singular values over the largest; 0 where all are zero."""
    largest = values.max()
    return 0.0 if largest == 0 else float(values.square().sum() / largest.square())


def _spread(values: Tensor, cosines: Tensor) -> Spread:
    r = len(cosines)
    pairs = r * (r - 1)
    apart = cosines.abs().sum() - cosines.diagonal().abs().sum()
    return Spread(
        effective_rank=effective_rank(values),
        stable_rank=stable_rank(values),
        correlation=float(apart / pairs) if pairs else 0.0,
    )


def _cosines(rows: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(rows, dim=1)
    return unit @ unit.T


def _of_artefact(folder: Path) -> Iterator[_Found]:
    """Yield the updates of a method's banks and pools."""
    try:
        sha256 = str(read_json(folder / INDEX, kind="artefact")["tensors"]["sha256"])
    except (KeyError, TypeError) as error:
        raise StorageError(f"{folder / INDEX} is corrupt: it names no tensors") from error
    tensors = read_tensors(folder / TENSORS, sha256=sha256)

    def rows(stack: str) -> Tensor:
        """Return a stack's rows in the order of their identifiers."""
        known = torch.cat([tensors[f"{stack}.frozen"], tensors[f"{stack}.active"]])
        return known[tensors[f"{stack}.slot"]]

    for name in tensors:
        stack = name.removesuffix(".slot")
        if stack == name or not stack.endswith(".B"):
            continue
        owner = stack.removesuffix(".B")
        b, layer = rows(stack), owner.removeprefix("layers.").replace("/", ".")
        layer = layer.removesuffix(".bank").replace(".bank.", ".")
        pools = len(tensors.get(f"{owner}.down_router.slot", ()))
        trunk = f"{owner.removesuffix('.bank')}.trunk"
        if len(b) == 0 or (b.dim() != 3 and not pools):
            continue  # no expert here
        if pools:  # of each task, factors that are paired anew for each input
            a, b = (each.reshape(pools, -1, each.shape[-1]) for each in (rows(f"{owner}.A"), b))
            yield _Found(layer, a, b, paired=False)
        elif f"{trunk}.slot" in tensors:
            yield _Found(layer, rows(trunk).expand(len(b), -1, -1), b)
        else:
            yield _Found(layer, rows(f"{owner}.A"), b)


def _of_adapter(folder: Path) -> Iterator[_Found]:
    """Yield the updates of the layers of a PEFT adapter."""
    config = _peft_config(folder)
    tensors = read_tensors(folder / WEIGHTS)
    mixtures = {name.rpartition(".")[0] for name in config.get("target_parameters") or ()}
    for name, a in tensors.items():
        match = _FACTOR.match(name)
        if match is None:
            continue
        layer, prefix, weight = match["layer"], match["prefix"], match["weight"] or ""
        b = tensors.get(f"{layer}.{prefix}_B{weight}")
        if b is None:
            raise StorageError(f"{folder / WEIGHTS} has {name!r} and no other factor beside it")
        shown = layer.removeprefix("base_model.model.")
        stacked = any(f".{shown}.".replace(".base_layer", "").endswith(f".{m}.") for m in mixtures)
        rank = int(config.get("r") or 0)
        experts = len(a) // rank if stacked and rank and len(a) % rank == 0 else 1
        try:
            a, b = as_ranks(a, b, layer, experts=experts)
        except ConfigError:
            yield _Found(shown)
            continue
        yield _Found(shown, *_as_multiplied(a, b, tensors, layer))


def _as_multiplied(
    a: Tensor, b: Tensor, tensors: Mapping[str, Tensor], layer: str
) -> tuple[Tensor, Tensor]:
    """Return A and B with what PEFT multiplies them by; see the module docstring."""
    for name in ("lora_E", "lora_diag"):
        values = tensors.get(f"{layer}.{name}")
        if values is not None:
            return a * values.reshape(1, -1, 1), b
    widths = tensors.get(f"{layer}.delora_w_norm")
    if widths is None:
        return a, b
    a, b = (each / torch.linalg.vector_norm(each, dim=2, keepdim=True).clamp_min(1e-4)
            for each in (a, b))  # fmt: skip
    return a * widths, b


def _peft_config(folder: Path) -> dict[str, Any]:
    """Return an adapter's settings."""
    try:
        config = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {folder / ADAPTER}: {error}") from error
    if not isinstance(config, dict):
        raise StorageError(f"cannot read {folder / ADAPTER}: it holds no settings")
    return config
