"""A run's configuration as JSON, and how two configurations differ."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Number of differences that a message shows.
_SHOWN = 4


def plain(value: Any) -> Any:
    """The value in the types of JSON: dataclasses become dicts, tuples lists, and paths strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return json.loads(json.dumps(value, default=str))


def without(value: Any, names: set[str]) -> Any:
    """The nested dicts without these keys, at all depths."""
    if not isinstance(value, dict):
        return value
    return {name: without(part, names) for name, part in value.items() if name not in names}


def differences(earlier: dict, now: dict) -> str:
    """The differences between two nested dicts, in words; empty if they are equal. A value of ``earlier`` is "there", a
    value of ``now`` is "here". Of many, the first ones are shown."""
    old, new = _leaves(earlier), _leaves(now)
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    shown = [f"{name} {old.get(name)!r} there, {new.get(name)!r} here" for name in names[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def named_files(value: Any) -> Iterator[str]:
    """The names of existing files in a plain value, at all depths."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from named_files(part)
    elif isinstance(value, str) and os.path.isfile(value):
        yield value


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Dotted name -> value, for all values in nested dicts."""
    if not isinstance(value, dict):
        return {name: value}
    parts = [_leaves(part, f"{name}.{key}" if name else key) for key, part in value.items()]
    return dict(item for part in parts for item in part.items())
