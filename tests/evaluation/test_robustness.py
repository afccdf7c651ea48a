"""Curves over missing tables are what evaluating each table by itself would give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.conftest import toy_task
from tests.contract.cases import CASES, make
from tests.methods.pairs import pair_learner, pair_task

from evolora.backbones.batch import Batch
from evolora.errors import ConfigError, EvoloraError, StreamError
from evolora.evaluation.outcomes import judged
from evolora.evaluation.robustness import Robustness, Scores, Tables, robustness
from evolora.evaluation.tally import tally_for
from evolora.learner import Learner
from evolora.methods.delo import DeLoConfig
from evolora.routing.task_keys import TaskKeySelectorConfig
from evolora.streams.missing import MissingConfig
from evolora.streams.missing_manifest import Manifest, with_missing
from evolora.streams.task import Stream

TABLES = Tables(rates=(0.0, 0.4, 0.9, 1.0), both_ratio=0.25, seeds=(3,))


def stream_of(
    codes: Sequence[int] = (0,), *, several: bool = False, protocol: Any = "seen"
) -> Stream:
    tasks = tuple(pair_task(index, codes, several=several) for index in range(2))
    return Stream(name="toy", tasks=tasks, label_protocol=protocol)


def taught(name: str, kind: str = "vilt", *, several: bool = False) -> Learner:
    learner = pair_learner(CASES[name].config, kind)
    for index in range(2):
        learner.learn(pair_task(index, several=several))
    return learner


def told(learner: Learner, stream: Stream) -> dict[str, float]:
    """Scores with each sample's task told, by the method's own parts."""
    scores = {}
    for index, (task, labels, offset) in enumerate(judged(tuple(stream), stream.label_protocol)):
        batch = learner.backbone.collate([task.test[row] for row in range(len(task.test))])
        tasks = torch.full((len(batch),), learner.method.expert_task(index))
        with torch.no_grad():
            answers = learner.method.answer(batch, None, tasks, labels).scores
        tally = tally_for(task.metric, len(task.labels.classes))
        tally.add(answers, batch, offset)
        scores[task.name] = tally.score()
    return scores


def assert_is_evaluation(scores: Scores, learner: Learner, stream: Stream) -> None:
    """Compare with testing a stream with that table in it, sample by sample anew."""
    results = [
        learner.evaluate(task, labels=labels, offset=offset)
        for task, labels, offset in judged(tuple(stream), stream.label_protocol)
    ]
    names = [task.name for task in stream]
    assert scores.tasks == pytest.approx({n: r.score for n, r in zip(names, results, strict=True)})
    assert scores.ap == pytest.approx(sum(r.score for r in results) / len(results))
    for case in ("complete", "text_missing", "image_missing"):
        found = [result.by_case[case] for result in results if case in result.by_case]
        assert (case in scores.by_missing) == bool(found)
        if found:
            assert scores.by_missing[case] == pytest.approx(sum(found) / len(found))


def tables_of(found: Robustness) -> list[tuple[Any, dict[str, Any]]]:
    common = {"both_ratio": found.tables.both_ratio, "seed": found.tables.seeds[0]}
    return [(point, {"kind": point.kind, "rate": point.rate, **common}) for point in found.points]


@pytest.mark.parametrize("several", [False, True], ids=["accuracy", "macro-f1"])
@pytest.mark.parametrize("codes", [(0,), (0, 0, 1, 0, 2)], ids=["complete", "some-incomplete"])
def test_each_point_is_that_table_s_own_evaluation(several: bool, codes: Sequence[int]) -> None:
    learner, stream = taught("delo", several=several), stream_of(codes, several=several)
    found = robustness(learner, stream, TABLES)
    assert len(found.points) == 12 and found.routing == "task-free" and found.own is None
    for point, table in tables_of(found):
        incomplete = with_missing(stream, table)
        assert point.task_free is not None and point.oracle is not None
        assert_is_evaluation(point.task_free, learner, incomplete)
        assert point.oracle.tasks == pytest.approx(told(learner, incomplete))
        routes = [learner.evaluate(task).routes for task in incomplete]
        right = sum(r.get(task.name, 0) for r, task in zip(routes, stream, strict=True))
        assert point.task_identification == pytest.approx(right / sum(found.samples.values()))
    assert len({point.task_free.ap for point in found.points if point.task_free}) > 1


@pytest.mark.parametrize("protocol", ["seen", "task"])
@pytest.mark.parametrize(("name", "kind"), [("sequential-lora", "clip"), ("lora-per-task", "vilt")])
def test_a_method_that_infers_no_task_has_one_way_to_answer(
    name: str, kind: str, protocol: str
) -> None:
    learner, stream = taught(name, kind), stream_of(protocol=protocol)
    found = robustness(learner, stream, TABLES)
    for point, table in tables_of(found):
        free, oracle = point.task_free, point.oracle
        assert (free is None) == (name == "lora-per-task") and (oracle is None) != (free is None)
        assert point.task_identification is None
        scores = free or oracle
        assert scores is not None
        assert_is_evaluation(scores, learner, with_missing(stream, table))


def test_the_run_s_own_table_is_a_point() -> None:
    learner, stream = taught("delo"), stream_of((0, 0, 0, 1))
    settings = MissingConfig.from_options(
        {"kind": "both", "rate": 0.5, "seed": 9, "test": {"kind": "image", "rate": 0.8}}
    )
    manifest = Manifest.draw(stream, settings)
    found = robustness(learner, stream, TABLES, manifest)
    assert found.trained is not None and (found.trained.kind, found.trained.rate) == ("both", 0.5)
    assert found.own is not None and (found.own.kind, found.own.rate) == ("image", 0.8)
    assert found.own.task_free is not None
    assert_is_evaluation(found.own.task_free, learner, manifest.apply(stream))
    assert found.to_json()["own"]["task_free"]["ap"] == found.own.task_free.ap

    # A manifest of the samples before some of them lost a part by themselves.
    other = Manifest.draw(stream_of(), MissingConfig(kind="text", rate=0.0))
    assert not any(any(splits["test"]) for splits in other.codes.values())
    own = robustness(learner, stream, TABLES, other).own
    assert own is not None and own.task_free is not None
    assert_is_evaluation(own.task_free, learner, other.apply(stream))
    assert set(own.task_free.by_missing) == {"complete", "text_missing"}


def test_several_tables_are_averaged() -> None:
    learner, stream = taught("delo"), stream_of()
    each = [
        robustness(learner, stream, Tables(kinds=("both",), rates=(0.5,), seeds=(seed,))).points[0]
        for seed in (0, 1, 2)
    ]
    both = robustness(learner, stream, Tables(kinds=("both",), rates=(0.5,), seeds=(0, 1, 2)))
    scores = [one.task_free.ap for one in each if one.task_free]
    assert both.points[0].task_free is not None and len(set(scores)) > 1
    assert both.points[0].task_free.ap == pytest.approx(sum(scores) / 3)
    found = [one.task_identification for one in each if one.task_identification is not None]
    assert both.points[0].task_identification == pytest.approx(sum(found) / 3)


def test_a_sample_is_answered_once_in_each_state_it_can_be_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learner, stream = taught("delo"), stream_of((0, 0, 1))
    seen: list[tuple[str, ...]] = []
    route = learner.method.route

    def counted(batch: Batch, oracle: int | None = None) -> Any:
        there = {name: batch.present[name].tolist() for name in ("image", "text")}
        seen.extend(
            (key, *(name for name in there if there[name][row]))
            for row, key in enumerate(batch.keys)
        )
        return route(batch, oracle)

    monkeypatch.setattr(learner.method, "route", counted)
    learner.evaluation_batch_size = 5
    found = robustness(learner, stream, Tables())
    assert len(found.points) == 15
    rows = [len(task.test) for task in stream]
    whole = sum(sum(row % 3 != 2 for row in range(count)) for count in rows)
    assert len(seen) == 3 * whole + (sum(rows) - whole)


def test_answers_do_not_depend_on_what_is_tested_together() -> None:
    learner, stream = taught("delo"), stream_of()
    learner.evaluation_batch_size = 64
    whole = robustness(learner, stream, TABLES)
    learner.evaluation_batch_size, learner.evaluation_cache = 1, False
    alone = robustness(learner, stream, TABLES)
    assert [p.task_free for p in whole.points] == [p.task_free for p in alone.points]
    assert [p.oracle for p in whole.points] == [p.oracle for p in alone.points]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": ("txt",)}, "unknown missing kind 'txt'; did you mean 'text'"),
        ({"kinds": ("none",)}, "known: both, image, text"),
        ({"rates": (0.5, 70.0)}, r"missing rate must be a number in \[0, 1\]; got 70"),
        ({"both_ratio": -1.0}, "missing both_ratio must be a number"),
        ({"rates": ()}, "missing rates: give at least one"),
    ],
)
def test_tables_that_cannot_be_drawn_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(EvoloraError, match=message):
        Tables(**settings)


def test_what_has_no_two_modalities_or_votes_is_refused() -> None:
    images = Stream(name="toy", tasks=(toy_task(0),))
    learner = pair_learner(CASES["sequential-lora"].config)
    with pytest.raises(ConfigError, match="nothing is learned"):
        robustness(learner, stream_of(), TABLES)
    learner.learn(pair_task(0))
    with pytest.raises(StreamError, match="has only image"):
        robustness(learner, images, TABLES)
    with pytest.raises(ConfigError, match="unknown task"):
        robustness(learner, Stream(name="toy", tasks=(pair_task(1),)), TABLES)
    blind = make("sequential-lora")
    blind.learn(toy_task(0))
    with pytest.raises(ConfigError, match="sees only image"):
        robustness(blind, images, TABLES)
    voting = DeLoConfig(num_factors=4, r=2, selector=TaskKeySelectorConfig(group_size=4))
    crowd = pair_learner(voting)
    crowd.learn(pair_task(0))
    with pytest.raises(ConfigError, match="decides in groups of 4"):
        robustness(crowd, stream_of(), TABLES)
