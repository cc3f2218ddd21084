"""Interventions as descriptions and arrays by name: what a file holds, what a digest is of, how one looks in words."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save

from interventions.kinds.layers import Layers
from vlm_jax.errors import UserError
from vlm_jax.showing import fields_in_words
from vlm_jax.sites import Intervention

#: Stands in a description for :class:`interventions.kinds.layers.Layers`.
LAYERS = "layers"
#: An intervention with more numbers than this is shown without its digest, which needs all of them.
_HASHED = 10_000_000


def digest(interventions: Sequence[Intervention]) -> str:
    """A hash of the kinds, options and arrays of the interventions.

    Raises:
        UserError: for an intervention with an option that a file cannot hold, such as a function.
    """
    try:
        return hash_of(*packed(interventions))
    except TypeError:
        names = ", ".join(type(one).__name__ for one in interventions)
        raise UserError(f"a function cannot be written to a file ({names}): make it a kind of its own") from None


def hash_of(entries: list[dict], tensors: dict[str, np.ndarray]) -> str:
    """A hash of descriptions and arrays."""
    return hashlib.sha256(file_of(entries, tensors)).hexdigest()[:12]


def file_of(entries: list[dict], tensors: dict[str, np.ndarray], **metadata: str) -> bytes:
    """The bytes of a safetensors file of descriptions and arrays."""
    metadata |= {"interventions": json.dumps(entries, sort_keys=True)}
    return save(dict(sorted(tensors.items())), metadata=metadata)


def packed(interventions: Sequence[Intervention]) -> tuple[list[dict], dict[str, np.ndarray]]:
    """The description of each intervention, and all their arrays by name."""
    tensors: dict[str, np.ndarray] = {}
    return [_described(number, i, tensors) for number, i in enumerate(interventions)], tensors


def _described(number: int, intervention: Intervention, tensors: dict[str, np.ndarray]) -> dict:
    """Kind, options, and the names that the arrays get in ``tensors``."""
    options, arrays = {}, {}
    for field in _fields(intervention):
        value = getattr(intervention, field.name)
        if _is_option(field):
            options[field.name] = value
        elif value is not None:
            arrays[field.name] = _pack(value, f"{number}.{field.name}", tensors)
    return {"kind": type(intervention).__name__, "options": options, "arrays": arrays}


def _fields(kind: Any) -> tuple[dataclasses.Field, ...]:
    """The fields of an intervention: every kind is a dataclass, though the base class is not."""
    return dataclasses.fields(kind)


def _is_option(field: dataclasses.Field) -> bool:
    """Whether a field of a kind is static."""
    return not field.metadata.get("pytree_node", True)


def _pack(value: Any, name: str, tensors: dict[str, np.ndarray]) -> Any:
    """Puts the arrays of ``value`` into ``tensors`` and returns their names in its place."""
    if value is None:
        return None
    if isinstance(value, Layers):
        fields = {"numbers": value.numbers, "slots": value.slots}
        return {LAYERS: {key: _pack(part, f"{name}.{key}", tensors) for key, part in fields.items()}}
    if isinstance(value, dict):
        return {key: _pack(part, f"{name}.{key}", tensors) for key, part in sorted(value.items())}
    if isinstance(value, tuple):
        return [_pack(part, f"{name}.{i}", tensors) for i, part in enumerate(value)]
    tensors[name] = np.asarray(value, order="C")
    return name


def describe(intervention: Intervention) -> str:
    """One line: the kind, where it acts, its options, how many numbers it holds, and their hash, if it has one."""
    try:
        return f"{_words(intervention)} #{digest((intervention,))}"
    except UserError:
        return _words(intervention)


def short(intervention: Intervention) -> str:
    """As :func:`describe`. The hash is left out where the numbers are many or not known, as within ``jax.jit``."""
    leaves = jax.tree.leaves(intervention)
    if any(isinstance(leaf, jax.core.Tracer) or not hasattr(leaf, "shape") for leaf in leaves):
        return fields_in_words(intervention)
    whole = all(not isinstance(leaf, jax.Array) or leaf.is_fully_addressable for leaf in leaves)
    if not whole or sum(np.size(leaf) for leaf in leaves) > _HASHED:
        return _words(intervention)
    return describe(intervention)


def _words(intervention: Intervention) -> str:
    tables = {site: np.atleast_1d(np.asarray(table)) for site, table in intervention.active().items()}
    slot = getattr(intervention, "slot", None)
    slots = slot if isinstance(slot, dict) else dict.fromkeys(intervention.sites, slot)
    parts = []
    for site in sorted(intervention.sites):
        named = slots.get(site)
        parts.append(f"{site} {named}".rstrip() if isinstance(named, Layers) else _layers_of(site, tables.get(site)))
    for field in filter(_is_option, _fields(intervention)):
        value = getattr(intervention, field.name)
        if callable(value):
            value = getattr(value, "__name__", type(value).__name__)
        if value and isinstance(value, str | int | float):
            parts.append(f"{field.name}={value}")
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(intervention))
    return f"{type(intervention).__name__}({'; '.join(parts)}) {size:,} numbers"


def _layers_of(site: str, table: np.ndarray | None) -> str:
    """A site and the layers that are True in its ``table (L,)``: ``text.attn_out L3,4``. If the table is None or True
    everywhere, just the site."""
    if table is None or table.all():
        return site
    layers = np.flatnonzero(table)
    return f"{site} L{','.join(map(str, layers))}" if len(layers) else f"{site} nowhere"
