"""Samples of several modalities: remembered by all they have, and prepared once."""

from __future__ import annotations

import pytest
import torch
from tests.backbones.pairs import Pairs, make, memory

from evolora.backbones.memory import Memory
from evolora.storage.tensor_cache import TensorCache
from evolora.streams.task import Example
from evolora.training.samples import Samples

KINDS = pytest.mark.parametrize("kind", ["vilt", "clip"])


class Counted(Pairs):
    """Counts how often a row is read."""

    def __init__(self, codes: tuple[int, ...]) -> None:
        super().__init__(codes)
        self.reads: list[int] = []

    def __getitem__(self, row: int) -> Example:
        self.reads.append(row)
        return super().__getitem__(row)


@KINDS
def test_batches_of_remembered_samples_are_those_of_collate(kind: str) -> None:
    backbone = make(kind)
    data = Counted((0, 1, 2))
    samples = Samples(backbone, memory())
    plain = backbone.collate(Pairs((0, 1, 2)).all())
    for _ in range(2):
        batch = samples.batch(data, [0, 1, 2])
        assert dict(batch.inputs).keys() == plain.inputs.keys() == set(backbone.input_names)
        for name, value in plain.inputs.items():
            assert torch.equal(batch.inputs[name], value)
        assert torch.equal(batch.labels, plain.labels) and batch.keys == plain.keys
        for name, value in plain.present.items():
            assert torch.equal(batch.present[name], value)
    assert data.reads == [0, 1, 2]


@KINDS
def test_what_has_no_room_is_read_again(kind: str) -> None:
    backbone = make(kind)
    kept = memory()
    small = Memory(crops=TensorCache(64), passes=kept.passes)  # room for a text, not for an image
    data = Counted((0, 1, 2))
    samples = Samples(backbone, small)
    samples.batch(data, [0, 1, 2])
    batch = samples.batch(data, [2, 0])
    assert data.reads == [0, 1, 2], "nothing is read before it is asked for"
    plain = backbone.collate([Pairs((0, 1, 2))[2], Pairs((0, 1, 2))[0]])
    for name, value in plain.inputs.items():
        assert torch.equal(batch.inputs[name], value)
    assert data.reads == [0, 1, 2, 0]


@KINDS
def test_content_is_all_that_a_sample_has(kind: str) -> None:
    backbone = make(kind)
    samples = Samples(backbone, memory())
    contents = [
        samples.batch(Pairs((code,)), [0]).known.samples[0]  # type: ignore[union-attr]
        for code in (0, 1, 2, 0)
    ]
    assert len(set(contents)) == 3 and contents[0] == contents[3]
    inputs = {"image": Pairs()[0].inputs["image"], "text": ""}
    empty = Rows([Example(inputs=inputs, label=0, key="")])
    known = samples.batch(empty, [0]).known
    assert known is not None and known.samples[0] not in contents, "an empty text is not none"


class Rows(list[Example]):
    """A list that can be referred to weakly."""
