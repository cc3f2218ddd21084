"""Writes a model as a Hugging Face folder."""

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from vlm_jax.checkpoints.leaves import named_leaves, rows_of, tensor_count
from vlm_jax.checkpoints.sources import INDEX, ORBAX, REGISTERS, SINGLE
from vlm_jax.config import Config
from vlm_jax.errors import UserError
from vlm_jax.families import FAMILIES
from vlm_jax.families.key_table import Row
from vlm_jax.files import order_metadata
from vlm_jax.model import Model


def save(model: Model, folder: str | os.PathLike, *, shard_bytes: int = 5 * 10**9) -> Path:
    """Writes ``config.json`` and the tensors with transformers' names. An existing checkpoint is replaced as a whole.

    Args:
        shard_bytes: largest size of a file in bytes. A larger model is written as several files and an index.

    Raises:
        UserError: if a file cannot be written.
    """
    try:
        _write(model, Path(folder), shard_bytes)
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot write {folder} ({error}): free the disk or choose another folder") from None
    return Path(folder)


def _write(model: Model, folder: Path, shard_bytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    family, leaves = FAMILIES[model.config.family], named_leaves(model)
    tensors_to_write = [(row, i) for row, leaf in rows_of(model.config) for i in range(tensor_count(row, leaf))]
    shards: list[list[tuple[Row, int]]] = [[]]
    filled = 0
    for row, i in tensors_to_write:
        size = leaves[row.path].nbytes // tensor_count(row, leaves[row.path])
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((row, i))
        filled += size
    index: dict[str, str] = {}
    registers = registers_json(model.config)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for number, shard in enumerate(shards):
            file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE
            tensors = {}
            for row, i in shard:
                value = np.asarray(leaves[row.path][i] if row.stacked else leaves[row.path])
                tensors[family.on_disk(row.hf.format(i))] = np.ascontiguousarray(row.op.to_hf(value, model.config))
            save_file(tensors, Path(scratch) / file, metadata={"format": "pt", **registers})
            order_metadata(Path(scratch) / file)
            index |= dict.fromkeys(tensors, file)
        (Path(scratch) / "config.json").write_text(json.dumps(config_to_save(model), indent=2) + "\n")
        if registers:
            (Path(scratch) / REGISTERS).write_text(registers["registers"] + "\n")
        if len(shards) > 1:
            total = sum(leaf.nbytes for leaf in leaves.values())
            value = {"metadata": {"total_size": total}, "weight_map": index}
            (Path(scratch) / INDEX).write_text(json.dumps(value, indent=2) + "\n")
        # Files of an earlier checkpoint would be loaded instead of this one.
        for stale in (*folder.glob("model*.safetensors"), folder / INDEX, folder / REGISTERS):
            stale.unlink(missing_ok=True)
        shutil.rmtree(folder / ORBAX, ignore_errors=True)
        for file in sorted(Path(scratch).iterdir()):
            file.chmod(0o644)
            shutil.move(file, folder / file.name)


def registers_json(config: Config) -> dict[str, str]:
    """The model's registers as JSON, as an entry of the weights' metadata, which shows that ``registers.json`` belongs
    to them; {} without registers."""
    registers = config.text.registers
    return {} if registers is None else {"registers": json.dumps(dataclasses.asdict(registers), sort_keys=True)}


def check_registers(folder: Path, config: Config, found: str | None) -> None:
    """Refuses weights that were trained with other registers than ``registers.json`` names.

    Args:
        found: what is written beside the weights; None for nothing.
    """
    expected = registers_json(config).get("registers")
    if found != expected:
        says = "is missing" if expected is None else f"says {expected}"
        trained = "without registers" if found is None else f"with {found}"
        raise UserError(
            f"{folder / REGISTERS} {says}, but the weights were trained {trained}: fetch the folder again, whole"
        )


def config_to_save(model: Model) -> dict:
    """The model's ``config.json`` with the current precision of its activations."""
    return with_dtype(json.loads(model.config.hf), str(model.text.dtype))


def with_dtype(config: Any, dtype: str) -> Any:
    """A ``config.json`` in which all dtype fields, also those of nested configs, are ``dtype``."""
    if not isinstance(config, dict):
        return config
    return {k: dtype if k in ("dtype", "torch_dtype") else with_dtype(v, dtype) for k, v in config.items()}
