"""Interventions on disk and in words: a safetensors file whose metadata says, as JSON, which kinds its arrays make."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from interventions import kinds
from vlm_jax.errors import UserError, nearest

#: Name in files -> kind.
KINDS = {name: getattr(kinds, name) for name in kinds.__all__}


def dump(interventions: Sequence[Any]) -> bytes:
    """The file's content; equal interventions give equal bytes."""
    tensors, described = {}, []
    for number, intervention in enumerate(interventions):
        kind = type(intervention).__name__
        if KINDS.get(kind) is not type(intervention):
            raise UserError(f"a {kind} cannot be saved: only the kinds of interventions.kinds can")
        options, layout = {}, {}
        for field in dataclasses.fields(intervention):
            value = getattr(intervention, field.name)
            if not field.metadata.get("pytree_node", True):
                options[field.name] = value
            elif value is not None:
                layout[field.name] = _pack(value, f"{number}.{field.name}", tensors)
        described.append({"kind": kind, "options": options, "arrays": layout})
    return save(dict(sorted(tensors.items())), metadata={"interventions": json.dumps(described, sort_keys=True)})


def _pack(value: Any, name: str, tensors: dict[str, np.ndarray]) -> Any:
    """Puts the arrays of ``value`` into ``tensors`` and returns their names in its place."""
    if value is None:
        return None
    if isinstance(value, dict):
        return {key: _pack(part, f"{name}.{key}", tensors) for key, part in sorted(value.items())}
    if isinstance(value, tuple):
        return [_pack(part, f"{name}.{i}", tensors) for i, part in enumerate(value)]
    tensors[name] = np.asarray(value, order="C")
    return name


def save_interventions(path: str | Path, interventions: Sequence[Any]) -> None:
    """Writes the interventions, in their order, to one file."""
    Path(path).write_bytes(dump(interventions))


def load_interventions(path: str | Path) -> tuple:
    """The interventions of a file.

    Raises:
        UserError: a file that is no safetensors file, names an unknown kind, or lacks an array.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            described = json.loads((file.metadata() or {})["interventions"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tuple(_unpack(entry, tensors) for entry in described)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"{path} holds no saved interventions ({type(error).__name__}: {error}): name a file that "
            "interventions.store.save_interventions wrote"
        ) from None


def _unpack(entry: dict, tensors: dict[str, np.ndarray]) -> Any:
    if entry["kind"] not in KINDS:
        raise UserError(f"unknown kind of intervention {entry['kind']!r}{nearest(entry['kind'], KINDS)}")

    def arrays(layout):
        if layout is None:
            return None
        if isinstance(layout, dict):
            return {key: arrays(part) for key, part in layout.items()}
        return tuple(arrays(part) for part in layout) if isinstance(layout, list) else tensors[layout]

    found = KINDS[entry["kind"]](**entry["options"], **{k: arrays(v) for k, v in entry["arrays"].items()})
    found.sites  # noqa: B018  refuses options that the kind does not know
    return found


def digest(interventions: Sequence[Any]) -> str:
    """A hash of what the interventions do: of kinds, options and arrays."""
    return hashlib.sha256(dump(interventions)).hexdigest()[:12]


def describe(intervention: Any) -> str:
    """One line: the kind, where it acts, its options and its hash."""
    active = {site: np.atleast_1d(np.asarray(table)) for site, table in intervention.active().items()}
    places = []
    for site, table in sorted(active.items()):
        layers = np.flatnonzero(table)
        whole = len(layers) == len(table)
        places.append(site if whole else f"{site} L{','.join(map(str, layers))}" if len(layers) else f"{site} nowhere")
    options = [
        f"{field.name}={getattr(intervention, field.name)}"
        for field in dataclasses.fields(intervention)
        if not field.metadata.get("pytree_node", True) and getattr(intervention, field.name) not in (None, False, 0)
    ]
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(intervention))
    return (
        f"{type(intervention).__name__}({'; '.join([*places, *options])}) {size:,} numbers #{digest((intervention,))}"
    )
