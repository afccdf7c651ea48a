"""Settings of a budget, and what the candidates of a model make of them."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from evolora.allocation.allocator import allocate
from evolora.allocation.settings import (
    GradientAllocationConfig,
    RandomAllocationConfig,
    UniformAllocationConfig,
)
from evolora.config import parse_config
from evolora.errors import ConfigError
from evolora.experts.sites import Site
from evolora.methods.lora import LoRAPerTaskConfig

BASE: dict[str, Any] = {"stream": "mosaic/domains"}


def sites() -> list[Site]:
    """Two towers of two blocks, with two Linears each."""
    return [
        Site(
            tower=tower, layer=layer, name=f"{tower}.{layer}.{name}", kind="linear",
            module=nn.Linear(4, wide), d_in=4, d_out=wide,
        )
        for tower in ("vision", "text")
        for layer in (0, 1)
        for name, wide in (("q_proj", 4), ("fc1", 8))
    ]  # fmt: skip


COSTS = [8, 12] * 4
SCORES = [1.0, 5.0, 4.0, 2.5, 0.2, 0.1, 3.0, 0.2]


def chosen(**settings: Any) -> list[str]:
    counts = allocate(UniformAllocationConfig(**settings), sites(), SCORES, COSTS)
    return [site.name for site, count in zip(sites(), counts, strict=True) if count]


def test_experts_are_counted_by_site() -> None:
    # vision scores 12.5 of 16: three of four
    assert chosen(budget=4) == ["vision.0.fc1", "vision.1.q_proj", "vision.1.fc1", "text.1.q_proj"]
    assert chosen(budget=0.5) == chosen(budget=4)
    assert len(chosen(budget=1.0)) == 8


def test_layers_get_an_expert_at_each_of_their_sites() -> None:
    # sums: vision 0 6.0, vision 1 6.5, text 0 0.3, text 1 3.2
    assert chosen(budget=1, unit="layers") == ["vision.1.q_proj", "vision.1.fc1"]
    assert chosen(budget=3, unit="layers")[-2:] == ["text.1.q_proj", "text.1.fc1"]
    assert chosen(budget=0.5, unit="layers", floors={"text": 0.5})[0::2] == [
        "vision.1.q_proj", "text.1.q_proj",
    ]  # fmt: skip


def test_parameters_are_spent_and_never_exceeded() -> None:
    for budget in range(8, 81):
        names = chosen(budget=budget, unit="parameters")
        used = sum(cost for site, cost in zip(sites(), COSTS, strict=True) if site.name in names)
        assert budget - 12 < used <= budget
    assert chosen(budget=8, unit="parameters") == ["vision.1.q_proj"]  # the best that can be paid


def test_blocks_can_be_paid_in_experts_and_in_parameters() -> None:
    assert chosen(budget=3, candidate="block") == ["vision.1.q_proj", "vision.1.fc1"]
    assert chosen(budget=45, unit="parameters", candidate="block") == [
        "vision.0.q_proj", "vision.0.fc1", "vision.1.q_proj", "vision.1.fc1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": 0}, "budget must be a whole number from 1, or a fraction"),
        ({"budget": 1.5}, r"budget must be .* got 1.5"),
        ({"budget": True}, "got True"),
        ({"unit": "layers", "candidate": "module"}, "chooses whole blocks"),
        ({"floors": {"vision": 2.0}}, r"floors\['vision'\]"),
        ({"floors": {"vision": 0.6, "text": 0.6}}, "floors must not exceed 1"),
        ({"tie_seed": -1}, "tie_seed must be in"),
        ({"sample": 0.0}, "sample must be"),
        ({"min_samples": 0}, "min_samples must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        GradientAllocationConfig(**settings)


def test_budgets_that_fit_no_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="budget is 9 experts, all candidates together take 8"):
        chosen(budget=9)
    with pytest.raises(ConfigError, match=r"buys 7 parameters, which is not one expert .* takes 8"):
        chosen(budget=7, unit="parameters")
    with pytest.raises(ConfigError, match="unknown tower in floors 'visions'; did you mean"):
        chosen(budget=2, floors={"visions": 0.5})


def test_the_sample_is_a_share_or_a_count() -> None:
    share = GradientAllocationConfig(sample=0.01, min_samples=16)
    assert [share.samples(rows) for rows in (5, 1000, 1601, 100_000)] == [5, 16, 17, 1000]
    assert GradientAllocationConfig(sample=40).samples(1000) == 40
    assert GradientAllocationConfig(sample=1.0).samples(1000) == 1000


def parsed(allocation: Any) -> Any:
    method = {"type": "lora-per-task", "allocation": allocation}
    return parse_config({**BASE, "method": method}).method.allocation


def test_configurations_name_a_type_a_file_or_nothing() -> None:
    assert parsed(None) is None
    assert parsed("gradient") == GradientAllocationConfig()
    assert parsed({"type": "random", "budget": 3}) == RandomAllocationConfig(budget=3)
    assert parsed({"budget": 1.0}) == GradientAllocationConfig(budget=1.0)
    assert isinstance(parsed({"budget": 1.0}).budget, float)
    assert parsed({"budget": 1}).budget == 1 and isinstance(parsed({"budget": 1}).budget, int)
    assert parsed("runs/other/allocation.json") == "runs/other/allocation.json"
    for wrong, words in (
        ("gradients", "or the path of a .json file"),
        ({"type": "gradients"}, "did you mean 'gradient'"),
        ({"type": "uniform", "sample": 3}, "method.allocation.sample: unknown setting"),
        ({"unit": "expert"}, "method.allocation.unit"),
        (3, "method.allocation: expected a mapping"),
    ):
        with pytest.raises(ConfigError, match=words):
            parsed(wrong)


def test_a_run_s_configuration_survives_json_and_what_a_file_says_is_hashed(tmp_path: Any) -> None:
    config = parse_config({**BASE, "method": {"type": "lora-per-task", "allocation": "gradient"}})
    again = parse_config(config.to_json())
    assert again == config and again.hash() == config.hash()
    plain = parse_config({**BASE, "method": "lora-per-task"})
    assert plain.hash() != config.hash()
    file = tmp_path / "a.json"
    hashes = []
    for content in ("{}", "{ }", "{}"):
        file.write_text(content)
        method = LoRAPerTaskConfig(allocation=str(file))
        hashes.append(parse_config({**BASE, "method": vars(method)}).hash())
    assert hashes[0] == hashes[2] != hashes[1]  # what the file says decides
