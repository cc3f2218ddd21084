"""LoRA adapters: creates them for a placement, counts their parameters, saves and loads them as PEFT folders."""

import json
import math
import os
import shutil
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray
from safetensors.numpy import save

from interventions.kinds.lora import Adapter, LoRA
from interventions.modules import check_names, linears
from interventions.placement.linear_maps import LinearMap, linear_maps, site_of
from interventions.placement.peft_config import PeftConfig, read_peft_config
from interventions.placement.peft_tensors import read_tensors
from vlm_jax import Model
from vlm_jax.checkpoints.leaves import leaf_name, named_leaves
from vlm_jax.errors import UserError, nearest
from vlm_jax.families import BACKBONES
from vlm_jax.sites import layered, null_slots


def init_lora(
    model: Model,
    names: Iterable[str],
    *,
    r: int,
    alpha: float,
    dropout: float,
    key: PRNGKeyArray,
    use_dora: bool = False,
    use_rslora: bool = False,
) -> LoRA:
    """A new adapter on the modules ``names``: "L3-attn" of the decoder, "V3-attn" of the vision tower. A is
    Kaiming-uniform and B zero, as in PEFT.

    Args:
        r: the rank.
        alpha: the output is scaled by ``alpha / r``; with ``use_rslora``, by ``alpha / sqrt(r)`` (Kalajdzievski 2023).
        key: random key for A.
        use_dora: it is DoRA, whose magnitudes begin as the norms of the kernels' columns.
    """
    maps = linear_maps(model)
    placed = linears(check_names(names, model.depths["text"], model.depths["visual"]), maps)
    weights, slot = {}, {}
    for i, (site, layers) in enumerate(placed.items()):
        weights[site] = _begun(maps[site], len(layers), r, jax.random.fold_in(key, i))
        slot[site] = _slots(maps[site], layers)
    lora = LoRA(weights, slot, jnp.float32(alpha / (math.sqrt(r) if use_rslora else r)), dropout=dropout)
    return _with_magnitudes(lora, model) if use_dora else lora


def init_lora_on(model: Model, sites: Iterable[str], *, r: int, alpha: float, key: PRNGKeyArray) -> LoRA:
    """A new adapter, without dropout, on linears of the decoder, of the vision tower or of the projector, in all of
    their layers: ``text.self_attn.q_proj``, ``visual.mlp.fc1`` ... A and B begin as in :func:`init_lora`.

    Raises:
        UserError: for a site that is not a linear of this model.
    """
    maps, weights, slot = linear_maps(model), {}, {}
    for i, site in enumerate(sites):
        if site not in maps:
            raise UserError(f"the model has no linear {site!r}{nearest(site, maps)}")
        layers = range(maps[site].run or 1)
        weights[site] = _begun(maps[site], len(layers), r, jax.random.fold_in(key, i))
        slot[site] = _slots(maps[site], layers)
    return LoRA(weights, slot, jnp.float32(alpha / r))


def _begun(linear: LinearMap, count: int, r: int, key: PRNGKeyArray) -> tuple[jax.Array, jax.Array]:
    """A and B of ``count`` new adapters."""
    bound = 1 / math.sqrt(linear.inputs)
    a = jax.random.uniform(key, (count, linear.inputs, r), minval=-bound, maxval=bound)
    return a, jnp.zeros((count, r, linear.outputs))


def _with_magnitudes(lora: LoRA, model: Model) -> LoRA:
    """The fresh LoRA as DoRA: with the norms of the kernels' columns as magnitudes."""
    kernels = {site_of(name): leaf for name, leaf in named_leaves(model).items()}
    magnitude = {}
    for site in lora.weights:
        kernel = jnp.asarray(kernels[site]).astype(jnp.float32)
        kernel = kernel[_layers(lora, site)] if layered(site) else kernel[None]
        magnitude[site] = jnp.linalg.norm(kernel, axis=-2)
    return lora.replace(magnitude=magnitude)


def adapter_parameters(model: Model, names: Iterable[str], r: int, use_dora: bool = False) -> int:
    """The number of trainable parameters of rank-``r`` LoRA, or DoRA, on these modules."""
    maps = linear_maps(model)
    placed = linears(check_names(names, model.depths["text"], model.depths["visual"]), maps)

    def of_one(linear: LinearMap) -> int:
        return r * (linear.inputs + linear.outputs) + use_dora * linear.outputs

    return sum(len(layers) * of_one(maps[site]) for site, layers in placed.items())


def lowest_layer(lora: LoRA) -> int:
    """The lowest layer that an adapter of the decoder touches."""
    return min(int(_layers(lora, site)[0]) for site in lora.slot if len(_layers(lora, site)))


def pad(lora: LoRA, model: Model, slots: int) -> LoRA:
    """The same adapter of the decoder with ``slots`` slots at every linear of it.

    All placements with at most this many slots then have arrays of the same shapes, so one program trains them all.
    Slots that no layer uses hold zeros and get no gradient.
    """
    depth, r = model.config.text.num_hidden_layers, next(iter(lora.weights.values()))[0].shape[-1]
    weights, slot, magnitude = {}, {}, {}
    for site, linear in linear_maps(model).items():
        if not site.startswith("text."):
            continue
        none = jnp.zeros((0, linear.inputs, r)), jnp.zeros((0, r, linear.outputs))
        a, b = lora.weights.get(site, none)
        weights[site] = tuple(jnp.pad(half, [(0, slots - len(a)), (0, 0), (0, 0)]) for half in (a, b))
        old = jnp.asarray(lora.slot.get(site, null_slots(depth, 0)))
        slot[site] = jnp.where(old < len(a), old, slots)
        if lora.magnitude is not None:
            sizes = lora.magnitude.get(site, jnp.zeros((0, linear.outputs)))
            magnitude[site] = jnp.pad(sizes, [(0, slots - len(a)), (0, 0)])
    return lora.replace(weights=weights, slot=slot, magnitude=magnitude if lora.magnitude is not None else None)


def compact(lora: LoRA) -> LoRA:
    """The same adapter without the slots that no layer uses: the inverse of :func:`pad`."""
    weights, slot, magnitude = {}, {}, {}
    for site, (a, b) in lora.weights.items():
        old = np.asarray(lora.slot[site])
        used, new = np.unique(old[old < len(a)], return_inverse=True)
        if not len(used):
            continue
        weights[site] = a[used], b[used]
        slot[site] = null_slots(len(old), len(used)).at[np.flatnonzero(old < len(a))].set(new)
        if lora.magnitude is not None:
            magnitude[site] = lora.magnitude[site][used]
    return lora.replace(weights=weights, slot=slot, magnitude=magnitude if lora.magnitude is not None else None)


def _layers(lora: LoRA, site: str) -> np.ndarray:
    """The layers in which the adapter is on a linear of the layers."""
    return np.flatnonzero(np.asarray(lora.slot[site]) < len(lora.weights[site][0]))


def _adapters(lora: LoRA, site: str) -> Adapter:
    """The adapters of a linear in :func:`_layers`, in this order; of a linear outside of the layers, the only one."""
    at = lora.slot[site][_layers(lora, site)] if layered(site) else 0
    a, b = lora.weights[site]
    return Adapter(a[at], b[at], lora.scale, None if lora.magnitude is None else lora.magnitude[site][at])


def merge(model: Model, lora: LoRA) -> Model:
    """The model with the adapter merged into its kernels. It computes the same function at the speed of the base model,
    and the base model's compiled program runs it. Kernels with fewer bits than the activations are widened, so that
    nothing of the adapter is lost in rounding."""

    def folded(path, kernel):
        site = site_of(leaf_name(path))
        if site not in lora.weights:
            return kernel
        kernel, adapters = kernel.astype(jnp.promote_types(kernel.dtype, model.text.dtype)), _adapters(lora, site)
        if not layered(site):
            return adapters.merged(kernel)
        layers = _layers(lora, site)
        return kernel.at[layers].set(adapters.merged(kernel[layers]))

    return jax.tree_util.tree_map_with_path(folded, model)


def save_peft(lora: LoRA, model: Model, folder: Path) -> None:
    """Writes a PEFT folder. Its ``target_modules`` are full paths, so that only the placed modules get adapters.

    Raises:
        UserError: for an adapter of a linear that is no ``nn.Linear`` in transformers.
    """
    maps, tensors, paths = linear_maps(model), {}, []
    for site in lora.weights:
        if (hf := maps[site].hf) is None:
            raise UserError(f"PEFT has no adapter for {site}, which is no nn.Linear in transformers: leave it out")
        adapters = jax.tree.map(np.asarray, _adapters(lora, site)._replace(scale=None))
        for i, layer in enumerate(_layers(lora, site) if layered(site) else [0]):
            path = hf.format(layer)
            parts = jax.tree.map(lambda x, i=i: x[i], adapters) if layered(site) else adapters
            paths.append(path)
            tensors[f"base_model.model.{path}.lora_A.weight"] = np.ascontiguousarray(parts.a.T)
            tensors[f"base_model.model.{path}.lora_B.weight"] = np.ascontiguousarray(parts.b.T)
            if parts.magnitude is not None:
                tensors[f"base_model.model.{path}.lora_magnitude_vector"] = parts.magnitude
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
        "use_dora": lora.magnitude is not None,
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
    """The LoRA or DoRA of a PEFT folder as an intervention.

    Its ranks and scales may differ from module to module: all are filled up with zeros to the largest rank, and A and B
    are multiplied by the root of the scale. An adapter of the text-only model inside is for its modules in the whole
    model. Adapters of vision blocks that the model does not run are left out.

    Args:
        source: what the model was loaded from, to compare with the name of the adapter's base model.

    Raises:
        UserError: for a folder without an adapter, an option of PEFT that makes it more than LoRA or DoRA on linears of
            the layers, the vision blocks and the projector, whole modules (for which
            :func:`interventions.placement.adapted.load_adapted` is), or tensors that do not belong to the options or
            the model, that are damaged or that are missing.

    Warns:
        UserWarning: if the adapter names another model as its base.
    """
    lora, whole = read_peft(model, folder, source)
    if whole or lora is None:
        raise UserError(
            f"{folder} has whole modules (modules_to_save), which are no adapter: load it with "
            "interventions.placement.adapted.load_adapted, which changes the model too"
        )
    return lora


def read_peft(
    model: Model, folder: str | os.PathLike, source: str | None = None
) -> tuple[LoRA | None, dict[str, np.ndarray]]:
    """The adapter of a PEFT folder as :func:`load_peft` returns it (None if it has only whole modules), and the tensors
    of its whole modules by their names in the key table."""
    folder, maps = Path(folder), linear_maps(model)
    peft = read_peft_config(folder)
    parts, whole = read_tensors(folder, peft, model.config, maps)
    _warn_of_another_base(peft, model, source)
    if not parts:
        return None, whole
    modules = {part.module for part in parts.values()}
    rank, scales = max(map(peft.rank, modules)), {peft.scale(module) for module in modules}
    placed = defaultdict(list)
    for layer, site, part in sorted(parts):
        if part == "A" and layer < (maps[site].run or 1):
            placed[site].append(layer)
    if not placed:
        raise UserError(f"{folder} adapts only vision blocks that the model does not run: name another adapter")

    def matrix(layer: int, site: str, letter: str) -> np.ndarray:
        module, value = parts[layer, site, letter]
        if len(scales) > 1:
            # By its root each, the sign to A, so that a linear combination of adapters is PEFT's too.
            scale = peft.scale(module)
            value = value * np.float32(math.copysign(math.sqrt(abs(scale)), scale if letter == "A" else 1))
        ranks = "AB".index(letter)  # the axis
        return np.pad(value, [(0, rank - size if axis == ranks else 0) for axis, size in enumerate(value.shape)]).T

    def stacked(site: str, letter: str) -> jax.Array:
        return jnp.asarray(np.stack([matrix(layer, site, letter) for layer in placed[site]]))

    weights = {site: (stacked(site, "A"), stacked(site, "B")) for site in placed}
    magnitude = None
    if peft.dora:
        values = {site: [parts[layer, site, "magnitude"].value for layer in placed[site]] for site in placed}
        magnitude = {site: jnp.asarray(np.stack(each)) for site, each in values.items()}
    scale = min(scales) if len(scales) == 1 else 1.0
    slot = {site: _slots(maps[site], layers) for site, layers in placed.items()}
    return LoRA(weights, slot, jnp.float32(scale), magnitude=magnitude, dropout=peft.dropout), whole


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


def _slots(linear: LinearMap, layers: Sequence[int]) -> jax.Array:
    """The slot table of an adapter on a linear in these layers."""
    if linear.run is None:
        return jnp.int32(0)
    return null_slots(linear.run, len(layers)).at[jnp.array(layers)].set(jnp.arange(len(layers), dtype=jnp.int32))
