"""Configurations as text: YAML files, and key=value words that change them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evolora.errors import ConfigError, suggest

SECTIONS = (
    *("method", "stream", "backbone", "training", "evaluation", "seed", "name"),
    "regularizers",
)
SHORT = {"method": "type", "stream": "name", "backbone": "name_or_path"}
"""Sections that may be given as one word, and the setting that the word is."""
_BOOL = "tag:yaml.org,2002:bool"
_TRUTH = re.compile(r"(true|True|TRUE|false|False|FALSE)$")
_SCIENTIFIC = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file."""
    import yaml

    try:
        value = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = (
            suggest(path.name, [p.name for p in path.parent.glob("*.yaml")])
            if path.parent.is_dir()
            else ""
        )
        raise ConfigError(f"no configuration file {path}{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2020-13-01
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", error)
        why = f": {problem}" if problem else ""
        raise ConfigError(f"{path} is not valid YAML{line}{why}") from error
    if not isinstance(value, dict):
        got = "it is empty" if value is None else f"got {type(value).__name__}"
        raise ConfigError(f"{path} must hold a mapping of sections ({', '.join(SECTIONS)}); {got}")
    return value


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text as YAML 1.2 has it; a key given twice is an error.

    PyYAML follows YAML 1.1, where "1e-3" without a dot is a string and "off" is false, and keeps
    the last of two equal keys without a word.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                    raise yaml.MarkedYAMLError(
                        problem=f"{key.value!r} is given twice", problem_mark=key.start_mark
                    )
                if isinstance(key.value, str):
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag != _BOOL]
        for first, known in Loader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(_BOOL, _TRUTH, list("tTfF"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _SCIENTIFIC, list("-+0123456789."))
    return yaml.load(text, Loader)


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
        for depth, parent in enumerate(parents):
            inner = place.get(parent)
            if inner is None:
                inner = {}
            elif isinstance(inner, str) and depth == 0 and parent in SHORT:
                inner = {SHORT[parent]: inner}  # "method: zero-shot" is short for its type
            if not isinstance(inner, dict):
                raise ConfigError(f"{word!r}: {parent!r} is a value, not a section")
            place[parent] = inner
            place = inner
        try:
            place[last] = parse_yaml(text)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"{word!r}: the value is not valid YAML") from error
    return result
