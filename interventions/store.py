"""Interventions on disk and in words.

A file of interventions is a safetensors file. Its metadata describes, as JSON, each intervention in order: its kind,
the module that defines the kind, its options, and which arrays its fields hold.
"""

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

from interventions.kinds import KINDS
from vlm_jax.errors import UserError, nearest
from vlm_jax.files import check_regular, order_metadata, parse_json
from vlm_jax.sites import Intervention


def save_interventions(path: str | Path, interventions: Sequence[Intervention], model: str | None = None) -> None:
    """Writes the interventions, in their order, to one file.

    Args:
        model: the fingerprint of the only model that they are for (:mod:`vlm_jax.checkpoints.fingerprint`), such as the
            one with which editors were trained; None if they suit any model of the same shape.

    Raises:
        UserError: for an intervention whose class is not registered with :func:`interventions.kinds.base.kind`.
    """
    entries, tensors = _packed(interventions)
    modules = [{"module": type(intervention).__module__} for intervention in interventions]
    entries = list(map(dict.__or__, entries, modules))
    own = {"digest": _hash(entries, tensors)} | ({} if model is None else {"model": model})
    Path(path).write_bytes(_file(entries, tensors, **own))
    order_metadata(Path(path))


def digest(interventions: Sequence[Intervention]) -> str:
    """A hash of the kinds, options and arrays of the interventions."""
    return _hash(*_packed(interventions))


def _hash(entries: list[dict], tensors: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(_file(entries, tensors)).hexdigest()[:12]


def _file(entries: list[dict], tensors: dict[str, np.ndarray], **metadata: str) -> bytes:
    metadata |= {"interventions": json.dumps(entries, sort_keys=True)}
    return save(dict(sorted(tensors.items())), metadata=metadata)


def _packed(interventions: Sequence[Intervention]) -> tuple[list[dict], dict[str, np.ndarray]]:
    """The description of each intervention, and all their arrays by name."""
    tensors: dict[str, np.ndarray] = {}
    return [_described(number, i, tensors) for number, i in enumerate(interventions)], tensors


def _described(number: int, intervention: Intervention, tensors: dict[str, np.ndarray]) -> dict:
    """Kind, options, and the names that the arrays get in ``tensors``."""
    name = type(intervention).__name__
    if KINDS.get(name) is not type(intervention):
        raise UserError(f"a {name} cannot be saved: register its class with @interventions.kinds.base.kind")
    options, arrays = {}, {}
    for field in _fields(intervention):
        value = getattr(intervention, field.name)
        if _is_option(field):
            options[field.name] = value
        elif value is not None:
            arrays[field.name] = _pack(value, f"{number}.{field.name}", tensors)
    return {"kind": name, "options": options, "arrays": arrays}


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
    if isinstance(value, dict):
        return {key: _pack(part, f"{name}.{key}", tensors) for key, part in sorted(value.items())}
    if isinstance(value, tuple):
        return [_pack(part, f"{name}.{i}", tensors) for i, part in enumerate(value)]
    tensors[name] = np.asarray(value, order="C")
    return name


def load_interventions(path: str | Path, model: str | None = None) -> tuple[Intervention, ...]:
    """The interventions of a file.

    Args:
        model: the fingerprint of the model on which they will act; None does not check it.

    Raises:
        UserError: for a file that is not a safetensors file, is damaged, holds no intervention or a kind that is not
            registered, lacks an array, has one with a number that is not finite, or is for another model only.
    """
    check_regular(Path(path))
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if model is not None and metadata.get("model", model) != model:
                raise UserError(
                    f"{path} was trained with another model (fingerprint {metadata['model']}, this one has {model}): "
                    "load that model"
                )
            entries = parse_json(metadata["interventions"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if not entries:
            raise UserError(f"{path} holds no intervention, so it would change nothing: save at least one")
        for name, tensor in tensors.items():
            if tensor.dtype.kind in "iu" and tensor.dtype.itemsize < 4:
                raise UserError(f"{path}: {name} is stored as {tensor.dtype}, which no kind has: save it again")
            if not np.isfinite(tensor.astype(np.float32 if tensor.dtype.kind in "fV" else tensor.dtype)).all():
                raise UserError(f"{path}: {name} holds a number that is not finite: train or save it again")
        if (own := metadata.get("digest")) is not None and own != (found := _hash(entries, tensors)):
            raise UserError(f"{path} is damaged (its digest is {found} instead of {own}): save or fetch it again")
        return tuple(_unpack(entry, tensors) for entry in entries)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"{path} holds no saved interventions ({type(error).__name__}: {error}): name a file that "
            "interventions.store.save_interventions wrote"
        ) from None


def _unpack(entry: dict, tensors: dict[str, np.ndarray]) -> Intervention:
    name = entry["kind"]
    if name not in KINDS:
        raise UserError(
            f"the file holds the kind {name!r}, which is not registered: import {entry['module']}, which defines it, "
            f"before you load the file{nearest(name, KINDS)}"
        )

    def arrays(layout):
        if layout is None:
            return None
        if isinstance(layout, dict):
            return {key: arrays(part) for key, part in layout.items()}
        return tuple(arrays(part) for part in layout) if isinstance(layout, list) else tensors[layout]

    # JSON turns tuples into lists, but static fields must be hashable.
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in entry["options"].items()}
    intervention = KINDS[name].restored(options | {key: arrays(layout) for key, layout in entry["arrays"].items()})
    intervention.sites  # noqa: B018  refuses options that the kind does not know
    return intervention


def describe(intervention: Intervention) -> str:
    """One line: the kind, where it acts, its options and its hash."""
    tables = {site: np.atleast_1d(np.asarray(table)) for site, table in intervention.active().items()}
    parts = [_site_and_layers(site, tables.get(site)) for site in sorted(intervention.sites)]
    for field in filter(_is_option, _fields(intervention)):
        value = getattr(intervention, field.name)
        if value and isinstance(value, str | int | float):
            parts.append(f"{field.name}={value}")
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(intervention))
    return f"{type(intervention).__name__}({'; '.join(parts)}) {size:,} numbers #{digest((intervention,))}"


def _site_and_layers(site: str, table: np.ndarray | None) -> str:
    """A site and the layers that are True in its ``table (L,)``: ``text.attn_out L3,4``. If the table is None or True
    everywhere, just the site."""
    if table is None or table.all():
        return site
    layers = np.flatnonzero(table)
    return f"{site} L{','.join(map(str, layers))}" if len(layers) else f"{site} nowhere"
