"""LoRA adapters: creates them for a placement, counts their parameters, saves and loads them as PEFT folders."""

import json
import math
import os
import shutil
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray
from safetensors.numpy import save

from interventions.kinds.lora import LoRA
from interventions.modules import check_names, linears
from interventions.placement.peft_config import PeftConfig, read_peft_config
from interventions.placement.peft_tensors import read_halves
from vlm_jax import Model
from vlm_jax.checkpoints.leaves import leaf_name, named_leaves
from vlm_jax.errors import UserError, nearest
from vlm_jax.families import BACKBONES, FAMILIES
from vlm_jax.sites import TEXT_LINEARS, null_slots


def init_lora(model: Model, names: Iterable[str], *, r: int, alpha: float, dropout: float, key: PRNGKeyArray) -> LoRA:
    """A new adapter on the modules ``names`` such as "L3-attn". A is Kaiming-uniform and B zero, as in PEFT.

    Args:
        r: the rank.
        alpha: the output is scaled by ``alpha / r``.
        key: random key for A.
    """
    placed = _layers_by_linear(linears(check_names(names, model.config.text.num_hidden_layers)))
    weights = {}
    for i, (name, layers) in enumerate(placed.items()):
        inputs, outputs = _shape(model, name)
        bound = 1 / math.sqrt(inputs)
        a = jax.random.uniform(jax.random.fold_in(key, i), (len(layers), inputs, r), minval=-bound, maxval=bound)
        weights[f"text.{name}"] = (a, jnp.zeros((len(layers), r, outputs)))
    return LoRA(weights, _slots(model, placed), jnp.float32(alpha / r), dropout=dropout)


def init_lora_on(model: Model, sites: Iterable[str], *, r: int, alpha: float, key: PRNGKeyArray) -> LoRA:
    """A new adapter, without dropout, on linears of the decoder or of the vision tower, in all of their layers:
    ``text.self_attn.q_proj``, ``visual.mlp.fc1`` ... A and B begin as in :func:`init_lora`.

    Raises:
        UserError: for a site that is not a linear of this model's layers.
    """
    shapes = {
        f"{part}.{rest.partition('.')[2].removesuffix('.kernel')}": leaf.shape
        for name, leaf in named_leaves(model).items()
        for part, _, rest in [name.partition(".")]
        if name.endswith(".kernel") and rest.startswith(("layers.", "blocks."))
    }
    weights, slot = {}, {}
    for i, site in enumerate(sites):
        if site not in shapes:
            raise UserError(f"the model's layers have no linear {site!r}{nearest(site, shapes)}")
        (_, inputs, outputs), depth = shapes[site], model.depths[site.partition(".")[0]]
        bound = 1 / math.sqrt(inputs)
        a = jax.random.uniform(jax.random.fold_in(key, i), (depth, inputs, r), minval=-bound, maxval=bound)
        weights[site], slot[site] = (a, jnp.zeros((depth, r, outputs))), jnp.arange(depth, dtype=jnp.int32)
    return LoRA(weights, slot, jnp.float32(alpha / r))


def adapter_parameters(model: Model, names: Iterable[str], r: int) -> int:
    """The number of trainable parameters of rank-``r`` LoRA on these modules."""
    names = check_names(names, model.config.text.num_hidden_layers)
    return sum(r * sum(_shape(model, name)) for _, name in linears(names))


def lowest_layer(lora: LoRA) -> int:
    """The lowest layer that the adapter touches."""
    return min(int(np.argmax(np.asarray(slot) < len(lora.weights[site][0]))) for site, slot in lora.slot.items())


def pad(lora: LoRA, model: Model, slots: int) -> LoRA:
    """The same adapter with ``slots`` slots at every linear of the decoder.

    All placements with at most this many slots then have arrays of the same shapes, so one program trains them all.
    Slots that no layer uses hold zeros and get no gradient.
    """
    depth, r = model.config.text.num_hidden_layers, next(iter(lora.weights.values()))[0].shape[-1]
    weights, slot = {}, {}
    for name in (name for names in TEXT_LINEARS.values() for name in names):
        site, (inputs, outputs) = f"text.{name}", _shape(model, name)
        a, b = lora.weights.get(site, (jnp.zeros((0, inputs, r)), jnp.zeros((0, r, outputs))))
        weights[site] = tuple(jnp.pad(half, [(0, slots - len(a)), (0, 0), (0, 0)]) for half in (a, b))
        old = jnp.asarray(lora.slot.get(site, null_slots(depth, 0)))
        slot[site] = jnp.where(old < len(a), old, slots)
    return lora.replace(weights=weights, slot=slot)


def compact(lora: LoRA) -> LoRA:
    """The same adapter without the slots that no layer uses: the inverse of :func:`pad`."""
    weights, slot = {}, {}
    for site, (a, b) in lora.weights.items():
        old = np.asarray(lora.slot[site])
        used, new = np.unique(old[old < len(a)], return_inverse=True)
        if len(used):
            weights[site] = a[used], b[used]
            slot[site] = null_slots(len(old), len(used)).at[np.flatnonzero(old < len(a))].set(new)
    return lora.replace(weights=weights, slot=slot)


def merge(model: Model, lora: LoRA) -> Model:
    """The model with the adapter added to its kernels. It computes the same function at the speed of the base model,
    and the base model's compiled program runs it. Kernels with fewer bits than the activations are widened, so that
    nothing of the adapter is lost in rounding."""

    def folded(path, kernel):
        site = leaf_name(path).replace("text.layers.", "text.").removesuffix(".kernel")
        if site not in lora.weights:
            return kernel
        a, b = lora.weights[site]
        layers = np.flatnonzero(np.asarray(lora.slot[site]) < len(a))
        slots = lora.slot[site][layers]
        kernel = kernel.astype(jnp.promote_types(kernel.dtype, model.text.dtype))
        return kernel.at[layers].add((lora.scale * a[slots] @ b[slots]).astype(kernel.dtype))

    return jax.tree_util.tree_map_with_path(folded, model)


def save_peft(lora: LoRA, model: Model, folder: Path) -> None:
    """Writes a PEFT folder. Its ``target_modules`` are full paths, so that only the placed modules get adapters."""
    prefix = FAMILIES[model.config.family].layers
    tensors, paths = {}, []
    for site, (a, b) in lora.weights.items():
        slots = np.asarray(lora.slot[site])
        for layer in np.flatnonzero(slots < len(a)):
            path = f"{prefix}.{layer}.{site.removeprefix('text.')}"
            paths.append(path)
            tensors[f"base_model.model.{path}.lora_A.weight"] = np.ascontiguousarray(np.asarray(a[slots[layer]]).T)
            tensors[f"base_model.model.{path}.lora_B.weight"] = np.ascontiguousarray(np.asarray(b[slots[layer]]).T)
    r = next(iter(lora.weights.values()))[0].shape[-1]
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": float(lora.scale) * r,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "target_modules": sorted(paths),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unfinished = Path(scratch) / folder.name
        unfinished.mkdir()
        # Not with save_file, whose error for a full disk is no OSError, which a run folder makes a sentence of.
        (unfinished / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
        (unfinished / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)


def load_peft(model: Model, folder: str | os.PathLike, source: str | None = None) -> LoRA:
    """The LoRA of a PEFT folder as an intervention.

    Its ranks and scales may differ from module to module: all are filled up with zeros to the largest rank, and B is
    multiplied by the scale. An adapter of the text-only model inside is for its modules in the whole model.

    Args:
        source: what the model was loaded from, to compare with the name of the adapter's base model.

    Raises:
        UserError: for a folder without an adapter, an option of PEFT that makes it more than a LoRA on the decoder's
            linears, or tensors that do not belong to the options or the model, that are damaged or that are missing.

    Warns:
        UserWarning: if the adapter names another model as its base.
    """
    folder = Path(folder)
    peft = read_peft_config(folder)
    shapes = {name: _shape(model, name) for names in TEXT_LINEARS.values() for name in names}
    halves = read_halves(folder, peft, model.config, shapes)
    _warn_of_another_base(peft, model, source)
    modules = {half.module for half in halves.values()}
    rank, scales = max(map(peft.rank, modules)), {peft.scale(module) for module in modules}
    placed = _layers_by_linear({(layer, linear) for layer, linear, _ in halves})

    def matrix(layer: int, linear: str, letter: str) -> np.ndarray:
        module, value = halves[layer, linear, letter]
        if letter == "B" and len(scales) > 1:
            value = value * np.float32(peft.scale(module))
        ranks = "AB".index(letter)  # the axis
        return np.pad(value, [(0, rank - size if axis == ranks else 0) for axis, size in enumerate(value.shape)]).T

    def stacked(linear: str, letter: str) -> jax.Array:
        return jnp.asarray(np.stack([matrix(layer, linear, letter) for layer in placed[linear]]))

    weights = {f"text.{name}": (stacked(name, "A"), stacked(name, "B")) for name in placed}
    scale = min(scales) if len(scales) == 1 else 1.0
    return LoRA(weights, _slots(model, placed), jnp.float32(scale), dropout=peft.dropout)


def _warn_of_another_base(peft: PeftConfig, model: Model, source: str | None) -> None:
    """Warns if the adapter was trained on a model of another name or class."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    family = model.config.family
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    classes = [known[name] for name in (family, BACKBONES.get(family, family))]
    own = source or json.loads(model.config.hf or "{}").get("_name_or_path")
    other = None
    if peft.base_class is not None and peft.base_class not in classes:
        other, own = peft.base_class, classes[0]
    elif peft.base and own and Path(peft.base).name.lower() != Path(own).name.lower():
        other = peft.base
    if other is not None:
        warnings.warn(
            f"{peft.where} says that the adapter was trained on {other}, but the model is {own}: check that they "
            "belong together",
            stacklevel=3,
        )


def _layers_by_linear(pairs: Iterable[tuple[int, str]]) -> dict[str, list[int]]:
    """Linear -> the numbers of its layers, ascending."""
    grouped = defaultdict(list)
    for layer, name in sorted(pairs):
        grouped[name].append(layer)
    return dict(sorted(grouped.items()))


def _slots(model: Model, placed: dict[str, list[int]]) -> dict[str, jax.Array]:
    depth = model.config.text.num_hidden_layers
    return {
        f"text.{name}": null_slots(depth, len(layers)).at[jnp.array(layers)].set(jnp.arange(len(layers)))
        for name, layers in placed.items()
    }


def _shape(model: Model, linear: str) -> tuple[int, int]:
    """The numbers of inputs and outputs of a linear in the decoder's layers."""
    module = model.text.layers
    for part in linear.split("."):
        module = getattr(module, part)
    return module.kernel.shape[1:]
