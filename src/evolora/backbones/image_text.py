"""Models that read images and text and write: InternVL, LLaVA, Idefics3, SmolVLM, Qwen-VL.

Three towers: "vision" (the encoder), "projection" and "language". Experts stand at any Linear of
them. A row of the encoder is an image (or a tile of one), of Qwen-VL a patch; it goes by the route
of the sample it belongs to.

    prompt = chat template of the turns, images where they stand      (padded on the left)
    loss   = mean over the answer's tokens of -log p(token | images, prompt, tokens before it)
    answer = greedy, with the key-value cache; the route is fixed before the first token

The prompt's token ids are known when a sample is prepared, so nothing here depends on who shares a
batch: padding is masked, positions count a row's own tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.backbones.answer_tokens import NO_ANSWER, Limit, cut
from evolora.backbones.base import Batch, TextBackbone
from evolora.backbones.blocks import (
    ALL_LINEAR,
    block_indices,
    feed_forward_site,
    layer_statistics,
    linear_site,
    outputs_of,
    statistic_layers,
)
from evolora.backbones.dialogue import Dialogues, flat, padded_left, padded_right, stacked
from evolora.backbones.families import (
    LANGUAGE,
    PROJECTION,
    VISION,
    blocks_of,
    family_of,
    gated_mlp_of,
    linears_of,
    read_blocks,
)
from evolora.backbones.frozen import ModelFunction, config_of
from evolora.backbones.max_pooled import MAX_POOLED, NOTHING, max_pooled, width
from evolora.backbones.prompt_rows import as_long_as_others, of_images, prompt_spans
from evolora.backbones.soft_prompts import token_means
from evolora.errors import ConfigError, DataError, unknown_name
from evolora.experts.sites import Site, SiteKind
from evolora.registry import BACKBONES
from evolora.routing.route import Decisions, Route
from evolora.routing.spans import TokenSpans
from evolora.streams.task import Example

TEXT_LENGTH = 2048
"""Longest prompt in tokens where nothing else is said and the model takes as many."""
SQUARE = 448


@BACKBONES.register("image-text", summary="InternVL, LLaVA, Idefics3, SmolVLM, Qwen-VL: they write")
class ImageText(TextBackbone):
    """A ``transformers`` image-text-to-text model with its processor.

    Args:
        model: ``...ForConditionalGeneration`` of a family in
            :mod:`evolora.backbones.families`.
        processor: its processor, or None where only shapes count.
        name: what the user called it.
        text_length: longest prompt in tokens, images included; None is the model's own limit, at
            most 2048. A longer prompt is refused.
    """

    default_targets = (ALL_LINEAR,)
    towers = (VISION, PROJECTION, LANGUAGE)
    cached_tower = LANGUAGE
    modalities = ("image", "text")
    kept_features = ("layers", "modalities")
    apart_features = (MAX_POOLED,)

    def __init__(
        self,
        model: nn.Module,
        processor: Any | None = None,
        *,
        name: str = "",
        text_length: int | None = None,
    ) -> None:
        self.family = family_of(model)
        self.config = config_of(model)
        own = int(getattr(self.config.text_config, "max_position_embeddings", TEXT_LENGTH))
        self.text_length = min(own, TEXT_LENGTH) if text_length is None else text_length
        if self.text_length < 1:
            raise ConfigError(f"text_length must be at least 1; got {text_length}")
        super().__init__(model)
        self.name = name
        self.processor = processor
        self.image_token = int(self.config.image_token_id)
        self.dialogues = Dialogues(processor, self.image_token, self.text_length)
        counts = tuple(f"{pixels} number" for pixels in self.family.pixels)
        self.input_names = (
            *("input_ids", "attention_mask", "answer_ids", "words"),
            *self.family.pixels,
            *counts,
        )

    # -- towers ----------------------------------------------------------------------------------

    def blocks(self, tower: str) -> list[nn.Module]:
        """Return the blocks of a tower that are read, the lowest first; a projection is one."""
        if tower == PROJECTION:
            return [self.model.get_submodule(self.family.projection)]
        if tower == LANGUAGE:
            return blocks_of(self.model.get_submodule(self.family.language))
        return read_blocks(blocks_of(self.model.get_submodule(self.family.vision)), self.config)

    def sites(
        self,
        kind: SiteKind,
        *,
        towers: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
        target_modules: Sequence[str] | None = (),
    ) -> list[Site]:
        """Return Linear sites, or the language model's whole MLPs ("ffn").

        The name of a Linear is taken in every tower that has it, "all-linear" is all.

        None is "all-linear": families name their Linears differently.

        Raises:
            ConfigError: an unknown tower, a name that no chosen tower has, or another kind.
        """
        self.check_towers(towers)
        if kind == "ffn" and set(towers or (LANGUAGE,)) == {LANGUAGE}:
            decoder = self.blocks(LANGUAGE)
            places = block_indices(layers, len(decoder), LANGUAGE)
            return [feed_forward_site(LANGUAGE, at, gated_mlp_of(decoder[at])) for at in places]
        if kind != "linear":
            raise ConfigError(
                f"{type(self).__name__} has experts at Linears, and as whole MLPs in the language "
                f"tower; this method asks for {kind!r}" + (f" in {towers}" if towers else "")
            )
        targets = self.default_targets if target_modules is None else target_modules
        found: list[Site] = []
        known: set[str] = {ALL_LINEAR}
        for tower in [tower for tower in self.towers if towers is None or tower in towers]:
            blocks = self.blocks(tower)
            chosen = None if tower == PROJECTION else layers
            for index in block_indices(chosen, len(blocks), tower):
                linears = linears_of(blocks[index])
                known.update(linears)
                found += [
                    linear_site(tower, index, name, linear)
                    for name, linear in linears.items()
                    if name in targets or ALL_LINEAR in targets
                ]
        for target in targets:
            if target not in known:
                raise unknown_name("target module", target, known)
        return found

    def repeated_blocks(self) -> list[nn.Module]:
        """Return the blocks of both transformers; the projection, small, is never run again."""
        return [*self.blocks(VISION), *self.blocks(LANGUAGE)]

    # -- samples ---------------------------------------------------------------------------------

    def prepare(
        self, example: Example, draw: torch.Generator | None = None
    ) -> Mapping[str, Tensor]:
        """Return {"text": tokens (n,), "image": what the encoder takes, "answer": tokens (a,)}.

        Tokens of a sample without text are called "prompt"; "words" are those of the text alone.
        Images are the processor's, and never augmented: an answer may say where something is.
        """
        self.check_modalities(example)
        found = self.dialogues.prompt(example)
        prepared = {"text" if "text" in example.inputs else "prompt": found["input_ids"]}
        for name in self.family.pixels:
            if name in found:
                value = found[name][0] if self.family.nested else found[name]
                prepared["image" if name == "pixel_values" else name] = value
        more = {"answer": self.dialogues.answer(example), "words": self.dialogues.words(example)}
        return {**prepared, **{name: value for name, value in more.items() if value is not None}}

    def inputs_of(self, prepared: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return token ids and mask (b, n), answers (b, a), words, images (b, k, ...), their k."""
        prompts = [one["text"] if "text" in one else one["prompt"] for one in prepared]
        ids, mask = padded_left(prompts, self._padding)
        answers = padded_right([one.get("answer") for one in prepared], NO_ANSWER)
        words = padded_right([one.get("words") for one in prepared], NOTHING)
        inputs = {"input_ids": ids, "attention_mask": mask, "answer_ids": answers, "words": words}
        for name in self.family.pixels:
            key = "image" if name == "pixel_values" else name
            inputs[name], inputs[f"{name} number"] = stacked([one.get(key) for one in prepared])
        return {name: value.to(self.device) for name, value in inputs.items()}

    def row_sizes(self, batch: Batch) -> Tensor:
        """Return (b, 3): width of the prompts, of the answers, and rows in the encoder."""
        inputs = batch.inputs
        widths = torch.tensor([inputs[name].shape[1] for name in ("input_ids", "answer_ids")])
        number = inputs["pixel_values number"].unsqueeze(1)
        return torch.cat([widths.to(number).expand(len(batch), 2), number], dim=1)

    def without(self, batch: Batch, lost: Mapping[str, Tensor]) -> Batch:
        """Refuse: an image's tokens are part of the prompt, which would have to be made anew."""
        raise ConfigError(
            f"{type(self).__name__} cannot take a modality out of a prepared prompt; make samples "
            "without it"
        )

    # -- what methods ask for --------------------------------------------------------------------

    def answer_logits(
        self, batch: Batch, route: Route, *, limit: Limit = None
    ) -> tuple[Tensor, Tensor]:
        """Return logits (b, a, c) at the tokens of answers (b, a); see :class:`TextBackbone`."""
        batch = as_long_as_others(batch, self._padding)
        answers = cut(batch.inputs["answer_ids"], limit)
        given = answers != NO_ANSWER
        if answers.shape[1] == 0 or not bool(given.any(dim=1).all()):
            raise DataError("a batch that is learned needs an answer in every row")
        self._place(batch, route, answers.shape[1])
        ids = torch.cat([batch.inputs["input_ids"], answers.clamp_min(0)], dim=1)
        mask = torch.cat([batch.inputs["attention_mask"], given.long()], dim=1)
        inputs = self._model_inputs(batch, ids, mask)
        output = self.call(self._forward, logits_to_keep=answers.shape[1] + 1, **inputs)
        return output.logits[:, :-1], answers

    @torch.no_grad()
    def write(self, batch: Batch, route: Route, max_new_tokens: int) -> list[str]:
        """Return the answer of each row, greedy; it ends at an end token or at the limit."""
        self._place(batch, replace(route, decisions=Decisions()))
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        ends = self._end_tokens
        try:
            tokens: Tensor = self.call(
                self._generate,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=self._padding,
                eos_token_id=ends,
                **self._model_inputs(batch, ids, mask, positions=False),
            )
        finally:  # what was decided is of this generation
            self._place(batch, route)
        texts = []
        for row in tokens[:, ids.shape[1] :].tolist():
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            texts.append(self.dialogues.read(row[:end]))
        return texts

    def encode(self, batch: Batch, route: Route) -> Tensor:
        """Return the mean state (b, d) of each row's prompt under the route."""
        spans = self._place(batch, route)
        return token_means(self._prompt_states(batch), spans.mask)

    def base_pass(self, batch: Batch, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Return those of the results that are named, of prompts; an answer is never seen.

        "modalities": unit vectors (b, 2, d): mean of what the projection made of the images, and
        mean of the last states at the prompt's other tokens; NaN where the sample lacks it.
        "layers": statistics of the prompt at four depths of the language model.
        "max-pooled": see :mod:`evolora.backbones.max_pooled`.
        """
        apart = {name: max_pooled(self, batch) for name in names if name == MAX_POOLED}
        return apart if len(apart) == len(names) else {**apart, **self._whole_pass(batch, names)}

    def _whole_pass(self, batch: Batch, names: Sequence[str]) -> Mapping[str, Tensor]:
        spans = self._spans(batch)
        blocks = self.blocks(LANGUAGE)
        depths = statistic_layers(1 + len(blocks))
        entering: list[Tensor] = []
        handle = blocks[0].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
        try:
            with outputs_of(blocks) as hidden:
                last = self._prompt_states(batch)
        finally:
            handle.remove()
        found = {"embedding": token_means(last, spans.mask)}
        if "layers" in names:
            states = [*entering, *hidden]
            found["layers"] = layer_statistics([states[depth] for depth in depths], spans.mask)
        if "modalities" in names:
            image, text = spans.means(entering[0])[:, 0], spans.means(last)[:, 1]
            means = F.normalize(torch.stack([image, text], dim=1), dim=-1)
            found["modalities"] = means.masked_fill(~spans.present.unsqueeze(2), float("nan"))
        return found

    # -- what it is ------------------------------------------------------------------------------

    @property
    def parts(self) -> Mapping[str, int]:
        """The mean state of the prompt."""
        return {LANGUAGE: int(self.config.text_config.hidden_size)}

    def feature_widths(self) -> dict[str, int]:
        """Return the widths of "pooled", "layers", "max-pooled" and (of each) "modalities"."""
        depths = statistic_layers(1 + len(self.blocks(LANGUAGE)))
        widths = dict.fromkeys(("pooled", "modalities"), self.width)
        return {**widths, "layers": 2 * len(depths) * self.width, MAX_POOLED: width(self)}

    def describe(self) -> dict[str, Any]:
        """Return class, name and prompt limit, for the artefact."""
        return {
            "type": "image-text",
            "class": type(self.model).__name__,
            "name_or_path": self.name,
            "sha256": self.fingerprint(),
            "text_length": self.text_length,
        }

    def preprocessing(self) -> str:
        """Return the prompt limit and a digest of the processor's settings and chat template."""
        images = getattr(self.processor, "image_processor", None)
        settings = images.to_dict() if images is not None else {}
        template = getattr(self.processor, "chat_template", None)
        text = json.dumps([settings, template], sort_keys=True, default=str)
        return f"{self.text_length}/{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def tower_inputs(self) -> dict[str, tuple[ModelFunction, dict[str, Tensor]]]:
        """Return the language model with a prompt of full length; images differ in size."""
        width = self.width
        states = torch.empty(1, self.text_length, width, device="meta")
        language: Any = self.model.get_submodule(self.family.language)
        return {LANGUAGE: (language.forward, {"inputs_embeds": states})}

    def tokens(self, tower: str) -> int:
        """Return the length of a full sequence: the longest prompt, the patches of a square image.

        An encoder without a size of its own (Qwen-VL) counts an image of 448 x 448 pixels.
        """
        if tower == LANGUAGE:
            return self.text_length
        vision = self.config.vision_config
        size, patch = (
            one[0] if isinstance(one, list | tuple) else int(one)
            for one in (getattr(vision, "image_size", SQUARE), vision.patch_size)
        )
        patches: int = (size // patch) ** 2
        return patches

    # -- inside ----------------------------------------------------------------------------------

    @property
    def _padding(self) -> int:
        tokenizer = getattr(self.processor, "tokenizer", None)
        found = getattr(tokenizer, "pad_token_id", None)
        return 0 if found is None else int(found)

    @property
    def _end_tokens(self) -> list[int]:
        model: Any = self.model
        own = model.generation_config.eos_token_id
        others = own if isinstance(own, list) else [own]
        return [int(t) for t in dict.fromkeys([self.dialogues.end_token, *others]) if t is not None]

    def _forward(self, **inputs: Any) -> Any:
        return self.model(use_cache=False, **inputs)

    def _generate(self, **inputs: Any) -> Any:
        model: Any = self.model
        return model.generate(**inputs)

    def _prompt_states(self, batch: Batch) -> Tensor:
        """Return the last states (b, n, d) of prompts."""
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        model: Any = self.model
        states: Tensor = self.call(
            lambda **inputs: model.model(use_cache=False, **inputs),
            **self._model_inputs(batch, ids, mask),
        ).last_hidden_state
        return states

    def _model_inputs(
        self, batch: Batch, ids: Tensor, mask: Tensor, *, positions: bool = True
    ) -> dict[str, Any]:
        """Return what the model's forward takes; positions count a row's own tokens."""
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        pixels = self._pixels(batch)
        inputs.update(pixels)
        if self.family.packed and pixels:  # it counts positions itself, by the images' grids
            inputs["mm_token_type_ids"] = (ids == self.image_token).int()
        elif positions:
            inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)
        return inputs

    def _pixels(self, batch: Batch) -> dict[str, Tensor]:
        """Return the encoder's inputs of all rows; none where no row has an image."""
        if not bool(batch.inputs["pixel_values number"].any()):
            return {}
        found = {}
        for name in self.family.pixels:
            whole = batch.inputs[name]
            number = batch.inputs[f"{name} number"]
            found[name] = whole if self.family.nested else flat(whole, number)
        return found

    def _spans(self, batch: Batch, more: int = 0) -> TokenSpans:
        return prompt_spans(batch, self.image_token, self.modalities, more)

    def _place(self, batch: Batch, route: Route, more: int = 0) -> TokenSpans:
        """Put the route in place for all towers: a row of the encoder goes by its sample's."""
        spans = self._spans(batch, more)
        self.host.set_route(LANGUAGE, replace(route, spans=spans))
        numbers = batch.inputs["pixel_values number"]
        rows = torch.arange(len(batch), device=numbers.device).repeat_interleave(numbers)
        seen = replace(route.take(rows), random=of_images(route.random, batch))
        self.host.set_route(VISION, seen)
        merged = self.config.vision_config.spatial_merge_size**2 if self.family.packed else 1
        every = torch.arange(0, len(rows), merged, device=rows.device)
        random = of_images(route.random, batch, merged)
        self.host.set_route(PROJECTION, replace(seen.take(every), random=random))
        return spans
