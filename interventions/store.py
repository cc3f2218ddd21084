"""Interventions on disk.

A file of interventions is a safetensors file. Its metadata describes, as JSON, each intervention in order: its kind,
the module that defines the kind, its options, and which arrays its fields hold.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from interventions.kinds import KINDS
from interventions.kinds.layers import Layers
from interventions.kinds.packed import LAYERS, file_of, hash_of, packed
from vlm_jax.acting import several
from vlm_jax.errors import UserError, nearest
from vlm_jax.files import check_regular, order_metadata, parse_json
from vlm_jax.sites import Intervention


def save_interventions(
    path: str | Path, interventions: Intervention | Sequence[Intervention], model: str | None = None
) -> None:
    """Writes one or several interventions, in their order, to one file.

    Args:
        model: the fingerprint of the only model that they are for (:mod:`vlm_jax.checkpoints.fingerprint`), such as the
            one with which editors were trained; None if they suit any model of the same shape.

    Raises:
        UserError: for an intervention whose class is not registered with :func:`interventions.kinds.base.kind`.
    """
    interventions = several(interventions)
    for kind in map(type, interventions):
        if KINDS.get(kind.__name__) is not kind:
            raise UserError(
                f"a {kind.__name__} cannot be saved: register its class with @interventions.kinds.base.kind"
            )
    entries, tensors = packed(interventions)
    modules = [{"module": type(intervention).__module__} for intervention in interventions]
    entries = list(map(dict.__or__, entries, modules))
    own = {"digest": hash_of(entries, tensors)} | ({} if model is None else {"model": model})
    Path(path).write_bytes(file_of(entries, tensors, **own))
    order_metadata(Path(path))


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
        if (own := metadata.get("digest")) is not None and own != (found := hash_of(entries, tensors)):
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
            parts = {key: arrays(part) for key, part in layout.items()}
            return Layers(**parts[LAYERS]) if parts.keys() == {LAYERS} else parts
        return tuple(arrays(part) for part in layout) if isinstance(layout, list) else tensors[layout]

    # JSON turns tuples into lists, but static fields must be hashable.
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in entry["options"].items()}
    intervention = KINDS[name].restored(options | {key: arrays(layout) for key, layout in entry["arrays"].items()})
    intervention.sites  # noqa: B018  refuses options that the kind does not know
    return intervention
