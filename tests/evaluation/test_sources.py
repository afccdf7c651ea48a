"""Which path a later one draws on: mean gate weights, noted while its test set is answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.backbones.qformers import QUERIES, qformer
from tests.methods.modalities import TEXTS, task
from tests.methods.test_pathweave import learner

from evolora.config import parse_config
from evolora.evaluation.sources import SourceShares
from evolora.experts.woven import WovenLayer
from evolora.methods.pathweave import PathWeaveConfig
from evolora.streams.task import Stream
from evolora.training.continual import ContinualRun

STAGES = ("image", "video", "audio", "pc")


def one(counts: Any) -> Any:
    return counts


def test_shares_are_the_mean_of_the_weights_of_queries_and_encoder_tokens() -> None:
    learned = learner()
    for stage in ("video", "audio"):
        learned.learn(task(stage))
    shares = SourceShares(learned.method, 1)
    assert shares.names == ("video", "audio")
    seen: dict[str, list[torch.Tensor]] = {}
    for key, layer in learned.method.layers.items():
        assert isinstance(layer, WovenLayer)
        if layer.gates is not None:
            with torch.no_grad():  # weights that differ from token to token
                layer.gates.weight.frozen.copy_(torch.randn_like(layer.gates.weight.frozen))
            layer.register_forward_pre_hook(
                lambda made, args, key=key: seen.setdefault(key, []).append(
                    torch.softmax(args[0] @ made.gates.weight.all().T, dim=-1)
                )
            )
    with shares.noted():
        learned.evaluate(task("audio"))
    found = shares.to_json(one)
    assert found["paths"] == ["video", "audio"] and set(found["sites"]) == set(seen)
    for key, parts in seen.items():
        reads = key.endswith(("crossattention/key", "crossattention/value"))
        tokens = [part if reads else part[:, :QUERIES] for part in parts]
        mean = torch.cat([part.flatten(0, 1) for part in tokens]).mean(dim=0)
        assert found["sites"][key] == pytest.approx(mean.tolist(), abs=1e-5)
        assert sum(found["sites"][key]) == pytest.approx(1.0, abs=1e-5)
        if "crossattention" not in key:
            assert parts[0].shape[1] > QUERIES, "the instruction is there, and left out"
    learned.evaluate(task("audio"))
    assert shares.to_json(one) == found, "nothing is noted outside"


def test_rows_of_other_paths_do_not_count() -> None:
    learned = learner()
    for stage in ("video", "audio", "pc"):
        learned.learn(task(stage))
    shares, mixed = (SourceShares(learned.method, 2) for _ in range(2))
    with shares.noted():
        learned.evaluate(task("pc"))
    with mixed.noted():
        learned.evaluate(task("pc"))
        learned.evaluate(task("audio"))
        learned.evaluate(task("image"))
    assert mixed.to_json(one) == shares.to_json(one) and shares.names[-1] == "pc"


@pytest.mark.parametrize(
    "config",
    [PathWeaveConfig(r=2, reuse=False), PathWeaveConfig(r=2, mixture="mean")],
    ids=["alone", "mean"],
)
def test_without_a_gate_there_is_nothing_to_note(config: PathWeaveConfig) -> None:
    learned = learner(config=config)
    for index, stage in enumerate(STAGES[:3]):
        learned.learn(task(stage))
        shares = SourceShares(learned.method, index)
        with shares.noted():
            learned.evaluate(task(stage))
        assert shares.names == () and shares.to_json(one) == {}


def run_of(folder: Path, **method: Any) -> Path:
    config = parse_config({
        "method": {"type": "pathweave", "r": 2, **method},
        "stream": "mosaic/domains",
        "training": {
            "max_steps": 2, "per_device_train_batch_size": 3, "warmup_steps": 0,
            "augment": False, "label_smoothing_factor": 0.0,
        },
        "seed": 3,
    })  # fmt: skip
    stream = Stream(name="toy", tasks=tuple(task(stage) for stage in STAGES))
    ContinualRun(config, folder, stream=stream, backbone=qformer()).run()
    return folder


def test_a_run_keeps_them_with_questions_captions_and_what_full_tuning_costs(
    tmp_path: Path,
) -> None:
    folder = run_of(tmp_path / "run")
    after = json.loads((folder / "routing.json").read_text())["after"]
    assert [one.get("sources", {}).get("paths") for one in after] == [
        None, None, ["video", "audio"], ["video", "audio", "pc"],
    ]  # fmt: skip
    for entry in after:
        assert "captions" not in entry, "nothing asks for a sentence"
        for shares in entry.get("sources", {"sites": {}})["sites"].values():
            assert sum(shares) == pytest.approx(1.0, abs=1e-5)
    history = json.loads((folder / "run.json").read_text())["history"]
    assert history[0]["full_tuning"] == 0 and history[0]["trainable_parameters"] == 0
    model: Any = qformer().model
    whole = sum(
        p.numel() for m in (model.qformer, model.language_projection) for p in m.parameters()
    )
    assert all(one["full_tuning"] > whole for one in history[1:])
    assert TEXTS.text
