"""CLIP-like dual encoders (``CLIPModel``, ``SiglipModel``): images against class-name prompts.

logits = exp(logit_scale) * cos(image, text) (+ logit_bias for SigLIP). Class prompts are encoded
with the same task's experts as the images that are compared with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.backbones.base import Backbone, Batch, Encoded
from evolora.errors import ConfigError, DataError, suggest, unknown_name
from evolora.experts.sites import Site, SiteKind
from evolora.randomness import StepRandom, generator
from evolora.registry import BACKBONES
from evolora.routing.route import BASE, Route
from evolora.streams.images import random_resized_crop, read_image, resize_center_crop
from evolora.streams.task import Example, LabelSpace

PROMPTS_PER_FORWARD = 512
"""Class prompts are encoded in chunks of so many rows."""
LINEARS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "out_proj": "self_attn.out_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
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
        self._classes: dict[tuple[Any, ...], Tensor] = {}

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
            for index in _layers(layers, len(blocks), tower):
                block = blocks[index]
                if kind == "mlp":
                    found.append(_mlp_site(block, tower, index))
                else:
                    found.extend(_linear_site(block, tower, index, t) for t in target_modules)
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
            image = read_image(example.inputs["image"])
            if random is None:
                crops.append(resize_center_crop(image, self.image_size))
            else:
                draw = generator(random.seed, "crop", random.first_row + row)
                crops.append(random_resized_crop(image, self.image_size, draw, scale=CROP_SCALE))
        return Batch(
            inputs={"pixel_values": self.normalize(torch.stack(crops))},
            labels=torch.tensor([example.label for example in examples], device=self.device),
            keys=tuple(example.key for example in examples),
            task=task,
            random=random,
        )

    def normalize(self, images: Tensor) -> Tensor:
        """Return uint8 images (b, 3, s, s) as the floats the vision tower was trained on."""
        images = images.to(self.device)
        mean, std = self._mean_std()
        shape = (1, 3, 1, 1)
        scaled = images.float() / 255.0
        return (scaled - mean.to(self.device).view(shape)) / std.to(self.device).view(shape)

    def encode_base(self, batch: Batch, *, features: bool = True) -> Encoded:
        """Run the untouched vision tower; the routing features come from the same pass."""
        with torch.no_grad(), self.host.disabled():
            if not features:
                return Encoded(embedding=self._image_embedding(batch))
            hidden: list[Tensor] = []
            tower: Any = getattr(self.model, "vision_model")  # noqa: B009 - untyped
            handles = [
                module.register_forward_hook(lambda _, __, out: hidden.append(out))
                for module in (tower.embeddings, *self._blocks("vision"))
            ]
            try:
                embedding = self._image_embedding(batch)
            finally:
                for handle in handles:
                    handle.remove()
        return Encoded(
            embedding=embedding,
            features={"pooled": F.normalize(embedding, dim=-1), "layers": layer_statistics(hidden)},
        )

    @property
    def width(self) -> int:
        """Width of the shared image-text space."""
        if self.is_siglip:
            return int(self.config.vision_config.hidden_size)
        return int(self.config.projection_dim)

    def feature_widths(self) -> dict[str, int]:
        """Return the widths of "pooled" and "layers"."""
        depth = 1 + len(self._blocks("vision"))
        statistics = 2 * len(_statistic_layers(depth)) * self.config.vision_config.hidden_size
        return {"pooled": self.width, "layers": statistics}

    def encode(self, batch: Batch, route: Route) -> Tensor:
        """Return L2-normalisable image embeddings (b, p) under the route."""
        self.host.set_route("vision", route)
        return self._image_embedding(batch)

    def class_embeddings(
        self,
        labels: LabelSpace,
        task: int,
        *,
        random: StepRandom | None = None,
        classes: Sequence[int] | None = None,
        ensemble: bool = True,
        version: int = 0,
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
        """
        cacheable = not torch.is_grad_enabled() and random is None
        key = (task, version, labels, tuple(classes) if classes is not None else None, ensemble)
        if cacheable and key in self._classes:
            return self._classes[key]
        names = labels.classes if classes is None else [labels.classes[i] for i in classes]
        templates = labels.templates if ensemble else labels.templates[:1]
        prompts = [template.format(name) for template in templates for name in names]
        # One forward where gradients flow: a backward that recomputes must still find its route,
        # and noise is drawn per row of a forward.
        size = PROMPTS_PER_FORWARD if cacheable else len(prompts)
        rows = torch.cat(
            [
                self._text_embedding(prompts[start : start + size], task, random)
                for start in range(0, len(prompts), size)
            ]
        )
        unit = F.normalize(rows, dim=-1).view(len(templates), len(names), -1)
        result = F.normalize(unit.mean(dim=0), dim=-1)
        if cacheable:
            self._classes[key] = result
        return result

    def forget_classes(self) -> None:
        """Drop cached class embeddings of learned tasks; the base's stay valid for ever."""
        self._classes = {key: value for key, value in self._classes.items() if key[0] == BASE}

    def logits(self, embedding: Tensor, classes: Tensor) -> Tensor:
        """Return scaled cosine similarities (b, c)."""
        model: Any = self.model
        scores: Tensor = F.normalize(embedding, dim=-1) @ classes.T * model.logit_scale.exp()
        return scores + model.logit_bias if self.is_siglip else scores

    def text_summary(self, input_ids: Tensor) -> Tensor:
        """Return (c,) index of the token a prompt is read out at: its end token."""
        if self.is_siglip:
            return torch.full(
                (input_ids.shape[0],), input_ids.shape[1] - 1, device=input_ids.device
            )
        end = self.config.text_config.eos_token_id
        hits = input_ids == end if end != 2 else input_ids == input_ids.max(dim=1, keepdim=True)[0]
        return hits.int().argmax(dim=1)

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
        return _pooled(self.call("get_image_features", pixel_values=batch.inputs["pixel_values"]))

    def _text_embedding(self, prompts: list[str], task: int, random: StepRandom | None) -> Tensor:
        tokens = self.tokenize(prompts)
        route = Route.of(
            task,
            len(prompts),
            device=self.device,
            summary=self.text_summary(tokens["input_ids"]),
            random=random,
        )
        self.host.set_route("text", route)
        return _pooled(self.call("get_text_features", **tokens))

    def tokenize(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """Return token tensors, padded to the longest prompt (SigLIP: to its maximum)."""
        if self.processor is None:
            raise ConfigError("this backbone was built without a processor; it has shapes only")
        limit = int(self.config.text_config.max_position_embeddings)
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        tokens = tokenizer(
            list(prompts),
            padding="max_length" if self.is_siglip else True,
            truncation=True,
            max_length=limit,
            return_tensors="pt",
        )
        names = ("input_ids",) if self.is_siglip else ("input_ids", "attention_mask")
        return {name: tokens[name].to(self.device) for name in names if name in tokens}

    def _blocks(self, tower: str) -> list[nn.Module]:
        blocks: Any = getattr(self.model, f"{tower}_model").encoder.layers
        return list(blocks)

    def _mean_std(self) -> tuple[Tensor, Tensor]:
        image = getattr(self.processor, "image_processor", self.processor)
        mean = getattr(image, "image_mean", None) or (0.5, 0.5, 0.5)
        std = getattr(image, "image_std", None) or (0.5, 0.5, 0.5)
        return torch.tensor(mean), torch.tensor(std)


def layer_statistics(hidden: Sequence[Tensor]) -> Tensor:
    """Return (b, f): mean and standard deviation over tokens at four depths of a tower.

    Low layers tell the style of an image, high layers its content; a selector needs both. Each
    statistic is normalised over its width, so that no layer outweighs another.
    """
    parts = []
    for index in _statistic_layers(len(hidden)):
        tokens = hidden[index].float()
        parts.append(F.layer_norm(tokens.mean(dim=1), tokens.shape[2:]))
        parts.append(F.layer_norm(tokens.std(dim=1), tokens.shape[2:]))
    return torch.cat(parts, dim=1)


def _statistic_layers(depth: int) -> list[int]:
    """Return four of ``depth`` tensors, the embeddings first and the last block last."""
    return sorted({round((depth - 1) * share / 3) for share in range(4)})


def load_dual_encoder(name_or_path: str, *, revision: str | None = None) -> DualEncoder:
    """Return a backbone from a hub name, a local folder or an embedded name ("clip-tiny").

    Raises:
        DataError: nothing loadable is there; says where it looked.
    """
    from transformers import AutoModel, AutoProcessor

    from evolora.assets import embedded_backbone, embedded_backbones

    folder = embedded_backbone(name_or_path)
    where = str(folder or name_or_path)
    if not folder and "/" not in name_or_path and not Path(name_or_path).is_dir():
        # Hub names have an owner; a bare word is a misspelt embedded name or folder, not worth a
        # minute of connection attempts where there is no network.
        known = embedded_backbones()
        raise DataError(
            f"no backbone {name_or_path!r}{suggest(name_or_path, known)} (embedded: "
            f"{', '.join(known)}; a local folder or a hub name such as "
            "'openai/clip-vit-base-patch16' will do too)"
        )
    load_processor: Any = AutoProcessor.from_pretrained
    try:
        with _quiet_transformers():
            model = AutoModel.from_pretrained(where, revision=revision, dtype=torch.float32)
            processor = load_processor(where, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        looked = "the embedded backbones, the local file system and the hub cache"
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"no backbone {name_or_path!r}: looked in {looked} ({first})") from error
    is_path = Path(name_or_path).exists()
    return DualEncoder(model, processor, name=str(Path(name_or_path)) if is_path else name_or_path)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide the loading bar and the advice to install torchvision, which is not used here."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _pooled(output: Any) -> Tensor:
    """Transformers 5 returns an output object, 4 returned the tensor."""
    pooled: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return pooled


def _layers(layers: Sequence[int] | None, depth: int, tower: str) -> list[int]:
    if layers is None:
        return list(range(depth))
    wrong = [layer for layer in layers if not -depth <= layer < depth]
    if wrong:
        raise ConfigError(
            f"layers_to_transform: the {tower} tower has {depth} blocks; got {wrong[0]}"
        )
    return sorted({layer % depth for layer in layers})


def _mlp_site(block: Any, tower: str, index: int) -> Site:
    width = block.layer_norm2.normalized_shape[0]
    return Site(
        tower=tower,
        layer=index,
        name=f"{tower}.{index}.mlp",
        kind="mlp",
        module=block.mlp,
        norm=block.layer_norm2,
        d_in=width,
        d_out=width,
    )


def _linear_site(block: Any, tower: str, index: int, target: str) -> Site:
    module = block.get_submodule(LINEARS[target])
    return Site(
        tower=tower,
        layer=index,
        name=f"{tower}.{index}.{target}",
        kind="linear",
        module=module,
        d_in=module.in_features,
        d_out=module.out_features,
    )
