"""The regulariser: what it adds up, its schedules and adaptivity, and what is a setting of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from evolora.config import parse_config
from evolora.errors import ConfigError
from evolora.regularizers.features import Features
from evolora.regularizers.orthogonal import overlap
from evolora.regularizers.redundancy import Update, redundancy
from evolora.regularizers.resora import Record, Resora
from evolora.regularizers.settings import ResoraConfig

LAST: dict[str, int] = {"step": 9, "total_steps": 10}


def record(
    seed: int, rank: int = 4, updates: int = 1, tokens: int = 40, older: int = 0, name: str = "l"
) -> Record:
    draw = torch.Generator().manual_seed(seed)
    a, b = (
        torch.randn(updates, rank, 6, generator=draw),
        torch.randn(updates, rank, 5, generator=draw),
    )
    z = torch.randn(updates, tokens, 6, generator=draw) @ a.mT
    old = torch.randn(older, rank, 6, generator=draw), torch.randn(older, rank, 5, generator=draw)
    return Record(name, a, b, Features.of(z), (old,) if older else ())


def total(records: list[Record], **settings: Any) -> tuple[float, dict[str, Tensor]]:
    place = {key: settings.pop(key, LAST[key]) for key in LAST}
    task = settings.pop("task_loss", None)
    chosen = {"measure_down": "f_corr", "measure_up": "f_contrib", **settings}
    loss, metrics = Resora(ResoraConfig(**chosen)).total(records, task_loss=task, **place)
    return float(loss), metrics


def test_it_is_the_mean_over_updates_of_both_sides() -> None:
    records = [record(0), record(1, rank=8), record(2, updates=3)]
    found, metrics = total(records, weight=0.5, w_down=2.0, w_up=3.0)
    down, up = [], []
    for one in records:
        assert one.features is not None
        for a, b, features in zip(one.a, one.b, one.features.split([1] * len(one.a)), strict=True):
            alone = Update(a.unsqueeze(0), b.unsqueeze(0), features)
            down.append(redundancy("f_corr", "down", alone))
            up.append(redundancy("f_contrib", "up", alone))
    mean_down, mean_up = torch.cat(down).mean(), torch.cat(up).mean()
    assert found == pytest.approx(float(0.5 * (2.0 * mean_down + 3.0 * mean_up)))
    assert float(metrics["redundancy_down"]) == pytest.approx(float(mean_down))
    assert float(metrics["redundancy_up"]) == pytest.approx(float(mean_up))
    summed, _ = total(records, weight=0.5, w_down=2.0, w_up=3.0, reduction="sum")
    assert summed == pytest.approx(5 * found)
    assert not any(value.requires_grad for value in metrics.values())


def test_updates_that_saw_few_tokens_are_left_out() -> None:
    many, few = record(0), record(1, tokens=15)
    assert total([many, few], measure_up="none") == total([many], measure_up="none")
    assert total([many, few], measure_up="none", min_tokens=15)[0] != total([many])[0]
    assert total([few], measure_up="none")[0] == 0.0
    weights, _ = total([many, few], measure_down="w_cos", measure_up="w_cos")
    assert weights != pytest.approx(total([many], measure_down="w_cos", measure_up="w_cos")[0])


def test_lambda_grows_over_the_warm_up_and_the_up_side_comes_later() -> None:
    config = ResoraConfig(weight=2.0, warmup=0.2, up_delay=0.5)
    down = [config.strength("down", step, 10) for step in range(10)]
    up = [config.strength("up", step, 10) for step in range(10)]
    assert down == pytest.approx([1.0] + [2.0] * 9)
    assert up == pytest.approx([0.0] * 5 + [1.0] + [2.0] * 4)
    plain = ResoraConfig(weight=2.0, warmup=0.0)
    assert [plain.strength(side, 0, 10) for side in ("down", "up")] == [2.0, 2.0]  # type: ignore[arg-type]
    _, metrics = total([record(0)], up_delay=0.5, step=0)
    assert "redundancy_up" not in metrics
    assert [ResoraConfig(every_n_steps=3).due(step) for step in range(5)] == [
        True, False, False, True, False,
    ]  # fmt: skip
    assert not ResoraConfig(weight=0.0).due(0)
    assert not ResoraConfig(w_down=0.0, measure_up="none").due(0)


def test_ratio_makes_the_term_a_share_of_the_task_s_loss() -> None:
    records = [record(0)]
    for task in (0.5, 4.0):
        found, _ = total(
            records,
            weight=0.1,
            adaptivity="ratio",
            task_loss=torch.tensor(task, requires_grad=True),
        )
        assert found == pytest.approx(0.1 * task)
    one, task = records[0], torch.tensor(3.0, requires_grad=True)
    one.a.requires_grad_()
    down = {"measure_down": "w_cos", "measure_up": "none", "weight": 0.1, "adaptivity": "ratio"}
    resora = Resora(ResoraConfig(**down))  # type: ignore[arg-type]
    resora.total([one], task_loss=task, **LAST)[0].backward()
    found = redundancy("w_cos", "down", Update(one.a, one.b)).sum()
    (wanted,) = torch.autograd.grad(0.1 * 3.0 / found.item() * found, one.a)
    assert one.a.grad is not None and task.grad is None
    torch.testing.assert_close(one.a.grad, wanted)
    half, _ = total(
        records, weight=0.1, adaptivity="ratio", warmup=1.0, step=4, task_loss=torch.tensor(1.0)
    )
    assert half == pytest.approx(0.05)
    with pytest.raises(ConfigError, match="needs task_loss"):
        total(records, adaptivity="ratio")


def test_learned_scales_are_trained_to_the_logarithm_of_what_they_weigh() -> None:
    resora = Resora(ResoraConfig(weight=1.0, adaptivity="learned", warmup=0.0))
    assert set(resora.scales) == {"down", "up"}
    optimizer = torch.optim.SGD(resora.scales.values(), lr=0.5)
    for _ in range(60):
        loss, metrics = resora.total([record(0)], **LAST)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for side, scale in resora.scales.items():
        assert scale.item() == pytest.approx(float(metrics[f"redundancy_{side}"].log()), abs=1e-3)
    value = sum(
        torch.exp(-scale) * metrics[f"redundancy_{side}"] + scale
        for side, scale in resora.scales.items()
    )
    assert float(loss) == pytest.approx(float(value), abs=1e-3)  # type: ignore[arg-type]
    assert Resora(ResoraConfig()).scales == {}


def test_pairwise_reaches_the_measure() -> None:
    one = record(0)
    wanted = redundancy("w_cos", "down", Update(one.a, one.b), pairwise=True)
    found, _ = total(
        [one], weight=1.0, measure_down="w_cos", measure_up="none", adaptivity="pairwise"
    )
    assert found == pytest.approx(float(wanted))


def test_tokens_are_drawn_the_same_ones_every_time() -> None:
    z = torch.randn(2, 50, 3)
    real = torch.arange(50) % 3 > 0
    z[:, ~real] = 1e6  # which token is real stays with it
    some = Resora(ResoraConfig(max_tokens=20), seed=1)
    first, again = (some.features_of([(z, real)])[0] for _ in range(2))
    assert torch.equal(first.covariance, again.covariance)
    assert 8 <= int(first.count[0]) < 20 and float(first.covariance.abs().max()) < 10.0
    other = Resora(ResoraConfig(max_tokens=20), seed=2).features_of([(z, real)])[0]
    assert not torch.equal(first.covariance, other.covariance)
    every = Resora(ResoraConfig(max_tokens=50)).features_of([(z, real), (z[:, :9], None)])
    assert int(every[0].count[0]) == int(real.sum()) and int(every[1].count[0]) == 9


def test_o_lora_is_a_setting() -> None:
    records = [record(0, older=3), record(1, older=1), record(2)]
    found, _ = total(
        records, weight=0.5, measure_down="overlap", measure_up="none", across="tasks",
        reduction="sum", warmup=0.0,
    )  # fmt: skip
    wanted = sum(float(overlap(one.older[0][0], one.a)) for one in records if one.older)
    assert found == pytest.approx(0.5 * wanted)


def test_gor_is_a_setting() -> None:
    records = [record(0, rank=8), record(1, rank=8)]
    found, _ = total(
        records, weight=1e-6, measure_down="gor", measure_up="gor", reduction="sum", warmup=0.0,
        groups=2,
    )  # fmt: skip
    wanted = 0.0
    for one in records:
        for rows in one.a[0].view(2, 4, 6):
            wanted += float((rows @ rows.T - torch.eye(4)).pow(2).sum())
        # B (5, 8) has five rows, so one group of them: fewer than four would be none
        weight = one.b[0].T
        wanted += float((weight @ weight.T - torch.eye(5)).pow(2).sum())
    assert found == pytest.approx(1e-6 * wanted, rel=1e-5)


def test_experts_and_tasks_share_what_their_subspaces_share() -> None:
    axes = torch.eye(6)
    a = torch.stack([axes[:2], 3 * axes[[1, 0]], axes[3:5]])  # the second spans what the first does
    b = torch.randn(3, 2, 5)
    one = Record("l", a, b, older=((torch.stack([axes[[4, 5]]]), b[:1]),))
    settings: dict[str, Any] = {"weight": 1.0, "measure_down": "w_cos", "measure_up": "none"}
    found, _ = total([one], across="experts", **settings)
    assert found == pytest.approx(1 / 3, abs=1e-4)
    found, _ = total([one], across="tasks", **settings)
    assert found == pytest.approx(0.5 / 3, abs=1e-4)
    alone = Record("l", a[:1], b[:1])
    for across in ("experts", "tasks"):
        assert total([alone], across=across, **settings)[0] == 0.0
    cut, _ = total([one], across="experts", **{**settings, "measure_down": "overlap"})
    assert cut == pytest.approx(6.0)


def both(measure: str, **settings: Any) -> dict[str, Any]:
    return {"measure_down": measure, "measure_up": measure, **settings}


@pytest.mark.parametrize(
    "settings",
    [
        {"measure_down": "f_corr", "measure_up": "f_contrib"},
        both("f_dist"),
        *(both(measure) for measure in ("w_cos", "w_orth", "gor", "gor_intra")),
        both("w_cos", groups=2),
        *(both(m, across=across) for m in ("w_cos", "overlap") for across in ("experts", "tasks")),
    ],
    ids=str,
)
def test_autocast_leaves_the_term_alone(settings: dict[str, Any]) -> None:
    one = record(0, updates=2, older=1)
    z = torch.randn(2, 40, 6) @ one.a.mT
    records = [replace(one, features=Features.of(z, tokens=True))]
    resora = Resora(ResoraConfig(**settings))
    plain, _ = resora.total(records, **LAST)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = resora.total(records, **LAST)
    assert inside.dtype == torch.float32 and torch.equal(inside, plain) and plain > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"measure_down": "f_contrib"}, "unknown measure_down .*'f_contrib'"),
        ({"measure_up": "w_coss"}, "did you mean 'w_cos'"),
        (
            {"across": "tasks", "measure_down": "f_corr"},
            r"measure_down \(across tasks\) 'f_corr'.*overlap, w_cos",
        ),
        ({"weight": -1.0}, "weight must be at least 0; got -1.0"),
        ({"warmup": 1.5}, "warmup is a share of the steps"),
        ({"up_delay": 1.0}, "up_delay is a share of the steps"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1; got 0"),
        ({"layers": "("}, "layers must be a regular expression"),
        (
            {"adaptivity": "pairwise", "measure_down": "gor", "measure_up": "none"},
            "'pairwise' weighs pairs of ranks",
        ),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ResoraConfig(**settings)
    with pytest.raises(ConfigError, match=r"nothing|no low-rank update trains"):
        Resora(ResoraConfig()).total([], **LAST)


def test_a_configuration_file_lists_regularizers() -> None:
    base: dict[str, Any] = {"method": "sequential-lora", "stream": "mosaic/domains"}
    plain = parse_config(base)
    config = parse_config({**base, "regularizers": ["resora", {"type": "resora", "weight": 0.1}]})
    assert config.regularizers == (ResoraConfig(), ResoraConfig(weight=0.1))
    assert config.to_json()["regularizers"][1]["weight"] == 0.1
    assert parse_config(config.to_json()) == config
    assert config.hash() != plain.hash()
    old = plain.to_json()
    del old["regularizers"]
    assert parse_config(old).hash() == plain.hash()
    with pytest.raises(ConfigError) as error:
        parse_config({
            **base,
            "regularizers": [{"type": "resorra"}, {"type": "resora", "weigth": 1}, {"weight": 1}],
        })  # fmt: skip
    for part in ("regularizers[0].type: unknown regularizer 'resorra'; did you mean 'resora'?",
                 "regularizers[1].weigth: unknown setting; did you mean 'weight'?",
                 "regularizers[2].type: missing"):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(ConfigError, match="regularizers: expected a list of settings"):
        parse_config({**base, "regularizers": {"type": "resora"}})
