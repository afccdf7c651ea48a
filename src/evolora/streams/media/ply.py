"""PLY files: ascii, binary little endian, binary big endian; vertices, colours and faces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2",
    "ushort": "u2", "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4",
    "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip
_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
_PLACE, _COLOURS = ("x", "y", "z"), (("red", "green", "blue"), ("r", "g", "b"))
_FACES = ("vertex_indices", "vertex_index")
Column = NDArray[np.float64] | list[NDArray[np.float64]]


@dataclass
class _Element:
    """Rows of a kind: (name, type, type of the length if it is a list) each."""

    name: str
    count: int
    properties: list[tuple[str, str, str | None]] = field(default_factory=list)

    @property
    def plain(self) -> bool:
        return all(length is None for _, _, length in self.properties)


def read_ply(content: bytes) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return vertices (n, 3), or (n, 6) with colours in [0, 1], and triangles (t, 3).

    Raises:
        ValueError: the file is damaged or has no vertices with x, y and z.
    """
    order, elements, body = _header(content)
    read = _ascii(body, elements) if order == "" else _binary(body, elements, order)
    tables = dict(read)
    vertices = tables.get("vertex")
    if vertices is None or not all(name in vertices for name in _PLACE):
        raise ValueError("it has no vertices with x, y and z")
    columns = [vertices[name] for name in _PLACE]
    for names in _COLOURS:
        if all(name in vertices for name in names):
            kinds = {name: kind for e in elements if e.name == "vertex"
                     for name, kind, _ in e.properties}  # fmt: skip
            scale = 255.0 if kinds[names[0]] == "u1" else 1.0
            columns += [np.asarray(vertices[name]) / scale for name in names]
            break
    faces = tables.get("face", {})
    rings = next((faces[name] for name in _FACES if name in faces), [])
    fans = [(ring[0], ring[k], ring[k + 1]) for ring in rings for k in range(1, np.size(ring) - 1)]
    return np.stack(columns, axis=1), np.asarray(fans, dtype=np.int64).reshape(-1, 3)


def _header(content: bytes) -> tuple[str, list[_Element], bytes]:
    head, end, body = content.partition(b"end_header")
    if not end or not head.startswith(b"ply"):
        raise ValueError("its header has no end")
    newline = body.find(b"\n")
    order: str | None = None
    elements: list[_Element] = []
    for line in head.decode("latin-1").splitlines()[1:]:
        match line.split():
            case ["format", kind, *_]:
                if kind not in _ORDERS:
                    raise ValueError(f"unknown format {kind!r} (known: {', '.join(_ORDERS)})")
                order = _ORDERS[kind]
            case ["element", name, count]:
                elements.append(_Element(name, int(count)))
            case ["property", "list", length, kind, name] if elements:
                elements[-1].properties.append((name, _type(kind), _type(length)))
            case ["property", kind, name] if elements:
                elements[-1].properties.append((name, _type(kind), None))
    if order is None:
        raise ValueError("its header names no format")
    return order, elements, body[newline + 1 :]


def _type(name: str) -> str:
    if name not in _TYPES:
        raise ValueError(f"unknown type {name!r}")
    return _TYPES[name]


def _ascii(body: bytes, elements: list[_Element]) -> Iterator[tuple[str, dict[str, Column]]]:
    lines = [line for line in body.decode("latin-1").splitlines() if line.strip()]
    if len(lines) < sum(element.count for element in elements):
        raise ValueError(f"it ends after {len(lines)} rows")
    first = 0
    for element in elements:
        columns: dict[str, list[NDArray[np.float64]]] = {n: [] for n, _, _ in element.properties}
        for line in lines[first : first + element.count]:
            words = np.array(line.split(), dtype=np.float64)
            place = 0
            for name, _, length in element.properties:
                size = 1 if length is None else int(words[place])
                place += length is not None
                if place + size > len(words):
                    raise ValueError(f"a row is too short: {line!r}")
                columns[name].append(words[place : place + size])
                place += size
        first += element.count
        yield element.name, {
            name: np.concatenate(columns[name]) if length is None and columns[name]
            else columns[name]
            for name, _, length in element.properties
        }  # fmt: skip


def _binary(
    body: bytes, elements: list[_Element], order: str
) -> Iterator[tuple[str, dict[str, Column]]]:
    place = 0
    for element in elements:
        if element.plain:
            kinds = np.dtype([(name, order + kind) for name, kind, _ in element.properties])
            if len(body) - place < kinds.itemsize * element.count:
                raise ValueError(f"it ends within its {element.count} rows of {element.name!r}")
            rows = np.frombuffer(body, kinds, element.count, place)
            place += kinds.itemsize * element.count
            yield element.name, {n: rows[n].astype(np.float64) for n, _, _ in element.properties}
            continue
        lists: dict[str, list[NDArray[np.float64]]] = {n: [] for n, _, _ in element.properties}
        for _ in range(element.count):
            for name, kind, length in element.properties:
                size = 1
                if length is not None:
                    size = int(_take(body, order + length, 1, place)[0])
                    place += np.dtype(length).itemsize
                lists[name].append(_take(body, order + kind, size, place).astype(np.float64))
                place += np.dtype(kind).itemsize * size
        yield element.name, dict(lists)


def _take(body: bytes, kind: str, count: int, place: int) -> NDArray[np.generic]:
    if count < 0 or place + count * np.dtype(kind).itemsize > len(body):
        raise ValueError("it ends within a list")
    return np.frombuffer(body, kind, count, place)
