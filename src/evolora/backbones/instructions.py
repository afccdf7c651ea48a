"""Instructions: what a Q-Former and its language model read of a sample's text.

The text is taken as it is, turns of a conversation line by line. The Q-Former gets it by its own
tokenizer (InstructBLIP) or not at all (BLIP-2); the language model gets it behind the soft tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from evolora.backbones.dialogue import MARKER, Dialogues, turns_of
from evolora.errors import DataError
from evolora.streams.task import Example


class Instructions(Dialogues):
    """Prepares texts with the processor of a Q-Former model.

    Args:
        processor: its processor, with ``tokenizer`` and perhaps ``qformer_tokenizer``.
        image_token: id of the token that stands for a soft token in the stock model.
        limit: longest prompt in tokens, soft tokens apart.
        asked_limit: longest instruction of the Q-Former; a longer one is cut.
        decodes: whether the language model is a decoder, which goes on with the prompt.
    """

    def __init__(
        self, processor: Any, image_token: int, limit: int, *, asked_limit: int, decodes: bool
    ) -> None:
        super().__init__(processor, image_token, limit)
        self.asked_limit, self.decodes = asked_limit, decodes

    def render(self, turns: Sequence[str], images: int, key: str) -> str:
        """Return the text of turns; soft tokens come first, whatever markers say."""
        return "\n".join(turn.replace(MARKER, "").strip("\n") for turn in turns)

    def prompt(self, example: Example) -> dict[str, Tensor]:
        """Return input_ids (n,) of the text, and asked_ids (t,) where the Q-Former reads it."""
        text = self.render(turns_of(example), 0, example.key)
        first = self.end_token if self.first_token is None else self.first_token
        told = list(self.tokenizer(text)["input_ids"]) or [first]  # an answer follows something
        ids = torch.tensor(told, dtype=torch.int32)
        if len(ids) > self.limit:
            raise DataError(
                f"sample {example.key!r} has a prompt of {len(ids)} tokens; the limit is "
                f"{self.limit} (backbone.text_length)"
            )
        found = {"input_ids": ids}
        reader = getattr(self.processor, "qformer_tokenizer", None)
        if reader is not None:
            asked = reader(text, truncation=True, max_length=self.asked_limit)["input_ids"]
            found["asked_ids"] = torch.tensor(asked, dtype=torch.int32)
        return found

    def plain(self, text: str) -> list[int]:
        """Return the tokens of a text without any that the tokenizer adds."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def _last_word(self) -> str:
        """What an answer follows: any word, for a decoder; it starts anew behind an encoder."""
        return ":" if self.decodes else ""
