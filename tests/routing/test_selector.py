"""Selectors: DDAS rules on scripted errors (specs/moe_adapters.md 9.1-11, 9.3 e), and the rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import toy_task

from evolora.errors import ConfigError, StreamError
from evolora.learner import Learner
from evolora.methods.moe_adapters import MoEAdaptersConfig
from evolora.routing.autoencoders import AutoEncoderTraining
from evolora.routing.route import BASE
from evolora.routing.selector import (
    AlwaysSelector,
    AutoEncoderSelector,
    AutoEncoderSelectorConfig,
    OracleSelector,
)
from evolora.training.config import TrainingConfig


def scripted(
    errors: list[list[float]],
    *,
    reference: list[float] | None = None,
    thresholds: list[float] | None = None,
    **settings,
) -> list[int]:
    """Return the tasks a selector chooses when its auto-encoders' errors are these."""
    config = AutoEncoderSelectorConfig(**settings)
    selector = AutoEncoderSelector(config, 4)
    values = torch.tensor(errors)
    for task in range(values.shape[1]):
        rows = [torch.zeros(stack.shape) for stack in selector.bank.networks()]
        selector.bank.add([*rows, torch.zeros(4)])
        fixed = thresholds[task] if thresholds else selector.calibrate(torch.zeros(1, 4))
        selector._add_threshold(fixed)
    selector.bank.errors = lambda _: values
    if reference is not None:
        rows = [torch.zeros(stack.shape) for stack in selector.reference.networks()]
        selector.reference.add([*rows, torch.zeros(4)])
        selector.reference.errors = lambda _: torch.tensor(reference).unsqueeze(1)
    features = {config.feature: torch.zeros(len(errors), 4)}
    return selector.select(features, len(errors), None).tasks.tolist()


def test_9_3_e_scripted_losses() -> None:
    """Losses are [reference, task 0, task 1], threshold 0.0655."""
    assert scripted([[0.04, 0.06]], reference=[0.05], threshold=0.0655) == [0]
    assert scripted([[0.04, 0.06]], reference=[0.03], threshold=0.0655) == [BASE]
    assert scripted([[0.066, 0.08]], reference=[0.07], threshold=0.0655) == [BASE]


def test_9_1_11_threshold_zero_always_goes_to_the_base() -> None:
    for zero in (0, 0.0):
        assert scripted([[0.1, 1e-9], [5.0, 0.3]], threshold=zero) == [BASE, BASE]


def test_a_whole_number_is_a_threshold_too() -> None:
    assert scripted([[0.5], [1.5]], threshold=1) == [0, BASE]


def test_9_1_11_threshold_infinite_without_reference_is_the_argmin() -> None:
    errors = [[0.2, 0.1, 9.0], [1e30, 1e29, 1e28], [0.5, 0.6, 0.7]]
    assert scripted(errors, threshold=float("inf")) == [1, 2, 0]


def test_9_1_11_an_error_equal_to_the_threshold_stays_in() -> None:
    threshold = float(torch.tensor(0.0655))
    above = float(torch.nextafter(torch.tensor(threshold), torch.tensor(1.0)))
    assert scripted([[threshold, 1.0], [above, 1.0]], threshold=threshold) == [0, BASE]
    assert scripted([[threshold], [above]], thresholds=[threshold]) == [0, BASE]


def test_equal_errors_keep_the_smaller_index_and_the_reference_comes_first() -> None:
    assert scripted([[0.04, 0.04]], threshold=1.0) == [0]
    assert scripted([[0.04, 0.05]], reference=[0.04], threshold=1.0) == [BASE]


def test_9_1_11_groups() -> None:
    """Rows decided together share the mean error; groups of one are the rows themselves."""
    errors = [[0.1, 0.2], [0.4, 0.2], [0.9, 0.1], [0.2, 0.9], [0.1, 0.3]]
    each = scripted(errors, threshold=0.5)
    assert each == [0, 1, 1, 0, 0]
    assert scripted(errors, threshold=0.5, group_size=1) == each
    assert scripted(errors, threshold=0.5, group_size=2) == [1, 1, 1, 1, 0]
    assert scripted(errors, threshold=0.2, group_size=2) == [1, 1, BASE, BASE, 0]
    assert scripted(errors, threshold=0.5, group_size=128) == [0] * 5


def test_the_smallest_error_wins_and_its_own_threshold_decides() -> None:
    assert scripted([[0.3, 0.2]], thresholds=[1.0, 0.25]) == [1]
    assert scripted([[0.3, 0.4]], thresholds=[0.25, 1.0]) == [BASE]
    assert scripted([[1.1, 0.2]], thresholds=[1.0, 0.25]) == [1]


def test_what_is_not_a_number_goes_to_the_base() -> None:
    assert scripted([[float("nan")] * 2], threshold=1.0) == [BASE]


def test_thresholds_are_the_quantile_of_held_out_errors_times_the_margin() -> None:
    draw = torch.Generator().manual_seed(0)
    train, held = torch.randn(80, 6, generator=draw), torch.randn(40, 6, generator=draw)
    training = AutoEncoderTraining(hidden=3, steps=40)
    config = AutoEncoderSelectorConfig(quantile=0.75, margin=1.5, training=training)
    selector = AutoEncoderSelector(config, 6)
    selector.learn(0, train, held, seed=0)
    errors = selector.bank.errors(held)[:, 0]
    expected = 1.5 * torch.quantile(errors, 0.75)
    torch.testing.assert_close(selector.thresholds.all()[0], expected)
    accepted = selector.select({"layers": held}, 40, None).tasks == 0
    assert torch.equal(accepted, errors <= expected)
    selector.learn(1, train + 5, held + 5, seed=0)
    torch.testing.assert_close(selector.thresholds.all()[0], expected)
    with pytest.raises(ConfigError, match="expected 2, got 5"):
        selector.learn(5, train, held, seed=0)


def test_quantile_one_accepts_every_held_out_sample() -> None:
    held = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
    training = AutoEncoderTraining(hidden=3, steps=40)
    selector = AutoEncoderSelector(AutoEncoderSelectorConfig(quantile=1.0, training=training), 6)
    selector.learn(0, held, held, seed=0)
    assert selector.select({"layers": held}, 40, None).tasks.tolist() == [0] * 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantile": 0.0}, "quantile must be in"),
        ({"quantile": 1.1}, "quantile must be in"),
        ({"group_size": 0}, "group_size must be at least 1"),
        ({"feature": "alexnet"}, "needs feature_path"),
        ({"threshold": "auto"}, "'quantile' or a number"),
        ({"threshold": -1.0}, "'quantile' or a number"),
        ({"margin": 0.0}, "margin must be positive"),
    ],
)
def test_settings_are_checked(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AutoEncoderSelectorConfig(**settings)


def test_nothing_learned_is_the_base() -> None:
    selector = AutoEncoderSelector(AutoEncoderSelectorConfig(), 4)
    assert selector.select({"layers": torch.zeros(3, 4)}, 3, None).tasks.tolist() == [BASE] * 3


def test_oracle_and_always() -> None:
    assert OracleSelector().select({}, 2, 3).tasks.tolist() == [3, 3]
    assert OracleSelector().select({}, 2, None).tasks.tolist() == [BASE, BASE]
    assert AlwaysSelector(0).select({}, 2, 3).tasks.tolist() == [0, 0]
    assert AlwaysSelector(BASE).select({}, 2, 3).tasks.tolist() == [BASE, BASE]


def save_images(folder: Path, task: int) -> None:
    folder.mkdir(parents=True)
    for row in range(12):
        image = toy_task(task).train[row].inputs["image"].permute(1, 2, 0).numpy()
        Image.fromarray(np.ascontiguousarray(image)).save(folder / f"{row}.png")


def test_a_reference_folder_wins_back_its_images(make_backbone, tmp_path: Path) -> None:
    """With no threshold at all, only the reference keeps foreign inputs at the base."""
    save_images(tmp_path / "reference" / "deeper", 2)

    def routes(reference: str | None) -> list[int]:
        training = AutoEncoderTraining(hidden=6, steps=150)
        selector = AutoEncoderSelectorConfig(
            threshold=float("inf"), reference=reference, training=training
        )
        learner = Learner(
            make_backbone(),
            method=MoEAdaptersConfig(num_experts=2, r=2, selector=selector),
            training=TrainingConfig(max_steps=1, per_device_train_batch_size=4),
        )
        for task in (0, 1):
            learner.learn(toy_task(task))
        assert len(learner.method.selector.reference) == (reference is not None)
        return [learner.evaluate(toy_task(task)).routes.get("base", 0) for task in range(3)]

    assert routes(None) == [0, 0, 0]
    own, other, foreign = routes(str(tmp_path / "reference"))
    assert foreign == 12 and own + other <= 4


def test_a_reference_folder_that_is_missing_or_empty_is_named(make_backbone, tmp_path) -> None:
    for folder, message in ((tmp_path / "no", "no folder of images"), (tmp_path, "no images in")):
        selector = AutoEncoderSelectorConfig(reference=str(folder))
        learner = Learner(
            make_backbone(),
            method=MoEAdaptersConfig(num_experts=2, r=2, selector=selector),
            training=TrainingConfig(max_steps=1, per_device_train_batch_size=4),
        )
        with pytest.raises(StreamError, match=message):
            learner.learn(toy_task(0))
