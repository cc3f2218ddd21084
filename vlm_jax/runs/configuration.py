"""A run's configuration as JSON, and how two configurations differ."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """Dataclasses, paths and tuples as JSON has them."""
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    return json.loads(json.dumps(value, default=str))


def without(value: Any, names: set[str]) -> Any:
    """Nested dicts without these keys."""
    if not isinstance(value, dict):
        return value
    return {name: without(part, names) for name, part in value.items() if name not in names}


def differences(earlier: dict, now: dict) -> str:
    """What is not the same in two nested dicts, in words; empty where they are equal."""
    there, here = _leaves(earlier), _leaves(now)
    names = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    return ", ".join(f"{name} {there.get(name)!r} there, {here.get(name)!r} here" for name in names)


def named_files(value: Any) -> Iterator[str]:
    """The existing files that a plain value names, however deep."""
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
    """The values of nested dicts, under dotted names."""
    if not isinstance(value, dict):
        return {name: value}
    parts = [_leaves(part, f"{name}.{key}" if name else key) for key, part in value.items()]
    return dict(item for part in parts for item in part.items())
