"""Q-Formers: BLIP-2 and InstructBLIP, whose language model hears of an input in soft tokens.

    value --frozen encoder--> (b, frames, n, d) --entry of the modality--> (b * frames, n, e)
          --Q-Former (its queries attend to them)--> (b * frames, q, h) --projection--> soft tokens
    prompt = [cue, soft tokens] of each modality that the sample has, then its text
    loss   = mean over the answer's tokens of -log p(token | prompt, tokens before it)

Three towers: "qformer", "projection" and "language" (of an encoder-decoder, its encoder). A row of
the first two is a frame of a sample's modality and goes by the sample's route, or by that of the
modality where the route tells one (``Route.paths``). Frames of a sample stand together, each with
the sample's own instruction. Modalities are plugged in, see :mod:`evolora.backbones.modalities`.

A learned modality enters by its own norm, projection and queries, which a method owns
(:meth:`QFormer.let_in`). One that is not learned enters as the image does where it has that width;
else it is not seen. Prompts are packed to the right and positions count a row's own tokens, so
nothing depends on who shares a batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.backbones.answer_tokens import NO_ANSWER, Limit, cut
from evolora.backbones.base import Batch, TextBackbone
from evolora.backbones.blocks import (
    ALL_LINEAR,
    layer_statistics,
    outputs_of,
    statistic_layers,
)
from evolora.backbones.dialogue import padded_left, padded_right
from evolora.backbones.families import LANGUAGE, PROJECTION, blocks_of
from evolora.backbones.frozen import ModelFunction, config_of
from evolora.backbones.instructions import Instructions
from evolora.backbones.modalities import Entry, ModalitySpec
from evolora.backbones.qformer_parts import (
    QFORMER,
    digest_with,
    given_modalities,
    language_states,
    length_of,
    linear_sites,
    shapes_of_towers,
)
from evolora.backbones.soft_prompts import token_means
from evolora.backbones.soft_tokens import SEEN, as_long_as_others, has, prompts
from evolora.errors import ConfigError, DataError, UnsuitableError
from evolora.experts.sites import Site, SiteKind
from evolora.registry import BACKBONES
from evolora.routing.route import BASE, Decisions, Route
from evolora.routing.spans import TokenSpans
from evolora.streams.task import Example

MODEL_TYPES = ("blip-2", "instructblip")
TEXT_LENGTH, ASKED_LENGTH = 512, 128
"""Longest text in tokens where nothing else is said, and what the Q-Former reads of it (LAVIS)."""


@BACKBONES.register(
    "qformer", summary="BLIP-2, InstructBLIP: any modality, a language model writes"
)
class QFormer(TextBackbone):
    """A ``transformers`` model of a Q-Former and a language model, with its modalities.

    Args:
        model: ``Blip2ForConditionalGeneration`` or ``InstructBlipForConditionalGeneration``.
        processor: its processor, or anything with a ``tokenizer`` (and a ``qformer_tokenizer``,
            where the Q-Former reads the instruction); None where only shapes count.
        name: what the user called it.
        text_length: longest text in tokens, soft tokens apart; None is the language model's own
            limit, at most 512. A longer text is refused.
        modalities: name -> {"encoder": ..., its options}, or modalities as they are. "image" is
            the model's own where it is not named.
    """

    default_targets = (ALL_LINEAR,)
    towers = (QFORMER, PROJECTION, LANGUAGE)
    cached_tower = LANGUAGE
    kept_features = ("layers", "modalities")
    takes_modalities = True

    def __init__(
        self,
        model: nn.Module,
        processor: Any | None = None,
        *,
        name: str = "",
        text_length: int | None = None,
        modalities: Mapping[str, Mapping[str, Any]] | Sequence[ModalitySpec] = (),
    ) -> None:
        self.config = config_of(model)
        if getattr(self.config, "model_type", None) not in MODEL_TYPES:
            raise ConfigError(
                f"{type(model).__name__} is no Q-Former with a language model; a qformer backbone "
                "is a Blip2ForConditionalGeneration or an InstructBlipForConditionalGeneration"
            )
        own = int(getattr(self.config.text_config, "max_position_embeddings", TEXT_LENGTH))
        self.text_length = min(own, TEXT_LENGTH) if text_length is None else text_length
        if self.text_length < 1:
            raise ConfigError(f"text_length must be at least 1; got {text_length}")
        super().__init__(model)
        self.name, self.processor = name, processor
        self.decodes = bool(self.config.use_decoder_only_language_model)
        self.asks = self.config.model_type == "instructblip"
        asked = min(ASKED_LENGTH, int(self.config.qformer_config.max_position_embeddings))
        self.instructions = Instructions(
            processor,
            int(self.config.image_token_id or -1),
            self.text_length,
            asked_limit=asked,
            decodes=self.decodes,
        )
        self.encoders = nn.ModuleDict()
        self.specs: dict[str, ModalitySpec] = {}
        self.entries: Mapping[str, Entry] = {}
        self._plugged = ("", "")
        for spec in given_modalities(self, modalities):
            self.add_modality(spec)

    # -- modalities ------------------------------------------------------------------------------

    def add_modality(self, spec: ModalitySpec) -> None:
        """Plug a modality in; its encoder is frozen.

        Raises:
            ConfigError: there is one of that name, or "text" is asked for.
        """
        if spec.name in self.specs or spec.name in ("text", "prompt", "asked", "answer"):
            raise ConfigError(f"there is a modality {spec.name!r} already")
        spec.projected(self.reads)
        encoder = spec.encoder.eval().requires_grad_(False).to(self.device)
        self.encoders[spec.name] = encoder
        self.specs[spec.name] = spec
        self.modalities = (*self.specs, "text")
        texts = ("input_ids", "attention_mask", "answer_ids", "asked_ids", "asked_mask")
        self.input_names = (*texts, *self.specs)

    def let_in(self, entries: Mapping[str, Entry]) -> None:
        """Let modalities enter by what a method has learned, where its experts answer them."""
        self.entries = entries

    @property
    def reads(self) -> int:
        """Width e of what the Q-Former's cross-attention reads."""
        return int(self.config.qformer_config.encoder_hidden_size)

    @property
    def queries(self) -> Tensor:
        """The model's own query tokens (q, h)."""
        model: Any = self.model
        tokens: Tensor = model.query_tokens[0]
        return tokens

    @property
    def own_norm(self) -> nn.LayerNorm:
        """The norm behind the model's own encoder, which an image enters by."""
        model: Any = self.model
        norm: nn.LayerNorm = model.vision_model.post_layernorm
        return norm

    # -- towers ----------------------------------------------------------------------------------

    def blocks(self, tower: str) -> list[nn.Module]:
        """Return the blocks of a tower, the lowest first; a projection is one."""
        model: Any = self.model
        if tower == QFORMER:
            return list(model.qformer.encoder.layer)
        if tower == PROJECTION:
            return [model.language_projection]
        return blocks_of(model.language_model)

    def tower_parameters(self, tower: str) -> list[nn.Parameter]:
        """Return the weights of a tower, embeddings and norms outside of its blocks included."""
        whole = {QFORMER: "qformer", PROJECTION: "language_projection", LANGUAGE: "language_model"}
        return list(self.model.get_submodule(whole[tower]).parameters())

    def stays(self, names: Sequence[str]) -> bool:
        """Return whether these are of encoders, whose weights are the model's own."""
        other = self._weights or ()
        seen = all(name.startswith(SEEN) for name in names)
        return seen and not any(name.startswith("vision_model.") for name in other)

    def sites(
        self,
        kind: SiteKind,
        *,
        towers: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
        target_modules: Sequence[str] | None = (),
    ) -> list[Site]:
        """Return Linear sites. Linears of the Q-Former are called "attention.query",
        "crossattention.dense", "intermediate_query" and so on; "query" is that of both attentions.

        Raises:
            ConfigError: an unknown tower, a name that no chosen tower has, or another kind.
        """
        self.check_towers(towers)
        if kind != "linear":
            raise UnsuitableError(f"{type(self).__name__} has experts at Linears; got {kind!r}")
        targets = self.default_targets if target_modules is None else target_modules
        return linear_sites(self, towers or self.towers, layers, targets)

    def repeated_blocks(self) -> list[nn.Module]:
        """Return the blocks of both transformers; the projection, small, is never run again."""
        return [*self.blocks(QFORMER), *self.blocks(LANGUAGE)]

    # -- samples ---------------------------------------------------------------------------------

    def prepare(
        self, example: Example, draw: torch.Generator | None = None
    ) -> Mapping[str, Tensor]:
        """Return what each modality's ``read`` gives, and tokens: "text", "asked", "answer".

        Tokens of a sample without text are called "prompt". With ``draw``, a modality is augmented
        where its specification says how.
        """
        self.check_modalities(example)
        found = self.instructions.prompt(example)
        prepared = {"text" if "text" in example.inputs else "prompt": found["input_ids"]}
        if "asked_ids" in found:
            prepared["asked"] = found["asked_ids"]
        for modality, spec in self.specs.items():
            if modality in example.inputs:
                try:
                    prepared[modality] = spec.read(example.inputs[modality])
                except DataError as error:
                    raise DataError(f"sample {example.key!r}: {error}") from error
                if draw is not None and spec.augment is not None:
                    prepared[modality] = spec.augment(prepared[modality], draw)
        answer = self.instructions.answer(example)
        return prepared if answer is None else {**prepared, "answer": answer}

    def inputs_of(self, prepared: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return token ids (b, n), masks, answers (b, a), and values of modalities (b, ...)."""
        prompts = [one["text"] if "text" in one else one["prompt"] for one in prepared]
        ids, mask = padded_left(prompts, self._padding)
        asked = padded_right([one.get("asked") for one in prepared], NO_ANSWER)
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "answer_ids": padded_right([one.get("answer") for one in prepared], NO_ANSWER),
            "asked_ids": asked.clamp_min(0),
            "asked_mask": (asked != NO_ANSWER).long(),
        }
        for modality in self.specs:
            known = [one[modality] for one in prepared if modality in one]
            blank = torch.zeros_like(known[0]) if known else torch.zeros(0)
            inputs[modality] = torch.stack([one.get(modality, blank) for one in prepared])
        return {name: value.to(self.device) for name, value in inputs.items()}

    def row_sizes(self, batch: Batch) -> Tensor:
        """Return (b, 3 + m): width of texts, answers and instructions, and what a row has."""
        names = ("input_ids", "answer_ids", "asked_ids")
        widths = torch.tensor([batch.inputs[name].shape[1] for name in names])
        has = torch.stack([has(batch, modality) for modality in self.specs], dim=1).long()
        return torch.cat([widths.to(has).expand(len(batch), 3), has], dim=1)

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
        embeds, spans = prompts(self, batch, route)
        if not self.decodes:
            self.host.set_route(LANGUAGE, replace(route, spans=spans))
            first = int(self.config.text_config.decoder_start_token_id)
            start = torch.full_like(answers[:, :1], first)
            output = self.call(
                self._language,
                inputs_embeds=embeds,
                attention_mask=spans.mask.long(),
                decoder_input_ids=torch.cat([start, answers[:, :-1].clamp_min(0)], dim=1),
            )
            return output.logits, answers
        longer = {name: F.pad(where, (0, answers.shape[1])) for name, where in spans.of.items()}
        answered = F.pad(given, (embeds.shape[1], 0))
        self.host.set_route(
            LANGUAGE, replace(route, spans=TokenSpans(longer, spans.present, answer=answered))
        )
        mask = torch.cat([spans.mask, given], dim=1).long()
        output = self.call(
            self._language,
            inputs_embeds=torch.cat([embeds, self.embed(answers.clamp_min(0))], dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0),
            logits_to_keep=answers.shape[1] + 1,
        )
        return output.logits[:, :-1], answers

    @torch.no_grad()
    def write(self, batch: Batch, route: Route, max_new_tokens: int) -> list[str]:
        """Return the answer of each row, greedy; it ends at an end token or at the limit."""
        embeds, spans = prompts(self, batch, route)
        kept = replace(route, spans=spans)
        self.host.set_route(LANGUAGE, replace(kept, decisions=Decisions()))
        ends = self._end_tokens
        try:
            tokens: Tensor = self.call(
                self._generate,
                inputs_embeds=embeds,
                attention_mask=spans.mask.long(),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=self._padding,
                eos_token_id=ends,
            )
        finally:  # what was decided is of this generation
            self.host.set_route(LANGUAGE, kept)
        texts = []
        for row in tokens[:, 0 if self.decodes else 1 :].tolist():
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            texts.append(self.instructions.read(row[:end]))
        return texts

    def embed(self, ids: Tensor) -> Tensor:
        """Return what the language model makes of token ids: (..., d)."""
        language: Any = self.model.get_submodule("language_model")
        found: Tensor = self.call(lambda: language.get_input_embeddings()(ids))
        return found

    def encode(self, batch: Batch, route: Route) -> Tensor:
        """Return the mean state (b, d) of each row's prompt under the route."""
        embeds, spans = prompts(self, batch, route)
        self.host.set_route(LANGUAGE, replace(route, spans=spans))
        return token_means(language_states(self, embeds, spans.mask), spans.mask)

    def base_pass(self, batch: Batch, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Return those of the results that are named, of prompts; an answer is never seen.

        "modalities": unit vectors (b, m, d): the mean of each modality's soft tokens, and of the
        last states at the text; NaN where the sample lacks it, zero where it is not seen.
        "layers": statistics of the prompt at four depths of the language model.
        "seen <modality>": what its encoder makes of it (b, frames, n, d).
        """
        found = {
            name: self.call(self.specs[modality].tokens, values=batch.inputs[modality])
            for name in names
            if (modality := name.removeprefix(SEEN)) != name
        }
        if len(found) == len(names):
            return found
        embeds, spans = prompts(self, batch, Route.of(BASE, len(batch), device=self.device))
        with outputs_of(self.blocks(LANGUAGE)) as hidden:
            last = language_states(self, embeds, spans.mask)
        found["embedding"] = token_means(last, spans.mask)
        if "layers" in names:
            states = [embeds, *hidden]
            depths = statistic_layers(len(states))
            found["layers"] = layer_statistics([states[depth] for depth in depths], spans.mask)
        if "modalities" in names:
            parts = torch.cat([spans.means(embeds)[:, :-1], spans.means(last)[:, -1:]], dim=1)
            absent = ~spans.present.unsqueeze(2)
            found["modalities"] = F.normalize(parts, dim=-1).masked_fill(absent, float("nan"))
        return found

    # -- what it is ------------------------------------------------------------------------------

    @property
    def parts(self) -> Mapping[str, int]:
        """The mean state of the prompt."""
        return {LANGUAGE: int(self.config.text_config.hidden_size)}

    def feature_widths(self) -> dict[str, int]:
        """Return the widths of "pooled", "layers" and (of each) "modalities"."""
        depths = statistic_layers(1 + len(self.blocks(LANGUAGE)))
        widths = dict.fromkeys(("pooled", "modalities"), self.width)
        return {**widths, "layers": 2 * len(depths) * self.width}

    def fingerprint(self) -> str:
        """Return the SHA-256 of every weight, those of plugged encoders included."""
        own = super().fingerprint()
        state = self.encoders.state_dict()
        seen = f"{own}/{len(self.specs)}/{sum(value._version for value in state.values())}"
        if self._plugged[0] != seen:
            self._plugged = (seen, digest_with(own, state))
        return self._plugged[1]

    def describe(self) -> dict[str, Any]:
        """Return class, name, limit and modalities, for the artefact."""
        return {
            "type": QFORMER,
            "class": type(self.model).__name__,
            "name_or_path": self.name,
            "sha256": self.fingerprint(),
            "text_length": self.text_length,
            "modalities": {n: dict(s.options) for n, s in self.specs.items() if s.options},
        }

    def preprocessing(self) -> str:
        """Return a digest of the limits and of what each modality is."""
        images = getattr(self.processor, "image_processor", None)
        known = {n: [s.frames, s.cue, dict(s.options)] for n, s in self.specs.items()}
        settings = [self.text_length, known, images.to_dict() if images is not None else {}]
        text = json.dumps(settings, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def tower_inputs(self) -> dict[str, tuple[ModelFunction, dict[str, Tensor]]]:
        """Return the Q-Former with one frame of an image, and the language model with a prompt."""
        return shapes_of_towers(self)

    def tokens(self, tower: str) -> int:
        """Return the length of a full sequence of a tower; "vision" is the model's encoder."""
        return length_of(self, tower)

    def to(self, device: torch.device | str) -> Self:
        """Move the model and the encoders; the weights stay the same."""
        self.encoders.to(device)
        super().to(device)
        return self

    # -- inside ----------------------------------------------------------------------------------

    @property
    def _padding(self) -> int:
        tokenizer = getattr(self.processor, "tokenizer", None)
        found = getattr(tokenizer, "pad_token_id", None)
        return 0 if found is None else int(found)

    @property
    def _end_tokens(self) -> list[int]:
        model: Any = self.model
        own = model.language_model.generation_config.eos_token_id
        others = own if isinstance(own, list) else [own]
        ends = dict.fromkeys([self.instructions.end_token, *others])
        return [int(token) for token in ends if token is not None]

    def _language(self, **inputs: Any) -> Any:
        model: Any = self.model
        return model.language_model(use_cache=False, **inputs)

    def _generate(self, **inputs: Any) -> Any:
        model: Any = self.model
        return model.language_model.generate(**inputs)
