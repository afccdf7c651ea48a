"""Learner: a frozen model, a method and what has been learned so far. The library's front door."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from evolora.allocation.sample import TaskSamples
from evolora.answering import Answer, answer_inputs
from evolora.backbones.base import Backbone, Batch
from evolora.errors import ConfigError, unknown_name
from evolora.evaluation.cost import Cost, measure_cost
from evolora.evaluation.tally import Evaluation
from evolora.methods.answers import Objective
from evolora.methods.base import Method
from evolora.registry import METHODS
from evolora.storage.state import all_or_nothing
from evolora.streams.sampling import image_folder
from evolora.streams.task import Examples, LabelSpace, Subset, Task
from evolora.training.batches import Share, TrainingBatches, evaluation_batches, in_turn
from evolora.training.config import TrainingConfig
from evolora.training.held_out import split_held_out, spread
from evolora.training.loop import TaskRun, train_task
from evolora.training.prefix_cache import build_memory, check_training
from evolora.training.progress import Reporter
from evolora.training.regularised import check_regularizers
from evolora.training.replay import Archive, Replayed
from evolora.training.samples import Samples

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(kw_only=True)
class Progress:
    """Where a learner stands inside a task, for checkpoints.

    Args:
        step: optimizer steps done.
        moments: optimizer state at that step.
    """

    step: int = 0
    moments: Mapping[str, Tensor] = field(default_factory=dict)


class Learner:
    """Teaches a frozen model task after task.

    Args:
        model: a ``transformers`` model (CLIP, SigLIP, ViLT) or a :class:`Backbone`.
        processor: the model's processor; not needed with a Backbone.
        method: an instance of a method's configuration, e.g. ``evolora.MoEAdapters(r=16)``.
        training: how each task is trained.
        seed: run seed.
        evaluation_batch_size: samples per forward in evaluation and prediction.
        accelerator: the runtime; made from ``training`` when None.
        reporter: progress and log; silent when None.
        evaluation_cache: decode a test image and run the untouched base on it once, not in every
            evaluation.
        samples: what is known of samples already; shared by learners on one backbone.
        regularizers: settings of losses on experts, e.g. ``evolora.ResoraConfig()``; they are part
            of training, not of what is learned and saved.

    Raises:
        ConfigError: a setting of ``training``, or a regularizer, does not go with the method (the
            message says why).
    """

    def __init__(
        self,
        model: nn.Module | Backbone,
        processor: Any | None = None,
        *,
        method: Any,
        training: TrainingConfig | None = None,
        seed: int = 0,
        evaluation_batch_size: int = 64,
        accelerator: Accelerator | None = None,
        reporter: Reporter | None = None,
        evaluation_cache: bool = True,
        samples: Samples | None = None,
        regularizers: Sequence[Any] = (),
    ) -> None:
        from evolora.backbones.loading import wrap_model
        from evolora.config import build_method
        from evolora.training.runtime import build_accelerator, share_of

        self.training = training or TrainingConfig()
        self.seed = seed
        self.evaluation_batch_size = evaluation_batch_size
        self.accelerator = accelerator or build_accelerator(self.training)
        self.share: Share = share_of(self.accelerator)
        if not isinstance(model, Backbone):
            name = getattr(getattr(model, "config", None), "_name_or_path", "")
            model = wrap_model(model, processor, name=name)
        self.backbone = model.to(self.accelerator.device)
        self.method: Method = build_method(method, self.backbone, seed=seed)
        self.method.to(self.accelerator.device)
        self.method.objective = Objective(
            label_smoothing=self.training.label_smoothing_factor,
            max_classes=self.training.max_classes_per_step,
        )
        check_training(self.training, self.method)
        self.regularizers = check_regularizers(
            self.method, [*self.method.regularizers, *regularizers]
        )
        self.method.reuse = self.training.prefix_cache != "off"
        self.samples = samples or Samples(
            self.backbone, build_memory(self.training, self.backbone.device)
        )
        self.evaluation_cache = evaluation_cache
        self.reporter = reporter or Reporter()
        self.costs: list[Cost] = []
        self.archive = Archive(self.method)

    # -- learning --------------------------------------------------------------------------------

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks learned so far."""
        return self.method.task_names

    def begin(self, task: Task) -> None:
        """Allocate what a new task needs (the first half of :meth:`learn`)."""
        if task.name in self.task_names:
            raise ConfigError(
                f"task {task.name!r} is already learned (learned: {', '.join(self.task_names)})"
            )
        self.method.begin_task(task.name, task.labels, task.modalities)
        self.recall([task])

    def recall(self, tasks: Iterable[Task]) -> None:
        """Put the data of learned tasks at hand again, for methods that replay it.

        A learner that learned them itself, or goes on with a run, has them at hand.
        """
        for task in tasks:
            if task.name not in self.task_names:
                raise unknown_name("learned task", task.name, self.task_names)
            self.archive.keep(task)

    def learn(
        self,
        task: Task,
        *,
        progress: Progress | None = None,
        save: Callable[[int, Mapping[str, Tensor]], None] | None = None,
    ) -> float | None:
        """Learn a task to the end and return the last training loss (None if nothing trains).

        Args:
            task: what to learn.
            progress: where an interrupted learning of this task stopped (it is allocated then).
            save: called at checkpoints with (steps done, optimizer state).
        """
        with all_or_nothing(self.method, self.costs):
            if progress is None:
                self.begin(task)
            index = len(self.task_names) - 1
            train, held_out = split_held_out(task)
            read = partial(self._of_task, index, train)
            if progress is None:
                self.method.preview(index, self._samples(len(train), read))
            replayed = self.archive.replayed(self._keys)
            steps = 0 if task.name in self.training.known_tasks else self.training.max_steps
            run = self._task_run(task.name, [(index, train)], steps, replayed)
            loss = self._train(run, progress, save)
            self.method.review(index, len(train), read)
            self._finish(index, train, held_out)
            self._settle()
        return loss

    def learn_jointly(
        self,
        tasks: Sequence[Task],
        *,
        progress: Progress | None = None,
        save: Callable[[int, Mapping[str, Tensor]], None] | None = None,
    ) -> float | None:
        """Learn several tasks at once: each step a batch of one of them in turn, equally many.

        Raises:
            ConfigError: the method learns one task after another, or no task was given.
        """
        if not self.method.joint:
            joint = [entry.name for entry in METHODS if entry.value.joint]
            raise ConfigError(
                f"{self.method.config.type} learns one task after another; call learn for each "
                f"(methods that learn jointly: {', '.join(joint)})"
            )
        if not tasks:
            raise ConfigError("learn_jointly needs at least one task; got none")
        with all_or_nothing(self.method, self.costs):
            if progress is None:
                for task in tasks:
                    self.begin(task)
            first = len(self.task_names) - len(tasks)
            known = self.training.known_tasks
            parts = [
                (i, split_held_out(t)[0]) for i, t in enumerate(tasks, first) if t.name not in known
            ]
            run = self._task_run("all tasks", parts, self.training.max_steps * len(parts))
            loss = self._train(run, progress, save)
            self.method.finish_task()
            self._settle()
        return loss

    def _task_run(
        self,
        title: str,
        parts: Sequence[tuple[int, Examples]],
        steps: int,
        replayed: Replayed | None = None,
    ) -> TaskRun:
        feeds = [
            TrainingBatches(
                data,
                self.backbone,
                self.training,
                seed=self.seed,
                task=index,
                share=self.share,
                samples=self.samples if self.training.prefix_cache != "off" else None,
                replayed=replayed,
            )
            for index, data in parts
        ]
        rate = self.training.learning_rates.get(title, self.training.learning_rate)

        def batches(step: int) -> Any:
            return feeds[0].from_step(step) if len(feeds) == 1 else in_turn(feeds, step)

        return TaskRun(
            method=self.method,
            batches=batches,
            config=self.training,
            base_rate=rate,
            title=title,
            total_steps=steps,
            regularizers=self.regularizers,
            seed=self.seed,
        )

    def _train(
        self,
        run: TaskRun,
        progress: Progress | None,
        save: Callable[[int, Mapping[str, Tensor]], None] | None,
    ) -> float | None:
        self.backbone.forget_classes()
        self.samples.memory.new_generation()
        place = progress or Progress()
        with self.backbone.checkpointing(self.training.gradient_checkpointing):
            loss = train_task(
                run,
                self.accelerator,
                self.reporter,
                start=place.step,
                moments=place.moments,
                save=save,
            )
        self.reduce_usage()
        cost = measure_cost(self.method)
        self.costs.append(cost if run.total_steps else replace(cost, trainable_parameters=0))
        return loss

    def _settle(self) -> None:
        """Note what the finished task leaves to be stored."""
        after = measure_cost(self.method)
        self.costs[-1] = replace(after, trainable_parameters=self.costs[-1].trainable_parameters)

    def reduce_usage(self) -> None:
        """Sum the usage counts of all processes (those of replicated rows are equal already)."""
        if self.share.count == 1:
            return
        for counter in self.method.counters().values():
            if not counter.replicated:
                device = self.accelerator.device
                total = self.accelerator.reduce(counter.counts.to(device), reduction="sum")
                counter.counts = total.to(counter.counts.device)

    def _finish(self, index: int, train: Examples, held_out: Examples) -> None:
        """Freeze the task and teach the selector to recognise it."""
        self.method.finish_task()
        feature = self.method.selector.feature
        if feature is None:
            return
        selector = self.method.selector
        folder = selector.wants_reference
        if folder is not None:
            selector.learn_reference(
                self.features(spread(image_folder(folder)), feature), self.seed
            )
        selector.learn(
            index,
            self.features(spread(train), feature),
            self.features(held_out, feature),
            self.seed,
        )

    @torch.no_grad()
    def features(self, data: Examples, name: str) -> Tensor:
        """Return the frozen base's routing features (n, f) of a data set."""
        parts = []
        with self.reporter.bar("features", len(data)) as bar:
            for batch in self.batches(data, range(len(data))):
                parts.append(self.method.routing_features(batch, name)[1][name].cpu())
                bar.advance(len(batch))
        return torch.cat(parts)

    # -- evaluation ------------------------------------------------------------------------------

    def evaluate(
        self, task: Task, *, labels: LabelSpace | None = None, offset: int = 0
    ) -> Evaluation:
        """Answer a task's test set, task-free, and return how well.

        Where answers are texts, the model writes them, and ``labels`` and ``offset`` are not read.

        Args:
            task: learned or not.
            labels: what to choose from; the task's own classes when None.
            offset: index of the task's first class in ``labels``.
        """
        from evolora.evaluation.testing import judge_classes, judge_texts

        self.method.eval()
        if task.labels.text:
            return judge_texts(self, task)
        return judge_classes(self, task, labels or task.labels, offset)

    def summed(self, counts: Tensor) -> Tensor:
        """Return whole numbers summed over processes."""
        total: Tensor = self.accelerator.reduce(counts.to(self.accelerator.device), "sum")
        return total.cpu()

    def batches(self, data: Examples, rows: range) -> Iterator[Batch]:
        """Yield rows of a data set without augmentation."""
        samples = self.samples if self.evaluation_cache else None
        return evaluation_batches(data, self.backbone, self.evaluation_batch_size, rows, samples)

    def _samples(self, rows: int, read: Callable[[Sequence[int]], Iterable[Batch]]) -> TaskSamples:
        summed = partial(self.accelerator.reduce, reduction="sum")
        own = self.share
        return TaskSamples(rows=rows, read=read, index=own.index, count=own.count, summed=summed)

    def _of_task(self, task: int, data: Examples, rows: Sequence[int]) -> Iterator[Batch]:
        """Yield some rows of a task's data set, as batches of the task."""
        for batch in self.batches(Subset(data, rows), range(len(rows))):
            yield replace(batch, task=task)

    def _keys(self, data: Examples) -> list[str]:
        """Return the keys of a data set's samples."""
        return [key for batch in self.batches(data, range(len(data))) for key in batch.keys]

    def own_range(self, rows: int) -> range:
        """Return this process's contiguous part of a test set."""
        count, index = self.share.count, self.share.index
        return range(rows * index // count, rows * (index + 1) // count)

    # -- answering -------------------------------------------------------------------------------

    def predict(
        self,
        images: Any = None,
        texts: Any = None,
        *,
        classes: Sequence[str] | None = None,
        task: str | None = None,
        **others: Any,
    ) -> list[Answer]:
        """Answer each input on its own, without being told its task (unless ``task`` tells it).

        Args:
            images: one image or a list: file names, bytes, PIL images or uint8 arrays.
            texts: one text or a list, for backbones that see texts. Either side may be left out;
                in a list, None is what an input lacks. Where the model writes, a tuple in the list
                of images holds several of one input.
            classes: class names to choose from, with the templates of the task that answers. None
                lets the task that answers choose among its own classes; the base chooses among all
                classes of all learned tasks.
            task: name of a learned task whose experts shall answer every image, among its classes.
                Methods with ``routing == "oracle"`` know no task by themselves and need it.
            **others: plugged modalities, given as images are (audio="a.wav"; a tuple is several
                frames). There, what is no list goes with every input, and each needs a text.

        Raises:
            DataError: nothing was given, or what is not seen or not learned, or an unreadable file.
            ConfigError: ``classes`` is no list of names, or ``task`` is not learned.
        """
        return answer_inputs(
            self.method,
            {"image": images, "text": texts, **others},
            classes=classes,
            task=task,
            batch_size=self.evaluation_batch_size,
        )

    # -- keeping ---------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the portable artefact (safetensors, JSON, model card) into a folder."""
        from evolora.storage.artefact import save_artefact

        if self.accelerator.is_main_process:
            save_artefact(self, Path(folder))
        self.accelerator.wait_for_everyone()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        model: nn.Module | Backbone | None = None,
        processor: Any | None = None,
        *,
        training: TrainingConfig | None = None,
    ) -> Learner:
        """Return a learner from an artefact; needs no training data.

        Args:
            folder: what :meth:`save_pretrained` or ``evolora run`` wrote.
            model: the backbone; None loads the one the artefact names.
            processor: its processor.
            training: how further tasks are trained.

        Raises:
            StorageError: missing, corrupt, or made on a backbone of other weights.
        """
        from evolora.storage.artefact import load_artefact

        return load_artefact(Path(folder), model, processor, training=training)
