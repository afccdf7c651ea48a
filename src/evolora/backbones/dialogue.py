"""Dialogues: from images and turns of text to what a model's processor makes of them.

A processor with a chat template renders the turns; where there is none, a plain one is used:

    Question: <first turn>
    Answer: <its answer>
    Question: <last turn>
    Answer:

each line ended by a line break. An answer is tokenized by itself where the prompt ends in a blank,
else as the word after the prompt's last one. An image stands where the text says "<image>", else
before the first turn. The marker of an image that a sample lacks is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evolora.errors import ConfigError, DataError
from evolora.streams.images import read_image
from evolora.streams.task import Example

MARKER = "<image>"
Content = list[dict[str, str]]


class Dialogues:
    """Prepares samples with the processor of an image-text-to-text model.

    Args:
        processor: its processor.
        image_token: id of the token that stands for a part of an image.
        limit: longest prompt in tokens.
    """

    def __init__(self, processor: Any, image_token: int, limit: int) -> None:
        self.processor, self.image_token, self.limit = processor, image_token, limit

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        if self.processor is None:
            raise ConfigError("this backbone was built without a processor; it has shapes only")
        return self.processor.tokenizer

    @property
    def end_token(self) -> int:
        """Token that ends an answer."""
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ConfigError("the tokenizer has no end token (eos_token), which ends an answer")
        return int(end)

    def prompt(self, example: Example) -> dict[str, Tensor]:
        """Return input_ids (n,) and the inputs of the encoder of one sample's images.

        Raises:
            DataError: images and markers do not fit each other, an image cannot be read, or the
                prompt is longer than the limit.
        """
        images = _images(example)
        text = self.render(turns_of(example), len(images), example.key)
        bos = self.tokenizer.bos_token
        try:
            found = self.processor(
                text=[text],
                images=images or None,
                return_tensors="pt",
                add_special_tokens=not (bos and text.startswith(bos)),
            )
        except (ValueError, IndexError, TypeError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"sample {example.key!r} cannot be prepared: {first}") from error
        ids = found["input_ids"][0].to(torch.int32)
        if len(ids) > self.limit:
            raise DataError(
                f"sample {example.key!r} has a prompt of {len(ids)} tokens (of images: "
                f"{int((ids == self.image_token).sum())}); the limit is {self.limit} "
                "(backbone.text_length)"
            )
        return {**found, "input_ids": ids}

    @property
    def first_token(self) -> int | None:
        """Token that every text begins with, or None."""
        first = self.tokenizer.bos_token_id
        return None if first is None else int(first)

    def words(self, example: Example) -> Tensor | None:
        """Return the tokens (m,) of the user's last turn as text alone, or None without words."""
        parts = _content(turns_of(example)[-1])
        text = " ".join(part["text"].strip() for part in parts if part["type"] == "text")
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        first = [] if self.first_token is None else [self.first_token]
        return torch.tensor([*first, *ids], dtype=torch.int32) if ids else None

    def answer(self, example: Example) -> Tensor | None:
        """Return the tokens (a,) of a sample's answer with the end token, or None without one.

        Of several answers the most frequent is taken, the first of those.
        """
        label = example.label
        accepted = (label,) if isinstance(label, str) else label
        if not isinstance(accepted, tuple) or not accepted or not isinstance(accepted[0], str):
            return None
        text = Counter(accepted).most_common(1)[0][0]
        ids = self._after_prompt(text)
        if self.image_token in ids:
            raise DataError(f"the answer of sample {example.key!r} holds an image's token")
        return torch.tensor([*ids, self.end_token], dtype=torch.int32)

    def _after_prompt(self, text: str) -> list[int]:
        """Return the tokens of a text that follows a prompt."""

        def tokens(of: str) -> list[int]:
            return list(self.tokenizer(of, add_special_tokens=False)["input_ids"])

        if not self._last_word:
            return tokens(text)
        before, both = tokens(self._last_word), tokens(f"{self._last_word} {text}")
        return both[len(before) :] if both[: len(before)] == before else tokens(f" {text}")

    @cached_property
    def _last_word(self) -> str:
        """The word that every prompt ends with; empty where it ends with a blank."""
        prompt = self.render(("",), 0, "")
        return "" if not prompt or prompt[-1].isspace() else prompt.split()[-1]

    def read(self, tokens: Sequence[int]) -> str:
        """Return the text of generated tokens, without special ones and outer blanks."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()

    def render(self, turns: Sequence[str], images: int, key: str) -> str:
        """Return the prompt of turns (user, assistant, user, ...), up to where the answer begins.

        Raises:
            DataError: the markers are not as many as the images.
        """
        contents = [_content(turn) for turn in turns]
        marked = sum(part["type"] == "image" for content in contents for part in content)
        if images == 0:
            contents = [[p for p in content if p["type"] == "text"] for content in contents]
        elif marked == 0:
            contents[0] = [{"type": "image"}] * images + contents[0]
        elif marked != images:
            raise DataError(f"sample {key!r} has {images} images and {marked} {MARKER} markers")
        if getattr(self.processor, "chat_template", None):
            messages = [
                {"role": "assistant" if index % 2 else "user", "content": content}
                for index, content in enumerate(contents)
            ]
            rendered: str = self.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
            return rendered
        token: str = getattr(self.processor, "image_token", MARKER)
        lines = [
            ("Answer: " if index % 2 else "Question: ")
            + "".join(token if part["type"] == "image" else part["text"] for part in content)
            for index, content in enumerate(contents)
        ]
        return "\n".join([*lines, "Answer:", ""])


def turns_of(example: Example) -> tuple[str, ...]:
    """Return the turns of a sample's text, beginning and ending with the user's."""
    text = example.inputs.get("text", "")
    turns = (text,) if isinstance(text, str) else tuple(text)
    if not all(isinstance(turn, str) for turn in turns) or len(turns) % 2 == 0:
        raise DataError(
            f"the text of sample {example.key!r} must be a string, or turns of user and assistant "
            f"that begin and end with the user's; got {text!r}"
        )
    return turns


def _content(turn: str) -> Content:
    """Return a turn as parts: text and images, as a chat template takes them."""
    parts: Content = []
    for index, text in enumerate(turn.split(MARKER)):
        if index:
            parts.append({"type": "image"})
        text = text.strip("\n") if MARKER in turn else text
        if text:
            parts.append({"type": "text", "text": text})
    return parts or [{"type": "text", "text": ""}]


def _images(example: Example) -> list[Any]:
    """Return a sample's images as PIL images."""
    given = example.inputs.get("image", ())
    sources = given if isinstance(given, list | tuple) else (given,)
    try:
        return [_picture(read_image(source)) for source in sources]
    except DataError as error:
        raise DataError(f"sample {example.key!r}: {error}") from error


def _picture(image: Tensor) -> Any:
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def padded_left(rows: Sequence[Tensor], padding: int) -> tuple[Tensor, Tensor]:
    """Return token rows as (b, n) int64 that end together, and their mask."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), padding, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = row
        mask[index, width - len(row) :] = 1
    return ids, mask


def padded_right(rows: Sequence[Tensor | None], padding: int) -> Tensor:
    """Return token rows as (b, n) int64 that begin together; None is empty."""
    width = max(0 if row is None else len(row) for row in rows)
    ids = torch.full((len(rows), width), padding, dtype=torch.int64)
    for index, row in enumerate(rows):
        if row is not None:
            ids[index, : len(row)] = row
    return ids


def stacked(parts: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Return (b, k, ...) of each sample's (k, ...), filled up with zeros, and the numbers k (b,).

    None is a sample without images.
    """
    counts = torch.tensor([0 if part is None else len(part) for part in parts])
    there = [part for part in parts if part is not None]
    if not there:
        return torch.zeros(len(parts), 0), counts
    shape = [max(part.shape[axis] for part in there) for axis in range(there[0].dim())]
    whole = there[0].new_zeros(len(parts), *shape)
    for row, part in enumerate(parts):
        if part is not None:
            whole[row][tuple(slice(size) for size in part.shape)] = part
    return whole, counts


def flat(whole: Tensor, counts: Tensor) -> Tensor:
    """Return the real ones of (b, k, ...), one after another: the inverse of :func:`stacked`."""
    places = torch.arange(whole.shape[1], device=whole.device)
    return whole[places.unsqueeze(0) < counts.unsqueeze(1)]
