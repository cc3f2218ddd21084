"""The tensors of a PEFT folder by the model's linears, and those of modules that are saved whole, checked against the
folder's options and the model."""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from interventions.placement.linear_maps import LinearMap
from interventions.placement.peft_config import MERGE, PeftConfig
from vlm_jax.checkpoints.leaves import rows_of, tensor_count
from vlm_jax.config import Config
from vlm_jax.errors import UserError
from vlm_jax.families import BACKBONES, FAMILIES
from vlm_jax.families.key_table import CONV
from vlm_jax.files import check_regular

_HEAD = "lm_head.weight"
_DTYPES = ("F32", "BF16", "F16")
#: The end of a tensor's name -> what it is called here.
_PARTS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "magnitude"}


class Part(NamedTuple):
    """One tensor of a module's adapter.

    module: the module's name in the file. value: A ``(rank, inputs)``, B ``(outputs, rank)`` or DoRA's magnitude
    ``(outputs,)``, float32 as in PEFT.
    """

    module: str
    value: np.ndarray


class Tensors(NamedTuple):
    """What a PEFT folder holds.

    parts: ``(layer, site, "A", "B" or "magnitude")`` -> the tensor; the layer is 0 outside of the layers.
    whole: the key table's name of a tensor -> the tensor of a module that is saved whole.
    """

    parts: dict[tuple[int, str, str], Part]
    whole: dict[str, np.ndarray]


def read_tensors(folder: Path, peft: PeftConfig, config: Config, linears: Mapping[str, LinearMap]) -> Tensors:
    """The tensors of a PEFT folder.

    Args:
        linears: the model's, by site.

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
    places, held = _places(config, linears), Tensors({}, {})
    table = _table_tensors(config) if peft.whole else {}
    saved = {name for name in table if peft.saves(name.rpartition(".")[0])}
    if peft.tied and saved and config.text.tie_word_embeddings:
        saved.add(_HEAD)  # PEFT writes it beside the embeddings
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118
                key = FAMILIES[config.family].in_table(name.removeprefix("base_model.model."))
                if key in saved:
                    held.whole[key] = _read(path, file, name, table[key], "the sizes of the model need")
                    continue
                module, part = _split(path, peft, name)
                layer, site = _place(path, module, config, places)
                if (layer, site, part) in held.parts:
                    raise UserError(f"{path} holds {module} twice, under two names: remove one of them")
                shape = _shape(peft.rank(module), part, linears[site])
                need = "the rank in adapter_config.json and the sizes of the model need"
                held.parts[layer, site, part] = Part(module, _read(path, file, name, shape, need))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): name a PEFT folder that is whole") from None
    needed = ("A", "B", "magnitude") if peft.dora else ("A", "B")
    parts = held.parts.items()
    lacking = {part.module for (*place, _), part in parts if not all((*place, n) in held.parts for n in needed)}
    if lacking or not (held.parts or held.whole):
        names = "lora_A, lora_B and lora_magnitude_vector" if peft.dora else "lora_A and lora_B"
        raise UserError(
            f"{path}: {names} of every module are needed, some are missing ({', '.join(sorted(lacking))}): fetch the "
            "adapter again, whole"
        )
    _compare_with_targets(path, peft, config, places, held.parts)
    _compare_with_saved(path, peft, held.whole, saved)
    return held


def _places(config: Config, linears: Mapping[str, LinearMap]) -> dict[str, tuple[int, str]]:
    """transformers' name of each linear that can have an adapter -> its layer and its site."""
    return {name: (layer, site) for site, linear in linears.items() for name, layer in linear.modules().items()}


def _split(path: Path, peft: PeftConfig, name: str) -> tuple[str, str]:
    """The module of a tensor's name, and which of its tensors it is."""
    ends = _PARTS if peft.dora else ("lora_A.weight", "lora_B.weight")
    found = re.fullmatch(rf"base_model\.model\.(.+)\.({'|'.join(map(re.escape, ends))})", name)
    if found is None:
        kind = "DoRA" if peft.dora else "plain LoRA"
        magnitude = " or lora_magnitude_vector" if peft.dora else ""
        raise UserError(
            f"{path} holds {name}, which is no lora_A.weight or lora_B.weight{magnitude} of {kind}: {MERGE}"
        )
    return found[1], _PARTS[found[2]]


def _place(path: Path, module: str, config: Config, places: Mapping[str, tuple[int, str]]) -> tuple[int, str]:
    """The layer and the site of a module, which may have the name of an older transformers or of the text-only
    model."""
    table = FAMILIES[config.family].in_table(module)
    for name in (table, _of_text_only(config, table)):
        if name in places:
            return places[name]
    if table in _others(config):
        raise UserError(
            f"{path} adapts {module}, but only linears of the layers, the vision blocks and the projector can have "
            f"adapters: {MERGE}, or train it with target_modules that name only those"
        )
    raise UserError(f"{path} adapts {module}, which the model does not have: name an adapter of this model")


def _of_text_only(config: Config, module: str) -> str:
    """The whole model's name of a module of the text-only model inside."""
    stack, layers = FAMILIES[BACKBONES.get(config.family, config.family)].layers, FAMILIES[config.family].layers
    return f"{layers}{module.removeprefix(stack)}" if module.startswith(f"{stack}.") else module


def _others(config: Config) -> set[str]:
    """The key table's names of modules to which PEFT gives adapters and this library does not: the unembedding, the
    embeddings and the convolutions."""
    rows = [row for row, _ in rows_of(config) if row.op is CONV or row.path == "text.embed_tokens.weight"]
    return {"lm_head", *(row.hf.removesuffix(".weight") for row in rows)}


def _shape(rank: int, part: str, linear: LinearMap) -> tuple[int, ...]:
    shapes = {"A": (rank, linear.inputs), "B": (linear.outputs, rank), "magnitude": (linear.outputs,)}
    return shapes[part]


def _read(path: Path, file: Any, name: str, expected: tuple[int, ...], need: str) -> np.ndarray:
    tensor = file.get_slice(name)
    if tensor.get_dtype() not in _DTYPES:
        raise UserError(
            f"{name} in {path} is stored as {tensor.get_dtype()}, only {', '.join(_DTYPES)} are supported: save the "
            "adapter in float32"
        )
    if (shape := tuple(tensor.get_shape())) != expected:
        raise UserError(f"{name} in {path} has the shape {shape}, but {need} {expected}: name an adapter of this model")
    value = file.get_tensor(name).astype(np.float32)
    if not np.isfinite(value).all():
        raise UserError(f"{name} in {path} holds NaN or infinite numbers: fetch the adapter again or train it again")
    return value


def _table_tensors(config: Config) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the model's tensors in transformers, and of an unembedding that is tied."""
    tensors = {}
    for row, leaf in rows_of(config):
        shape = row.op.hf_shape(leaf.shape[1:] if row.stacked else leaf.shape, config)
        tensors |= {row.hf.format(i): shape for i in range(tensor_count(row, leaf))}
    return {_HEAD: (config.text.vocab_size, config.text.hidden_size)} | tensors


def _compare_with_saved(path: Path, peft: PeftConfig, held: Mapping[str, object], saved: set[str]) -> None:
    """Raises a UserError unless the tensors of modules that are saved whole are all there."""
    if lacking := sorted(saved - held.keys()):
        raise UserError(
            f"{path} has no tensor {', '.join(lacking)}, which modules_to_save in {peft.where.name} names: fetch the "
            "adapter again, whole"
        )
    if peft.whole and not saved:
        raise UserError(
            f"{peft.where}: modules_to_save = {list(peft.whole)} names no module of this model: name an adapter of it"
        )


def _compare_with_targets(
    path: Path,
    peft: PeftConfig,
    config: Config,
    places: Mapping[str, tuple[int, str]],
    parts: Mapping[tuple[int, str, str], Part],
) -> None:
    """Raises a UserError unless the tensors are those of the modules that the options name."""
    names = {place: name for name, place in places.items()}
    held = {part.module for part in parts.values()}
    # Part of the model -> how names of its modules begin in the file, and in the key table; and a name.
    spelled: dict[str, dict[tuple[str, str], str]] = defaultdict(dict)
    for (layer, site, _), part in parts.items():
        spelled[site.partition(".")[0]][_beginnings(part.module, names[layer, site])] = part.module
    for pairs in spelled.values():
        if len(pairs) > 1:
            spellings = ", ".join(sorted(pairs.values()))
            raise UserError(f"{path} spells the names of modules in several ways ({spellings}): choose one")
    own = all(file == table for ((file, table),) in spelled.values())
    modules = set()
    for name, (_, site) in places.items():
        for file, table in spelled.get(site.partition(".")[0], {("", ""): ""} if own else {}):
            modules.add(file + name.removeprefix(table))
    if own:  # else it is of the text-only model, or older
        modules.add("lm_head")
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


def _beginnings(file: str, table: str) -> tuple[str, str]:
    """What comes before the longest common end of two names. Of equal names, the same for all: nothing."""
    count = next((i for i, (a, b) in enumerate(zip(file[::-1], table[::-1], strict=False)) if a != b), None)
    if count is None:
        count = min(len(file), len(table))
    return file[: len(file) - count], table[: len(table) - count]
