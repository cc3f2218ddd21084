"""Orbax folders, which load faster than Hugging Face folders."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp

from vlm_jax.checkpoints.leaves import abstract, named_leaves
from vlm_jax.checkpoints.precision import Precision
from vlm_jax.checkpoints.save import check_registers, config_to_save, registers_json
from vlm_jax.checkpoints.sources import ORBAX, REGISTERS
from vlm_jax.config import Config
from vlm_jax.errors import UserError
from vlm_jax.mesh.sharding import sharding
from vlm_jax.model import Model


def save_orbax(model: Model, folder: Path) -> None:
    """Writes ``config.json`` and an Orbax checkpoint. :func:`vlm_jax.load` reads the folder."""
    import orbax.checkpoint as ocp  # takes half a second, and few folders need it

    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / ORBAX).absolute(), named_leaves(model), force=True)
    (folder / "config.json").write_text(json.dumps(config_to_save(model), indent=2) + "\n")
    for place in (folder, folder / ORBAX):  # the second copy shows that the first belongs to these arrays
        if registers := registers_json(model.config).get("registers"):
            (place / REGISTERS).write_text(registers + "\n")


def load_orbax(folder: Path, config: Config, precision: Precision, mesh) -> dict[str, jax.Array]:
    """Name -> parameter, read from an Orbax checkpoint; ``mesh`` as for :func:`vlm_jax.load`.

    Raises:
        UserError: for an unreadable checkpoint; missing, extra or misshapen arrays (all are listed); NaN or infinite
            values; matrices that would be rounded.
    """
    import orbax.checkpoint as ocp

    path = (folder / ORBAX).absolute()
    own = path / REGISTERS
    check_registers(folder, config, own.read_text().strip() if own.is_file() else None)
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            saved = checkpointer.metadata(path).item_metadata.tree
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is not a readable Orbax checkpoint ({error}): convert the model again") from None
        expected = named_leaves(abstract(config))
        problems = [f"missing {name}" for name in sorted(expected.keys() - saved.keys())]
        problems += [f"extra {name}" for name in sorted(saved.keys() - expected.keys())]
        problems += [
            f"misshapen {name} {tuple(saved[name].shape)}, expected {expected[name].shape}"
            for name in sorted(expected.keys() & saved.keys())
            if tuple(saved[name].shape) != expected[name].shape
        ]
        problems += [
            f"{name} is stored as {saved[name].dtype}, only float32, bfloat16 and float16 are supported"
            for name in sorted(expected.keys() & saved.keys())
            if str(saved[name].dtype) not in ("float32", "bfloat16", "float16")
        ]
        if problems:
            raise UserError(
                f"{folder}: {len(problems)} array(s) do not fit the config ({'; '.join(problems)}): "
                "convert the model again"
            )
        for name in expected:
            precision.check(name, str(saved[name].dtype), name)
        first_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = {
            name: jax.ShapeDtypeStruct(
                leaf.shape,
                precision.of_leaf(name) or saved[name].dtype,
                sharding=first_device if mesh is None else sharding(name, leaf.shape, mesh),
            )
            for name, leaf in expected.items()
        }
        try:
            leaves = checkpointer.restore(path, target)
        except Exception as error:  # TensorStore reports a damaged file by errors of many kinds
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path} cannot be read ({reason}): convert the model again") from None
    for name, leaf in leaves.items():
        if not jnp.isfinite(leaf).all():
            raise UserError(f"{name} in {path} holds NaN or infinite numbers: convert the model again")
    return leaves
