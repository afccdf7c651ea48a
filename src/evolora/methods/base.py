"""Method: what every continual learner shares, so that one method = one short readable file.

A method is an ``nn.Module`` whose parameters and buffers are exactly what it adds to the frozen
backbone: its state dict is what is saved, and ``parameters()`` is what trains. The lifecycle
(tasks, freezing, counting, inference) is here; a method file says which experts stand where, which
gate mixes them, who recognises the task, and what is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from evolora.allocation.allocator import Allocator
from evolora.allocation.sample import TaskSamples
from evolora.allocation.value import Allocation
from evolora.backbones.base import Backbone, Batch, Encoded, TextBackbone, check_labels, prompts_of
from evolora.experts.prompts import PromptLayer
from evolora.experts.sites import ExpertLayer, Site
from evolora.experts.usage import UsageCounter
from evolora.methods.answers import Objective, Prediction, Written, answer_limit
from evolora.methods.entries import entries_of
from evolora.methods.fitness import check_backbone
from evolora.methods.heads import heads_of
from evolora.methods.reservoir import Reservoir
from evolora.methods.versions import StateVersions
from evolora.randomness import generator
from evolora.routing.features import FeatureExtractor
from evolora.routing.route import BASE, Route
from evolora.routing.selection import Chosen, Selection
from evolora.routing.selector import AlwaysSelector, Selector
from evolora.streams.task import LabelSpace

Routing = Literal["task-free", "oracle", "none"]
HeadMode = Literal["selected", "all_seen"]


class Method(nn.Module):
    """Base of every method.

    Class attributes:
        config_class: frozen dataclass of the method's settings.
        routing: how it knows the task at inference: "task-free", told by an "oracle", or "none".
        joint: True trains on all tasks at once (an upper bound, not a continual learner).
        replaces_weights: True runs the model with other weights than the frozen ones.
        needs_prompts: True answers by class-name prompts alone, which not every backbone has.
        writes: True also trains a model that writes its answers (:class:`TextBackbone`).
        needs_one_stream: True works on image and text in one sequence alone, as in ViLT.
        needs_modalities: True works where modalities are plugged in alone, as in a Q-Former.
        trains: False learns nothing at all.
        counted_as: mark in a tensor's name -> part that ``evolora inspect`` counts it under.
        regularizers: settings of losses on experts that belong to the method, whatever else a run
            adds.

    Attributes:
        heads: the tasks' linear heads where the backbone has no class-name prompts, else None.
        entries: how plugged modalities enter a Q-Former; None where there are none.
        head_mode: which heads answer: that of the "selected" task, or those of "all_seen" tasks.
            Methods that know no task ask all of them.
        query_feature: feature of the untouched model that routes carry as ``queries``, or None.
        reservoir: which samples of earlier tasks are replayed in training; None replays none. Heads
            of replayed tasks go on learning.
        allocator: decides which sites get a task's experts; None where the method has a rule.

    Args:
        config: instance of ``config_class``.
        backbone: frozen model the experts are added to.
        seed: run seed; initialisation derives from it.
    """

    config_class: ClassVar[type]
    routing: Routing = "none"
    joint: ClassVar[bool] = False
    replaces_weights: ClassVar[bool] = False
    needs_prompts: ClassVar[bool] = False
    writes: ClassVar[bool] = False
    needs_one_stream: ClassVar[bool] = False
    needs_modalities: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    counted_as: Mapping[str, str] = {}
    regularizers: Sequence[Any] = ()

    def __init__(self, config: Any, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__()
        check_backbone(self, config, backbone)
        self.config = config
        self.backbone = backbone
        self.seed = seed
        self.layers = nn.ModuleDict()
        self.selector: Selector = AlwaysSelector(BASE)
        self.labels: list[LabelSpace] = []
        self.task_names: list[str] = []
        self.task_modalities: list[tuple[str, ...]] = []
        self.heads = heads_of(backbone, self.labels)
        self.entries = entries_of(backbone, seed=seed) if self.trains else None
        self.head_mode: HeadMode = "selected"
        self.query_feature: str | None = None
        self.reservoir: Reservoir | None = None
        self.allocator: Allocator | None = None
        self.objective = Objective()
        self.reuse = True  # what lies below the experts is computed once (training.prefix_cache)
        self._tensors = StateVersions()
        self.extractors: dict[str, FeatureExtractor] = {}

    # -- learning --------------------------------------------------------------------------------

    def begin_task(self, name: str, labels: LabelSpace, modalities: Sequence[str] = ()) -> None:
        """Take up a new task: allocate its experts, trainable."""
        check_labels(self.backbone, labels)
        self.task_names.append(name)
        self.labels.append(labels)
        self.task_modalities.append(tuple(modalities))
        task = len(self.labels) - 1
        if self.heads is not None:
            draw = generator(self.seed, "head", task)
            self.heads.add(labels, draw, freeze=not self.joint and self.reservoir is None)
        if self.entries is not None:
            self.entries.begin(self.task_modalities, freeze=not self.joint)
        self.allocate(task)
        if self.backbone.device.type != "meta":  # counting on shapes keeps its indices on the CPU
            self.to(self.backbone.device)

    def allocate(self, task: int) -> None:
        """Add what the new task needs. Default: nothing."""

    def preview(self, task: int, samples: TaskSamples | None) -> None:
        """Look at a task just begun (None: at shapes alone); a decision must enter the state."""

    def review(
        self, task: int, rows: int, read: Callable[[Sequence[int]], Iterable[Batch]]
    ) -> None:
        """Look at the training samples of the task just learned. Default: nothing.

        Args:
            task: index of the task.
            rows: of its training set.
            read: gives chosen rows as batches of the task, without augmentation.
        """

    def finish_task(self) -> None:
        """Freeze what the task leaves behind. Default: nothing."""

    def expert_task(self, task: int) -> int:
        """Return the index under which a data task's experts are routed (methods may share one)."""
        return task

    def sources(self, task: int) -> tuple[str, ...]:
        """Return whose experts a learned gate mixes for a task, its own last; empty: no gate."""
        return ()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss": total, ...named terms} of a training batch of the current task."""
        assert batch.task is not None
        self._tensors.forget()
        labels = self.labels[batch.task]
        task = self.expert_task(batch.task)
        encoded, chosen = self.told(batch, task)
        with self.weights():
            route = self.make_route(chosen, batch, encoded)
            loss, embedding = self.loss_under(route, batch, labels, task)
        extra = self.extra_losses(batch, embedding)
        total = loss + sum(extra.values()) if extra else loss
        return {"loss": total, "task": loss.detach(), **{k: v.detach() for k, v in extra.items()}}

    def loss_under(
        self, route: Route, batch: Batch, labels: LabelSpace, task: int
    ) -> tuple[Tensor, Tensor]:
        """Return the task's loss under a route, and the embedding (b, p) it was computed from.

        Of a model that writes: the mean over rows of the answers' losses, and these (b, 1).
        """
        if isinstance(self.backbone, TextBackbone):
            limit = answer_limit(batch, labels, self.labels)
            smoothing = self.objective.label_smoothing
            losses = self.backbone.answer_losses(batch, route, limit=limit, smoothing=smoothing)
            return losses.mean(), losses.unsqueeze(1)
        embedding = self.backbone.encode(batch, route)
        return self.task_loss(embedding, batch, labels, task), embedding

    def task_loss(self, embedding: Tensor, batch: Batch, labels: LabelSpace, task: int) -> Tensor:
        """Return the classification loss of embeddings (b, p) of the current data task."""
        return self.objective.loss(*self.training_logits(embedding, batch, labels, task), labels)

    def training_logits(
        self, embedding: Tensor, batch: Batch, labels: LabelSpace, task: int
    ) -> tuple[Tensor, Tensor]:
        """Return logits (b, c) of the classes that a training loss is about, and their targets."""
        assert batch.task is not None
        if self.heads is not None:
            return self.heads.of_task(embedding, batch.task), batch.labels
        subset, targets = self.objective.step_classes(batch, labels)
        classes = prompts_of(self.backbone).class_embeddings(
            labels,
            task,
            random=batch.random.whole() if batch.random else None,
            classes=subset,
            ensemble=False,
            reuse=self.reuse,
        )
        return prompts_of(self.backbone).logits(embedding, classes), targets

    def extra_losses(self, batch: Batch, embedding: Tensor) -> dict[str, Tensor]:
        """Return the method's own weighted loss terms of the forward that just ran."""
        return {}

    def make_route(self, tasks: Chosen, batch: Batch, encoded: Encoded | None = None) -> Route:
        """Return the route of a batch that experts answer, with what their gates read.

        Args:
            tasks: who answers; a tensor or a number says so without helpers.
            batch: the samples.
            encoded: the base's pass over them, if there was one.
        """
        chosen = Selection.of(tasks, len(batch), self.backbone.device)
        route = Route(
            chosen.tasks,
            uniform=chosen.uniform,
            helpers=chosen.helpers,
            summary=self.backbone.vision_summary,
            random=batch.random,
        )
        if self.query_feature is None:
            return route
        queries = (encoded or self.backbone.encode_base(batch)).features[self.query_feature]
        return replace(route, queries=queries if queries.dim() == 3 else queries.unsqueeze(1))

    def weights(self) -> AbstractContextManager[None]:
        """Context in which the backbone runs with this method's own weights. Default: its own."""
        return nullcontext()

    # -- inference -------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, batch: Batch, labels: LabelSpace, *, oracle: int | None = None) -> Prediction:
        """Return class probabilities over ``labels``, each row routed on its own.

        Args:
            batch: preprocessed samples.
            labels: what to choose from.
            oracle: index of the true task if it is learned; read by oracle selectors alone.
        """
        return self.answer(batch, *self.route(batch, oracle), labels)

    @torch.no_grad()
    def write(
        self,
        batch: Batch,
        labels: LabelSpace,
        *,
        oracle: int | None = None,
        tasks: Chosen | None = None,
    ) -> Written:
        """Return the text that answers each row, routed on its own; see :meth:`predict`.

        All rows run in one batch, whatever their tasks (``tasks`` where they are told); a row's
        route holds for all its tokens.
        """
        check_labels(self.backbone, labels)
        assert isinstance(self.backbone, TextBackbone)
        batch = replace(batch, random=None)
        encoded, chosen = self.route(batch, oracle) if tasks is None else (None, tasks)
        selection = Selection.of(chosen, len(batch), self.backbone.device).settled()
        with self.weights():
            route = self.make_route(selection, batch, encoded)
            texts = self.backbone.write(batch, route, labels.max_new_tokens)
        return Written(texts=tuple(texts), tasks=selection.tasks)

    @torch.no_grad()
    def route(self, batch: Batch, oracle: int | None = None) -> tuple[Encoded | None, Selection]:
        """Return (the base's pass if the selector needed one, who answers each row)."""
        rows, device = len(batch), self.backbone.device
        if not self.labels:  # nothing is learned: there are no experts to route to
            return None, Selection.of(BASE, rows, device)
        encoded, features = self.routing_features(batch)
        return encoded, Selection.of(self.selector.select(features, rows, oracle), rows, device)

    @torch.no_grad()
    def told(self, batch: Batch, experts: int) -> tuple[Encoded | None, Selection]:
        """Return who answers rows whose experts are told: in training, and where a user says so.

        Who helps them is decided as :meth:`route` does. ``experts`` is an :meth:`expert_task`.
        """
        selection = Selection.of(experts, len(batch), self.backbone.device)
        if experts == BASE or not self.selector.helps:
            return None, selection
        encoded, features = self.routing_features(batch)
        helpers = self.selector.helpers(features, selection.tasks)
        found = replace(selection, helpers=helpers)
        return encoded, Selection.of(found, len(batch), self.backbone.device).settled()

    def answer(
        self, batch: Batch, encoded: Encoded | None, tasks: Chosen, labels: LabelSpace
    ) -> Prediction:
        """Return class probabilities of rows whose answerers are known."""
        chosen = Selection.of(tasks, len(batch), self.backbone.device)
        return self.score(self.embed(batch, encoded, chosen), chosen.tasks, labels)

    def embed(self, batch: Batch, encoded: Encoded | None, tasks: Chosen) -> Tensor:
        """Return the embedding (b, p) of each row under its own tasks' experts, or the base's.

        The rows of all tasks run in one forward; those of the base are not run again if ``encoded``
        has their pass.
        """
        batch = replace(batch, random=None)  # a training batch that is answered draws nothing
        chosen = Selection.of(tasks, len(batch), self.backbone.device)
        answered = chosen.tasks != BASE
        rows, others = torch.nonzero(answered)[:, 0], torch.nonzero(~answered)[:, 0]
        if len(rows) == 0:
            return self._embed_base(batch, encoded)
        if len(others) == 0:
            return self._embed_experts(batch, chosen, encoded)
        mine, rest = (encoded.take(part) if encoded else None for part in (rows, others))
        experts = self._embed_experts(batch.take(rows), chosen.take(rows), mine)
        base = self._embed_base(batch.take(others), rest)
        return torch.cat([experts, base.to(experts.dtype)])[torch.cat([rows, others]).argsort()]

    def score(self, embedding: Tensor, tasks: Tensor, labels: LabelSpace) -> Prediction:
        """Return class probabilities of embeddings (b, p) under the classes of their tasks (b,)."""
        logits: Tensor | None = None
        for task in torch.unique(tasks).tolist():
            rows = torch.nonzero(tasks == task).squeeze(1)
            part = self._logits(embedding[rows], task, labels)
            if logits is None:
                logits = part.new_empty(len(embedding), part.shape[1])
            logits[rows] = part
        assert logits is not None
        scores = logits.sigmoid() if labels.multi_label else logits.softmax(dim=1)
        return Prediction(scores=scores, tasks=tasks)

    def _logits(self, embedding: Tensor, task: int, labels: LabelSpace) -> Tensor:
        """Return logits (b, c) of embeddings (b, p) that ``task`` (or the base) answers."""
        if self.heads is None:
            return prompts_of(self.backbone).logits(embedding, self.classifier(labels, task))
        alone = self.head_mode == "selected" and self.routing != "none" and task != BASE
        # Asked for classes that only other tasks taught, the features are still the task's.
        if alone and not set(labels.classes).isdisjoint(self.labels[task].classes):
            return self.heads.among(embedding, labels, [task])
        return self.heads.among(embedding, labels, range(len(self.labels)))

    def routing_features(
        self, batch: Batch, name: str | None = None
    ) -> tuple[Encoded | None, dict[str, Tensor]]:
        """Return (the base's pass if it was needed, features by name: the selector's, or this)."""
        if (wanted := name or self.selector.feature) is None:
            return None, {}
        if wanted in self.backbone.apart_features:
            return None, self.backbone.base_results(batch, (wanted,))
        encoded = self.backbone.encode_base(batch)
        extra = {name: extract(batch) for name, extract in self.extractors.items()}
        return encoded, {**encoded.features, **extra}

    def classifier(self, labels: LabelSpace, task: int) -> Tensor:
        """Return (c, p) class embeddings under the experts of ``task`` (or BASE)."""
        if task == BASE:
            with self.backbone.host.disabled():
                return prompts_of(self.backbone).class_embeddings(labels, BASE, reuse=self.reuse)
        with self.weights():
            return prompts_of(self.backbone).class_embeddings(
                labels, task, version=self._state_version(), reuse=self.reuse
            )

    def _state_version(self) -> int:
        """Return a number that changes with every in-place or whole change of the tensors."""
        return self._tensors.number((*self.parameters(), *self.buffers()), self.backbone.new_state)

    def route_tensors(self, task: int) -> Sequence[Tensor] | None:
        """Return every tensor that decides how ``task`` is answered, where that can be told.

        As long as they are the same, an input that was answered is not run again. Default: None.
        """
        return None

    def _embed_base(self, batch: Batch, encoded: Encoded | None) -> Tensor:
        return (encoded or self.backbone.encode_base(batch, features=False)).embedding

    def _embed_experts(self, batch: Batch, chosen: Selection, encoded: Encoded | None) -> Tensor:
        """Return the embedding (b, p) of rows that experts answer.

        It is kept where all have the same tasks, whose experts tell their state.
        """
        chosen = chosen.settled()
        pairs = chosen.pairs()
        state = self._route_state(pairs[0]) if batch.known and len(pairs) == 1 else None

        def run(rows: Tensor) -> Tensor:
            part, known = batch.take(rows), encoded.take(rows) if encoded else None
            with self.weights():
                return self.backbone.encode(part, self.make_route(chosen.take(rows), part, known))

        if batch.known is None or state is None:
            with self.weights():
                return self.backbone.encode(batch, self.make_route(chosen, batch, encoded))
        found = batch.known.memory.passes.fetch(
            (state,),
            batch.known.samples,
            lambda rows: {state: run(rows)},
            context=self.backbone.context(),
        )
        return found[state].to(self.backbone.device)

    def _route_state(self, pair: tuple[int, int]) -> str | None:
        """Return a digest of all that decides the answers of a task with its helper, or None."""
        self._state_version()  # forgets digests of another state
        return self._tensors.digest(
            pair,
            f"{self.config}/{pair}",
            lambda: [self.route_tensors(task) for task in pair if task != BASE],
        )

    # -- shared helpers --------------------------------------------------------------------------

    def insert(self, site: Site, layer: ExpertLayer) -> None:
        """Own ``layer`` and let it act at ``site``."""
        self.layers[site.key] = layer
        self.backbone.host.insert(site, layer)

    def insert_prompts(
        self, layers: Mapping[str, PromptLayer], *, at: int = 0, replace: bool = False
    ) -> None:
        """Own prompt layers, by name, and put their prompts into the backbone's blocks."""
        self.layers.update(layers)
        self.backbone.insert_prompts(list(layers.values()), at=at, replace=replace)

    def remove(self) -> None:
        """Take all experts out of the backbone again."""
        self.backbone.host.remove_all()

    def counters(self) -> dict[str, UsageCounter]:
        """Return the usage counter of each site that has one."""
        found = {key: getattr(layer, "usage", None) for key, layer in self.layers.items()}
        return {key: value for key, value in found.items() if isinstance(value, UsageCounter)}

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that train now, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def stored(self) -> dict[str, Tensor]:
        """Return every tensor that must be kept to answer again and to go on, by name."""
        kept = self.state_dict().items()
        return {name: t for name, t in kept if t.numel() > 0 and name != "allocator.scores"}

    @property
    def allocation(self) -> Allocation | None:
        """Which sites have experts of which task, or None where no allocator decides it."""
        return None if self.allocator is None else self.allocator.allocation(self.task_names)
