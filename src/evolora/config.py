"""Configuration: YAML and key=value words checked against frozen dataclasses, all faults at once."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolora.errors import ConfigError, EvoloraError, suggest, unknown_name
from evolora.registry import METHODS, STREAMS

if TYPE_CHECKING:
    from evolora.backbones.base import Backbone
    from evolora.methods.base import Method
    from evolora.streams.task import Stream
    from evolora.training.config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which frozen model.

    Args:
        name_or_path: hub name, local folder, or embedded name ("clip-tiny").
        revision: hub revision.
    """

    name_or_path: str = "clip-tiny"
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How rows of the matrix are measured.

    Args:
        batch_size: samples per forward.
        baseline: also score the untouched base on every task before learning.
    """

    batch_size: int = 64
    baseline: bool = True


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: one method on one stream.

    Args:
        method: an instance of a method's configuration.
        stream: {"name": ..., options of its loader}.
        backbone, training, evaluation: see their classes.
        seed: of everything that is drawn.
        name: shown in reports; the method's name when empty.
    """

    method: Any
    stream: Mapping[str, Any]
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    training: TrainingConfig
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = 0
    name: str = ""

    @property
    def title(self) -> str:
        """Name shown in reports."""
        return self.name or str(self.method.type)

    def to_json(self) -> dict[str, Any]:
        """Return the resolved configuration as JSON values."""
        return {
            "method": dataclasses.asdict(self.method),
            "stream": dict(self.stream),
            "backbone": dataclasses.asdict(self.backbone),
            "training": {**dataclasses.asdict(self.training)},
            "evaluation": dataclasses.asdict(self.evaluation),
            "seed": self.seed,
            "name": self.name,
        }

    def hash(self) -> str:
        """Return a short hash of all that decides the result (not of where it is reported)."""
        value = self.to_json()
        for name in ("report_to", "save_steps", "logging_steps", "dataloader_num_workers"):
            value["training"].pop(name)
        value.pop("name")
        text = json.dumps(value, sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


SECTIONS = ("method", "stream", "backbone", "training", "evaluation", "seed", "name")


def read_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the run a YAML file describes, with ``key.sub=value`` words applied.

    Raises:
        ConfigError: missing file, bad YAML, unknown or wrong values; all faults with their paths.
    """
    return parse_config(apply_overrides(read_yaml(path), overrides), source=str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file."""
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = (
            suggest(path.name, [p.name for p in path.parent.glob("*.yaml")])
            if path.parent.is_dir()
            else ""
        )
        raise ConfigError(f"no configuration file {path}{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise ConfigError(f"{path} is not valid YAML{line}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a mapping of sections ({', '.join(SECTIONS)})")
    return value


def apply_overrides(value: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Return a copy of a nested mapping with ``key.sub=value`` words applied (values are YAML)."""
    import copy

    import yaml

    result = copy.deepcopy(dict(value))
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"expected key=value (for example training.max_steps=50); got {word!r}"
            )
        *parents, last = key.split(".")
        place = result
        for parent in parents:
            inner = place.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{word!r}: {parent!r} is a value, not a section")
            place = inner
        try:
            place[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{word!r}: the value is not valid YAML") from error
    return result


def parse_config(value: Mapping[str, Any], *, source: str = "configuration") -> RunConfig:
    """Return the run that a mapping describes.

    Raises:
        ConfigError: one message with every fault and its path.
    """
    from evolora.training.config import TrainingConfig

    faults: list[str] = [
        f"{key}: unknown section{suggest(key, SECTIONS)}" for key in value if key not in SECTIONS
    ]
    parts: dict[str, Any] = {}
    method = value.get("method")
    if isinstance(method, str):
        method = {"type": method}
    if not isinstance(method, Mapping) or "type" not in method:
        faults.append(f"method.type: missing (known: {', '.join(METHODS.names())})")
    elif method["type"] not in METHODS:
        faults.append(f"method.type: {unknown_name('method', method['type'], METHODS.names())}")
    else:
        parts["method"] = _check(METHODS.get(method["type"]).config_class, method, "method", faults)
    parts["stream"] = _check_stream(value.get("stream"), faults)
    for name, kind in (
        ("backbone", BackboneConfig),
        ("training", TrainingConfig),
        ("evaluation", EvaluationConfig),
    ):
        parts[name] = _check(kind, value.get(name) or {}, name, faults)
    parts["seed"] = _check(int, value.get("seed", 0), "seed", faults)
    parts["name"] = _check(str, value.get("name", ""), "name", faults)
    if faults:
        raise ConfigError(f"{source}: " + "; ".join(faults))
    return RunConfig(**parts)


def _check(kind: Any, value: Any, path: str, faults: list[str]) -> Any:
    """Validate one section strictly; on failure note every fault under its path."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    config = ConfigDict(extra="forbid")
    try:
        if dataclasses.is_dataclass(kind):
            _forbid_extra(kind, config)
            return TypeAdapter(kind).validate_python(value)
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        for fault in error.errors():
            # pydantic names the alternative of a union by class; a user only knows the field path
            where = ".".join(
                [path, *(str(p) for p in fault["loc"] if not str(p).endswith("Config"))]
            )
            faults.append(f"{where}: {_fault_text(fault, kind)}")
    except EvoloraError as error:
        faults.append(f"{path}: {error}")
    return None


def _forbid_extra(kind: Any, config: Any, seen: set[Any] | None = None) -> None:
    """Make pydantic refuse unknown keys in a dataclass and in the dataclasses it holds."""
    import typing

    seen = seen if seen is not None else set()
    if kind in seen or not dataclasses.is_dataclass(kind):
        return
    seen.add(kind)
    if "__pydantic_config__" not in vars(kind):
        setattr(kind, "__pydantic_config__", config)  # noqa: B010 - not declared on the class
    for hint in typing.get_type_hints(kind).values():
        for part in (hint, *typing.get_args(hint)):
            _forbid_extra(part, config, seen)


def _fault_text(fault: Mapping[str, Any], kind: Any) -> str:
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        names = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
        return f"unknown setting{suggest(str(fault['loc'][-1]), names)}"
    return f"{fault['msg']}; got {fault['input']!r}"


def _check_stream(value: Any, faults: list[str]) -> dict[str, Any] | None:
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or "name" not in value:
        faults.append(f"stream.name: missing (known: {', '.join(STREAMS.names())})")
        return None
    if value["name"] not in STREAMS:
        faults.append(f"stream.name: {unknown_name('stream', value['name'], STREAMS.names())}")
        return None
    allowed = [p for p in inspect.signature(STREAMS.get(value["name"])).parameters]
    for key in value:
        if key != "name" and key not in allowed:
            hint = suggest(key, allowed) or f" (known: {', '.join(allowed)})"
            faults.append(f"stream.{key}: unknown option of {value['name']}{hint}")
    return dict(value)


def load_stream(name: str, **options: Any) -> Stream:
    """Return a registered stream by name.

    Args:
        name: "mosaic/domains", "mtil", "folder", ... (``evolora ls streams``).
        options: of its loader; an unknown one is refused with the known ones.
    """
    faults: list[str] = []
    checked = _check_stream({"name": name, **options}, faults)
    if faults or checked is None:
        raise ConfigError("; ".join(faults))
    stream: Stream = STREAMS.get(name)(**options)
    return stream


def build_method(config: Any, backbone: Backbone, *, seed: int = 0) -> Method:
    """Return the method a configuration instance describes, attached to the backbone."""
    name = getattr(config, "type", None)
    if name is None or not dataclasses.is_dataclass(config):
        raise ConfigError(
            f"method must be a method configuration such as evolora.MoEAdapters(r=16); got {config!r}"
        )
    method: Method = METHODS.get(name)(config, backbone, seed=seed)
    return method
