"""Heads: frozen one after another, filled nulls, columns by class name."""

from __future__ import annotations

import pytest
import torch

from evolora.errors import ConfigError
from evolora.methods.heads import TaskHeads
from evolora.streams.task import LabelSpace


def heads() -> TaskHeads:
    spaces = [LabelSpace(classes=classes) for classes in (("a", "b"), ("c", "a", "d"))]
    made = TaskHeads({"image": 3, "text": 2}, spaces)
    for number, space in enumerate(spaces):
        made.add(space, torch.Generator().manual_seed(number))
    return made


def test_older_heads_are_frozen_and_stay() -> None:
    spaces = [LabelSpace(classes=classes) for classes in (("a", "b"), ("c",), ("d",))]
    made = TaskHeads({"all": 4}, spaces)
    made.add(spaces[0], torch.Generator().manual_seed(0))
    x = torch.randn(5, 4)
    before = made.of_task(x, 0).detach()
    made.add(spaces[1], torch.Generator().manual_seed(1))
    assert made.weight.frozen_ids() == [0, 1] and made.weight.active.shape == (1, 4)
    assert torch.equal(made.of_task(x, 0), before)
    made.add(spaces[2], torch.Generator().manual_seed(1), freeze=False)
    assert made.weight.active.shape == (2, 4) and made.null is None


def test_a_missing_part_is_the_tasks_null_embedding() -> None:
    made = heads()
    with torch.no_grad():
        made.null.active.copy_(torch.arange(5.0)[None])
    x = torch.randn(2, 5)
    x[1, 3:] = 0.0
    image, text = x[:, :3], x[:, 3:]
    filled = torch.cat(
        [part / part.square().mean(dim=1, keepdim=True).sqrt() for part in (image, text)], dim=1
    )
    filled[1, 3:] = torch.tensor([3.0, 4.0])
    expected = filled @ made.weight.active.T + made.bias.active
    torch.testing.assert_close(made.of_task(x, 1), expected)
    made.of_task(x, 1).sum().backward()
    grad = made.null.active.grad
    assert grad is not None and torch.equal(grad[0, :3], torch.zeros(3)) and grad[0, 3:].abs().all()


@pytest.mark.parametrize(("own", "zero_filled", "ours"), [((-1, -0.5), 0, 3), ((0.3, -0.2), 2, 2)])
def test_other_tasks_never_win_by_a_zero(own: tuple, zero_filled: int, ours: int) -> None:
    """G8: zeros for the classes of other tasks, as released, beat negative logits."""
    spaces = [LabelSpace(classes=(f"{task}a", f"{task}b")) for task in range(3)]
    made = TaskHeads({"all": 2}, spaces)
    for space in spaces:
        made.add(space, torch.Generator().manual_seed(0))
    x = torch.ones(1, 2)
    with torch.no_grad():
        made.weight.frozen.zero_()
        made.bias.frozen[2:4] = torch.tensor(own)
    every = LabelSpace(classes=tuple(name for space in spaces for name in space.classes))
    found = made.among(x, every, [1])
    assert found.argmax().item() == ours
    assert found.masked_fill(found.isinf(), 0.0).argmax().item() == zero_filled


def test_columns_follow_the_names() -> None:
    made = heads()
    x = torch.randn(4, 5)
    one, two = made.of_task(x, 0), made.of_task(x, 1)
    space = LabelSpace(classes=("d", "b", "a", "c"))
    first = made.among(x, space, [0])
    assert torch.equal(first[:, [1, 2]], one[:, [1, 0]])
    assert torch.equal(first[:, [0, 3]], torch.full((4, 2), -torch.inf))
    every = made.among(x, space, [0, 1])
    expected = torch.stack(
        [two[:, 2], one[:, 1], torch.maximum(one[:, 0], two[:, 1]), two[:, 0]], 1
    )
    assert torch.equal(every, expected)


def test_classes_nobody_learned_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"classes x, y; this model has learned heads for a, b"):
        heads().among(torch.randn(1, 5), LabelSpace(classes=("x", "y")), [0, 1])
