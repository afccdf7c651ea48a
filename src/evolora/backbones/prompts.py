"""Class prompts of a dual encoder: tokenised once, run from the lowest expert, kept by state.

Prompts are never augmented, so all that lies below the lowest expert of the text tower is the same
in every step: it is computed once per label space. A text tower without experts gives class
embeddings once and for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evolora.errors import ConfigError
from evolora.randomness import StepRandom
from evolora.routing.route import BASE, Route
from evolora.storage.tensor_cache import TensorCache
from evolora.streams.task import LabelSpace

if TYPE_CHECKING:
    from evolora.backbones.clip import DualEncoder

PROMPTS_PER_FORWARD = 512
"""Class prompts are encoded in chunks of so many rows."""
PROMPTS_PER_PREFIX = 1024
"""Activations of up to so many prompts are kept together."""
CLASS_BYTES, PREFIX_BYTES, TOKEN_BYTES = 64 * 2**20, 256 * 2**20, 16 * 2**20
"""Room for class embeddings, activations of prompts, and tokens."""


class PromptEncoder:
    """The text side of a dual encoder.

    Args:
        backbone: its model, tokenizer and expert host.
    """

    def __init__(self, backbone: DualEncoder) -> None:
        self.backbone = backbone
        self.classes = TensorCache(CLASS_BYTES)
        self._tokens = TensorCache(TOKEN_BYTES)
        self._entering = TensorCache(PREFIX_BYTES)
        self._arguments: dict[tuple[Any, ...], _Arguments] = {}

    def class_embeddings(
        self,
        labels: LabelSpace,
        task: int,
        *,
        random: StepRandom | None,
        classes: Sequence[int] | None,
        ensemble: bool,
        version: int,
        reuse: bool,
    ) -> Tensor:
        """Return unit-length class embeddings (c, p); see ``DualEncoder.class_embeddings``."""
        templates = labels.templates if ensemble else labels.templates[:1]
        if reuse and self._frozen(task):
            return self._frozen_embeddings(labels, templates, classes)
        cacheable = not torch.is_grad_enabled() and random is None
        chosen = None if classes is None else tuple(classes)
        key = (self.backbone.context(), task, version, labels, chosen, ensemble)
        if cacheable and (known := self.classes.get(key)) is not None:
            return known
        result = self._embed(labels, templates, chosen, task, random, reuse=reuse)
        if cacheable:
            self.classes.put(key, result)
        return result

    def forget(self) -> None:
        """Drop class embeddings of learned tasks; those of the base stay valid for ever."""
        for key in self.classes:
            assert isinstance(key, tuple)
            if key[1] != BASE:
                self.classes.drop(key)

    def summary(self, input_ids: Tensor) -> Tensor:
        """Return (c,) index of the token a prompt is read out at: its end token."""
        if self.backbone.is_siglip:
            return torch.full(
                (input_ids.shape[0],), input_ids.shape[1] - 1, device=input_ids.device
            )
        end = self.backbone.config.text_config.eos_token_id
        hits = input_ids == end if end != 2 else input_ids == input_ids.max(dim=1, keepdim=True)[0]
        return hits.int().argmax(dim=1)

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return token tensors on the CPU, padded to the longest prompt (SigLIP: its maximum)."""
        processor = self.backbone.processor
        if processor is None:
            raise ConfigError("this backbone was built without a processor; it has shapes only")
        names = ("input_ids",) if self.backbone.is_siglip else ("input_ids", "attention_mask")
        known = {name: self._tokens.get((name, tuple(prompts))) for name in names}
        found = {name: value for name, value in known.items() if value is not None}
        if len(found) == len(names):
            return found
        tokenizer = getattr(processor, "tokenizer", processor)
        tokens = tokenizer(
            list(prompts),
            padding="max_length" if self.backbone.is_siglip else True,
            truncation=True,
            max_length=int(self.backbone.config.text_config.max_position_embeddings),
            return_tensors="pt",
        )
        return {
            name: self._tokens.put((name, tuple(prompts)), tokens[name])
            for name in names
            if name in tokens
        }

    def _frozen(self, task: int) -> bool:
        """Return whether the text tower is the base's for a task."""
        backbone = self.backbone
        return backbone.host.lowest("text", task) is None and not backbone.has_other_weights

    @torch.no_grad()
    def _frozen_embeddings(
        self, labels: LabelSpace, templates: Sequence[str], classes: Sequence[int] | None
    ) -> Tensor:
        ensemble = len(templates) == len(labels.templates)
        key = (self.backbone.context(), BASE, 0, labels, None, ensemble)
        known = self.classes.get(key)
        if known is None:
            known = self._embed(labels, templates, None, BASE, None, reuse=True)
            self.classes.put(key, known)
        return known if classes is None else known[list(classes)]

    def _embed(
        self,
        labels: LabelSpace,
        templates: Sequence[str],
        classes: tuple[int, ...] | None,
        task: int,
        random: StepRandom | None,
        *,
        reuse: bool,
    ) -> Tensor:
        """Return class embeddings, averaged over templates as unit vectors."""
        prompts = tuple(template.format(name) for template in templates for name in labels.classes)
        count = len(labels.classes)
        chosen = list(range(count)) if classes is None else list(classes)
        rows = [start * count + row for start in range(len(templates)) for row in chosen]
        embedded = self._rows(prompts, rows, task, random, reuse=reuse)
        unit = F.normalize(embedded, dim=-1).view(len(templates), len(chosen), -1)
        return F.normalize(unit.mean(dim=0), dim=-1)

    def _rows(
        self,
        prompts: tuple[str, ...],
        rows: Sequence[int],
        task: int,
        random: StepRandom | None,
        *,
        reuse: bool,
    ) -> Tensor:
        """Return (rows, p) embeddings of some of the prompts."""
        tokens = {name: value[list(rows)] for name, value in self.tokenize(prompts).items()}
        cut = self.backbone.host.lowest("text", task)
        if reuse and cut and self.backbone.host.enabled and not self.backbone.has_other_weights:
            whole = self._entering_block(prompts, cut)
            ids = self._trimmed(tokens)["input_ids"].to(self.backbone.device)
            entering = whole.take(rows, ids.shape[1]) if whole is not None else None
            if entering is not None:
                return self._go_on(entering, cut, ids, task, random)
        if torch.is_grad_enabled() or random is not None or len(rows) <= PROMPTS_PER_FORWARD:
            # One forward where gradients flow: a backward that recomputes must still find its
            # route, and noise is drawn per row of a forward.
            return self._forward(tokens, task, random)
        order = _lengths(tokens).argsort(stable=True)  # prompts of a length need little padding
        parts = [
            self._forward({name: value[part] for name, value in tokens.items()}, task, None)
            for part in torch.split(order, PROMPTS_PER_FORWARD)
        ]
        result = torch.cat(parts)
        return torch.empty_like(result).index_copy(0, order.to(result.device), result)

    def _forward(
        self, tokens: Mapping[str, Tensor], task: int, random: StepRandom | None
    ) -> Tensor:
        tokens = {name: v.to(self.backbone.device) for name, v in self._trimmed(tokens).items()}
        self._set_route(tokens["input_ids"], task, random)
        return pooled(self.backbone.call("get_text_features", **tokens))

    def _set_route(self, ids: Tensor, task: int, random: StepRandom | None) -> None:
        route = Route.of(
            task, len(ids), device=self.backbone.device, summary=self.summary(ids), random=random
        )
        self.backbone.host.set_route("text", route)

    def _trimmed(self, tokens: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Cut off columns behind the longest of these prompts (SigLIP reads the last one)."""
        if self.backbone.is_siglip or "attention_mask" not in tokens:
            return tokens
        longest = int(tokens["attention_mask"].any(dim=0).nonzero().max()) + 1
        return {name: value[:, :longest] for name, value in tokens.items()}

    # -- from the lowest expert on ---------------------------------------------------------------

    def _entering_block(self, prompts: tuple[str, ...], cut: int) -> _Arguments | None:
        """Return what block ``cut`` of the untouched tower is called with, computed once."""
        if len(prompts) > PROMPTS_PER_PREFIX:
            return None
        key = (self.backbone.context(), prompts, cut)
        hidden = self._entering.get(key)
        if hidden is not None:
            return self._arguments[key].of(hidden)
        tokens = self._trimmed(self.tokenize(prompts))
        tokens = {name: value.to(self.backbone.device) for name, value in tokens.items()}
        call = self.backbone.entering_block("text", cut, "get_text_features", tokens)
        arguments = _Arguments(*call)
        self._entering.put(key, arguments.hidden)
        if key in self._entering:
            self._arguments = {k: v for k, v in self._arguments.items() if k in self._entering}
            self._arguments[key] = arguments
        return arguments

    def _go_on(
        self, entering: _Arguments, cut: int, ids: Tensor, task: int, random: StepRandom | None
    ) -> Tensor:
        """Run block ``cut`` and all above it, as the tower's own forward does."""
        self._set_route(ids, task, random)
        hidden = entering.hidden
        for block in self.backbone.blocks("text")[cut:]:
            hidden = block(hidden, *entering.args, **entering.kwargs)
        model: Any = self.backbone.model
        states = model.text_model.final_layer_norm(hidden)
        rows = torch.arange(len(ids), device=states.device)
        embedding: Tensor = states[rows, self.summary(ids)]
        head = model.text_model.head if self.backbone.is_siglip else model.text_projection
        projected: Tensor = head(embedding)
        return projected


@dataclass(frozen=True)
class _Arguments:
    """What a transformer block is called with.

    Args:
        hidden: (b, n, d) activations.
        args, kwargs: all else, with rows first in what is a tensor (masks).
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def of(self, hidden: Tensor) -> _Arguments:
        return _Arguments(hidden, self.args, self.kwargs)

    def take(self, rows: Sequence[int], length: int) -> _Arguments | None:
        """Return the first ``length`` tokens of rows; None where a mask cannot be divided."""
        count, longest = self.hidden.shape[:2]
        if list(rows) == list(range(count)) and length == longest:
            return self
        others = [*self.args, *self.kwargs.values()]
        if not all(v is None or isinstance(v, Tensor | bool | int | float | str) for v in others):
            return None
        index = torch.tensor(rows, device=self.hidden.device)

        def own(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.dim() == 0:
                return value
            value = value[index] if len(value) == count else value
            for axis in range(1, value.dim()):
                if value.shape[axis] == longest:  # a mask's queries and keys
                    value = value.narrow(axis, 0, length)
            return value

        return _Arguments(
            self.hidden[index][:, :length],
            tuple(own(value) for value in self.args),
            {name: own(value) for name, value in self.kwargs.items()},
        )


def _lengths(tokens: Mapping[str, Tensor]) -> Tensor:
    mask = tokens.get("attention_mask")
    return mask.sum(dim=1) if mask is not None else torch.zeros(len(tokens["input_ids"]))


def pooled(output: Any) -> Tensor:
    """Return the features of ``get_*_features``: transformers 5 wraps them, 4 returned a tensor."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features
