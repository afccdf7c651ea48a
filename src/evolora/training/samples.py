"""Reading samples once: label and content are remembered, what was prepared while there is room."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from evolora.backbones.base import Backbone, Batch, LazyInputs
from evolora.backbones.batch import answer_texts, label_tensor
from evolora.backbones.memory import Known, Memory
from evolora.streams.task import Example, Examples, Joined, Label, Subset

DIGEST_BYTES = 16


@dataclass(frozen=True)
class Sample:
    """What is remembered of a row.

    Args:
        label, key: as its :class:`Example` has them.
        content: digest of its prepared form. Two samples of equal content share all results; two of
            an equal key need not have anything in common.
        modalities: those it has.
    """

    label: Label
    key: str
    content: bytes
    modalities: tuple[str, ...]


@dataclass
class _Rows:
    """The rows of one data set that were read; it lives as long as the data set."""

    data: weakref.ref[Examples]
    read: dict[int, Sample] = field(default_factory=dict)


class Samples:
    """Makes batches whose samples are known (``Batch.known``) and decoded only where it is needed.

    Relies on what ``Examples`` promises: a row is the same sample each time.

    Args:
        backbone: prepares samples.
        memory: where prepared samples and results are kept.
    """

    def __init__(self, backbone: Backbone, memory: Memory) -> None:
        self.backbone, self.memory = backbone, memory
        self._known: dict[int, _Rows] = {}

    def batch(
        self,
        data: Examples,
        rows: Sequence[int],
        *,
        task: int | None = None,
        examples: Sequence[Example] | None = None,
    ) -> Batch:
        """Return rows of a data set as a batch, without augmentation.

        Args:
            data: data set.
            rows: its rows.
            task: index of the task, in training.
            examples: the rows as they were read already (by worker processes).
        """
        fresh: dict[int, Mapping[str, Tensor]] = {}
        samples = []
        for place, row in enumerate(rows):
            sample = self._remembered(data, row)
            if sample is None:
                example = data[row] if examples is None else examples[place]
                sample, fresh[place] = self._meet(data, row, example)
            samples.append(sample)

        def read(places: Sequence[int]) -> Mapping[str, Tensor]:
            return self.backbone.inputs_of(
                [
                    fresh[place]
                    if place in fresh
                    else self._again(data, rows[place], samples[place])
                    for place in places
                ]
            )

        return Batch(
            inputs=LazyInputs(self.backbone.input_names, range(len(samples)), read),
            labels=label_tensor([s.label for s in samples], self.backbone.device),
            keys=tuple(s.key for s in samples),
            task=task,
            answers=answer_texts([s.label for s in samples]),
            known=Known(samples=tuple(s.content for s in samples), memory=self.memory),
            present=self.backbone.present([s.modalities for s in samples]),
        )

    def _remembered(self, data: Examples, row: int) -> Sample | None:
        data, row = _origin(data, row)
        known = self._known.get(id(data))
        return known.read.get(row) if known is not None else None

    def _meet(
        self, data: Examples, row: int, example: Example
    ) -> tuple[Sample, Mapping[str, Tensor]]:
        """Prepare a row that was not read before, and remember it."""
        prepared = self.backbone.prepare(example)
        sample = Sample(
            label=example.label,
            key=example.key,
            content=_digest(prepared),
            modalities=tuple(prepared),
        )
        self._keep(sample.content, prepared)
        rows = self._rows_of(data, row)
        if rows is not None:
            known, origin = rows
            known.read[origin] = sample
        return sample, prepared

    def _rows_of(self, data: Examples, row: int) -> tuple[_Rows, int] | None:
        """Return what is remembered of the data set and the row within it.

        A data set is known by its identity, which another may get when it is gone; one that cannot
        be referred to weakly (a plain list) is read each time.
        """
        data, row = _origin(data, row)
        address = id(data)
        if address not in self._known:
            try:
                reference = weakref.ref(data, lambda _: self._known.pop(address, None))
            except TypeError:
                return None
            self._known[address] = _Rows(reference)
        return self._known[address], row

    def _again(self, data: Examples, row: int, sample: Sample) -> Mapping[str, Tensor]:
        """Return a row's prepared form as it is kept, or read it again."""
        kept = {name: self.memory.crops.get((sample.content, name)) for name in sample.modalities}
        found = {name: value for name, value in kept.items() if value is not None}
        if len(found) == len(kept):
            return found
        prepared = self.backbone.prepare(data[row])
        self._keep(sample.content, prepared)
        return prepared

    def _keep(self, content: bytes, prepared: Mapping[str, Tensor]) -> None:
        for name, value in prepared.items():
            self.memory.crops.put((content, name), value)


def _digest(prepared: Mapping[str, Tensor]) -> bytes:
    """Return a digest of all a sample has; a missing modality differs from any that is there."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name, value in sorted(prepared.items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.cpu().contiguous().numpy().data)
    return digest.digest()


def _origin(data: Examples, row: int) -> tuple[Examples, int]:
    """Return the data set a row really comes from: subsets are made anew for every use."""
    if isinstance(data, Joined):
        return _origin(*data.place(row))
    if isinstance(data, Subset):
        return _origin(data.data, data.indices[row])
    return data, row
