"""A model with the adapters of PEFT folders, and with the whole modules that such folders may hold besides."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from interventions.kinds.lora import LoRA
from interventions.placement.adapters import merge, read_peft
from interventions.placement.combine import combine
from vlm_jax import Model
from vlm_jax.checkpoints.leaves import abstract, leaf_name, named_leaves, rows_of, tensor_count
from vlm_jax.errors import UserError

_HEAD, _EMBEDDINGS = "lm_head.weight", "text.embed_tokens.weight"


def load_adapted(
    model: Model, folders: Sequence[str | os.PathLike], weights: Sequence[float] = (), source: str | None = None
) -> tuple[Model, LoRA | None]:
    """The model with the whole modules of PEFT folders, and the adapter to apply to it: of several folders, the
    weighted sum (:func:`interventions.placement.combine.combine`). The adapter is None if there are only whole modules.

    Args:
        weights: one for each folder; none: all are 1.
        source: what the model was loaded from, to compare with the names of the adapters' base models.

    Raises:
        UserError: as :func:`interventions.placement.adapters.load_peft`, but for whole modules only if there are
            several folders or weights.
    """
    if weights and len(weights) != len(folders):
        raise UserError(f"{len(folders)} adapters got {len(weights)} weights: give each adapter one, or none at all")
    read = [read_peft(model, folder, source) for folder in folders]
    plain = len(folders) == 1 and all(weight == 1 for weight in weights)
    if plain:
        ((lora, whole),) = read
        return with_whole_modules(model, whole), lora
    loras = []
    for folder, (lora, whole) in zip(folders, read, strict=True):
        if whole or lora is None:
            raise UserError(f"{folder} has whole modules (modules_to_save), which have no weighted sum: load it alone")
        loras.append(lora)
    return model, combine(loras, weights or [1.0] * len(loras))


def merged(
    model: Model, folders: Sequence[str | os.PathLike], weights: Sequence[float] = (), source: str | None = None
) -> Model:
    """The model with the adapters and whole modules of PEFT folders in its parameters; arguments as
    :func:`load_adapted`."""
    changed, lora = load_adapted(model, folders, weights, source)
    return changed if lora is None else merge(changed, lora)


def with_whole_modules(model: Model, whole: Mapping[str, np.ndarray]) -> Model:
    """The model with some of its tensors replaced. They are rounded to its precision, but not below its activations'.

    If a model ties its unembedding to its embeddings and these become different, it is untied, as in PEFT.

    Args:
        whole: the key table's name of a tensor -> the new tensor, in transformers' layout.
    """
    leaves = named_leaves(model)
    if model.config.text.tie_word_embeddings:
        (embeddings,) = (row.hf for row, _ in rows_of(model.config) if row.path == _EMBEDDINGS)
        old = np.asarray(leaves[_EMBEDDINGS], np.float32)
        head = whole.get(_HEAD, old)
        if np.array_equal(head, whole.get(embeddings, old)):
            whole = {name: value for name, value in whole.items() if name != _HEAD}
        else:
            model, whole = untied(model), {**whole, _HEAD: head}
            leaves = named_leaves(model)
    for row, leaf in rows_of(model.config):
        for i in range(tensor_count(row, leaf)):
            if (tensor := whole.get(row.hf.format(i))) is None:
                continue
            array, where = leaves[row.path], (slice(None),) * (leaf.ndim - row.stacked)
            dtype = jnp.promote_types(array.dtype, model.text.dtype)
            value = jnp.asarray(row.op.read(_Tensor(tensor), where), dtype)
            array = array.astype(dtype).at[i].set(value) if row.stacked else value
            leaves[row.path] = jax.device_put(array, getattr(leaves[row.path], "sharding", None))
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[leaf_name(path)], model)


def untied(model: Model) -> Model:
    """The same function as a model whose unembedding is a parameter of its own."""
    config = model.config
    hf = json.loads(config.hf or "{}")
    for part in (hf, hf.get("text_config") or {}):
        if part is hf or "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    text = dataclasses.replace(config.text, tie_word_embeddings=False)
    shapes = abstract(dataclasses.replace(config, text=text, hf=json.dumps(hf) if config.hf else ""))
    leaves = named_leaves(model)
    leaves["text.lm_head.kernel"] = leaves[_EMBEDDINGS].T
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[leaf_name(path)], shapes)


class _Tensor:
    """An array with the members of a safetensors slice that :class:`vlm_jax.families.key_table.Op` reads."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __getitem__(self, where):
        return self.array[where]

    def get_shape(self) -> tuple[int, ...]:
        return self.array.shape
