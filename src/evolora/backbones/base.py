"""Backbone: one frozen pretrained model behind the few verbs that methods and the loop need."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.backbones.answer_tokens import Limit, answer_means, token_losses
from evolora.backbones.batch import (
    Batch,
    Encoded,
    LazyInputs,
    Prefix,
    answer_texts,
    label_tensor,
)
from evolora.backbones.blocks import block_indices, outputs_of, prompt_site
from evolora.backbones.frozen import FrozenModel, ModelFunction
from evolora.backbones.kinds import check_labels, prompts_of
from evolora.errors import ConfigError, DataError, unknown_name
from evolora.experts.prompts import InputPrompts, PromptLayer, PromptSite, insert_prefix
from evolora.experts.sites import Site, SiteKind
from evolora.randomness import StepRandom, generator
from evolora.routing.route import Route
from evolora.streams.task import Example, LabelSpace

__all__ = [
    "Backbone",
    "Batch",
    "Encoded",
    "LazyInputs",
    "Prefix",
    "PromptBackbone",
    "TextBackbone",
    "check_labels",
    "prompts_of",
]

CROP_SCALE = (0.9, 1.0)
"""Area kept by the training crop (MoE-Adapters, RandomResizedCrop 0.9-1.0, bicubic)."""


class Backbone(FrozenModel):
    """A frozen model, its sites, and how it turns samples into embeddings.

    Experts are added through :attr:`host`; the weights are never written.

    Attributes:
        default_targets: Linears that get experts where a method's settings name none.
        answers: classes are told apart by "prompts" that name them (:class:`PromptBackbone`), or by
            "heads" on the embedding, which are learned by methods; or the model writes its answer
            as a "text" (:class:`TextBackbone`).
        cached_tower: the tower that :meth:`prefix_of` cuts: the one that sees images.
        modalities: what a sample may have; it has at least one of them.
        vision_summary: where the vector that speaks for a sample is, see :class:`Route`.
        input_names: of ``Batch.inputs``.
        kept_features: routing features of :meth:`base_pass`, beside "pooled".
        apart_features: those that have a pass of their own and are made only where asked for.
        masked: whether a prefix has a mask.
        has_prefix: whether it can go on from activations below the experts at all.
        one_stream: image and text run in one sequence, whose places routes carry as ``spans``, and
            a pooler (:attr:`pooler_site`) makes the embedding of it, as in ViltModel.
        takes_modalities: whether modalities may be plugged in, as in a Q-Former.
    """

    default_targets: ClassVar[tuple[str, ...]] = ("q_proj", "v_proj", "fc1", "fc2")
    answers: ClassVar[Literal["prompts", "heads", "text"]] = "heads"
    cached_tower: str = "vision"
    modalities: tuple[str, ...] = ("image",)
    vision_summary: str = "first"
    input_names: tuple[str, ...] = ("pixel_values",)
    kept_features: tuple[str, ...] = ("layers",)
    apart_features: tuple[str, ...] = ()
    masked: bool = False
    has_prefix: ClassVar[bool] = True
    one_stream: ClassVar[bool] = False
    takes_modalities: ClassVar[bool] = False
    _states = 0

    @abstractmethod
    def sites(
        self,
        kind: SiteKind,
        *,
        towers: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
        target_modules: Sequence[str] | None = (),
    ) -> list[Site]:
        """Return the sites of a kind, in order of tower and depth; ConfigError on unknown names.

        ``target_modules`` of None are the :attr:`default_targets`.
        """

    def check_towers(self, towers: Sequence[str] | None) -> None:
        """Refuse towers that the model does not have."""
        for tower in towers or ():
            if tower not in self.towers:
                raise unknown_name("tower", tower, self.towers)

    def tower_parameters(self, tower: str) -> list[nn.Parameter]:
        """Return the weights of a tower: those of its blocks, and what else it consists of."""
        return [weight for block in self.blocks(tower) for weight in block.parameters()]

    @property
    def pooler_site(self) -> Site:
        """Where a layer stands that reads the whole sequence (b, n, d), if there is ``one_stream``.

        Its input is what the pooler reads, its output becomes the embedding.
        """
        raise TypeError(f"{type(self).__name__} has no pooler of one stream")

    def prompt_sites(self, layers: Sequence[int] | None = None) -> list[PromptSite]:
        """Return blocks of :attr:`cached_tower` that may get prompts, the lowest first.

        Args:
            layers: indices; None takes all.
        """
        blocks = self.blocks(self.cached_tower)
        wanted = block_indices(layers, len(blocks), self.cached_tower)
        return [prompt_site(blocks[index], self.cached_tower, index) for index in wanted]

    def insert_prompts(
        self, layers: Sequence[PromptLayer], *, at: int = 0, replace: bool = False
    ) -> None:
        """Put the prompts of layers into their blocks from the next forward on.

        Args:
            layers: of one kind; see :mod:`evolora.experts.prompts`.
            at: for input prompts, the position they are put to.
            replace: for input prompts, take out those of the block before.
        """
        if layers[0].kind == "input":
            InputPrompts(self.host, self.blocks(self.cached_tower), layers, at=at, replace=replace)
            return
        for layer in layers:
            insert_prefix(self.host, layer)

    def collate(
        self,
        examples: Sequence[Example],
        *,
        task: int | None = None,
        random: StepRandom | None = None,
    ) -> Batch:
        """Return preprocessed samples; with ``random``, images are cropped at random."""
        draws: list[torch.Generator | None] = [None] * len(examples)
        if random is not None:
            first = random.first_row
            draws = [generator(random.seed, "crop", first + row) for row in range(len(examples))]
        prepared = [self.prepare(one, draw) for one, draw in zip(examples, draws, strict=True)]
        return Batch(
            inputs=self.inputs_of(prepared),
            labels=label_tensor([example.label for example in examples], self.device),
            keys=tuple(example.key for example in examples),
            task=task,
            random=random,
            answers=answer_texts([example.label for example in examples]),
            present=self.present(prepared),
        )

    @abstractmethod
    def prepare(
        self, example: Example, draw: torch.Generator | None = None
    ) -> Mapping[str, Tensor]:
        """Return a sample's modalities as small integers; :meth:`inputs_of` takes them on.

        A missing modality is missing here too. The result is the same each time, unless ``draw``
        augments the image.

        Raises:
            DataError: the sample has none of the backbone's modalities.
        """

    @abstractmethod
    def inputs_of(self, prepared: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the ``Batch.inputs`` of prepared samples; a constant for what is missing."""

    def present(self, samples: Sequence[Iterable[str]]) -> dict[str, Tensor]:
        """Return ``Batch.present`` of samples whose modalities are given."""
        if len(self.modalities) == 1:
            return {}
        known = [frozenset(sample) for sample in samples]
        return {
            modality: torch.tensor([modality in found for found in known], device=self.device)
            for modality in self.modalities
        }

    def without(self, batch: Batch, lost: Mapping[str, Tensor]) -> Batch:
        """Return the batch as if rows lacked a modality: modality -> (b,) bool.

        Nothing is known of such samples.
        """
        present = dict(batch.present)
        for modality, rows in lost.items():
            present[modality] = present.get(modality, torch.ones_like(rows)) & ~rows
        return replace(batch, present=present, known=None, prefix=None)

    def row_sizes(self, batch: Batch) -> Tensor | None:
        """Return what noise in training depends on (b, s), where rows differ in it; else None."""
        return None

    def check_modalities(self, example: Example) -> None:
        """Refuse a sample that has nothing this backbone can see."""
        if not any(modality in example.inputs for modality in self.modalities):
            wanted = " or ".join(self.modalities)
            got = ", ".join(example.inputs) or "nothing"
            raise DataError(
                f"sample {example.key!r} has no {wanted}, which is what "
                f"{type(self).__name__} answers; got {got}"
            )

    def encode_base(self, batch: Batch, *, features: bool = True) -> Encoded:
        """Run the untouched base once, without gradient; routing features come from the same pass.

        "pooled" is the embedding as a unit vector, "modalities" (b, m, f) one vector per modality:
        NaN where the sample lacks it, "pooled" where the backbone has one modality only.
        """
        names = ("embedding", *self.kept_features) if features else ("embedding",)
        found = self.base_results(batch, names)
        embedding = found.pop("embedding")
        pooled = F.normalize(embedding, dim=-1)
        routing = {"pooled": pooled, "modalities": pooled.unsqueeze(1)} | found
        return Encoded(embedding=embedding, features=routing if features else {})

    def base_results(self, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
        """Return what :meth:`base_pass` makes of a batch; once, where samples are known."""

        def run(part: Batch) -> Mapping[str, Tensor]:
            with torch.no_grad(), self.host.disabled():
                return self.base_pass(part, names)

        known = batch.known if not self.has_other_weights or self.stays(names) else None
        if known is None:
            return dict(run(batch))
        results = known.memory.passes.fetch(
            names, known.samples, lambda rows: run(batch.take(rows)), context=self.context()
        )
        return {name: value.to(self.device) for name, value in results.items()}

    def stays(self, names: Sequence[str]) -> bool:
        """Return whether none of the weights that a method has in place decides these results."""
        return False

    @abstractmethod
    def base_pass(self, batch: Batch, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Return those of the "embedding" (b, p) and the features of the batch that are named.

        It is called without gradient and with experts disabled.
        """

    @property
    def width(self) -> int:
        """Width p of the embedding."""
        return sum(self.parts.values())

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, int]:
        """What the embedding is made of: name of a part -> its width, in order.

        A part that is named as a modality is zero where a sample lacks that modality.
        """

    @abstractmethod
    def feature_widths(self) -> dict[str, int]:
        """Return the width of each routing feature that :meth:`encode_base` gives."""

    @abstractmethod
    def tower_inputs(self) -> dict[str, tuple[ModelFunction, dict[str, Tensor]]]:
        """Return tower -> (function, its inputs on the meta device): one row of full length."""

    @abstractmethod
    def tokens(self, tower: str) -> int:
        """Return the length of a full sequence of a tower."""

    @abstractmethod
    def encode(self, batch: Batch, route: Route) -> Tensor:
        """Return the embedding (b, p) of the batch under the route.

        It goes on from ``batch.prefix`` where there is one, or from what ``batch.known`` keeps of
        the activations below the lowest expert, which it computes once.
        """

    def prefix(self, batch: Batch, cut: int) -> Tensor:
        """Return the activations (b, n, d) of :meth:`prefix_of`."""
        return self.prefix_of(batch, cut).hidden

    @abstractmethod
    def prefix_of(self, batch: Batch, cut: int) -> Prefix:
        """Return what enters block ``cut`` of the untouched :attr:`cached_tower`.

        The length is the same for every sample, so that what is kept of each can be stacked.

        Raises:
            ConfigError: the tower has no such block.
        """

    def known_prefix(self, batch: Batch, route: Route) -> Prefix | None:
        """Return what :attr:`cached_tower` can go on from below its experts, or None.

        It is what the batch brings, or what is kept of its samples (computed once). A training step
        goes on from below the experts of its own task, which may be higher than others'.
        """
        if self.has_other_weights:
            return None
        if batch.prefix is not None:
            return batch.prefix
        task = route.alone if route.random is not None else None
        cut, known = self.host.lowest(self.cached_tower, task), batch.known
        if not cut or known is None or known.memory.prefixes is None or not self.host.enabled:
            return None

        names = (f"prefix {cut}", "mask") if self.masked else (f"prefix {cut}",)

        def compute(rows: Tensor) -> dict[str, Tensor]:
            part = self.prefix_of(batch.take(rows), cut)
            return {names[0]: part.hidden, **({} if part.mask is None else {"mask": part.mask})}

        found = known.memory.prefixes.fetch(names, known.samples, compute, context=self.context())
        dtype = next(self.model.parameters()).dtype
        return Prefix(
            cut=cut,
            hidden=found[names[0]].to(self.device, dtype, non_blocking=True),
            mask=found["mask"].to(self.device) if self.masked else None,
        )

    @contextmanager
    def keeping_prefix(self, batch: Batch, mask: Tensor | None = None) -> Iterator[None]:
        """Keep the prefixes of known samples, which a pass through the untouched base goes by.

        Args:
            batch: what runs.
            mask: (b, n) of its sequences, where the backbone is ``masked``.
        """
        cut, known = self.host.lowest(self.cached_tower), batch.known
        prefixes = known.memory.prefixes if known is not None else None
        if not cut or known is None or prefixes is None or self.has_other_weights:
            yield
            return
        with outputs_of([self.blocks(self.cached_tower)[cut - 1]]) as hidden:
            yield
        found = {f"prefix {cut}": hidden[0], **({} if mask is None else {"mask": mask})}
        prefixes.keep(found, known.samples, context=self.context())

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what an artefact must remember to find this backbone again (JSON values)."""

    def context(self) -> str:
        """Return all that decides what the untouched model makes of an input, as a cache key."""
        device, dtype = self._own[0].device, self._own[0].dtype
        autocast = ""
        if torch.is_autocast_enabled(device.type):
            autocast = str(torch.get_autocast_dtype(device.type))
        return f"{self.fingerprint()}/{self.preprocessing()}/{device}/{dtype}/{autocast}"

    @abstractmethod
    def preprocessing(self) -> str:
        """Return what decides the inputs of a prepared sample (sizes, mean, deviation)."""

    def new_state(self) -> int:
        """Return a number that no state of any method here has had, and forget classes."""
        self._states += 1
        self.forget_classes()
        return self._states

    def forget_classes(self) -> None:
        """Drop what is kept of learned classes; called whenever experts may change."""


class PromptBackbone(Backbone):
    """A backbone that tells classes apart by prompts that name them: no head has to be learned."""

    answers = "prompts"

    @abstractmethod
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
        """Return (c, p) class embeddings with the experts of ``task`` (or the base)."""

    @abstractmethod
    def logits(self, embedding: Tensor, classes: Tensor) -> Tensor:
        """Return (b, c) logits of embeddings (b, p) against class embeddings (c, p)."""


class TextBackbone(Backbone):
    """A backbone that writes its answers, token after token: a language model behind an encoder.

    A method trains it by :meth:`answer_losses` and asks it by :meth:`write`; its embedding, the
    mean state of the prompt, serves selectors.
    """

    answers = "text"
    has_prefix = False

    @abstractmethod
    def answer_logits(
        self, batch: Batch, route: Route, *, limit: Limit = None
    ) -> tuple[Tensor, Tensor]:
        """Return logits (b, a, c) at the tokens of each row's answer, and these tokens (b, a).

        The end token is one of them. Where a row has no more, the token is NO_ANSWER.

        Args:
            batch: with answers.
            route: who answers.
            limit: tokens of an answer that count, at most: of all rows, or of each.

        Raises:
            DataError: a row has no answer.
        """

    def answer_losses(
        self, batch: Batch, route: Route, *, limit: Limit = None, smoothing: float = 0.0
    ) -> Tensor:
        """Return (b,): mean over the tokens of a row's answer of -log p(token | all before it).

        A row counts the same however long its answer is. ``smoothing`` is that of labels, in
        [0, 1); the rest is :meth:`answer_logits`'.
        """
        logits, answers = self.answer_logits(batch, route, limit=limit)
        return answer_means(token_losses(logits, answers, smoothing), answers)

    @abstractmethod
    def write(self, batch: Batch, route: Route, max_new_tokens: int) -> list[str]:
        """Return the answer of each row, the most probable token taken at each step.

        The route is fixed before the first token and holds for all.
        """

    def prefix_of(self, batch: Batch, cut: int) -> Prefix:
        """Refuse: texts differ in length, so activations below the experts are not kept."""
        raise ConfigError(f"{type(self).__name__} keeps no activations below its experts")
