"""CLIP as two streams that meet in a head: each sample's own image beside its own text.

    embedding = [u_image / |u_image| ; u_text / |u_text|],  zeros for a side the sample lacks

The towers are those of :class:`DualEncoder`; a missing side's tower is not run for that sample.
What stands in for a missing side (a learned vector) and the heads belong to methods. This is ours:
DeLo's paper has only ViLT.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.backbones.base import Backbone, Batch, Prefix
from evolora.backbones.blocks import layer_statistics, outputs_of, statistic_layers
from evolora.backbones.clip import DualEncoder
from evolora.backbones.frozen import ModelFunction
from evolora.backbones.prompts import pooled
from evolora.backbones.texts import longest, padded, token_ids, tokenizer_of
from evolora.experts.sites import Site, SiteKind
from evolora.registry import BACKBONES
from evolora.routing.route import Route
from evolora.streams.task import Example

TOWERS = {"image": "vision", "text": "text"}
"""Modality -> the tower that sees it."""


@BACKBONES.register(
    "clip-fusion", summary="CLIPModel and SiglipModel: image beside text, answered by heads"
)
class ClipFusion(Backbone):
    """A ``transformers`` CLIP or SigLIP whose samples have an image, a text, or both.

    Args:
        model, processor, name: as of :class:`DualEncoder`.
    """

    towers = DualEncoder.towers
    modalities = ("image", "text")
    input_names = ("pixel_values", "input_ids", "attention_mask")
    kept_features = ("layers", "modalities")

    def __init__(self, model: nn.Module, processor: Any | None = None, *, name: str = "") -> None:
        self.encoder = DualEncoder(model, processor, name=name)
        super().__init__(model)
        self.encoder.host = self.host
        self.name = name
        self.config = self.encoder.config
        self.vision_summary = self.encoder.vision_summary
        self.text_length = self.encoder.tokens("text")
        self._empty: Tensor | None = None

    def sites(
        self,
        kind: SiteKind,
        *,
        towers: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
        target_modules: Sequence[str] | None = (),
    ) -> list[Site]:
        """Return the sites of both towers or of those named, as the dual encoder has them."""
        return self.encoder.sites(kind, towers=towers, layers=layers, target_modules=target_modules)

    def prepare(
        self, example: Example, draw: torch.Generator | None = None
    ) -> Mapping[str, Tensor]:
        """Return {"image": uint8 (3, s, s), "text": int32 (n,)}, without what is missing."""
        self.check_modalities(example)
        found = dict(self.encoder.prepare(example, draw)) if "image" in example.inputs else {}
        if "text" in example.inputs:
            text = example.inputs["text"]
            found["text"] = token_ids(self.encoder.processor, text, self.text_length)
        return found

    def inputs_of(self, prepared: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return pixels (b, 3, s, s), token ids and mask (b, n); black and "" if missing."""
        size = self.encoder.image_size
        blank = torch.zeros(3, size, size, dtype=torch.uint8)
        images = torch.stack([one.get("image", blank) for one in prepared])
        texts = [one.get("text", self._empty_text()) for one in prepared]
        tokenizer = tokenizer_of(self.encoder.processor)
        tokens = padded(texts, self.text_length, int(tokenizer.pad_token_id or 0))
        return {
            "pixel_values": self.encoder.normalize(images),
            **{name: value.to(self.device) for name, value in tokens.items()},
        }

    def base_pass(self, batch: Batch, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the "embedding" and the wanted features.

        "layers" are the statistics of the vision tower and then of the text tower, "modalities" the
        unit embedding of each side; a missing side is zero in the former, NaN in the latter. In
        "pooled", a sample with one side has all its length there.
        """
        sides = [self._base_side(batch, side, "layers" in names) for side in self.modalities]
        whole = {
            "embedding": torch.cat([unit for unit, _ in sides], dim=1),
            "layers": torch.cat([statistics for _, statistics in sides], dim=1),
        }
        if "modalities" in names:
            absent = torch.stack([~self._has(batch, side) for side in self.modalities], dim=1)
            units = torch.stack([unit for unit, _ in sides], dim=1)
            whole["modalities"] = units.masked_fill(absent.unsqueeze(2), float("nan"))
        return {name: whole[name] for name in names}

    def _base_side(self, batch: Batch, side: str, statistics: bool) -> tuple[Tensor, Tensor]:
        """Return unit embeddings (b, p) and statistics (b, f or 0) of one side, zero if missing.

        Texts are run at full length, so that what is kept of a sample never depends on the others.
        """
        tower, rows = TOWERS[side], self._has(batch, side).nonzero()[:, 0]
        width = self._statistics(tower) if statistics else 0
        if len(rows) == 0:
            zeros = torch.zeros(len(batch), self.parts[side] + width, device=self.device)
            return zeros[:, : self.parts[side]], zeros[:, self.parts[side] :]
        part = batch.take(rows)
        modules = self.encoder.statistic_modules(tower) if statistics else ()
        mask = None
        with outputs_of(modules) as hidden:
            if side == "image":
                # What is kept of activations comes from forwards of as many rows each time.
                found = self.encoder.base_pass(replace(part, known=None), ("embedding",))
                unit = F.normalize(found["embedding"], dim=-1)
            else:
                tokens = self._tokens(part, trim=False)
                mask = tokens.get("attention_mask")
                unit = self._text(tokens)
        layers = layer_statistics(hidden, mask) if statistics else unit[:, :0]
        return _placed(unit, rows, len(batch)), _placed(layers, rows, len(batch))

    @property
    def parts(self) -> Mapping[str, int]:
        """Both sides' places in the shared image-text space."""
        return {side: self.encoder.width for side in self.modalities}

    def feature_widths(self) -> dict[str, int]:
        """Return the widths of "pooled", "layers" and (per modality) "modalities"."""
        statistics = sum(self._statistics(tower) for tower in self.towers)
        return {"pooled": self.width, "layers": statistics, "modalities": self.encoder.width}

    def _statistics(self, tower: str) -> int:
        config = getattr(self.config, f"{tower}_config")
        return 2 * len(statistic_layers(1 + len(self.blocks(tower)))) * int(config.hidden_size)

    def encode(self, batch: Batch, route: Route) -> Tensor:
        """Return [image; text] (b, 2p) under the route: unit vectors, zeros where one is missing.

        Each tower gets the route of the rows that it runs. A tower without experts is asked once
        per known sample; the text tower, whose sequences are short, has no prefix.
        """
        known = batch.known is not None and not self.has_other_weights
        sides: list[Tensor] = []
        base: Tensor | None = None
        for side, tower in TOWERS.items():
            if known and self.host.lowest(tower, route.alone) is None:
                if base is None:
                    base = self.encode_base(batch, features=False).embedding
                start = len(sides) * self.encoder.width
                sides.append(base[:, start : start + self.encoder.width])
            else:
                sides.append(self._side(batch, route, side))
        return torch.cat(sides, dim=1)

    def _side(self, batch: Batch, route: Route, side: str) -> Tensor:
        """Return the unit embeddings (b, p) of one side under the route, zeros where missing."""
        rows = self._has(batch, side).nonzero()[:, 0]
        if len(rows) == 0:
            return torch.zeros(len(batch), self.parts[side], device=self.device)
        part, route = batch.take(rows), route.take(rows)
        if side == "image":
            unit = F.normalize(self.encoder.encode(part, route), dim=-1)
        else:
            tokens = self._tokens(part, trim=True)
            summary = self.encoder.text_summary(tokens["input_ids"])
            self.host.set_route("text", replace(route, summary=summary))
            unit = self._text(tokens)
        return _placed(unit, rows, len(batch))

    def _text(self, tokens: Mapping[str, Tensor]) -> Tensor:
        return F.normalize(pooled(self.call("get_text_features", **tokens)), dim=-1)

    def _tokens(self, batch: Batch, *, trim: bool) -> dict[str, Tensor]:
        """Return what the text tower takes; SigLIP reads the last of all positions, unmasked."""
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        if self.encoder.is_siglip:
            return {"input_ids": ids}
        length = longest(mask) if trim else self.text_length
        return {"input_ids": ids[:, :length], "attention_mask": mask[:, :length]}

    def _has(self, batch: Batch, side: str) -> Tensor:
        everywhere = torch.ones(len(batch), dtype=torch.bool, device=self.device)
        return batch.present.get(side, everywhere)

    def prefix_of(self, batch: Batch, cut: int) -> Prefix:
        """Return what enters block ``cut`` of the untouched vision tower."""
        return self.encoder.prefix_of(batch, cut)

    @contextmanager
    def with_weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Run the model with other weights, in both towers."""
        with super().with_weights(weights), self.encoder.with_weights(weights):
            yield

    def describe(self) -> dict[str, Any]:
        """Return class, name and preprocessing, for the artefact."""
        return {**self.encoder.describe(), "type": "clip-fusion"}

    def preprocessing(self) -> str:
        """Return the dual encoder's and the text length."""
        return f"fusion/{self.text_length}/{self.encoder.preprocessing()}"

    def tower_inputs(self) -> dict[str, tuple[ModelFunction, dict[str, Tensor]]]:
        """Return each tower with one sample of full length."""
        return self.encoder.tower_inputs()

    def tokens(self, tower: str) -> int:
        """Return the length of a full sequence of a tower."""
        return self.encoder.tokens(tower)

    def blocks(self, tower: str) -> list[nn.Module]:
        """Return the transformer blocks of a tower, the lowest first."""
        return self.encoder.blocks(tower)

    def _empty_text(self) -> Tensor:
        if self._empty is None:
            self._empty = token_ids(self.encoder.processor, "", self.text_length)
        return self._empty


def _placed(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return (count, f) with ``values`` in the given rows and zeros elsewhere."""
    if len(rows) == count:
        return values
    return values.new_zeros(count, values.shape[1]).index_copy(0, rows, values)
