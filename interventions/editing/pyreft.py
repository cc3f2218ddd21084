"""Editors as a folder in the layout of pyreft (https://github.com/stanfordnlp/pyreft): ``config.json`` and one file for
each editor in each layer.

pyreft writes its files as pickles, which can run code when they are read. These hold the same tensors under the same
names as safetensors. So pyreft reads such a folder after each ``intkey_*.safetensors`` is turned into a ``.bin`` with
``torch.save(safetensors.torch.load_file(name), ...)``, and this module reads a folder of pyreft's after the opposite.

An orthonormal projection is saved as ``rotate_layer``, U^T itself, as pyreft's LoReFT does. (Its DiReFT, ConsReFT and
LobiReFT save PyTorch's parametrisation of it instead.)
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from interventions.editing.editors import EDITOR_SITES
from interventions.kinds.reft import EDITOR_KINDS, Editor, orthonormal
from vlm_jax.errors import UserError
from vlm_jax.files import check_regular, parse_json

#: Site -> pyreft's name of the component; it knows only the first.
_COMPONENTS = {
    "text.resid_post": "block_output",
    "visual.resid_post": "vision.block_output",
    "text.embeddings": "input",
}
_TYPE = "<class 'pyreft.interventions.{}Intervention'>"


def _type_of(kind: type[Editor]) -> str:
    return _TYPE.format(kind.__name__.capitalize())


def _names(kind: type[Editor]) -> dict[str, str]:
    """Our array -> the name of its tensor in pyreft's ``state_dict``."""
    if not kind.orthonormal:
        return {"U": "proj_layer.weight", "W": "learned_source.weight", "b": "learned_source.bias"}
    if "W" in kind.sources:
        return {"U": "rotate_layer", "W": "weight", "b": "bias"}
    return {"U": "rotate_layer", "b": "learned_source"}


def save_pyreft(editors: Mapping[str, Editor], folder: Path) -> None:
    """Writes editors (:func:`interventions.editing.editors.init_editors`) into a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    representations, types, keys, own = [], [], [], []
    for name, editor in editors.items():
        site, kind = EDITOR_SITES[name], type(editor)
        projection, *arrays = map(np.asarray, editor.weights[site])
        slots = np.atleast_1d(np.asarray(editor.slot[site]))
        for layer in np.flatnonzero(slots < len(projection)).tolist():
            slot = slots[layer]
            u = np.asarray(orthonormal(projection[slot])) if kind.orthonormal else projection[slot]
            # PyTorch's linear layers hold the transpose; a rotate_layer does not.
            parts = {"U": u if kind.orthonormal else u.T}
            parts |= {s: a[slot].T if s == "W" else a[slot] for s, a in zip(kind.sources, arrays, strict=True)}
            key = f"layer.{layer}.comp.{_COMPONENTS[site]}.unit.pos.nunit.1#{len(keys)}"
            tensors = {_names(kind)[part]: np.ascontiguousarray(array) for part, array in parts.items()}
            save_file(tensors, folder / f"intkey_{key}.safetensors")
            keys.append(key)
            types.append(_type_of(kind))
            representations.append(
                {"layer": layer, "component": _COMPONENTS[site], "unit": "pos", "low_rank_dimension": u.shape[1]}
            )
            own.append({"editor": name, "group": editor.group, "layers": len(slots)})
    config = {"representations": representations, "intervention_types": types, "sorted_keys": keys, "vlm_jax": own}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_pyreft(folder: Path) -> dict[str, Editor]:
    """The editors of a folder that :func:`save_pyreft` wrote.

    Raises:
        UserError: for a folder without such a ``config.json``, of an unknown kind, or with a file that is missing or
            not a safetensors file.
    """
    kinds = {_type_of(kind): kind for kind in EDITOR_KINDS.values()}
    check_regular(folder / "config.json")
    try:
        config = parse_json((folder / "config.json").read_text())
        found: dict[str, list] = {}
        for representation, name, key, own in zip(
            *(config[part] for part in ("representations", "intervention_types", "sorted_keys", "vlm_jax")), strict=True
        ):
            if name not in kinds:
                raise UserError(f"{folder} has an intervention of the type {name!r}: known are {', '.join(kinds)}")
            check_regular(folder / f"intkey_{key}.safetensors")
            tensors = load_file(folder / f"intkey_{key}.safetensors")
            found.setdefault(own["editor"], []).append((representation["layer"], kinds[name], tensors, own))
        return {name: _editor(name, parts) for name, parts in found.items()}
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{folder} holds no editors ({type(error).__name__}: {error}): name a folder that save_pyreft wrote"
        ) from None


def _editor(name: str, parts: list[tuple[int, type[Editor], dict[str, np.ndarray], dict[str, Any]]]) -> Editor:
    """An editor from its layers."""
    (_, kind, _, own), site, names = parts[0], EDITOR_SITES[name], _names(parts[0][1])
    stacked = {part: np.stack([tensors[tensor] for _, _, tensors, _ in parts]) for part, tensor in names.items()}
    if not kind.orthonormal:
        stacked["U"] = stacked["U"].swapaxes(1, 2)
    if "W" in stacked:
        stacked["W"] = stacked["W"].swapaxes(1, 2)
    slot = np.full(own["layers"], len(parts), np.int32)
    slot[[layer for layer, *_ in parts]] = np.arange(len(parts))
    table = jnp.asarray(slot if site != "text.embeddings" else slot[0])
    weights = tuple(jnp.asarray(stacked[part]) for part in ("U", *kind.sources))
    return kind(weights={site: weights}, slot={site: table}, group=own["group"])
