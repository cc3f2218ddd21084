"""LoRA adapters: creates them for a placement, counts their parameters, saves and loads them as PEFT folders."""

import json
import math
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from interventions.kinds.lora import LoRA
from interventions.modules import check_names, linears
from vlm_jax import Model
from vlm_jax.checkpoints.leaves import leaf_name, named_leaves
from vlm_jax.errors import UserError, nearest
from vlm_jax.families import FAMILIES
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
    and the base model's compiled program runs it."""

    def folded(path, kernel):
        site = leaf_name(path).replace("text.layers.", "text.").removesuffix(".kernel")
        if site not in lora.weights:
            return kernel
        a, b = lora.weights[site]
        layers = np.flatnonzero(np.asarray(lora.slot[site]) < len(a))
        slots = lora.slot[site][layers]
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
        save_file(tensors, unfinished / "adapter_model.safetensors", metadata={"format": "pt"})
        (unfinished / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)


def load_peft(model: Model, folder: Path) -> LoRA:
    """The LoRA of a PEFT folder as an intervention.

    Raises:
        UserError: for a folder without an adapter, a module that the model lacks, or a shape that does not fit.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder} is not a readable PEFT folder ({error}): name one that holds adapter_config.json"
        ) from None
    if not isinstance(config, dict):
        raise UserError(f"{folder}/adapter_config.json does not hold a JSON object: name a PEFT folder")
    if (
        config.get("peft_type") != "LORA"
        or config.get("use_rslora")
        or config.get("rank_pattern")
        or config.get("alpha_pattern")
    ):
        raise UserError(f"{folder}: only plain LoRA with one rank for all modules is supported")
    r, alpha = config.get("r"), config.get("lora_alpha")
    if not (isinstance(r, int) and r > 0 and isinstance(alpha, int | float)):
        raise UserError(
            f"{folder}/adapter_config.json has r = {r!r}, lora_alpha = {alpha!r}: both must be numbers above 0"
        )
    start = f"base_model.model.{FAMILIES[model.config.family].layers}."
    known = [name for names in TEXT_LINEARS.values() for name in names]
    placed, halves = [], {}
    base = "base_model.model."
    for saved, tensor in tensors.items():
        # Adapters from older transformers have the modules' older names.
        name = base + FAMILIES[model.config.family].in_table(saved.removeprefix(base))
        layer, _, rest = name.removeprefix(start).partition(".")
        linear, _, half = rest.removesuffix(".weight").rpartition(".")
        fits = name.startswith(start) and layer.isdigit() and linear in known and half in ("lora_A", "lora_B")
        if not fits or int(layer) >= model.config.text.num_hidden_layers:
            raise UserError(
                f"{folder}: the model has no module for the adapter tensor {name!r}; was it made for another model?"
            )
        shape = _shape(model, linear)
        if tensor.shape != ((config["r"], shape[0]) if half == "lora_A" else (shape[1], config["r"])):
            raise UserError(f"{folder}: {name} has shape {tensor.shape}, which does not fit the model")
        halves[int(layer), linear, half] = jnp.asarray(tensor.T)
        placed.append((int(layer), linear))
    missing = [
        f"{layer}.{linear}"
        for layer, linear in placed
        for h in ("lora_A", "lora_B")
        if (layer, linear, h) not in halves
    ]
    if missing or not placed:
        raise UserError(
            f"{folder}: lora_A and lora_B of every module are needed, some are missing ({', '.join(missing)})"
        )
    placed = _layers_by_linear(set(placed))

    def stacked(linear: str, half: str) -> jax.Array:
        return jnp.stack([halves[layer, linear, half] for layer in placed[linear]])

    weights = {f"text.{name}": (stacked(name, "lora_A"), stacked(name, "lora_B")) for name in placed}
    return LoRA(
        weights,
        _slots(model, placed),
        jnp.float32(config["lora_alpha"] / config["r"]),
        dropout=config.get("lora_dropout", 0.0),
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
