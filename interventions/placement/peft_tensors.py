"""The tensors of a PEFT folder by the decoder's linears, checked against the folder's options and the model."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from interventions.placement.peft_config import MERGE, PeftConfig
from vlm_jax.checkpoints.leaves import rows_of, tensor_count
from vlm_jax.config import Config
from vlm_jax.errors import UserError
from vlm_jax.families import BACKBONES, FAMILIES
from vlm_jax.families.key_table import TRANSPOSE
from vlm_jax.files import check_regular

_DTYPES = ("F32", "BF16", "F16")


class Half(NamedTuple):
    """One matrix of a module's adapter.

    module: the module's name in the file. value: A ``(rank, inputs)`` or B ``(outputs, rank)``, float32 as in PEFT.
    """

    module: str
    value: np.ndarray


#: ``(layer, linear, "A" or "B")`` -> the matrix.
Halves = dict[tuple[int, str, str], Half]


def read_halves(folder: Path, peft: PeftConfig, config: Config, shapes: Mapping[str, tuple[int, int]]) -> Halves:
    """The matrices of a PEFT folder.

    Args:
        shapes: the numbers of inputs and outputs of each linear in the decoder's layers.

    Raises:
        UserError: for tensors that are damaged, missing, more than the options name, or not for this model.
    """
    path = folder / "adapter_model.safetensors"
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(
            f"{folder} holds only adapter_model.bin, a pickle, which can run code and is never read: save the adapter "
            "as safetensors"
        )
    check_regular(path)
    halves: Halves = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118
                module, letter = _split(path, name)
                layer, linear = _place(path, module, config, shapes)
                if (layer, linear, letter) in halves:
                    raise UserError(f"{path} holds {module} twice, under two names: remove one of them")
                value = _read(path, file, name, _shape(peft.rank(module), letter, shapes[linear]))
                halves[layer, linear, letter] = Half(module, value)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): name a PEFT folder that is whole") from None
    lacking = [half.module for (*place, _), half in halves.items() if not all((*place, ab) in halves for ab in "AB")]
    if lacking or not halves:
        raise UserError(
            f"{path}: lora_A and lora_B of every module are needed, some are missing ({', '.join(sorted(lacking))}): "
            "fetch the adapter again, whole"
        )
    _compare_with_targets(path, peft, config, shapes, halves)
    return halves


def _split(path: Path, name: str) -> tuple[str, str]:
    """The module and the letter of a tensor's name."""
    found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
    if found is None:
        raise UserError(f"{path} holds {name}, which is no lora_A.weight or lora_B.weight of plain LoRA: {MERGE}")
    return found[1], found[2]


def _place(path: Path, module: str, config: Config, shapes: Mapping[str, object]) -> tuple[int, str]:
    """The layer and the linear of a module, which may have the name of an older transformers or of the text-only
    model."""
    family, table = FAMILIES[config.family], FAMILIES[config.family].in_table(module)
    stacks = {family.layers, FAMILIES[BACKBONES.get(config.family, config.family)].layers}
    found = re.fullmatch(rf"(?:{'|'.join(map(re.escape, stacks))})\.(0|[1-9][0-9]*)\.(.+)", table)
    if found is not None and len(found[1]) < 6 and int(found[1]) < config.text.num_hidden_layers and found[2] in shapes:
        return int(found[1]), found[2]
    if table in _others(config):
        raise UserError(
            f"{path} adapts {module}, but only the linears of the decoder's layers can have adapters: {MERGE}, or "
            "train it with target_modules that name only those"
        )
    raise UserError(f"{path} adapts {module}, which the model does not have: name an adapter of this model")


def _others(config: Config) -> set[str]:
    """The key table's names of the linears that are not in the decoder's layers."""
    layers = f"{FAMILIES[config.family].layers}."
    linears = ((row.hf, tensor_count(row, leaf)) for row, leaf in rows_of(config) if row.op is TRANSPOSE)
    names = {hf.format(i).removesuffix(".weight") for hf, count in linears for i in range(count)}
    return {"lm_head", *(name for name in names if not name.startswith(layers))}


def _shape(rank: int, letter: str, sizes: tuple[int, int]) -> tuple[int, int]:
    return (rank, sizes[0]) if letter == "A" else (sizes[1], rank)


def _read(path: Path, file, name: str, expected: tuple[int, int]) -> np.ndarray:
    tensor = file.get_slice(name)
    if tensor.get_dtype() not in _DTYPES:
        raise UserError(
            f"{name} in {path} is stored as {tensor.get_dtype()}, only {', '.join(_DTYPES)} are supported: save the "
            "adapter in float32"
        )
    if (shape := tuple(tensor.get_shape())) != expected:
        raise UserError(
            f"{name} in {path} has the shape {shape}, but the rank in adapter_config.json and the sizes of the model "
            f"need {expected}: name an adapter of this model"
        )
    value = file.get_tensor(name).astype(np.float32)
    if not np.isfinite(value).all():
        raise UserError(f"{name} in {path} holds NaN or infinite numbers: fetch the adapter again or train it again")
    return value


def _compare_with_targets(
    path: Path, peft: PeftConfig, config: Config, shapes: Mapping[str, object], halves: Halves
) -> None:
    """Raises a UserError unless the tensors are those of the modules that the options name."""
    held = {half.module for half in halves.values()}
    prefixes = {half.module.removesuffix(f"{layer}.{linear}") for (layer, linear, _), half in halves.items()}
    if len(prefixes) > 1:
        raise UserError(
            f"{path} spells the names of modules in several ways ({', '.join(sorted(prefixes))}): choose one"
        )
    (prefix,) = prefixes
    modules = {f"{prefix}{layer}.{linear}" for layer in range(config.text.num_hidden_layers) for linear in shapes}
    if prefix == f"{FAMILIES[config.family].layers}.":  # else it is of the text-only model, or older
        modules |= _others(config)
    named = {module for module in modules if peft.adapts(module)}
    if lacking := sorted(named - held):
        raise UserError(
            f"{path} has no tensors for {', '.join(lacking)}, which {peft.where.name} names: fetch the adapter again, "
            "whole"
        )
    if more := sorted(held - named):
        raise UserError(
            f"{path} has tensors for {', '.join(more)}, which {peft.where.name} does not name, so PEFT does not use "
            "them: repair target_modules"
        )
