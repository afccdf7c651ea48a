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

from evolora.backbones.base import CROP_SCALE, Batch, Prefix, PromptBackbone
from evolora.backbones.blocks import (
    LINEARS,
    block_indices,
    block_sites,
    layer_statistics,
    named_linears,
    outputs_of,
    statistic_layers,
)
from evolora.backbones.frozen import ModelFunction, config_of
from evolora.backbones.pixels import mean_std, normalized
from evolora.backbones.prompts import PromptEncoder, pooled
from evolora.errors import ConfigError
from evolora.experts.sites import Site, SiteKind
from evolora.randomness import StepRandom
from evolora.registry import BACKBONES
from evolora.routing.route import Route
from evolora.streams.images import random_resized_crop, read_image, resize_center_crop
from evolora.streams.task import Example, LabelSpace


@BACKBONES.register(
    "dual-encoder", summary="CLIPModel and SiglipModel: images against class-name prompts"
)
class DualEncoder(PromptBackbone):
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
        self.config = config_of(model)
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
        target_modules: Sequence[str] | None = (),
    ) -> list[Site]:
        """Return MLP or Linear sites; see :class:`evolora.experts.sites.Site`."""
        wanted = tuple(towers or self.towers)
        self.check_towers(wanted)
        chosen = self.default_targets if target_modules is None else target_modules
        targets = named_linears(chosen, LINEARS)
        found: list[Site] = []
        for tower in wanted:
            blocks: Any = getattr(self.model, f"{tower}_model").encoder.layers
            for index in block_indices(layers, len(blocks), tower):
                found += block_sites(
                    blocks[index],
                    kind,
                    tower,
                    index,
                    linears=LINEARS,
                    targets=targets,
                    mlp=("mlp", "layer_norm2"),
                )
        return found

    def prepare(
        self, example: Example, draw: torch.Generator | None = None
    ) -> Mapping[str, Tensor]:
        """Return {"image": uint8 (3, s, s)}: the centre crop, or a random one."""
        self.check_modalities(example)
        image = read_image(example.inputs["image"])
        if draw is None:
            return {"image": resize_center_crop(image, self.image_size)}
        return {"image": random_resized_crop(image, self.image_size, draw, scale=CROP_SCALE)}

    def inputs_of(self, prepared: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return {"pixel_values": (b, 3, s, s)} of uint8 crops."""
        return {"pixel_values": self.normalize(torch.stack([one["image"] for one in prepared]))}

    def preprocessing(self) -> str:
        """Return size, mean and deviation."""
        mean, std = mean_std(self.processor)
        return f"{self.image_size}/{mean.tolist()}/{std.tolist()}"

    def normalize(self, images: Tensor) -> Tensor:
        """Return uint8 images (b, 3, s, s) as the floats the vision tower was trained on."""
        return normalized(images.to(self.device), *mean_std(self.processor))

    def base_pass(self, batch: Batch, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the image "embedding" and, where it is wanted, the statistics of the "layers"."""
        watched = self.statistic_modules("vision") if "layers" in names else ()
        with outputs_of(watched) as hidden, self.keeping_prefix(batch):
            found = {"embedding": self._image_embedding(batch)}
        if "layers" in names:
            found["layers"] = layer_statistics(hidden)
        return found

    def statistic_modules(self, tower: str) -> list[nn.Module]:
        """Return the modules of a tower whose outputs the "layers" feature is made of."""
        embeddings: nn.Module = getattr(self.model, f"{tower}_model").embeddings
        outputs = [embeddings, *self.blocks(tower)]
        return [outputs[index] for index in statistic_layers(len(outputs))]

    @property
    def parts(self) -> Mapping[str, int]:
        """The image's place in the shared image-text space."""
        config = self.config
        return {
            "image": int(
                config.vision_config.hidden_size if self.is_siglip else config.projection_dim
            )
        }

    def feature_widths(self) -> dict[str, int]:
        """Return the widths of "pooled", "layers" and (per modality) "modalities"."""
        depth = 1 + len(self.blocks("vision"))
        statistics = 2 * len(statistic_layers(depth)) * self.config.vision_config.hidden_size
        return {"pooled": self.width, "layers": statistics, "modalities": self.width}

    def encode(self, batch: Batch, route: Route) -> Tensor:
        """Return L2-normalisable image embeddings (b, p) under the route."""
        self.host.set_route("vision", route)
        prefix = self.known_prefix(batch, route)
        if prefix is not None:
            return self._go_on(prefix.hidden, prefix.cut)
        lowest = self.host.lowest("vision", route.alone)
        if batch.known and not self.has_other_weights and lowest is None:
            return self.encode_base(batch, features=False).embedding
        return self._image_embedding(batch)

    def prefix_of(self, batch: Batch, cut: int) -> Prefix:
        """Return what enters block ``cut`` of the untouched vision tower."""
        depth = len(self.blocks("vision"))
        if not 0 <= cut < depth:
            raise ConfigError(f"the vision tower has blocks 0 to {depth - 1}; got cut {cut}")
        inputs = {"pixel_values": batch.inputs["pixel_values"]}
        hidden = self.entering_block("vision", cut, "get_image_features", inputs)[0]
        return Prefix(cut=cut, hidden=hidden)

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
        mean, std = mean_std(self.processor)
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

    def tower_inputs(self) -> dict[str, tuple[ModelFunction, dict[str, Tensor]]]:
        """Return the vision tower with one image, the text tower with one prompt of full length."""
        size = self.image_size
        images = torch.empty(1, 3, size, size, device="meta")
        prompts = torch.zeros(1, self.tokens("text"), dtype=torch.long, device="meta")
        return {
            "vision": ("get_image_features", {"pixel_values": images}),
            "text": ("get_text_features", {"input_ids": prompts}),
        }

    def tokens(self, tower: str) -> int:
        """Return the length of a full sequence of a tower."""
        if tower == "text":
            return int(self.config.text_config.max_position_embeddings)
        vision = self.config.vision_config
        return int(vision.image_size // vision.patch_size) ** 2 + (0 if self.is_siglip else 1)

    def blocks(self, tower: str) -> list[nn.Module]:
        """Return the transformer blocks of a tower, the lowest first."""
        found: Any = getattr(self.model, f"{tower}_model").encoder.layers
        return list(found)
