"""ViLT: one stream of text tokens and image patches (``ViltModel``), answered by learned heads.

Sequence: [text CLS, words, SEP, padding, image CLS, patches]. The embedding is the pooler's output,
tanh(W h) of the text CLS. A missing image is white, a missing text the empty one ([CLS] [SEP]);
which of them is missing comes from the data (``Batch.present``), never from pixels or tokens.

The model is used as it is, with its image embeddings handed in: its own ``visual_embed`` draws the
order of the patches at random (each with its own position, so only rounding and the global random
state would tell), and drops some at random where ``max_image_length`` says so.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.backbones.base import CROP_SCALE, Backbone, Batch, Prefix
from evolora.backbones.blocks import (
    VILT_LINEARS,
    block_indices,
    block_sites,
    layer_statistics,
    named_linears,
    outputs_of,
    run_block,
    statistic_layers,
)
from evolora.backbones.frozen import ModelFunction, config_of
from evolora.backbones.pixels import mean_std, normalized
from evolora.backbones.texts import interpolated, longest, padded, token_ids
from evolora.errors import ConfigError
from evolora.experts.sites import Site, SiteKind
from evolora.registry import BACKBONES
from evolora.routing.route import Route
from evolora.routing.spans import Span, Spans
from evolora.streams.images import random_resized_crop, read_image, resize_square
from evolora.streams.task import Example

TOWER = "multimodal"


@BACKBONES.register("vilt", summary="ViltModel: image and text in one stream, answered by heads")
class Vilt(Backbone):
    """A ``transformers`` ViLT with its processor.

    Args:
        model: ``ViltModel``, or a model that holds one (``ViltForMaskedLM``).
        processor: its processor (tokenizer and image processor), or None where only shapes count.
        name: what the user called it: hub name, folder, or embedded name.
        text_length: longest text in tokens; None is the model's own table of positions. A longer
            one has its rows interpolated from the model's.
    """

    towers = (TOWER,)
    cached_tower = TOWER
    modalities = ("image", "text")
    input_names = ("input_ids", "attention_mask", "pixel_values")
    kept_features = ("layers", "modalities", "heads")
    masked = True
    one_stream = True

    def __init__(
        self,
        model: nn.Module,
        processor: Any | None = None,
        *,
        name: str = "",
        text_length: int | None = None,
    ) -> None:
        model = getattr(model, "vilt", model)
        if getattr(getattr(model, "config", None), "model_type", "") != "vilt":
            raise ConfigError(f"expected a ViltModel, got {type(model).__name__}")
        if getattr(model, "pooler", None) is None:
            raise ConfigError("this ViltModel has no pooler, whose output is the embedding")
        self.config = config_of(model)
        table = int(self.config.max_position_embeddings)
        self.text_length = table if text_length is None else text_length
        if self.text_length < 2:
            raise ConfigError(f"text_length must be at least 2 ([CLS] [SEP]); got {text_length}")
        if self.text_length > table:
            model = _with_longer_texts(model, self.text_length)
        super().__init__(model)
        self.name = name
        self.processor = processor
        self.image_size = int(self.config.image_size)
        self.patches = (self.image_size // int(self.config.patch_size)) ** 2
        self._empty: Tensor | None = None

    def sites(
        self,
        kind: SiteKind,
        *,
        towers: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
        target_modules: Sequence[str] | None = (),
    ) -> list[Site]:
        """Return MLP or Linear sites; the Linears go by ViLT's names or by CLIP's."""
        self.check_towers(towers)
        chosen = self.default_targets if target_modules is None else target_modules
        targets = named_linears(chosen, VILT_LINEARS)
        blocks = self.blocks(TOWER)
        found: list[Site] = []
        for index in block_indices(layers, len(blocks), TOWER):
            found += block_sites(
                blocks[index],
                kind,
                TOWER,
                index,
                linears=VILT_LINEARS,
                targets=targets,
                mlp=("output", "layernorm_after"),  # this "output" adds the residual by itself
            )
        return found

    def prepare(
        self, example: Example, draw: torch.Generator | None = None
    ) -> Mapping[str, Tensor]:
        """Return {"image": uint8 (3, s, s), "text": int32 (n,)}, without what is missing.

        The whole image is resized to the square, as in DeLo; with ``draw`` a random part of it.
        """
        self.check_modalities(example)
        found: dict[str, Tensor] = {}
        if "image" in example.inputs:
            image = read_image(example.inputs["image"])
            found["image"] = (
                resize_square(image, self.image_size)
                if draw is None
                else random_resized_crop(image, self.image_size, draw, scale=CROP_SCALE)
            )
        if "text" in example.inputs:
            found["text"] = token_ids(self.processor, example.inputs["text"], self.text_length)
        return found

    def inputs_of(self, prepared: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return token ids and mask (b, text_length) and pixels (b, 3, s, s)."""
        texts = [one.get("text", self._empty_text()) for one in prepared]
        size = self.image_size
        white = torch.full((3, size, size), 255, dtype=torch.uint8)
        images = torch.stack([one.get("image", white) for one in prepared]).to(self.device)
        tokens = padded(texts, self.text_length, int(self.config.pad_token_id or 0))
        return {
            **{name: value.to(self.device) for name, value in tokens.items()},
            "pixel_values": normalized(images, *mean_std(self.processor)),
        }

    def base_pass(self, batch: Batch, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the "embedding" and the wanted features.

        Texts are run at full length, so that what is kept of a sample never depends on the others.
        "layers": statistics over all tokens that are no padding, the constants in place of a
        missing modality included. "modalities": mean of the last hidden states over each modality.
        "heads": the last hidden state of each modality's class token, (b, m, d), in the order of
        the modalities; NaN where the sample lacks it.
        """
        inputs = dict(batch.inputs)
        spans = self.spans(batch, inputs["attention_mask"])
        model: Any = self.model
        states = [model.embeddings, *self.blocks(TOWER)]
        watched = [states[index] for index in statistic_layers(len(states))]
        watched = watched if "layers" in names else []
        with outputs_of(watched) as hidden, self.keeping_prefix(batch, spans.mask):
            output = self.call(self._run, **inputs)
        found = {"embedding": output.pooler_output}
        if "layers" in names:
            found["layers"] = layer_statistics(hidden, spans.mask)
        if "modalities" in names:
            means = F.normalize(spans.means(output.last_hidden_state), dim=-1)
            found["modalities"] = means.masked_fill(~spans.present.unsqueeze(2), float("nan"))
        if "heads" in names:
            heads = spans.heads(output.last_hidden_state)
            found["heads"] = heads.masked_fill(~spans.present.unsqueeze(2), float("nan"))
        return found

    @property
    def parts(self) -> Mapping[str, int]:
        """The pooled state, which both modalities share."""
        return {TOWER: int(self.config.hidden_size)}

    def feature_widths(self) -> dict[str, int]:
        """Return the widths of "pooled", "layers" and (per modality) "modalities" and "heads"."""
        statistics = 2 * len(statistic_layers(1 + len(self.blocks(TOWER)))) * self.width
        widths = dict.fromkeys(("pooled", "modalities", "heads"), self.width)
        return {**widths, "layers": statistics}

    @property
    def pooler_site(self) -> Site:
        """The pooler, behind the highest block."""
        model: Any = self.model
        return Site(
            tower=TOWER,
            layer=len(self.blocks(TOWER)) - 1,
            name=f"{TOWER}.{len(self.blocks(TOWER)) - 1}.pooler",
            kind="linear",
            module=model.pooler,
            d_in=self.width,
            d_out=self.width,
        )

    def encode(self, batch: Batch, route: Route) -> Tensor:
        """Return the pooled state (b, p) under the route; sites get it with its ``spans``."""
        prefix = self.known_prefix(batch, route)
        if prefix is not None:
            assert prefix.mask is not None
            tokens = prefix.mask[:, : self.text_length]
            self.host.set_route(TOWER, replace(route, spans=self._cut(batch, tokens)))
            return self._go_on(prefix)
        lowest = self.host.lowest(TOWER, route.alone)
        if batch.known and not self.has_other_weights and lowest is None:
            return self.encode_base(batch, features=False).embedding
        inputs = dict(batch.inputs)
        length = longest(inputs["attention_mask"])
        for name in ("input_ids", "attention_mask"):
            inputs[name] = inputs[name][:, :length]
        spans = self.spans(batch, inputs["attention_mask"])
        self.host.set_route(TOWER, replace(route, spans=spans))
        pooled: Tensor = self.call(self._run, **inputs).pooler_output
        return pooled

    def spans(self, batch: Batch, tokens: Tensor) -> Spans:
        """Return where the modalities of a batch stand, given its text mask (b, n)."""
        length = tokens.shape[1]
        everywhere = torch.ones(len(batch), dtype=torch.bool, device=tokens.device)
        present = [batch.present.get(modality, everywhere) for modality in self.modalities]
        image = torch.ones(len(batch), 1 + self.patches, dtype=torch.bool, device=tokens.device)
        return Spans(
            of={
                "image": Span(start=length, stop=length + 1 + self.patches),
                "text": Span(start=0, stop=length, head=1),
            },
            mask=torch.cat([tokens.bool(), image], dim=1),
            present=torch.stack(present, dim=1),
        )

    def _cut(self, batch: Batch, tokens: Tensor) -> Spans:
        return self.spans(batch, tokens[:, : longest(tokens)])

    def prefix_of(self, batch: Batch, cut: int) -> Prefix:
        """Return what enters block ``cut`` of the untouched model, texts padded to full length."""
        depth = len(self.blocks(TOWER))
        if not 0 <= cut < depth:
            raise ConfigError(f"the {TOWER} tower has blocks 0 to {depth - 1}; got cut {cut}")
        hidden = self.entering_block(TOWER, cut, self._run, dict(batch.inputs))[0]
        mask = self.spans(batch, batch.inputs["attention_mask"]).mask
        return Prefix(cut=cut, hidden=hidden, mask=mask)

    def _go_on(self, prefix: Prefix) -> Tensor:
        """Run a block and all above it, norm and pooler, as the model's own forward does."""
        assert prefix.mask is not None
        length = longest(prefix.mask[:, : self.text_length])
        hidden, mask = (
            torch.cat([value[:, :length], value[:, self.text_length :]], dim=1)
            for value in (prefix.hidden, prefix.mask)
        )
        # what transformers makes of a mask for attention that is computed in plain view
        barred = torch.zeros(mask.shape, dtype=hidden.dtype, device=hidden.device)
        barred = barred.masked_fill(~mask, torch.finfo(hidden.dtype).min)[:, None, None, :]
        for block in self.blocks(TOWER)[prefix.cut :]:
            hidden = run_block(block, hidden, barred)
        model: Any = self.model
        pooled: Tensor = model.pooler(model.layernorm(hidden))
        return pooled

    def _run(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Any:
        return run_in_order(self.model, input_ids, attention_mask, pixel_values)

    def _run_shapes(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        """Run on the meta device, where the stock forward cannot look at its mask."""
        model: Any = self.model
        text = model.embeddings.text_embeddings(input_ids=input_ids)
        hidden = torch.cat([text, image_embeddings(model, pixel_values)], dim=1)
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return self._go_on(Prefix(cut=0, hidden=hidden, mask=mask))

    def describe(self) -> dict[str, Any]:
        """Return class, name and preprocessing, for the artefact."""
        mean, std = mean_std(self.processor)
        return {
            "type": "vilt",
            "class": type(self.model).__name__,
            "name_or_path": self.name,
            "sha256": self.fingerprint(),
            "text_length": self.text_length,
            "image_size": self.image_size,
            "image_mean": [round(v, 6) for v in mean.tolist()],
            "image_std": [round(v, 6) for v in std.tolist()],
        }

    def preprocessing(self) -> str:
        """Return text length, image size, mean and deviation."""
        mean, std = mean_std(self.processor)
        return f"{self.text_length}/{self.image_size}/{mean.tolist()}/{std.tolist()}"

    def tower_inputs(self) -> dict[str, tuple[ModelFunction, dict[str, Tensor]]]:
        """Return the model with one image and one text of full length."""
        size = self.image_size
        tokens = torch.ones(1, self.text_length, dtype=torch.long, device="meta")
        images = torch.empty(1, 3, size, size, device="meta")
        return {TOWER: (self._run_shapes, {"input_ids": tokens, "pixel_values": images})}

    def tokens(self, tower: str) -> int:
        """Return the length of a full sequence."""
        return self.text_length + 1 + self.patches

    def blocks(self, tower: str) -> list[nn.Module]:
        """Return the transformer blocks, the lowest first."""
        model: Any = self.model
        return list(model.encoder.layer)

    def without(self, batch: Batch, lost: Mapping[str, Tensor]) -> Batch:
        """Return the batch as if rows lacked a modality: modality -> (b,) bool."""
        inputs = dict(batch.inputs)
        if "image" in lost:
            white = self.inputs_of([{"text": self._empty_text()}])["pixel_values"]
            rows = lost["image"].view(-1, 1, 1, 1)
            inputs["pixel_values"] = torch.where(rows, white, inputs["pixel_values"])
        if "text" in lost:
            empty = padded([self._empty_text()], self.text_length, self.config.pad_token_id or 0)
            for name, value in empty.items():
                rows = lost["text"].view(-1, 1)
                inputs[name] = torch.where(rows, value.to(self.device), inputs[name])
        return replace(super().without(batch, lost), inputs=inputs)

    def _empty_text(self) -> Tensor:
        if self._empty is None:
            self._empty = token_ids(self.processor, "", self.text_length)
        return self._empty


def run_in_order(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor
) -> Any:
    """Return the output of a ``ViltModel``'s own forward, with patches in their own order."""
    images = image_embeddings(model, pixel_values)
    return model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        image_embeds=images,
        pixel_mask=torch.ones(images.shape[:2], dtype=torch.long, device=images.device),
    )


def image_embeddings(model: Any, pixel_values: Tensor) -> Tensor:
    """Return the image CLS and the patches (b, n, d) of a ``ViltModel``, each with its position."""
    patches = model.embeddings.patch_embeddings(pixel_values).flatten(2).transpose(1, 2)
    first = model.embeddings.cls_token.expand(len(patches), -1, -1)
    embedded: Tensor = torch.cat([first, patches], dim=1) + model.embeddings.position_embeddings
    return embedded


def _with_longer_texts(model: nn.Module, length: int) -> nn.Module:
    """Return the model with a longer table of text positions; all other weights are shared."""
    own = [*model.parameters(), *model.buffers()]
    longer: Any = copy.deepcopy(model, {id(tensor): tensor for tensor in own})
    text = longer.embeddings.text_embeddings
    table = interpolated(text.position_embeddings.weight, length)
    text.position_embeddings = nn.Embedding(length, table.shape[1], _weight=table)
    text.position_ids = torch.arange(length, device=table.device).expand(1, -1)
    text.token_type_ids = torch.zeros(1, length, dtype=torch.long, device=table.device)
    longer.config.max_position_embeddings = length
    return longer  # type: ignore[no-any-return]
