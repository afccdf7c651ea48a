"""Configuration: every fault at once, under its path, in words a user can act on."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import evolora
from evolora.config import RunConfig, build_method, load_stream, parse_config, read_config
from evolora.config_text import apply_overrides, read_yaml
from evolora.errors import ConfigError, EvoloraError

CONFIGS = Path(__file__).parent.parent / "configs"
GOOD: dict[str, Any] = {"method": "moe-adapters", "stream": "mosaic/domains"}


def faults(value: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(value)
    text = str(caught.value)
    assert "\n" not in text and "pydantic" not in text and "Value error" not in text
    assert "ArgsKwargs" not in text and "Config." not in text
    return text


def test_short_and_long_forms_are_the_same_run() -> None:
    long = {
        "method": {"type": "moe-adapters"},
        "stream": {"name": "mosaic/domains"},
        "backbone": {"name_or_path": "clip-tiny"},
        "training": None,
        "evaluation": {},
    }
    assert parse_config(GOOD) == parse_config(long)
    assert parse_config({**GOOD, "backbone": "clip-tiny"}).hash() == parse_config(long).hash()


def test_every_fault_is_reported_at_once_with_its_path() -> None:
    text = faults(
        {
            "metod": {},
            "method": {"type": "moe-adapters", "num_expert": 4, "r": "wide"},
            "stream": {"name": "mosaic/domains", "limits": 3},
            "training": {"max_step": 5, "learning_rate": "fast"},
            "evaluation": {"batchsize": 1},
            "seed": "zero",
        }
    )
    for part in (
        "metod: unknown section; did you mean 'method'?",
        "method.num_expert: unknown setting; did you mean 'num_experts'?",
        "method.r: ", "got 'wide'",
        "stream.limits: unknown option of mosaic/domains; did you mean 'limit'?",
        "training.max_step: unknown setting; did you mean 'max_steps'?",
        "training.learning_rate: ", "got 'fast'",
        "evaluation.batchsize: unknown setting; did you mean 'batch_size'?",
        "seed: ", "got 'zero'",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"method": "moe-adapter"}, "unknown method 'moe-adapter'; did you mean 'moe-adapters'?"),
        ({"method": None}, "method.type: missing (known: branch-lora"),
        ({"method": {"r": 4}}, "method.type: missing"),
        ({"method": {"type": ["a"]}}, "method.type: unknown method ['a']"),
        ({"stream": None}, "stream.name: missing (known: "),
        ({"stream": "mosaic/domain"}, "did you mean 'mosaic/domains'?"),
        ({"stream": {"name": {}}}, "unknown stream {}"),
        ({"stream": "folder"}, "stream.root: missing; folder needs it"),
        ({"stream": {"name": "mosaic/domains", 3: 4}}, "stream.3: unknown option"),
        ({"training": [1]}, "training: expected a mapping of settings; got [1]"),
        ({"training": "fast"}, "training: expected a mapping of settings; got 'fast'"),
        ({"training": {"max_steps": 0}}, "training: max_steps must be at least 1; got 0"),
        ({"training": {"max_steps": 2.5}}, "training.max_steps: "),
        ({"training": {"learning_rate": -1}}, "learning_rate must be positive; got -1.0"),
        ({"training": {"learning_rates": {"a": 0}}}, "learning_rates['a'] must be positive"),
        ({"training": {"warmup_steps": -1}}, "warmup_steps must be at least 0; got -1"),
        ({"training": {"adam_beta2": 1}}, "adam_beta2 must be in [0, 1); got 1.0"),
        ({"training": {"max_grad_norm": 0}}, "max_grad_norm must be positive or None; got 0"),
        ({"training": {"max_classes_per_step": 1}}, "max_classes_per_step must be at least 2"),
        ({"training": {"mixed_precision": "fp16"}}, "training.mixed_precision: "),
        ({"training": {"report_to": "tensorboard"}}, "training.report_to: "),
        ({"method": {"type": "moe-adapters", "top_k": 30}}, "method: top_k must be between 1 and"),
        ({"seed": None}, "seed: "),
    ],
)
def test_each_fault_names_what_came_and_what_is_allowed(
    value: dict[str, Any], expected: str
) -> None:
    assert expected in faults({**GOOD, **value})


def test_two_faults_of_one_section_are_both_named() -> None:
    text = faults({**GOOD, "training": {"max_steps": 0, "weight_decay": -1.0}})
    assert "max_steps must be at least 1" in text and "weight_decay must be at least 0" in text


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (
            {"type": "auto-encoder", "quantil": 0.9},
            "method.selector.quantil: unknown setting; did you mean 'quantile'?",
        ),
        (
            {"type": "auto-encodr"},
            "method.selector.type: unknown type 'auto-encodr'; did you mean 'auto-encoder'? "
            "(known: auto-encoder, none, oracle, task-keys)",
        ),
        ({"quantile": 2}, "method.selector: quantile must be in (0, 1]; got 2.0"),
        (
            {"training": {"hiden": 3}},
            "method.selector.training.hiden: unknown setting; did you mean 'hidden'?",
        ),
        (
            {"type": "oracle", "quantile": 0.5},
            "method.selector.quantile: unknown setting (known: type)",
        ),
        (
            [],
            "method.selector: expected a mapping with a type "
            "(auto-encoder, none, oracle, task-keys); got []",
        ),
        (3, "method.selector: expected a mapping with a type"),
    ],
)
def test_a_nested_choice_has_one_readable_fault(selector: Any, expected: str) -> None:
    text = faults({**GOOD, "method": {"type": "moe-adapters", "selector": selector}})
    assert text.startswith(f"configuration: {expected}") and "; method" not in text


def test_a_nested_choice_may_leave_out_or_shorten_its_type() -> None:
    def selector(value: Any, **method: Any) -> Any:
        section = {"type": "moe-adapters", "selector": value, **method}
        return parse_config({**GOOD, "method": section}).method.selector

    assert selector({"quantile": 0.5}).quantile == 0.5
    assert selector({"quantile": 0.5}).type == "auto-encoder"
    assert selector("oracle").type == "oracle"
    assert selector("none", routers="shared").type == "none"
    assert selector({"threshold": "1e-3"}).threshold == 0.001


def test_yaml_types_become_what_the_settings_are(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        """
method:
  type: moe-adapters
  towers: [vision]
  layers_to_transform: [0, -1]
  selector: {training: {learning_rate: 5e-3}}
stream: {name: mosaic/domains, limit: 1e2, order: [a, b]}
training:
  learning_rate: 1e-3
  weight_decay: 1E-2
  max_grad_norm: .5e1
  learning_rates: {digits: 3e-4}
  report_to: [tensorboard]
  max_steps: 1_000
seed: 7
"""
    )
    config = read_config(path)
    assert config.training.learning_rate == 0.001
    assert config.training.weight_decay == 0.01
    assert config.training.max_grad_norm == 5.0
    assert config.training.learning_rates == {"digits": 3e-4}
    assert config.training.report_to == ("tensorboard",)
    assert config.training.max_steps == 1000
    assert config.method.towers == ("vision",) and config.method.layers_to_transform == (0, -1)
    assert config.method.selector.training.learning_rate == 0.005
    assert config.stream["limit"] == 100.0 and isinstance(config.stream["limit"], float)
    assert config.seed == 7


def test_off_is_a_word_and_still_switches_off(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "stream: mosaic/domains\nmethod: {type: moe-adapters, noise: off}\n"
        "training: {prefix_cache: off, augment: true}\n"
    )
    config = read_config(path, ["evaluation.cache=no"])
    assert config.training.prefix_cache == "off" and config.training.augment is True
    assert config.method.noise is False and config.evaluation.cache is False
    assert apply_overrides({}, ["method.cfs_mode=off"]) == {"method": {"cfs_mode": "off"}}


def test_words_like_numbers_stay_words(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("a: e5\nb: 1e\nc: '1e-3'\nd: 1e-3x\ne: v1e3\nf: 0x1e3\n")
    assert read_yaml(path) == {
        "a": "e5",
        "b": "1e",
        "c": "1e-3",
        "d": "1e-3x",
        "e": "v1e3",
        "f": 0x1E3,
    }


def test_overrides_are_applied_with_their_types(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("method: moe-adapters\nstream: mosaic/domains\ntraining:\n")
    words = [
        "method.r=8", "training.learning_rate=2e-3", "training.max_steps=5",
        "method.selector.quantile=0.5", "method.towers=[vision]", "stream.limit=9", "name=a=b",
        "backbone.name_or_path=other", "training.max_grad_norm=null",
    ]  # fmt: skip
    config = read_config(path, words)
    assert config.method.r == 8 and config.method.selector.quantile == 0.5
    assert config.method.towers == ("vision",)
    assert config.training.learning_rate == 0.002 and config.training.max_steps == 5
    assert config.training.max_grad_norm is None
    assert config.stream == {"name": "mosaic/domains", "limit": 9}
    assert config.name == "a=b" and config.title == "a=b"
    assert config.backbone.name_or_path == "other"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("training.max_steps", "expected key=value"),
        ("=5", "expected key=value"),
        ("seed.deep=5", "'seed' is a value, not a section"),
        ("training.max_steps.deep=5", "'max_steps' is a value, not a section"),
        ("name=[", "not valid YAML"),
    ],
)
def test_a_wrong_override_is_quoted(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        apply_overrides({**GOOD, "seed": 1, "training": {"max_steps": 3}}, [word])
    assert repr(word) in str(caught.value)


def test_overrides_do_not_change_the_mapping_they_are_applied_to() -> None:
    value = {"training": {"max_steps": 3}}
    assert apply_overrides(value, ["training.max_steps=4"]) == {"training": {"max_steps": 4}}
    assert value == {"training": {"max_steps": 3}}


def test_unreadable_files_are_one_error(tmp_path: Path) -> None:
    def refused(content: str | bytes | None, message: str) -> None:
        path = tmp_path / "run.yaml"
        if content is not None:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(ConfigError, match=message) as caught:
            read_config(path)
        assert "run.yaml" in str(caught.value) and "\n" not in str(caught.value)

    (tmp_path / "runs.yaml").write_text("")
    refused(None, "no configuration file .*; did you mean 'runs.yaml'?")
    refused("", r"must hold a mapping of sections \(method, .*\); it is empty")
    refused("# only a comment\n", "it is empty")
    refused("- a\n- b\n", "got list")
    refused("method: a\nstream: [\n", "not valid YAML at line 3")
    refused("method: a\n\tstream: b\n", "not valid YAML at line 2")
    refused("seed: 1\nmethod: a\nseed: 2\n", "not valid YAML at line 3: 'seed' is given twice")
    refused("a: !!python/object:os.system x\n", "not valid YAML at line 1")
    refused("name: 2020-13-01\n", "not valid YAML: month must be in 1..12")
    refused(b"\xff\xfe\x00\x00", "cannot read")
    with pytest.raises(ConfigError, match=r"cannot read .*Is a directory"):
        read_config(tmp_path)
    with pytest.raises(ConfigError, match="no configuration file"):
        read_config(tmp_path / "no" / "such.yaml")


def test_merged_yaml_mappings_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("x: &x {r: 1, s: 2}\ny:\n  <<: *x\n  r: 3\n")
    assert read_yaml(tmp_path / "a.yaml")["y"] == {"r": 3, "s": 2}


def test_stream_options_must_be_plain_values(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "method: zero-shot\nstream: {name: mosaic/domains, root: 2020-01-01, order: !!set {a, b}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path / "a.yaml")
    assert "stream.root: expected text" in str(caught.value)
    assert "stream.order: expected text" in str(caught.value)


def changed(*words: str) -> RunConfig:
    return parse_config(apply_overrides({**GOOD, "training": {}}, words))


def test_the_hash_is_stable_and_blind_to_reporting() -> None:
    plain = changed()
    assert re.fullmatch("[0-9a-f]{12}", plain.hash())
    assert plain.hash() == changed().hash()
    for word in (
        "name=other", "training.report_to=[tensorboard]", "training.save_steps=7",
        "training.logging_steps=3", "training.dataloader_num_workers=2",
        "training.max_steps=1000", "method.selector.type=auto-encoder",
    ):  # fmt: skip
        assert changed(word).hash() == plain.hash(), word


def test_the_hash_changes_with_all_that_decides_the_result() -> None:
    words = [
        "seed=1", "method.r=65", "method.selector.quantile=0.5", "method.towers=[vision]",
        "method.selector.training.hidden=9", "stream.limit=5", "stream.seed=1", "stream=mtil",
        "training.max_steps=999", "training.learning_rate=2e-3", "training.augment=false",
        "training.learning_rates={a: 1e-4}", "training.per_device_train_batch_size=2",
        "training.mixed_precision=bf16", "backbone.name_or_path=x", "backbone.revision=y",
        "method=zero-shot",
    ]  # fmt: skip
    hashes = {word: changed(word).hash() for word in words}
    assert len({changed().hash(), *hashes.values()}) == len(words) + 1


def test_the_resolved_configuration_reads_back_as_the_same_run() -> None:
    config = changed("method.selector.quantile=0.5", "training.learning_rates={a: 1e-4}", "seed=4")
    assert parse_config(config.to_json()) == config
    assert parse_config(config.to_json()).hash() == config.hash()


def test_load_stream_refuses_unknown_names_and_options() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mosaic/domains'"):
        load_stream("mosaic/domain")
    with pytest.raises(ConfigError, match="did you mean 'limit'"):
        load_stream("mosaic/domains", limt=3)
    with pytest.raises(ConfigError, match=r"stream\.root: missing; folder needs it"):
        load_stream("folder")
    with pytest.raises(EvoloraError):  # a Path is an option as good as text
        load_stream("folder", root=Path("no such folder"))


@pytest.mark.parametrize("method", ["moe-adapters", evolora.MoEAdapters, None, 3, {"type": "x"}])
def test_a_method_must_be_an_instance_of_a_configuration(method: Any, backbone: Any) -> None:
    with pytest.raises(ConfigError, match="method must be a configuration such as"):
        build_method(method, backbone)


def test_the_type_of_a_backbone_is_part_of_what_decides_a_result() -> None:
    plain = parse_config({**GOOD, "backbone": "clip-tiny"})
    same = {"name_or_path": "clip-tiny", "type": "auto", "text_length": None}
    assert parse_config({**GOOD, "backbone": same}) == plain
    fused = parse_config({**GOOD, "backbone": {"type": "clip-fusion"}})
    assert fused.backbone.name_or_path == "clip-tiny" and fused.hash() != plain.hash()
    longer = parse_config({**GOOD, "backbone": {"text_length": 50}})
    assert len({plain.hash(), fused.hash(), longer.hash()}) == 3


def test_an_unknown_type_of_backbone_is_refused() -> None:
    text = faults({**GOOD, "backbone": {"type": "clip-fusoin"}, "seed": "zero"})
    assert "unknown backbone type 'clip-fusoin'; did you mean 'clip-fusion'" in text
    assert "backbone" in text and "seed" in text


@pytest.mark.parametrize(
    "path",
    sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "compare"),
    ids=lambda p: p.parent.name + "/" + p.stem,
)
def test_every_configuration_of_the_project_is_a_run(path: Path) -> None:
    config = read_config(path)
    assert parse_config(config.to_json()).hash() == config.hash()
    named = re.findall(r"evolora run (\S+)", path.read_text())
    assert set(named) <= {path.relative_to(CONFIGS.parent).as_posix()}


@pytest.mark.parametrize("folder", [".", "mosaic/missing"])
def test_baselines_are_trained_as_long_and_under_the_same_table_as_delo(folder: str) -> None:
    """What may differ is the method and, each tuned alike, its rate; sizes follow DeLo's."""
    published = folder == "."
    first = CONFIGS / ("delo/upmc_food101_cmml.yaml" if published else "mosaic/missing/delo.yaml")
    wanted = read_config(first)
    pattern = "*/upmc_food101_cmml.yaml" if published else "mosaic/missing/*.yaml"
    found = sorted(CONFIGS.glob(pattern))
    assert len(found) >= 5
    for path in found:
        config = read_config(path)
        training = replace(config.training, learning_rate=wanted.training.learning_rate)
        same = (config.stream, training, config.seed)
        assert same == (wanted.stream, wanted.training, wanted.seed), path


def test_baselines_of_modalities_start_alike_and_are_trained_as_long_as_pathweave() -> None:
    """What may differ is the method, its rate, and that joint training sees images too."""
    folder = CONFIGS / "mosaic" / "modalities"
    wanted = read_config(folder / "pathweave.yaml")
    assert wanted.training.known_tasks == ("image",)
    assert wanted.backbone.modalities is not None
    assert [*wanted.backbone.modalities] == ["video", "audio", "depth", "pc"]
    found = {path.stem: read_config(path) for path in folder.glob("*.yaml")}
    assert len(found) >= 9
    for name, config in found.items():
        known = () if name.startswith("joint") else ("image",)
        assert config.training.known_tasks == known, name
        training = replace(
            config.training,
            learning_rate=wanted.training.learning_rate,
            known_tasks=wanted.training.known_tasks,
        )
        same = (config.backbone, config.stream, training, config.evaluation, config.seed)
        assert same == (wanted.backbone, wanted.stream, wanted.training, wanted.evaluation, 0), name
