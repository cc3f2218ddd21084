"""Orbax folders, for fast restarts."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from vlm_jax.checkpoints.leaves import abstract, named_leaves
from vlm_jax.checkpoints.save import config_to_save
from vlm_jax.checkpoints.sources import ORBAX
from vlm_jax.config import Config
from vlm_jax.errors import UserError
from vlm_jax.mesh.sharding import sharding
from vlm_jax.model import Model


def save_orbax(model: Model, folder: Path) -> None:
    """Writes ``config.json`` and an Orbax checkpoint, which ``load`` takes too."""
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / ORBAX).absolute(), named_leaves(model), force=True)
    (folder / "config.json").write_text(json.dumps(config_to_save(model), indent=2) + "\n")


def load_orbax(folder: Path, config: Config, dtype, mesh) -> dict[str, jax.Array]:
    path = (folder / ORBAX).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            found = checkpointer.metadata(path).item_metadata.tree
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is no readable Orbax checkpoint ({error}): convert the model again") from None
        wanted = named_leaves(abstract(config))
        problems = [f"missing {name}" for name in sorted(wanted.keys() - found.keys())]
        problems += [f"extra {name}" for name in sorted(found.keys() - wanted.keys())]
        problems += [
            f"misshapen {name} {tuple(found[name].shape)}, expected {wanted[name].shape}"
            for name in sorted(wanted.keys() & found.keys())
            if tuple(found[name].shape) != wanted[name].shape
        ]
        if problems:
            raise UserError(
                f"{folder}: {len(problems)} array(s) do not fit the config ({'; '.join(problems)}): "
                "convert the model again"
            )
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = {
            name: jax.ShapeDtypeStruct(
                leaf.shape,
                dtype or found[name].dtype,
                sharding=here if mesh is None else sharding(name, leaf.shape, mesh),
            )
            for name, leaf in wanted.items()
        }
        try:
            leaves = checkpointer.restore(path, target)
        except Exception as error:  # TensorStore reports damage with errors of many kinds
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path} cannot be read ({reason}): convert the model again") from None
    for name, leaf in leaves.items():
        if not jnp.isfinite(leaf).all():
            raise UserError(f"{name} in {path} holds NaN or infinite numbers: convert the model again")
    return leaves
