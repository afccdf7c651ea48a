"""What is computed once: every result with caches is the result without them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import toy_task
from tests.training.caching import METHODS, MOE, learner_of, run_of, settings
from torch import Tensor

from evolora.errors import ConfigError, DataError
from evolora.learner import Progress
from evolora.methods.full_finetuning import FullFinetuningConfig
from evolora.methods.lora import SequentialLoRAConfig
from evolora.storage.state import export_state, load_state


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("augment", [False, True])
def test_a_run_is_the_same_with_every_cache_on_and_off(
    name: str, augment: bool, tmp_path: Path
) -> None:
    plain = run_of(
        tmp_path / "off", METHODS[name], evaluate=False, prefix_cache="off", augment=augment
    )
    quick = run_of(tmp_path / "on", METHODS[name], evaluate=True, augment=augment)
    one, two = plain.run(), quick.run()
    assert (one.values == two.values).all() and (one.baseline == two.baseline).all()
    assert plain.record.routes == quick.record.routes
    states = [export_state(run.learner.method) for run in (plain, quick)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-3, atol=1e-5)
    assert plain.config.hash() == quick.config.hash()
    memory = plain.learner.samples.memory
    assert memory.prefixes is None and len(memory.crops) == len(memory.passes.kept) == 0


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("place", ["ram", "file"])
def test_memory_and_file_give_the_same(kind: str, place: str, tmp_path: Path) -> None:
    plain = learner_of(METHODS["sequential"], kind=kind, prefix_cache="off", max_steps=9)
    quick = learner_of(
        METHODS["sequential"],
        kind=kind,
        prefix_cache=place,
        prefix_cache_dtype="float32",
        prefix_cache_dir=str(tmp_path),
        max_steps=9,
    )
    for learner in (plain, quick):
        learner.learn(toy_task(0, 20))
    for key, value in export_state(plain.method).items():
        torch.testing.assert_close(export_state(quick.method)[key], value, rtol=1e-3, atol=1e-5)
    assert quick.evaluate(toy_task(0)) == plain.evaluate(toy_task(0))
    prefixes = quick.samples.memory.prefixes
    assert prefixes is not None and len(prefixes.kept) == 20 + 12
    assert (prefixes.kept.file is not None) == (place == "file")


def test_half_precision_is_close_and_takes_half_the_room() -> None:
    exact = learner_of(METHODS["sequential"])
    half = learner_of(METHODS["sequential"], prefix_cache="file")
    for learner in (exact, half):
        learner.learn(toy_task(0, 20))
    sizes = [learner.samples.memory.prefixes.kept.nbytes for learner in (exact, half)]
    assert sizes[0] == 2 * sizes[1] > 0
    one, two = export_state(exact.method), export_state(half.method)
    assert any(not torch.equal(one[key], two[key]) for key in one)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0.05, atol=5e-3)


@pytest.mark.parametrize("place", ["ram", "file"])
def test_a_cold_cache_in_the_middle_changes_no_bit(place: str) -> None:
    """As after a kill: the rest of the run meets samples in other company."""
    learner = learner_of(MOE, prefix_cache=place, save_steps=3, max_steps=8)
    saved: list[tuple[int, dict[str, Tensor], dict[str, Tensor]]] = []

    def save(step: int, moments: Mapping[str, Tensor]) -> None:
        state = {k: v.clone() for k, v in export_state(learner.method).items()}
        saved.append((step, state, {k: v.clone() for k, v in moments.items()}))

    learner.learn(toy_task(0, 20), save=save)
    for step, state, moments in saved:
        again = learner_of(MOE, prefix_cache=place, save_steps=3, max_steps=8)
        again.begin(toy_task(0, 20))
        load_state(again.method, state)
        again.learn(toy_task(0, 20), progress=Progress(step=step, moments=moments))
        for key, value in export_state(learner.method).items():
            assert torch.equal(export_state(again.method)[key], value), key


def test_room_for_a_part_of_the_samples_gives_the_same() -> None:
    plain = learner_of(METHODS["sequential"], max_steps=9)
    row = 4 * 5 * 32  # float32, 5 tokens, 32 wide
    small = learner_of(METHODS["sequential"], prefix_cache_bytes=7 * row, max_steps=9)
    for learner in (plain, small):
        learner.learn(toy_task(0, 20))
    kept = small.samples.memory.prefixes.kept
    assert len(kept) == 7 and kept.nbytes <= kept.limit_bytes
    for key, value in export_state(plain.method).items():
        assert torch.equal(export_state(small.method)[key], value)


@pytest.mark.parametrize("workers", [0, 2])
def test_readers_give_the_same(workers: int) -> None:
    learners = [
        learner_of(METHODS["sequential"], dataloader_num_workers=count, max_steps=6)
        for count in (0, workers)
    ]
    for learner in learners:
        learner.learn(toy_task(0, 20))
    for key, value in export_state(learners[0].method).items():
        assert torch.equal(export_state(learners[1].method)[key], value)


@pytest.mark.parametrize(
    ("method", "training", "message"),
    [
        (METHODS["sequential"], {"augment": True}, "training.augment crops at random"),
        (SequentialLoRAConfig(r=2), {}, "block 0 of the vision tower.*layers_to_transform"),
        (FullFinetuningConfig(), {}, "full-finetuning trains the weights below every block"),
    ],
)
@pytest.mark.parametrize("place", ["ram", "file"])
def test_a_cache_that_cannot_be_had_is_refused_with_the_reason(
    method: Any, training: dict[str, Any], message: str, place: str
) -> None:
    with pytest.raises(ConfigError, match=f"prefix_cache: {place} is not possible: .*{message}"):
        learner_of(method, prefix_cache=place, **training)
    learner_of(method, **training)  # "auto" goes without


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prefix_cache": "disk"}, "prefix_cache must be 'auto' or 'off' or 'ram' or 'file'"),
        ({"prefix_cache_bytes": -1}, "prefix_cache_bytes must be at least 0; got -1"),
        ({"prefix_cache_dtype": "int8"}, "prefix_cache_dtype must be"),
    ],
)
def test_wrong_settings_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**given)


def test_activations_that_do_not_fit_are_refused() -> None:
    learner = learner_of(METHODS["sequential"], prefix_cache="file")
    embeddings: Any = learner.backbone.model.vision_model
    with torch.no_grad():
        embeddings.pre_layrnorm.weight.mul_(1e6)
    with pytest.raises(DataError, match="prefix_cache_dtype: float32"):
        learner.learn(toy_task(0, 20))
