"""Twins, floors and the experts in a bench's tower."""

from __future__ import annotations

import torch

from evolora.bench import towers
from evolora.methods.lora import JointLoRA, JointLoRAConfig


def test_a_twin_shares_memory_and_nothing_else(tiny_tower) -> None:
    other = towers.twin(tiny_tower.backbone)
    theirs = dict(other.model.named_parameters())
    for name, parameter in tiny_tower.backbone.model.named_parameters():
        assert theirs[name].data_ptr() == parameter.data_ptr()
    before = tiny_tower.base()
    other.model.get_submodule("vision_model").register_forward_pre_hook(lambda *_: 1 / 0)
    assert torch.equal(before, tiny_tower.base())


def test_a_learner_in_a_twin_says_something_and_leaves_the_base_alone(tiny_tower) -> None:
    before = tiny_tower.base()
    method = tiny_tower.learn(JointLoRA, JointLoRAConfig(r=2, towers=("vision",)))
    with torch.no_grad():
        out = towers.routed(method.backbone)(tiny_tower.x)
    assert (out - before).abs().max() > 1e-3
    assert torch.equal(before, tiny_tower.base())


def test_the_floor_s_gradient_stops_at_the_lowest_sites(tiny_tower) -> None:
    """It runs the base's forward, and its backward meets every site's output but no embedding."""
    backbone = tiny_tower.backbone
    run = towers.floor(backbone, towers.linear_sites)
    out = run(tiny_tower.x)
    assert torch.equal(out.detach(), tiny_tower.base())
    leaves = _leaves(out)
    # q and v of the lowest layer; the outputs of its fc1 and fc2 already need their gradient.
    assert len(leaves) == 2
    assert all(leaf.shape == (4, 10, 32) for leaf in leaves)
    assert len(_leaves(towers.floor(backbone, towers.mlp_sites)(tiny_tower.x))) == 1


def _leaves(out: torch.Tensor) -> list[torch.Tensor]:
    found, todo, seen = [], [out.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo.extend(following for following, _ in node.next_functions)
    return found
