"""YAML and key=value words, checked against frozen dataclasses, all faults at once."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolora.config_text import SECTIONS, SHORT, apply_overrides, read_yaml
from evolora.errors import ConfigError, suggest, unknown_name
from evolora.registry import BACKBONES, METHODS, PARTS, REGULARIZERS, STREAMS, Registry

if TYPE_CHECKING:
    from evolora.backbones.base import Backbone
    from evolora.methods.base import Method
    from evolora.streams.task import Stream
    from evolora.training.config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which frozen model.

    Args:
        name_or_path: hub name, local folder, or embedded name ("clip-tiny", "vilt-tiny",
            "llava-tiny", "qformer-tiny").
        revision: hub revision.
        type: a name of ``evolora ls backbones`` ("clip-fusion"), or "auto": by the model.
        text_length: longest text in tokens; None is the model's own. ViLT's table of positions is
            interpolated beyond it; a model that writes refuses a longer prompt.
        modalities: of a Q-Former: name -> {"encoder": a name of ``evolora.registry.ENCODERS``,
            what its function takes}. "image" is the model's own.
    """

    name_or_path: str = "clip-tiny"
    revision: str | None = None
    type: str = "auto"
    text_length: int | None = None
    modalities: Mapping[str, Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        if self.type != "auto" and self.type not in BACKBONES:
            raise unknown_name("backbone type", self.type, ("auto", *BACKBONES.names()))


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How rows of the matrix are measured.

    Args:
        batch_size: samples per forward.
        baseline: also score the untouched base on every task before learning.
        cache: decode a test image and run the untouched base on it once, not in every evaluation.
    """

    batch_size: int = 64
    baseline: bool = True
    cache: bool = True


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: one method on one stream.

    Args:
        method: an instance of a method's configuration.
        stream: {"name": ..., options of its loader}.
        backbone, training, evaluation: see their classes.
        seed: of everything that is drawn.
        name: shown in reports; the method's name when empty.
        regularizers: instances of configurations of losses that are added in training.
    """

    method: Any
    stream: Mapping[str, Any]
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    training: TrainingConfig
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = 0
    name: str = ""
    regularizers: tuple[Any, ...] = ()

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
            "regularizers": [dataclasses.asdict(one) for one in self.regularizers],
        }

    def hash(self) -> str:
        """Return a short hash of all that decides the result (not of where it is reported)."""
        from evolora.config_hash import hash_of

        return hash_of(self)


def read_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the run a YAML file describes, with ``key.sub=value`` words applied.

    Raises:
        ConfigError: missing file, bad YAML, unknown or wrong values; all faults with their paths.
    """
    return parse_config(apply_overrides(read_yaml(path), overrides), source=str(path))


def parse_config(value: Mapping[str, Any], *, source: str = "configuration") -> RunConfig:
    """Return the run that a mapping describes.

    Raises:
        ConfigError: one message with every fault and its path.
    """
    from evolora.training.config import TrainingConfig

    faults: list[str] = [
        f"{key}: unknown section{suggest(str(key), SECTIONS)}"
        for key in value
        if key not in SECTIONS
    ]
    parts: dict[str, Any] = {
        "method": check_method(value.get("method"), faults),
        "stream": _check_stream(value.get("stream"), faults),
    }
    _check_plain(parts["stream"] or {}, faults)
    for name, kind in (
        ("backbone", BackboneConfig),
        ("training", TrainingConfig),
        ("evaluation", EvaluationConfig),
    ):
        given = value.get(name)
        if isinstance(given, str) and name in SHORT:
            given = {SHORT[name]: given}
        parts[name] = _check(kind, {} if given is None else given, name, faults)
    listed = value.get("regularizers") or ()
    parts["regularizers"] = _check_listed(REGULARIZERS, listed, "regularizers", faults)
    parts["seed"] = _check(int, value.get("seed", 0), "seed", faults)
    parts["name"] = _check(str, value.get("name", ""), "name", faults)
    if faults:
        raise ConfigError(f"{source}: " + "; ".join(faults))
    return RunConfig(**parts)


def _check_plain(stream: Mapping[str, Any], faults: list[str]) -> None:
    """Note stream options that cannot be kept as JSON (YAML also knows dates, sets and bytes)."""
    faults.extend(
        f"stream.{key}: expected text, numbers, lists or mappings; got {option!r}"
        for key, option in stream.items()
        if not _is_plain(option)
    )


def check_method(value: Any, faults: list[str]) -> Any:
    """Return the configuration instance of a method section, or None with every fault noted."""
    return _check_named(METHODS, value, "method", faults)


def _check_named(registry: Registry[Any], value: Any, path: str, faults: list[str]) -> Any:
    """Return the configuration instance of a registered thing: its type and its settings."""
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, Mapping) or "type" not in value:
        faults.append(f"{path}.type: missing (known: {', '.join(registry.names())})")
        return None
    if value["type"] not in registry.names():
        fault = unknown_name(registry.kind, value["type"], registry.names())
        faults.append(f"{path}.type: {fault}")
        return None
    found = registry.get(value["type"])
    return _check(getattr(found, "config_class", found), value, path, faults)


def _check_listed(
    registry: Registry[Any], listed: Any, path: str, faults: list[str]
) -> tuple[Any, ...]:
    """Return the configuration instances of a list of registered things."""
    if not isinstance(listed, list | tuple):
        faults.append(f"{path}: expected a list of settings with a type; got {listed!r}")
        return ()
    return tuple(
        one
        if dataclasses.is_dataclass(one)
        else _check_named(registry, one, f"{path}[{index}]", faults)
        for index, one in enumerate(listed)
    )


def _check(kind: Any, value: Any, path: str, faults: list[str]) -> Any:
    """Validate one section strictly; on failure note every fault under its path."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    before = len(faults)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            faults.append(f"{path}: expected a mapping of settings; got {value!r}")
            return None
        _forbid_extra(kind, ConfigDict(extra="forbid"))
        value = _check_alternatives(kind, value, path, faults)
        value = _check_parts(kind, value, path, faults)
    try:
        checked = TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        for fault in error.errors():
            if fault["type"] == "value_error" and len(faults) > before:
                continue  # a combination can only be judged when its parts are right
            where = ".".join([path, *(str(part) for part in fault["loc"])])
            faults.append(f"{where}: {_fault_text(fault, kind)}")
        return None
    return checked if len(faults) == before else None


def _check_alternatives(
    kind: Any, value: Mapping[Any, Any], path: str, faults: list[str]
) -> Mapping[Any, Any]:
    """Check the settings that are one of several dataclasses told apart by their ``type``.

    pydantic would list the faults of every alternative; a user means one. Wrong ones are left out
    of the result, so that the rest of the section is still checked.
    """
    checked = dict(value)
    for name, alternatives in _alternatives(kind).items():
        if name not in value or dataclasses.is_dataclass(value[name]):
            continue
        other = typing.get_args(typing.get_type_hints(kind)[name])
        plain = type(value[name]) in other and value[name] not in list(alternatives)
        if plain:  # none, or words that are no type: the path of a file
            continue
        given = checked.pop(name)
        given = {"type": given} if isinstance(given, str) else given
        if not isinstance(given, Mapping):
            known = ", ".join(sorted(alternatives))
            faults.append(f"{path}.{name}: expected a mapping with a type ({known}); got {given!r}")
            continue
        chosen = given.get("type", next(iter(alternatives)))
        if chosen not in list(alternatives):
            faults.append(f"{path}.{name}.type: {unknown_name('type', chosen, alternatives)}")
            continue
        part = _check(alternatives[chosen], given, f"{path}.{name}", faults)
        if part is not None:
            checked[name] = part
    return checked


def _check_parts(
    kind: Any, value: Mapping[Any, Any], path: str, faults: list[str]
) -> Mapping[Any, Any]:
    """Check the settings that take registered parts: fields of ``registry.A_PART`` and the like."""
    checked = dict(value)
    for part in dataclasses.fields(kind):
        given, takes = value.get(part.name), part.metadata.get("takes")
        if takes is None or given is None or dataclasses.is_dataclass(given):
            continue
        where, registry = f"{path}.{part.name}", PARTS[part.name]
        if takes == "parts":
            checked[part.name] = _check_listed(registry, given, where, faults)
        elif not (isinstance(given, str) and given.endswith(".json")):  # the path of a file
            checked[part.name] = _check_named(registry, given, where, faults)
    return checked


def _alternatives(kind: Any) -> dict[str, dict[str, Any]]:
    """Return field -> {type name: dataclass} of fields that are a union of dataclasses."""
    found: dict[str, dict[str, Any]] = {}
    for name, hint in typing.get_type_hints(kind).items():
        parts = [part for part in typing.get_args(hint) if dataclasses.is_dataclass(part)]
        if len(parts) > 1:
            found[name] = {str(getattr(part, "type")): part for part in parts}  # noqa: B009
    return found


def _forbid_extra(kind: Any, config: Any, seen: set[Any] | None = None) -> None:
    """Make pydantic refuse unknown keys in a dataclass and in the dataclasses it holds."""
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
    """Return one pydantic fault as a user reads it."""
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        for part in fault["loc"][:-1]:
            kind = typing.get_type_hints(kind).get(part) if dataclasses.is_dataclass(kind) else None
        names = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
        known = suggest(str(fault["loc"][-1]), names) or (
            f" (known: {', '.join(names)})" if names else ""
        )
        return f"unknown setting{known}"
    if fault["type"] == "value_error":  # our own check of a dataclass: it says what came
        return str(fault["ctx"]["error"])
    return f"{fault['msg']}; got {fault['input']!r}"


def _check_stream(value: Any, faults: list[str]) -> dict[str, Any] | None:
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or "name" not in value:
        faults.append(f"stream.name: missing (known: {', '.join(STREAMS.names())})")
        return None
    if value["name"] not in STREAMS.names():
        faults.append(f"stream.name: {unknown_name('stream', value['name'], STREAMS.names())}")
        return None
    allowed = inspect.signature(STREAMS.get(value["name"])).parameters
    for key in value:
        if key != "name" and key not in allowed:
            hint = suggest(str(key), allowed) or f" (known: {', '.join(allowed)})"
            faults.append(f"stream.{key}: unknown option of {value['name']}{hint}")
    for key, parameter in allowed.items():
        if parameter.default is parameter.empty and key not in value:
            faults.append(f"stream.{key}: missing; {value['name']} needs it")
    return dict(value)


def _is_plain(value: Any) -> bool:
    """Return whether a value can be kept as JSON."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, str | int | float | bool)


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
    if name is None or not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ConfigError(
            f"method must be a configuration such as evolora.MoEAdapters(r=16); got {config!r}"
        )
    method: Method = METHODS.get(name)(config, backbone, seed=seed)
    return method
