"""CLIP-like dual encoders (``CLIPModel``, ``SiglipModel``): images against class-name prompts.

logits = exp(logit_scale) * cos(image, text) (+ logit_bias for SigLIP). Class prompts are encoded
with the same task's experts as the images that are compared with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.backbones.base import Backbone, Batch, Encoded
from evolora.backbones.blocks import (
    LINEARS,
    block_indices,
    layer_statistics,
    linear_site,
    mlp_site,
    statistic_layers,
)
from evolora.backbones.memory import Known
from evolora.backbones.prompts import PromptEncoder, pooled
from evolora.errors import ConfigError, unknown_name
from evolora.experts.sites import Site, SiteKind
from evolora.randomness import StepRandom, generator
from evolora.registry import BACKBONES
from evolora.routing.route import Route
from evolora.streams.images import random_resized_crop, read_image, resize_center_crop
from evolora.streams.task import Example, LabelSpace

CROP_SCALE = (0.9, 1.0)
"""Area kept by the training crop (MoE-Adapters, RandomResizedCrop 0.9-1.0, bicubic)."""


@BACKBONES.register(
    "dual-encoder", summary="CLIPModel and SiglipModel: images against class-name prompts"
)
class DualEncoder(Backbone):
    """A ``transformers`` CLIP or SigLIP with its processor.

    Args:
        model: ``CLIPModel`` or ``SiglipModel``.
        processor: its processor (tokenizer and image processor), or None where only shapes count.
        name: what the user called it: hub name, folder, or embedded name.
    """

    towers = ("vision", "text")

    def __init__(self, model: nn.Module, processor: Any | None = None, *, name: str = "") -> None:
        if not (hasattr(model, "vision_model") and hasattr(model, "text_model")):
            raise ConfigError(
                f"expected a dual encoder (CLIPModel, SiglipModel), got {type(model).__name__}"
            )
        super().__init__(model)
        self.name = name
        self.processor = processor
        self.config: Any = getattr(model, "config")  # noqa: B009 - a Module's attributes are untyped
        self.is_siglip = not hasattr(model, "visual_projection")
        self.image_size = int(self.config.vision_config.image_size)
        self.vision_summary = "mean" if self.is_siglip else "first"  # SigLIP has no class token
        self.prompts = PromptEncoder(self)

    def sites(
        self,
        kind: SiteKind,
        *,
        towers: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
        target_modules: Sequence[str] = (),
    ) -> list[Site]:
        """Return MLP or Linear sites; see :class:`evolora.experts.sites.Site`."""
        wanted = tuple(towers or self.towers)
        for tower in wanted:
            if tower not in self.towers:
                raise unknown_name("tower", tower, self.towers)
        for target in target_modules:
            if target not in LINEARS:
                raise unknown_name("target module", target, LINEARS)
        found: list[Site] = []
        for tower in wanted:
            blocks: Any = getattr(self.model, f"{tower}_model").encoder.layers
            for index in block_indices(layers, len(blocks), tower):
                block = blocks[index]
                if kind == "mlp":
                    found.append(mlp_site(block, tower, index))
                else:
                    found.extend(linear_site(block, tower, index, t) for t in target_modules)
        return found

    def collate(
        self,
        examples: Sequence[Example],
        *,
        task: int | None = None,
        random: StepRandom | None = None,
    ) -> Batch:
        """Return normalised pixels (b, 3, s, s); with ``random``, a random resized crop each."""
        crops = []
        for row, example in enumerate(examples):
            if random is None:
                crops.append(self.prepare(example))
            else:
                draw = generator(random.seed, "crop", random.first_row + row)
                image = read_image(example.inputs["image"])
                crops.append(random_resized_crop(image, self.image_size, draw, scale=CROP_SCALE))
        return Batch(
            inputs=self.inputs_of(crops),
            labels=torch.tensor([example.label for example in examples], device=self.device),
            keys=tuple(example.key for example in examples),
            task=task,
            random=random,
        )

    def prepare(self, example: Example) -> Tensor:
        """Return the centre crop, uint8 (3, s, s)."""
        return resize_center_crop(read_image(example.inputs["image"]), self.image_size)

    def inputs_of(self, prepared: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return {"pixel_values": (b, 3, s, s)} of uint8 crops."""
        return {"pixel_values": self.normalize(torch.stack(list(prepared)))}

    def preprocessing(self) -> str:
        """Return size, mean and deviation."""
        mean, std = self._mean_std()
        return f"{self.image_size}/{mean.tolist()}/{std.tolist()}"

    def normalize(self, images: Tensor) -> Tensor:
        """Return uint8 images (b, 3, s, s) as the floats the vision tower was trained on."""
        images = images.to(self.device)
        mean, std = self._mean_std()
        shape = (1, 3, 1, 1)
        scaled = images.float() / 255.0
        return (scaled - mean.to(self.device).view(shape)) / std.to(self.device).view(shape)

    def encode_base(self, batch: Batch, *, features: bool = True) -> Encoded:
        """Run the untouched vision tower; the routing features come from the same pass."""
        names = ("embedding", "layers") if features else ("embedding",)
        if batch.known is None or self.has_other_weights:
            results: Mapping[str, Tensor] = self._base_pass(batch, names)
        else:
            results = batch.known.memory.passes.fetch(
                names,
                batch.known.samples,
                lambda rows: self._base_pass(batch.take(rows), names),
                context=self.context(),
            )
        embedding = results["embedding"].to(self.device)
        if not features:
            return Encoded(embedding=embedding)
        layers = results["layers"].to(self.device)
        return Encoded(
            embedding=embedding,
            features={"pooled": F.normalize(embedding, dim=-1), "layers": layers},
        )

    def _base_pass(self, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the base's embedding and, where it is wanted, the statistics of its layers."""
        with torch.no_grad(), self.host.disabled():
            if "layers" not in names:
                return {"embedding": self._image_embedding(batch)}
            tower: Any = getattr(self.model, "vision_model")  # noqa: B009 - untyped
            outputs = (tower.embeddings, *self.blocks("vision"))
            hidden: list[Tensor] = []
            handles = [
                outputs[index].register_forward_hook(lambda _, __, out: hidden.append(out))
                for index in statistic_layers(len(outputs))
            ]
            try:
                embedding = self._image_embedding(batch)
            finally:
                for handle in handles:
                    handle.remove()
            return {"embedding": embedding, "layers": layer_statistics(hidden)}

    @property
    def width(self) -> int:
        """Width of the shared image-text space."""
        if self.is_siglip:
            return int(self.config.vision_config.hidden_size)
        return int(self.config.projection_dim)

    def feature_widths(self) -> dict[str, int]:
        """Return the widths of "pooled" and "layers"."""
        depth = 1 + len(self.blocks("vision"))
        statistics = 2 * len(statistic_layers(depth)) * self.config.vision_config.hidden_size
        return {"pooled": self.width, "layers": statistics}

    def encode(self, batch: Batch, route: Route) -> Tensor:
        """Return L2-normalisable image embeddings (b, p) under the route."""
        self.host.set_route("vision", route)
        if self.has_other_weights:
            return self._image_embedding(batch)
        cut = self.host.lowest("vision")
        if batch.prefix is not None:
            return self._go_on(batch.prefix.hidden, batch.prefix.cut)
        if batch.known is None or not self.host.enabled or cut == 0:
            return self._image_embedding(batch)
        if cut is None:  # no expert stands in this tower
            return self.encode_base(batch, features=False).embedding
        if batch.known.memory.prefixes is None:
            return self._image_embedding(batch)
        return self._go_on(self._known_prefix(batch, batch.known, cut), cut)

    def _known_prefix(self, batch: Batch, known: Known, cut: int) -> Tensor:
        assert known.memory.prefixes is not None
        name = f"prefix {cut}"
        found = known.memory.prefixes.fetch(
            (name,),
            known.samples,
            lambda rows: {name: self.prefix(batch.take(rows), cut)},
            context=self.context(),
        )
        dtype = next(self.model.parameters()).dtype
        return found[name].to(self.device, dtype, non_blocking=True)

    def prefix(self, batch: Batch, cut: int) -> Tensor:
        """Return the activations (b, n, d) that enter block ``cut`` of the untouched tower."""
        depth = len(self.blocks("vision"))
        if not 0 <= cut < depth:
            raise ConfigError(f"the vision tower has blocks 0 to {depth - 1}; got cut {cut}")
        inputs = {"pixel_values": batch.inputs["pixel_values"]}
        return self.entering_block("vision", cut, "get_image_features", inputs)[0]

    def _go_on(self, hidden: Tensor, cut: int) -> Tensor:
        """Run block ``cut`` of the vision tower and all above it, as its own forward does."""
        for block in self.blocks("vision")[cut:]:
            hidden = block(hidden, None)
        model: Any = self.model
        tower = model.vision_model
        if self.is_siglip:
            embedding: Tensor = tower.head(tower.post_layernorm(hidden))
        else:
            embedding = model.visual_projection(tower.post_layernorm(hidden[:, 0]))
        return embedding

    def class_embeddings(
        self,
        labels: LabelSpace,
        task: int,
        *,
        random: StepRandom | None = None,
        classes: Sequence[int] | None = None,
        ensemble: bool = True,
        version: int = 0,
        reuse: bool = True,
    ) -> Tensor:
        """Return unit-length class embeddings (c, p).

        Args:
            labels: class names and templates.
            task: whose experts run in the text tower, or BASE.
            random: randomness of a training step.
            classes: encode only these class indices, in this order.
            ensemble: average the normalised embeddings of all templates and normalise again;
                False uses the first template (training).
            version: state of the experts; a cached result of another state is not used.
            reuse: go on from what the prompts are below the lowest expert, computed once; False
                encodes them from their tokens each time.
        """
        return self.prompts.class_embeddings(
            labels,
            task,
            random=random,
            classes=classes,
            ensemble=ensemble,
            version=version,
            reuse=reuse,
        )

    def forget_classes(self) -> None:
        """Drop cached class embeddings of learned tasks; the base's stay valid for ever."""
        self.prompts.forget()

    def logits(self, embedding: Tensor, classes: Tensor) -> Tensor:
        """Return scaled cosine similarities (b, c)."""
        model: Any = self.model
        scores: Tensor = F.normalize(embedding, dim=-1) @ classes.T * model.logit_scale.exp()
        return scores + model.logit_bias if self.is_siglip else scores

    def text_summary(self, input_ids: Tensor) -> Tensor:
        """Return (c,) index of the token a prompt is read out at: its end token."""
        return self.prompts.summary(input_ids)

    def tokenize(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """Return token tensors, padded to the longest prompt (SigLIP: to its maximum)."""
        tokens = self.prompts.tokenize(prompts)
        return {name: value.to(self.device) for name, value in tokens.items()}

    def describe(self) -> dict[str, Any]:
        """Return class, name and preprocessing, for the artefact."""
        mean, std = self._mean_std()
        return {
            "type": "dual-encoder",
            "class": type(self.model).__name__,
            "name_or_path": self.name,
            "sha256": self.fingerprint(),
            "image_size": self.image_size,
            "image_mean": [round(v, 6) for v in mean.tolist()],
            "image_std": [round(v, 6) for v in std.tolist()],
        }

    def _image_embedding(self, batch: Batch) -> Tensor:
        return pooled(self.call("get_image_features", pixel_values=batch.inputs["pixel_values"]))

    def blocks(self, tower: str) -> list[nn.Module]:
        """Return the transformer blocks of a tower, the lowest first."""
        found: Any = getattr(self.model, f"{tower}_model").encoder.layers
        return list(found)

    def _mean_std(self) -> tuple[Tensor, Tensor]:
        image = getattr(self.processor, "image_processor", self.processor)
        mean = getattr(image, "image_mean", None) or (0.5, 0.5, 0.5)
        std = getattr(image, "image_std", None) or (0.5, 0.5, 0.5)
        return torch.tensor(mean), torch.tensor(std)
