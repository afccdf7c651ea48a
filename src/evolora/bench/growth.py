"""Bench "growth": what a training step costs after ever more tasks, on a model that writes.

Per-task experts that no row is routed to must cost nothing. So a method learns 0, 4, 9 and 19 tasks
and then, each time, the very same one, whose experts stand at the same sites: its steps are held
against those without any task before. A step is forward, backward and optimizer, as in training
on samples that were seen before: what the untouched model makes of them is known.
Memory: what the step adds to the process, and what has to be stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from evolora.allocation.sample import TaskSamples
from evolora.allocation.settings import GradientAllocationConfig
from evolora.backbones.answer_tokens import NO_ANSWER
from evolora.backbones.base import Backbone, Batch
from evolora.backbones.image_text import ImageText
from evolora.bench.pairs import remembered
from evolora.bench.results import Value
from evolora.bench.session import MIB, Session
from evolora.bench.settings import Settings
from evolora.bench.timing import Variant
from evolora.bench.towers import randomise, twin_of
from evolora.config import build_method
from evolora.methods.base import Method
from evolora.methods.d_mole import FLOORS, DMoLEConfig
from evolora.methods.lora import LoRAPerTaskConfig
from evolora.randomness import StepRandom, generator
from evolora.routing.selector import Helper
from evolora.routing.task_keys import TaskKeySelectorConfig
from evolora.streams.task import LabelSpace

TASKS, QUICK_TASKS = (1, 5, 10, 20), (1, 4)
WIDTH, HEADS, LAYERS = 192, 3, 6
SIDE, PATCH = 64, 16
PATCHES = (SIDE // PATCH) ** 2
WORDS, IMAGE_TOKEN = 2048, 1
VOCABULARY = 64
"""Words and one picture, with noise, that a task's samples are made of: tasks differ."""
QUESTION, ANSWER = 24, 6
"""Longest question (beside its image's tokens) and answer, in tokens."""
HELPED = "d-mole, an earlier task helps every row"
TEXTS = LabelSpace.of_texts(ANSWER)
METHODS: Mapping[str, Callable[[], Any]] = {
    "lora-per-task, allocated by gradients": lambda: LoRAPerTaskConfig(
        target_modules=("all-linear",),
        selector=TaskKeySelectorConfig(),
        allocation=GradientAllocationConfig(budget=0.5, sample=8),
    ),
    "d-mole, nobody helps": lambda: _d_mole("none"),
    HELPED: lambda: _d_mole("nearest"),
}
"""Title -> settings of each method that is measured."""
LAST = -1
"""Number of the samples of the task that is in training."""
COLUMNS = ("step", "fastest step", "ms", "saved MiB", "peak MiB", "stored MiB", "trainable")


class Shapes:
    """A processor that is asked for the ids of its tokens alone."""

    tokenizer = SimpleNamespace(bos_token_id=None, pad_token_id=0)


def measure(session: Session) -> None:
    """Time and weigh the steps of every method; the slowest over the first is the goal's number."""
    slowest = [growth(session, title, make()) for title, make in METHODS.items()]
    session.goal("growth-step", max(slowest))


def growth(session: Session, title: str, config: Any) -> float:
    """Time and weigh a method's steps; return how much longer than the first the slowest takes.

    Args:
        session: gets the table.
        title: of the method.
        config: its settings.
    """
    s = session.settings
    model = llava(s, s.layers or s.either(LAYERS, 2))
    counts, rows = s.either(TASKS, QUICK_TASKS), s.batch or s.either(8, 2)
    if title == HELPED:  # the first task has nobody before it
        counts = (2, *counts[1:])
    note = f"{rows} pairs of an image and a question; r {config.r}; stored: all that must be kept"
    table = session.table(title, COLUMNS, note=note)
    variants = []
    first = row_of(counts[0])
    for count in counts:
        method = taught(config, ImageText(twin_of(model), Shapes(), name="random"), s, count, rows)
        variants.append(step(row_of(count), method, first))
        stored = sum(tensor.nbytes for tensor in method.stored().values()) / MIB
        trained = sum(parameter.numel() for parameter in method.trainable().values())
        values: dict[str, Value] = {"stored MiB": stored, "trainable": str(trained)}
        table.put(row_of(count), **values)
    batches = {}
    for count in counts:
        batch = samples(s, rows, count - 1, LAST)
        batches[row_of(count)] = replace(batch, known=remembered(batch))
    for variant in variants if not s.quick else ():
        table.put(variant.name, **session.weigh(variant, batches))
    done = session.time(title, variants, [batches], rounds=s.either(15, 3), table=table)
    for variant in variants:
        table.put(variant.name, ms=1000 * done.seconds(variant.name, "step"))
    return max(done.between((v.name, "step"), (first, "step")).median for v in variants)


def _d_mole(helper: Helper) -> DMoLEConfig:
    allocation = GradientAllocationConfig(floors=FLOORS, sample=8)
    return DMoLEConfig(allocation=allocation, helper=helper)


def row_of(count: int) -> str:
    """Return the name of a row: so many tasks, the last one in training."""
    return f"task {count}"


def step(name: str, method: Method, base: str) -> Variant:
    """Return a whole training step of a method's newest task, on its own batch of those given."""
    parameters = list(method.trainable().values())
    # The rate is nothing, so that every round sees the same weights; the work is the same.
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)

    def run(batches: Mapping[str, Batch]) -> Tensor:
        loss: Tensor = method(batches[name])["loss"]
        return loss

    def update() -> None:
        optimizer.step()
        torch.autograd.graph.increment_version(parameters)

    return Variant(
        name=name, run=run, passes=("step",), modules=(method,), step_base=base, after=update
    )


def llava(settings: Settings, layers: int) -> nn.Module:
    """Return a random LLaVA with so many layers in both towers."""
    import transformers

    stock: Any = transformers
    shape = {
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
    }
    vision = stock.CLIPVisionConfig(
        intermediate_size=4 * WIDTH, image_size=SIDE, patch_size=PATCH, **shape
    )
    text = stock.LlamaConfig(vocab_size=WORDS, intermediate_size=8 * WIDTH // 3, **shape)
    config = stock.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
    )
    torch.manual_seed(settings.seed)
    model = stock.LlavaForConditionalGeneration(config)
    model.eval().to(settings.device, settings.torch_dtype)
    made: nn.Module = model
    return made


def taught(config: Any, backbone: Backbone, settings: Settings, count: int, rows: int) -> Method:
    """Return a method that has learned all but the last of so many tasks, and trains that one.

    What it learns is drawn at random: fresh experts give zero, and would get no gradient.
    """
    method = build_method(config, backbone, seed=settings.seed)
    for task in range(count):
        batch = samples(settings, rows, task, LAST if task == count - 1 else task)
        read = reader(batch)
        method.begin_task(f"task {task}", TEXTS)
        method.preview(task, TaskSamples(rows=rows, read=read))
        randomise(method)
        if task < count - 1:
            method.review(task, rows, read)
            finish(method, task, batch, settings.seed)
    method.to(backbone.device, next(backbone.model.parameters()).dtype)
    return method.train()


def reader(batch: Batch) -> Callable[[Sequence[int]], Iterable[Batch]]:
    """Return a function from rows to the batches that hold them."""
    return lambda rows: [batch.take(torch.tensor(list(rows)))]


def finish(method: Method, task: int, batch: Batch, seed: int) -> None:
    """Freeze a task and teach the selector to recognise it."""
    method.finish_task()
    name = method.selector.feature
    if name is None:
        return
    with torch.no_grad():
        features = method.routing_features(batch)[1][name].cpu()
    half = len(features) // 2
    method.selector.learn(task, features[half:], features[:half], seed)


def samples(settings: Settings, rows: int, task: int, data: int) -> Batch:
    """Return random images with questions and answers of different length, as a task's batch.

    Args:
        settings: device, dtype, seed.
        rows: samples.
        task: whose batch it is.
        data: which samples they are.
    """
    draw = generator(settings.seed, "growth", data)
    longest = 1 + PATCHES + QUESTION
    words = torch.randint(2, WORDS, (VOCABULARY,), generator=draw)
    ids = words[torch.randint(VOCABULARY, (rows, longest), generator=draw)]
    lengths = torch.randint(QUESTION // 2, QUESTION + 1, (rows, 1), generator=draw)
    lengths[0] = QUESTION
    begin = QUESTION - lengths  # padding stands on the left
    place = torch.arange(longest)
    image = (place > begin) & (place <= begin + PATCHES)
    ids = ids.masked_fill(image, IMAGE_TOKEN).masked_fill(place < begin, 0)
    answers = torch.randint(2, WORDS, (rows, ANSWER), generator=draw)
    ends = torch.randint(2, ANSWER + 1, (rows, 1), generator=draw)
    ends[0] = ANSWER
    pixels = torch.randn(1, 1, 3, SIDE, SIDE, generator=draw)
    pixels = pixels + 0.5 * torch.randn(rows, 1, 3, SIDE, SIDE, generator=draw)
    device = settings.device
    inputs = {
        "input_ids": ids,
        "attention_mask": (place >= begin).long(),
        "answer_ids": answers.masked_fill(torch.arange(ANSWER) >= ends, NO_ANSWER),
        "pixel_values": pixels.to(settings.torch_dtype),
        "words": ids.masked_fill(image | (place < begin), NO_ANSWER)[:, 1 + PATCHES :],
        "pixel_values number": torch.ones(rows, dtype=torch.long),
    }
    everywhere = torch.ones(rows, dtype=torch.bool, device=device)
    return Batch(
        inputs={name: value.to(device) for name, value in inputs.items()},
        labels=torch.zeros(rows, dtype=torch.long, device=device),
        keys=tuple(f"{data}/{row}" for row in range(rows)),
        task=task,
        random=StepRandom(settings.seed),
        present={"image": everywhere, "text": everywhere},
    )
