"""Parts of a Q-Former model: its Linears and what they are called, its towers as shapes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from evolora.backbones.blocks import ALL_LINEAR, block_indices, linear_site
from evolora.backbones.families import LANGUAGE, PROJECTION, linears_of
from evolora.backbones.frozen import ModelFunction
from evolora.backbones.modalities import OWN, ModalitySpec, make_modality
from evolora.errors import unknown_name
from evolora.experts.sites import Site

if TYPE_CHECKING:
    from evolora.backbones.qformer import QFormer

QFORMER = "qformer"
PLACES = {
    "attention.attention": "attention",
    "attention.output": "attention",
    "crossattention.attention": "crossattention",
    "crossattention.output": "crossattention",
}
"""Where a Linear of a Q-Former's attention is -> the attention it is named by."""


def given_modalities(
    backbone: QFormer, given: Mapping[str, Mapping[str, Any]] | Sequence[ModalitySpec]
) -> list[ModalitySpec]:
    """Return the modalities that a user names, or gives as they are; the model's own is first.

    Where the user does not name it, the artefact need not either.
    """
    model, processor = backbone.model, backbone.processor
    if isinstance(given, Mapping):
        specs = [make_modality(name, options, model, processor) for name, options in given.items()]
    else:
        specs = list(given)
    if OWN in {spec.name for spec in specs}:
        return specs
    own = make_modality(OWN, {"encoder": "vision"}, model, processor)
    return [replace(own, options={}), *specs]


def digest_with(own: str, plugged: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a model's own digest and the weights of what is plugged into it."""
    digest = hashlib.sha256(own.encode())
    for name, tensor in sorted(plugged.items()):
        value = tensor.detach().cpu().contiguous().flatten()
        digest.update(name.encode() + value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def linear_sites(
    backbone: QFormer,
    towers: Sequence[str],
    layers: Sequence[int] | None,
    targets: Sequence[str],
) -> list[Site]:
    """Return the sites of Linears that are wanted, see ``QFormer.sites``.

    Raises:
        ConfigError: a name that no chosen tower has.
    """
    found: list[Site] = []
    known: set[str] = {ALL_LINEAR}
    for tower in [tower for tower in backbone.towers if tower in towers]:
        blocks = backbone.blocks(tower)
        chosen = None if tower == PROJECTION else layers
        for index in block_indices(chosen, len(blocks), tower):
            named = qformer_linears if tower == QFORMER else linears_of
            linears = named(blocks[index])
            for path, linear in linears.items():
                name = path or PROJECTION
                names = {name, name.rpartition(".")[2], ALL_LINEAR}
                known |= names
                if names & set(targets):
                    found.append(linear_site(tower, index, name, linear))
    for target in targets:
        if target not in known:
            raise unknown_name("target module", target, known)
    return found


def qformer_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Return name -> Linear of a block of a Q-Former, found by where it stands.

    "attention.query", "crossattention.dense", and of the MLPs "intermediate", "output_query".
    """
    found: dict[str, nn.Linear] = {}
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear):
            owner, _, last = path.rpartition(".")
            found[f"{PLACES[owner]}.{last}" if owner in PLACES else owner] = module
    return found


def shapes_of_towers(backbone: QFormer) -> dict[str, tuple[ModelFunction, dict[str, Tensor]]]:
    """Return the Q-Former with one frame of an image, and the language model with a prompt.

    On the meta device: towers are counted, not run.
    """
    model: Any = backbone.model
    number, width = backbone.queries.shape
    inputs = {
        "query_embeds": torch.empty(1, number, width, device="meta"),
        "encoder_hidden_states": torch.empty(
            1, backbone.tokens("vision"), backbone.reads, device="meta"
        ),
    }
    if backbone.asks:
        length = backbone.tokens(QFORMER) - number
        inputs["input_ids"] = torch.zeros(1, length, dtype=torch.long, device="meta")
    language = model.language_model
    prompt = torch.empty(1, backbone.tokens(LANGUAGE), backbone.width, device="meta")
    reader = language.base_model if backbone.decodes else language.get_encoder()
    return {
        QFORMER: (model.qformer.forward, inputs),
        LANGUAGE: (reader.forward, {"inputs_embeds": prompt}),
    }


def length_of(backbone: QFormer, tower: str) -> int:
    """Return the length of a full sequence of a tower; "vision" is the model's encoder."""
    if tower == "vision":
        vision = backbone.config.vision_config
        count: int = (int(vision.image_size) // int(vision.patch_size)) ** 2 + 1
        return count
    if tower == LANGUAGE:
        return backbone.text_length
    reads = backbone.asks and tower == QFORMER
    return int(backbone.queries.shape[0]) + (backbone.instructions.asked_limit if reads else 0)


def language_states(backbone: QFormer, embeds: Tensor, mask: Tensor) -> Tensor:
    """Return the last states (b, n, d) of prompts (b, n, d) under the route in place."""
    model: Any = backbone.model
    mask = mask.long()

    def run(**inputs: Any) -> Any:
        if not backbone.decodes:
            return model.language_model.get_encoder()(**inputs)
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        return model.language_model.base_model(use_cache=False, position_ids=positions, **inputs)

    output = backbone.call(run, inputs_embeds=embeds, attention_mask=mask)
    states: Tensor = output.last_hidden_state
    return states
