"""Parts of several methods together: what works does what its parts say, the rest is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.backbones.pairs import make
from tests.backbones.qformers import qformer
from tests.backbones.writers import samples, writer
from tests.conftest import toy_task
from tests.contract.cases import mixed_batch, toy_backbone
from tests.methods.modalities import task as stage
from tests.methods.pairs import pair_learner, pair_task
from tests.methods.test_pathweave import answers as path_answers
from tests.methods.test_pathweave import learner as path_learner
from tests.methods.test_recipe import CODES, SHORT, recipe
from tests.methods.test_writing import TASKS, TRAINING
from torch import Tensor

from evolora.config import read_config
from evolora.errors import ConfigError
from evolora.evaluation.inspection import inspect_config
from evolora.experts.factor_layer import FactorLayer
from evolora.learner import Learner
from evolora.methods.evolora import PARTS_FOR, EvoloraConfig, kind_of_backbone
from evolora.methods.recipe import Recipe
from evolora.recipes.experts import BottleneckExperts
from evolora.recipes.gates import TopKGate
from evolora.regularizers.settings import ResoraConfig
from evolora.routing.route import BASE
from evolora.routing.task_keys import BoundedTaskKeySelector, BoundedTaskKeySelectorConfig

RECIPES = Path(__file__).parents[2] / "configs/recipes"
FACTORS = {"type": "factors", "num_factors": 4, "r": 2}
ENCODERS = {"type": "auto-encoder", "training": CODES, "quantile": 0.9}
FOUR = {"type": "pool", "num_experts": 4}
BUDGETED: dict[str, Any] = {
    "experts": FACTORS,
    "sites": "qkv",
    "gate": "query",
    "selector": ENCODERS,
    "allocation": {"type": "gradient", "budget": 2, "sample": 8},
    "losses": ["align", "consistency"],
}


def method_of(learner: Learner) -> Recipe:
    assert isinstance(learner.method, Recipe)
    return learner.method


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (
            {"experts": "factors"},
            "gate 'own' mixes matrices, experts 'factors' are factors: use gate query, or experts "
            "bottleneck or lora",
        ),
        (
            {"gate": "query"},
            "gate 'query' mixes factors, experts 'lora' are matrices: use gate own or tokens or "
            "top-k, or experts factors",
        ),
        (
            {"gate": "top-k"},
            "chooses among the experts of a pool; allocation 'every-site' gives experts of a "
            "task's own: use allocation pool",
        ),
        (
            {"gate": "tokens", "allocation": {"type": "gradient"}},
            "its router knows of no task; allocation 'gradient' gives experts of a task's own: use "
            "allocation shared",
        ),
        (
            {"experts": "factors", "gate": "query", "allocation": "pool"},
            "factors that a task has of its own; allocation 'pool' gives experts of a pool that "
            "tasks share: use allocation every-site or gradient or random or uniform",
        ),
        ({"allocation": "shared"}, "leaves nothing to select: use selector none"),
        ({"selector": "none"}, "selector 'none' does not tell the task"),
        ({"selector": "modality"}, "selector 'modality' does not tell the task"),
        (
            {"allocation": "per-modality", "sites": "q-former"},
            "allocation per-modality and selector modality need each other",
        ),
        (
            {"allocation": "per-modality", "sites": "mlp", "selector": "modality"},
            "sites 'mlp' do not tell modalities apart",
        ),
        (
            {"gate": "top-k", "allocation": "pool", "selector": {**ENCODERS, "helper": "nearest"}},
            "which gate 'top-k' does not: use helper none, or gate own",
        ),
        (
            {"gate": {"type": "top-k", "top_k": 5}, "allocation": FOUR},
            r"top_k must be between 1 and num_experts \(4\); got 5",
        ),
        ({"selector": {"type": "task-keys", "quantile": 2}}, r"quantile must be in \(0, 1\]"),
        ({"experts": "loora"}, "unknown expert 'loora'; did you mean 'lora'"),
    ],
)  # fmt: skip
def test_parts_that_do_not_go_together_are_refused(parts: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        recipe(**parts)


WOVEN = {"experts": "woven", "gate": "paths", "selector": "modality", "allocation": "per-modality"}
BY_MODALITY = {"selector": "modality", "allocation": "per-modality"}


@pytest.mark.parametrize(
    ("kind", "parts", "reason"),
    [
        ("clip", {**BY_MODALITY, "sites": "linear"}, "Q-Former .*DualEncoder has its own only"),
        ("clip", {**WOVEN, "sites": "q-former"}, "selector modality needs a model that"),
        ("clip", {"sites": "q-former"}, "sites q-former need a model with a Q-Former"),
        (
            "clip",
            {"experts": FACTORS, "gate": "query", "sites": {"type": "qkv", "towers": ["text"]}},
            "chosen by a sample's text, and samples of DualEncoder have image only: use towers "
            "vision",
        ),
        ("clip", {"losses": ["consistency"]}, "drops one of a sample's two modalities"),
        ("clip", {"losses": ["align"]}, "and gate 'own' asks none"),
        ("clip", {"losses": ["load-balance"]}, "load-balance needs gate 'top-k'"),
        ("clip", {"sites": {"type": "mlp", "towers": ["tex"]}}, "did you mean 'text'"),
        (
            "writer",
            {"experts": FACTORS, "gate": "query", "sites": "qkv"},
            "ImageText has vision, projection, language: use experts lora or bottleneck",
        ),
        ("writer", {"sites": "mlp"}, "has experts at Linears"),
        (
            "q-former",
            {**BY_MODALITY, "sites": {"type": "linear", "target_modules": ["all-linear"]}},
            "'language' reads all modalities .* use towers qformer and projection",
        ),
        (
            "pairs",
            {"experts": FACTORS, "gate": "query", "sites": "qkv", "losses": ["align"]},
            "those of ClipFusion are the untouched model's",
        ),
    ],
)
def test_parts_that_a_backbone_cannot_have_are_refused(
    kind: str, parts: dict[str, Any], reason: str
) -> None:
    config = recipe(**parts)
    with pytest.raises(ConfigError, match=reason):
        if kind == "pairs":
            pair_learner(config, "clip")
        else:
            made = {"clip": lambda: toy_backbone("clip"), "writer": lambda: writer("llava")}
            Recipe(config, made.get(kind, lambda: qformer("instructblip"))())


def budgeted(kind: str = "vilt", **given: Any) -> Learner:
    config = recipe(**{**BUDGETED, **given})
    learner = pair_learner(config, kind, max_steps=4)
    for index in range(3):
        learner.learn(pair_task(index))
    return learner


def scores(learner: Learner, rows: list[tuple[int, int]], tasks: list[int]) -> Tensor:
    """Embeddings of rows (task, row), each answered by a given task."""
    examples = [pair_task(task).test[row] for task, row in rows]
    batch = learner.backbone.collate(examples)
    with torch.no_grad():
        return learner.method.embed(batch, None, torch.tensor(tasks))


@pytest.mark.parametrize("kind", ["vilt", "clip"])
def test_factors_stand_where_the_budget_puts_them_and_nowhere_else(kind: str) -> None:
    losses = BUDGETED["losses"] if kind == "vilt" else ["consistency"]
    learner = budgeted(kind, losses=losses)
    method = method_of(learner)
    found = method.allocation
    assert found is not None
    for key, layer in method.layers.items():
        assert isinstance(layer, FactorLayer)
        here = [t.task for t in found.tasks if key.replace("/", ".") in t.experts]
        assert [len(pool) for pool in layer.pools.values()] == [len(here)] * len(layer.pools)
    assert [sum(t.experts.values()) for t in found.tasks] == [2, 2, 2]
    if kind == "vilt":  # on two streams all tasks want the same
        assert len({tuple(sorted(t.experts)) for t in found.tasks}) > 1


def test_rows_of_tasks_with_experts_at_different_sites_run_in_one_batch() -> None:
    learner = budgeted()
    rows, tasks = [(0, 0), (1, 1), (2, 2), (0, 1)], [0, 1, 2, BASE]
    together = scores(learner, rows, tasks)
    for index, (row, task) in enumerate(zip(rows, tasks, strict=True)):
        assert torch.allclose(together[index], scores(learner, [row], [task])[0], atol=1e-5)
        others = [scores(learner, [row], [t])[0] for t in (0, 1, 2, BASE) if t != task]
        assert not any(torch.allclose(together[index], other, atol=1e-4) for other in others)


def test_a_finished_task_s_factors_answer_the_same_after_the_next_and_after_loading(
    tmp_path: Path,
) -> None:
    learner = pair_learner(recipe(**BUDGETED), max_steps=4)
    learner.learn(pair_task(0))
    rows = [(0, row) for row in range(4)]
    before = scores(learner, rows, [0] * 4)
    learner.learn(pair_task(1))
    assert torch.equal(scores(learner, rows, [0] * 4), before)
    learner.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = Learner.from_pretrained(tmp_path, model=make("vilt"))
    for key, value in learner.method.state_dict().items():
        assert torch.equal(value, loaded.method.state_dict()[key]), key
    assert torch.equal(scores(loaded, rows, [0] * 4), before)


def test_what_no_auto_encoder_takes_is_the_base_s_bit_for_bit() -> None:
    learner = budgeted()
    learner.method.selector.thresholds.frozen.fill_(0.0)  # type: ignore[union-attr, operator]
    batch = learner.backbone.collate([pair_task(0).test[row] for row in range(4)])
    assert learner.method.predict(batch, pair_task(0).labels).tasks.tolist() == [BASE] * 4
    base = learner.backbone.encode_base(batch, features=False).embedding
    assert torch.equal(scores(learner, [(0, row) for row in range(4)], [BASE] * 4), base)


def test_a_pool_with_task_keys_on_a_dual_encoder_leaves_foreign_rows_to_the_base() -> None:
    config = recipe(
        experts={"type": "bottleneck", "r": 6},
        sites="mlp",
        gate="top-k",
        allocation={"type": "pool", "num_experts": 4, "freeze_top": 9},
        selector={"type": "task-keys", "quantile": 1.0},
    )
    learner = Learner(toy_backbone("clip"), method=config, training=SHORT)
    for index in range(2):
        learner.learn(toy_task(index))
    batch = mixed_batch(learner.backbone)  # rows of tasks 0, 1 and 2, which nobody learned
    tasks = learner.method.predict(batch, toy_task(0).labels).tasks.view(-1, 3)
    assert tasks[:, 0].tolist() == [0] * 3 and tasks[:, 1].tolist() == [1] * 3
    assert tasks[:, 2].tolist() == [BASE] * 3


def test_a_pool_on_a_model_that_writes_answers_a_row_alone_as_among_others() -> None:
    config = recipe(
        experts={"type": "lora", "r": 2},
        sites={"type": "linear", "target_modules": ["all-linear"]},
        gate="top-k",
        allocation={"type": "pool", "num_experts": 3},
    )
    learner = Learner(writer("llava"), method=config, training=TRAINING)
    for one in TASKS[:2]:
        learner.learn(one)
    batch = learner.backbone.collate(samples())
    whole = learner.method.write(batch, TASKS[0].labels, tasks=1)
    alone = [
        learner.method.write(batch.take(torch.tensor([row])), TASKS[0].labels, tasks=1).texts[0]
        for row in range(len(batch))
    ]
    assert list(whole.texts) == alone and any(alone)
    assert all(layer.usage.counts.any() for layer in learner.method.layers.values())


def test_lora_pairs_per_modality_keep_what_a_modality_answered() -> None:
    parts = {**BY_MODALITY, "sites": "q-former", "experts": {"type": "lora", "r": 2}}
    learner = path_learner(config=recipe(**parts))
    learner.learn(stage("video"))
    before = path_answers(learner, "video")
    learner.learn(stage("audio"))
    assert torch.equal(path_answers(learner, "video"), before)
    assert method_of(learner).paths == ["video", "audio"]
    with pytest.raises(ConfigError, match="the paths of video, audio are finished"):
        learner.learn(stage("video", name="again"))


def test_regularizers_of_a_recipe_train_it_as_those_of_a_run_do() -> None:
    parts: dict[str, Any] = {"experts": {"type": "lora", "r": 4}, "selector": "oracle"}
    term = {"type": "resora", "weight": 5.0, "warmup": 0.0}
    states = []
    for own, of_run in (([term], ()), ((), [ResoraConfig(weight=5.0, warmup=0.0)]), ((), ())):
        learner = Learner(
            toy_backbone("clip"),
            method=recipe(**parts, regularizers=list(own)),
            training=SHORT,
            regularizers=of_run,
        )
        learner.learn(toy_task(0))
        states.append(learner.method.state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    assert any(not torch.equal(value, states[2][key]) for key, value in states[0].items())


TRAINED = {
    "factors-budget": lambda method: (pair_learner(method, max_steps=3), pair_task),
    "pool-task-keys": lambda method: (
        Learner(toy_backbone("clip"), method=method, training=SHORT),
        toy_task,
    ),
    "budget-clip": lambda method: (
        Learner(toy_backbone("clip"), method=method, training=SHORT),
        toy_task,
    ),
    "d-mole-resora": lambda method: (
        Learner(writer("llava"), method=method, training=TRAINING),
        TASKS.__getitem__,
    ),
}


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_of_the_project_learns_and_is_counted(name: str) -> None:
    config = read_config(RECIPES / f"{name}.yaml")
    learner, tasks = TRAINED[name](config.method)
    for index in range(2):
        learner.learn(tasks(index))
        assert learner.costs[index].trainable_parameters > 0
    before = learner.costs[0].trainable_parameters
    found = inspect_config(config, tasks=2)
    assert found.trainable[0] > before  # real sizes are larger than toys
    assert found.parameters["experts" if name != "factors-budget" else "adapters"] > 0
    assert (found.allocation is None) == (name == "pool-task-keys")
    if found.allocation is not None:
        counts = [sum(entry.experts.values()) for entry in found.allocation.tasks]
        assert 0 < counts[0] < len(found.sites)


def test_keys_with_a_bound_leave_what_is_far_to_the_base() -> None:
    draw = torch.Generator().manual_seed(0)
    places = torch.eye(3, 8) * 4
    rows = [place + 0.3 * torch.randn(40, 8, generator=draw) for place in places]
    for metric in ("cosine", "mahalanobis"):
        for quantile in (None, 0.95):
            settings = BoundedTaskKeySelectorConfig(metric=metric, quantile=quantile, margin=1.5)
            selector = BoundedTaskKeySelector(settings, 1, 8)
            for task in range(2):
                train, held_out = rows[task][:20, None], rows[task][20:30, None]
                selector.learn(task, train, held_out, 0)
            inputs = torch.cat([part[30:] for part in rows])[:, None]
            tasks = selector.select({"modalities": inputs}, 30, None).tasks
            assert (tasks[:10] == 0).sum() >= 9 and (tasks[10:20] == 1).sum() >= 9
            assert ((tasks[20:] == BASE).sum() == 10) == (quantile is not None)


def test_evolora_takes_parts_by_what_the_backbone_is() -> None:
    found = {
        kind_of_backbone(toy_backbone("clip")),
        kind_of_backbone(writer("llava")),
        kind_of_backbone(qformer("instructblip")),
        kind_of_backbone(pair_learner(EvoloraConfig(), "vilt").backbone),
        kind_of_backbone(pair_learner(EvoloraConfig(), "clip").backbone),
    }
    assert found == set(PARTS_FOR)
    own = EvoloraConfig(experts=BottleneckExperts(r=2)).on(toy_backbone("clip"))
    assert own.experts.r == 2 and own.selector == PARTS_FOR["dual-encoder"].selector
    with pytest.raises(ConfigError, match="evolora on a dual-encoder model: gate 'top-k' chooses"):
        EvoloraConfig(gate=TopKGate()).on(toy_backbone("clip"))


@pytest.mark.parametrize("kind", ["vilt", "clip"])
def test_evolora_learns_pairs(kind: str) -> None:
    learner = pair_learner(EvoloraConfig(), kind, max_steps=2)
    learner.learn(pair_task(0))
    batch = learner.backbone.collate([pair_task(0).test[row] for row in range(3)])
    assert learner.method.predict(batch, pair_task(0).labels).tasks.tolist() == [0] * 3


def test_evolora_learns_texts_and_modalities() -> None:
    learner = Learner(writer("llava"), method=EvoloraConfig(), training=TRAINING)
    learner.learn(TASKS[0])
    plugged = path_learner(config=EvoloraConfig())
    plugged.learn(stage("video"))
    assert method_of(plugged).paths == ["video"] and learner.costs[0].trainable_parameters > 0
