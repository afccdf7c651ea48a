"""``mosaic/modalities``: five tasks, each in a modality of its own, offline: questions, captions.

Stands for the image, video, audio, depth and point-cloud data of PathWeave where nothing can be
downloaded. An example has its modality and the question ("text"):

    image  uint8 (3, 64, 64)       a painted object
    video  uint8 (4, 3, 64, 64)    an object that turns or moves, or an animated emoji
    audio  float32 (24000,)        recorded notes or beats, 16 kHz mono, in [-1, 1]
    depth  uint8 (3, 64, 64)       inverse depth in three equal channels, 0 behind the object
    pc     float32 (512, 6)        points in metres around the middle, and colors in [0, 1]

No object, animation or recording is on two sides of a split, in any modality. With ``blind: true``
the same questions come without what they are about.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evolora.registry import STREAMS
from evolora.streams.mosaic.instructions import limited, smaller
from evolora.streams.mosaic.reading import SPLITS, decode_bytes, packed_text, read_packed
from evolora.streams.sampling import row_index
from evolora.streams.task import Example, LabelSpace, Stream, Task


@dataclass(frozen=True, eq=False)
class PackedItems:
    """Some questions of a packed file; what they are about is decoded on access.

    Args:
        packed: tensors of the file.
        rows: row of each question in the file.
        modality: name of the task, of its inputs and of the form they are packed in.
        kinds: names of the kinds of question.
        sources: names of what does not cross splits.
        name: prefix of the samples' keys.
        blind: give the questions alone.
    """

    packed: dict[str, Tensor]
    rows: Tensor
    modality: str
    kinds: Sequence[str]
    sources: Sequence[str]
    name: str
    blind: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = int(self.rows[row_index(index, len(self))])
        inputs: dict[str, Any] = {"text": packed_text(self.packed, "question", row)}
        if not self.blind:
            inputs[self.modality] = DECODERS[self.modality](self._content(row))
        answers = tuple(packed_text(self.packed, "answers", row).split("\n"))
        return Example(inputs=inputs, label=answers, key=f"{self.name}/{row}")

    def kind(self, index: int) -> str:
        """Return what kind a question is of, a key of ``modality_words.WORDINGS``."""
        return self.kinds[int(self.packed["kind"][self.rows[index]])]

    def group(self, index: int) -> str:
        """Return what a question must not share with one of another split, by name."""
        return self.sources[int(self.packed["source"][self.rows[index]])]

    def _content(self, row: int) -> bytes:
        item = int(self.packed["item"][row])
        start, stop = self.packed["offsets"][item : item + 2].tolist()
        return self.packed["bytes"][start:stop].numpy().tobytes()


def _film(content: bytes) -> Tensor:
    strip = decode_bytes(content)  # (3, frames * side, side)
    side = strip.shape[2]
    return strip.reshape(3, -1, side, side).transpose(0, 1).contiguous()


def _sound(content: bytes) -> Tensor:
    import soundfile

    wave, _ = soundfile.read(io.BytesIO(content), dtype="float32")
    return torch.from_numpy(wave).clamp(-1, 1)


def _cloud(content: bytes) -> Tensor:
    (step,) = struct.unpack("<f", content[:4])
    body = np.frombuffer(zlib.decompress(content[4:]), dtype=np.uint8).reshape(6, -1)
    points, colors = body[:3].view(np.int8) * np.float32(step), body[3:] / np.float32(255)
    return torch.from_numpy(np.concatenate([points, colors]).T.astype(np.float32))


DECODERS: Mapping[str, Callable[[bytes], Tensor]] = {
    "image": decode_bytes,
    "video": _film,
    "audio": _sound,
    "depth": decode_bytes,
    "pc": _cloud,
}
"""Modality -> what turns its packed form into a tensor."""


@STREAMS.register(
    "mosaic/modalities",
    summary="questions and captions, embedded: image, video, audio, depth and point clouds in turn",
)
def load(
    *,
    root: str | Path | None = None,
    order: Sequence[str] | None = None,
    limit: int | None = None,
    test_limit: int | None = None,
    blind: bool = False,
    seed: int = 0,
) -> Stream:
    """Return the stream.

    Args:
        root: folder with ``modalities.safetensors`` and ``modalities.json`` made by ``evolora
            data build``; None uses the embedded compact version.
        order: task names in learning order (a subset is allowed); None uses the stored order.
        limit: at most so many questions per task and split.
        test_limit: the same for the test splits alone.
        blind: leave out what the questions are about: what the words alone can tell.
        seed: chooses what a limit keeps.
    """
    packed, info = read_packed(root, "modalities")
    limits = {"train": limit, "val": limit, "test": smaller(limit, test_limit)}
    tasks = []
    for index, task in enumerate(info["tasks"]):
        data = {}
        for number, split in enumerate(SPLITS):
            chosen = (packed["task"] == index) & (packed["split"] == number)
            name = f"{task['name']}/{split}"
            rows = limited(torch.nonzero(chosen).squeeze(1), limits[split], seed, name)
            data[split] = PackedItems(
                packed, rows, task["name"], info["kinds"], info["sources"], name, blind
            )
        tasks.append(
            Task(
                name=task["name"],
                **data,
                labels=LabelSpace.of_texts(task["max_new_tokens"]),
                modalities=("text",) if blind else (task["name"], "text"),
                metric=task["metric"],
                answer_format=task["answer_format"],
            )
        )
    stream = Stream(
        name="mosaic/modalities",
        tasks=tuple(tasks),
        source=f"{info['size']} version, {len(packed['task'])} questions about "
        f"{len(packed['offsets']) - 1} items of registry packages"
        f"{', without the items' if blind else ''}",
    )
    return stream if order is None else stream.reordered(order)
