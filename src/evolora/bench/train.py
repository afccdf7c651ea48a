"""Bench "train": what is saved by adapting the top layers only, with the activations below them
computed once, and by encoding the class prompts of a frozen text tower once.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from evolora.backbones.base import Backbone, Batch
from evolora.backbones.clip import DualEncoder
from evolora.backbones.memory import Known
from evolora.bench.references import LoopLoRALayer
from evolora.bench.session import Session
from evolora.bench.timing import Variant
from evolora.bench.towers import (
    END_TOKEN,
    TARGETS,
    FindSites,
    build,
    in_float64,
    insert_copies,
    learner,
    pixels,
)
from evolora.experts.sites import Site
from evolora.methods.base import Method
from evolora.methods.lora import JointLoRA, JointLoRAConfig
from evolora.routing.route import BASE, Route
from evolora.streams.task import LabelSpace
from evolora.training.config import TrainingConfig
from evolora.training.prefix_cache import build_memory

R, CLASSES, CONTEXT = 16, 64, 77
ALL = "all layers"
Cache = Literal["off", "ram", "file"]
CACHES: tuple[Cache, ...] = ("off", "ram", "file")
HOW: dict[Cache, str] = {
    "off": "nothing cached",
    "ram": "cached in memory",
    "file": "cached in a mapped float16 file",
}
HALF_ERROR = 1e-2
"""Activations kept in half precision are rounded; float32 ones are not."""


def measure(session: Session) -> None:
    """Time steps on images with ever fewer layers adapted, then steps with class prompts."""
    s = session.settings
    layers, batch = s.layers or 4, s.batch or s.either(4, 1)
    backbone = build(s, layers, text_layers=s.either(4, 1))
    images = [pixels(replace(s, seed=seed), batch) for seed in range(s.either(3, 2))]
    caches = s.either(CACHES, CACHES[1:2])
    variants = prefixes(backbone, images, layers, caches)
    numbers = list(range(len(images)))
    title = f"{layers} layers of ViT-B/16, {batch} images, LoRA r {R}"
    comparison = session.compare(
        title, variants, numbers, rounds=s.either(9, 3), memory=not s.quick
    )
    for goal, part in (("prefix-half", "top half"), ("prefix-quarter", "top quarter")):
        name = f"{part}, {HOW['ram']}"
        if name in comparison.variants:
            speed = comparison.between((ALL, "step"), (name, "step")).median
            session.goal(goal, speed)
    prompts(session, backbone, images)


def prefixes(
    backbone: DualEncoder, images: Sequence[Tensor], layers: int, caches: Sequence[Cache]
) -> list[Variant]:
    """Return LoRA in all layers, and in the top ones with every kind of cache.

    Their inputs are numbers of ``images``, so that a batch is known when it comes again.
    """
    made = [adapted(backbone, images, range(layers), ALL, "off")]
    for part, count in (("top half", layers // 2), ("top quarter", layers // 4)):
        if count:
            top = range(layers - count, layers)
            made += [adapted(backbone, images, top, f"{part}, {HOW[c]}", c) for c in caches]
    return made


def adapted(
    backbone: DualEncoder,
    images: Sequence[Tensor],
    layers: Sequence[int],
    name: str,
    cache: Cache,
) -> Variant:
    """Return a LoRA in some layers, on images whose prefixes are kept (or not)."""
    method = vision_lora(backbone, layers)
    memory = build_memory(
        TrainingConfig(
            prefix_cache=cache, augment=False, per_device_train_batch_size=len(images[0])
        ),
        backbone.device,
    )
    batches = []
    for number, image in enumerate(images):
        rows = tuple(f"{number}/{row}".encode() for row in range(len(image)))
        known = None if cache == "off" else Known(samples=rows, memory=memory)
        batches.append(replace(batch_of(image), known=known))

    def run(number: int) -> Tensor:
        batch = batches[number]
        return method.backbone.encode(batch, Route.of(0, len(batch), device=backbone.device))

    if cache != "off":
        with torch.no_grad():  # the first pass over the images is not what is compared
            for number in range(len(images)):
                run(number)
    return Variant(
        name=name,
        run=run,
        passes=("step",),
        modules=(method,),
        step_base=ALL,
        reference=_exact_encode(backbone, method, layers)(images[0]),
        max_error=HALF_ERROR if cache == "file" else None,
    )


def vision_lora(backbone: DualEncoder, layers: Sequence[int]) -> Method:
    """Return a LoRA in some layers of the vision tower, nothing folded."""
    config = JointLoRAConfig(
        r=R,
        lora_alpha=R,
        target_modules=TARGETS,
        towers=("vision",),
        layers_to_transform=tuple(layers),
    )
    return learner(JointLoRA, config, backbone)


def batch_of(image: Tensor) -> Batch:
    """Return images as a batch; only their number and pixels matter here."""
    labels = torch.zeros(len(image), dtype=torch.long, device=image.device)
    return Batch(inputs={"pixel_values": image}, labels=labels, keys=("",) * len(image))


def prompts(session: Session, backbone: DualEncoder, images: Sequence[Tensor]) -> None:
    """Time a step on images and class prompts: prompts encoded each time, or once."""
    layers = len(backbone.blocks("vision"))
    method = vision_lora(backbone, range(layers))
    encoder = method.backbone
    assert isinstance(encoder, DualEncoder)
    encoder.processor = WordTokenizer()
    labels = LabelSpace(classes=tuple(f"thing number {i}" for i in range(CLASSES)))
    tokens = encoder.tokenize(labels.prompts())["input_ids"].to(encoder.device)
    padded = torch.nn.functional.pad(tokens, (0, CONTEXT - tokens.shape[1]))
    with torch.no_grad():
        once = encoder.class_embeddings(labels, BASE)

    def step(classes: Callable[[], Tensor]) -> Callable[[int], Tensor]:
        def run(number: int) -> Tensor:
            route = Route.of(0, len(images[number]), device=encoder.device)
            embedding = encoder.encode(batch_of(images[number]), route)
            return encoder.logits(embedding, classes())

        return run

    exact = in_float64(backbone)
    embedding = _exact_encode(backbone, method, range(layers))(images[0])
    alone = "images alone"
    with torch.no_grad():
        reference = exact.logits(embedding, _text(exact, padded))
    variants = [
        Variant(
            name=name,
            run=step(classes),
            passes=("step",),
            modules=(method,),
            step_base=alone,
            reference=reference,
        )
        for name, classes in (
            (alone, lambda: once),
            (f"prompts encoded in every step, {CONTEXT} tokens", lambda: _text(encoder, padded)),
            (
                f"prompts encoded in every step, {tokens.shape[1]} tokens",
                lambda: _text(encoder, tokens),
            ),
            ("prompts cached", lambda: encoder.class_embeddings(labels, 0, ensemble=False)),
        )
    ]
    s = session.settings
    depths = f"{layers} vision and {len(backbone.blocks('text'))} text layers"
    title = f"{CLASSES} prompts of a frozen text tower, {depths}, {len(images[0])} images"
    numbers = list(range(len(images)))
    comparison = session.compare(
        title, variants, numbers, rounds=s.either(9, 3), memory=not s.quick
    )
    ratio = comparison.ratio("prompts cached", "step")
    session.goal("text-cached", ratio.median if ratio else None)


class WordTokenizer:
    """A number for each word, between a start and an end token; enough for random weights."""

    def __call__(self, texts: Sequence[str], **_: Any) -> dict[str, Tensor]:
        """Return input_ids and attention_mask (c, longest)."""
        rows = [[1022, *map(_word, text.split()), END_TOKEN] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}


def _word(word: str) -> int:
    return zlib.crc32(word.encode()) % 1000


@torch.no_grad()
def _text(encoder: DualEncoder, ids: Tensor) -> Tensor:
    """Return unit-length embeddings (c, p) of prompts, by the model's own function."""
    out = encoder.call("get_text_features", input_ids=ids).pooler_output
    return torch.nn.functional.normalize(out, dim=-1)


def _exact_encode(
    backbone: DualEncoder, method: Method, layers: Sequence[int]
) -> Callable[[Tensor], Tensor]:
    """Return a function to the embedding in double precision, computed by naive loops."""
    exact = in_float64(backbone)
    insert_copies(exact, method, _linears_of(layers), LoopLoRALayer)

    @torch.no_grad()
    def encode(image: Tensor) -> Tensor:
        route = Route.of(0, len(image), device=image.device)
        return exact.encode(batch_of(image.double()), route)

    return encode


def _linears_of(layers: Sequence[int]) -> FindSites:
    def sites(backbone: Backbone) -> list[Site]:
        return backbone.sites(
            "linear", towers=("vision",), layers=tuple(layers), target_modules=TARGETS
        )

    return sites
