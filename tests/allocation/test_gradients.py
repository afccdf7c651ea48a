"""Scores of sites: against gradients taken sample by sample, on every kind of backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from tests.backbones.pairs import Pairs, fusion, vilt
from tests.conftest import ToyProcessor, toy_model, toy_task
from torch import Tensor

from evolora.allocation.gradients import gradient_scores
from evolora.allocation.sample import TaskSamples
from evolora.backbones.base import Backbone
from evolora.backbones.clip import DualEncoder
from evolora.errors import ConfigError
from evolora.experts.sites import Site
from evolora.methods.base import Method
from evolora.methods.lora import LoRAPerTask, LoRAPerTaskConfig
from evolora.streams.task import LabelSpace, Subset
from evolora.training.batches import evaluation_batches

KINDS = ("clip", "siglip", "vilt", "clip-fusion")


def backbone_of(kind: str) -> Backbone:
    if kind in ("clip", "siglip"):
        return DualEncoder(toy_model(kind), ToyProcessor(), name="toy")
    return vilt() if kind == "vilt" else fusion()


def begun(kind: str, *, several: bool = False) -> tuple[Method, list[Site], Any]:
    """A method at its first task, its candidate sites, and the task's samples."""
    backbone = backbone_of(kind)
    method = LoRAPerTask(LoRAPerTaskConfig(r=2), backbone)
    labels, data = toy_task(0).labels, toy_task(0, 12).train
    if kind not in ("clip", "siglip"):
        labels = LabelSpace(classes=("one", "two", "three"), multi_label=several)
        data = Pairs((0, 1, 2, 0, 1, 0, 2, 0), several=several)
    method.begin_task("task", labels)
    sites = backbone.sites("linear", target_modules=("q_proj", "v_proj", "fc1", "fc2"))
    return method, sites, data


def samples_of(method: Method, data: Any, size: int = 4, **part: Any) -> TaskSamples:
    def read(rows: Sequence[int]) -> Any:
        for batch in evaluation_batches(
            Subset(data, rows), method.backbone, size, range(len(rows))
        ):
            yield type(batch)(**{**vars(batch), "task": 0})

    return TaskSamples(rows=len(data), read=read, **part)


def gradients(method: Method, sites: Sequence[Site], data: Any, row: int) -> list[Tensor]:
    """The gradient of one sample's loss at each site, by plain autograd on the model itself."""
    backbone = method.backbone
    weights: list[Any] = [site.module.weight for site in sites]
    for weight in weights:
        weight.requires_grad_(True)
    method.reuse = False
    try:
        with backbone.host.disabled():
            batch = backbone.collate([data[row]], task=0)
            embedding = backbone.encode(batch, method.make_route(0, batch))
            loss = method.task_loss(embedding, batch, method.labels[0], 0)
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        return [
            torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)
        ]
    finally:
        method.reuse = True
        for weight in weights:
            weight.requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_norms_of_gradients_taken_sample_by_sample(kind: str) -> None:
    method, sites, data = begun(kind)
    rows = [0, 1, 2, 4, 7]
    single = [gradients(method, sites, data, row) for row in rows]
    samples = samples_of(method, data, size=2)
    score = partial(gradient_scores, method, sites, samples, rows)
    means = [torch.stack(own).mean(dim=0).norm() for own in zip(*single, strict=True)]
    norms = [torch.stack([g.norm() for g in own]).mean() for own in zip(*single, strict=True)]
    torch.testing.assert_close(torch.tensor(score()), torch.stack(means), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        torch.tensor(score(reduction="mean_of_norms")), torch.stack(norms), rtol=1e-4, atol=1e-6
    )
    sizes = torch.tensor([float(site.d_in * site.d_out) for site in sites])
    torch.testing.assert_close(
        torch.tensor(score(normalize=True)), torch.stack(means) / sizes.sqrt(), rtol=1e-4, atol=1e-7
    )
    assert len(set(score())) > len(sites) // 2  # they tell sites apart


@pytest.mark.parametrize("kind", KINDS)
def test_scores_do_not_depend_on_batch_size_or_number_of_processes(kind: str) -> None:
    method, sites, data = begun(kind)
    rows = list(range(7))
    whole = torch.tensor(gradient_scores(method, sites, samples_of(method, data, 7), rows))
    for size in (1, 3):
        other = gradient_scores(method, sites, samples_of(method, data, size), rows)
        torch.testing.assert_close(torch.tensor(other), whole, rtol=1e-4, atol=1e-6)
    for count in (2, 3):
        parts = of_processes(method, sites, data, rows, count)
        torch.testing.assert_close(torch.tensor(parts[0]), whole, rtol=1e-4, atol=1e-6)
        assert all(part == parts[0] for part in parts)


def of_processes(
    method: Method, sites: Sequence[Site], data: Any, rows: list[int], count: int
) -> list[list[float]]:
    """What each of several processes finds: their sums are taken in turn, in one process."""
    sent: list[list[Tensor]] = []
    for index in range(count):
        own: list[Tensor] = []
        sent.append(own)

        def keep(tensor: Tensor, own: list[Tensor] = own) -> Tensor:
            own.append(tensor.clone())
            return tensor

        part = samples_of(method, data, 2, index=index, count=count, summed=keep)
        gradient_scores(method, sites, part, rows)
    assert len({len(own) for own in sent}) == 1  # no process waits for a sum the others skip
    totals = [torch.stack(tensors).sum(dim=0) for tensors in zip(*sent, strict=True)]
    found = []
    for index in range(count):
        left = iter(totals)
        part = samples_of(
            method,
            data,
            2,
            index=index,
            count=count,
            summed=lambda _, left=left: next(left).clone(),
        )
        found.append(gradient_scores(method, sites, part, rows))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_as_it_was(kind: str) -> None:
    method, sites, data = begun(kind)
    before = {name: value.clone() for name, value in method.backbone.model.state_dict().items()}
    asked = {name: p.requires_grad for name, p in method.named_parameters()}
    gradient_scores(method, sites, samples_of(method, data), [0, 1, 2])
    for parameter in (*method.backbone.model.parameters(), *method.parameters()):
        assert parameter.grad is None
    assert not any(p.requires_grad for p in method.backbone.model.parameters())
    assert asked == {name: p.requires_grad for name, p in method.named_parameters()}
    for name, value in method.backbone.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not method.backbone.has_other_weights and method.backbone.host.enabled


def test_earlier_experts_do_not_count() -> None:
    method, sites, data = begun("clip")
    samples = samples_of(method, data)
    fresh = gradient_scores(method, sites, samples, [0, 1, 2])
    for layer in method.layers.values():
        bank: Any = layer.bank
        with torch.no_grad():
            bank.B.active.add_(1.0)
    assert gradient_scores(method, sites, samples, [0, 1, 2]) == fresh


@pytest.mark.parametrize("kind", ["clip", "vilt"])
def test_a_model_of_another_type_is_scored_in_float32(kind: str) -> None:
    method, sites, data = begun(kind)
    method.backbone.model.to(torch.bfloat16)
    rounded = gradient_scores(method, sites, samples_of(method, data), [0, 1, 2])
    assert next(method.backbone.model.parameters()).dtype == torch.bfloat16
    method.backbone.model.float()  # the same weights, in float32
    exact = gradient_scores(method, sites, samples_of(method, data), [0, 1, 2])
    # CLIP's temperature is the backbone's own, in its type: one factor of all sites.
    tolerance = 2e-3 if kind == "clip" else 1e-4
    torch.testing.assert_close(
        torch.tensor(rounded), torch.tensor(exact), rtol=tolerance, atol=1e-6
    )


def test_an_mlp_is_scored_by_all_of_its_weights() -> None:
    method, linears, data = begun("clip")
    blocks = method.backbone.sites("mlp")
    samples = samples_of(method, data)
    whole = gradient_scores(method, blocks, samples, [0, 1, 2])
    parts = gradient_scores(method, linears, samples, [0, 1, 2])
    of = {site.name: score for site, score in zip(linears, parts, strict=True)}
    for site, score in zip(blocks, whole, strict=True):
        place = site.name.removesuffix(".mlp")
        both = (of[f"{place}.fc1"] ** 2 + of[f"{place}.fc2"] ** 2) ** 0.5
        assert score == pytest.approx(both, rel=1e-5)


def test_a_tower_whose_modality_is_always_missing_scores_zero() -> None:
    method, sites, _ = begun("clip-fusion")
    samples = samples_of(method, Pairs((1, 1, 1)))  # no text
    scores = gradient_scores(method, sites, samples, [0, 1, 2])
    for site, score in zip(sites, scores, strict=True):
        assert (score == 0.0) == (site.tower == "text"), site.name
    only_text = [site for site in sites if site.tower == "text"]
    assert gradient_scores(method, only_text, samples, [0, 1, 2]) == [0.0] * len(only_text)


def test_several_labels_per_sample_are_scored() -> None:
    method, sites, data = begun("vilt", several=True)
    assert all(s > 0 for s in gradient_scores(method, sites, samples_of(method, data), [0, 1]))


def test_a_loss_that_overflows_is_named() -> None:
    method, sites, data = begun("clip")
    with torch.no_grad():
        weight: Any = sites[0].module.weight
        weight.fill_(float("inf"))
    with pytest.raises(ConfigError, match=r"gradient norm at .* is no number"):
        gradient_scores(method, sites, samples_of(method, data), [0, 1])


def test_rows_are_drawn_by_seed_and_shared_out_once() -> None:
    read: Callable[[Sequence[int]], Any] = lambda rows: iter(())  # noqa: E731
    alone = TaskSamples(rows=50, read=read)
    rows = alone.drawn(9, 3, "allocation", 1)
    assert rows == alone.drawn(9, 3, "allocation", 1) == sorted(set(rows)) and len(rows) == 9
    assert rows != alone.drawn(9, 4, "allocation", 1)
    parts = [TaskSamples(rows=50, read=read, index=i, count=4).share(rows) for i in range(4)]
    assert [row for part in parts for row in part] == rows
