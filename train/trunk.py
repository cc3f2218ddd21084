"""Trains LoRA above a frozen trunk. The trunk is the layers below the lowest one with an adapter: it is run once for
each example instead of at every step.

Adapters are padded (:func:`interventions.placement.adapters.pad`), so that all placements of the same number of modules
have arrays of the same shapes. They share a few compiled steps: one for each layer at which the trunk may end
(:func:`first_layer`).
"""

import functools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from interventions.kinds.lora import Adapter, LoRA
from interventions.placement.adapters import adapter_parameters, compact, lowest_layer, pad
from train.adapter import Adapted, LoRAOptions, fit_adapter
from train.objective import Epochs, answer_loss
from vlm_jax import Model
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.inputs import Inputs
from vlm_jax.mesh.sharding import even, own_rows, placed_rows
from vlm_jax.nn.flops import lora_step_flops
from vlm_jax.nn.visibility import Tokens
from vlm_jax.processor import Processor
from vlm_jax.prompts import Batch, Fitted, fitted, positions, room_of
from vlm_jax.runs.processes import fetch
from vlm_jax.sites import TEXT_LINEARS, Context, Intervention
from vlm_jax.typing import Array, ArrayLike

#: Number of examples whose trunk is computed together.
_CHUNK = 32
#: The linears whose outputs the backward pass reads.
_WIDE = [name for names in TEXT_LINEARS.values() for name in names if name not in ("self_attn.o_proj", "mlp.down_proj")]
#: remat -> the sites whose values are kept for the backward pass, which computes the rest of a layer again.
_KEPT = {
    "full": (),
    "some": ("text.mlp.gate_proj", "text.mlp.up_proj"),
    "none": ("text.resid_mid", *(f"text.{name}" for name in _WIDE)),
}


#: The number of layers in a trunk is a multiple of this.
_STRIDE = 2


def first_layer(lowest: int) -> int:
    """The first layer above the trunk: the lowest layer with an adapter, or the layer below it.

    Rounding down halves the number of steps to compile. The cost is half a layer, on average, that is run at every step
    though it has no adapter (docs/lora.md).
    """
    return lowest // _STRIDE * _STRIDE


@flax.struct.dataclass
class Trunk:
    """Examples as training reads them.

    x: the residual stream that enters a layer, computed once because no adapter changes it. deepstack: the image
    features that DeepStack adds after the first K layers; None if the model has no DeepStack or these layers are below.
    index, valid, target: positions of the gold tokens, which of them are not padding, and the tokens
    (:func:`train.objective.answer_loss`). In training, all arrays have one more leading axis: the micro-batches.
    """

    x: Float[ArrayLike, "*micro examples tokens width"]
    deepstack: Float[ArrayLike, "*micro examples layers tokens width"] | None
    tokens: Tokens
    position_ids: Int[ArrayLike, "*micro examples 3 tokens"]
    index: Int[ArrayLike, "*micro examples answer"]
    valid: Bool[ArrayLike, "*micro examples answer"]
    target: Int[ArrayLike, "*micro examples answer"]

    def take(self, rows) -> "Trunk":
        """Some of the examples, copied to memory."""
        return jax.tree.map(lambda a: np.asarray(a[rows]), self)

    def window(self, model: Model):
        """Positions and masks for the decoder (:meth:`vlm_jax.nn.decoder.Decoder.window`)."""
        return model.text.window(self.tokens, self.position_ids.swapaxes(0, 1))

    def run(self, model: Model, low: int, high: int, **options) -> Float[Array, "examples tokens width"]:
        """``x`` after layers ``low`` to ``high - 1``."""
        deepstack = None if self.deepstack is None else self.deepstack.swapaxes(0, 1)
        return model.text.scan(self.x, self.window(model), layers=(low, high), deepstack=deepstack, **options)[0]


@flax.struct.dataclass
class LayeredLoRA(Intervention):
    """LoRA in the form that training runs: each array has one slice for each layer, not one for each slot, so the
    backward pass writes each layer's gradient once.

    weights: site -> ``(A^T (L, r, in), B (L, r, out))``. A is transposed, so that its gradient is a matmul that needs
    no transposed copy of the layer's input. With the copy it would take several times as long on a CPU.
    magnitude: DoRA's, site -> ``(L, out)``.
    used: site -> whether the layer has an adapter, ``(L,)`` bool. everywhere: the sites at which nearly every layer has
    one.
    """

    weights: dict[str, tuple[jax.Array, jax.Array]]
    used: dict[str, jax.Array]
    magnitude: dict[str, jax.Array] | None
    scale: jax.Array
    key: jax.Array
    dropout: float = flax.struct.field(pytree_node=False)
    everywhere: frozenset[str] = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, lora: LoRA, depth: int, lowest: int) -> "LayeredLoRA":
        weights, used, magnitude = {}, {}, None if lora.magnitude is None else {}
        for site, (a, b) in lora.weights.items():
            slot = jnp.minimum(lora.slot[site], len(a) - 1)
            weights[site] = a.swapaxes(1, 2)[slot], b[slot]
            if magnitude is not None and lora.magnitude is not None:
                magnitude[site] = lora.magnitude[site][slot]
            used[site] = lora.slot[site] < len(a)
        # With as many slots as layers, almost every layer has an adapter: skipping the others costs more than it saves.
        everywhere = frozenset(site for site, (a, _) in lora.weights.items() if len(a) >= depth - lowest)
        assert lora.key is not None, "training needs a random key for dropout"
        key = jax.vmap(functools.partial(jax.random.fold_in, lora.key))(jnp.arange(depth))
        return cls(weights, used, magnitude, jnp.full(depth, lora.scale), key, lora.dropout, everywhere)

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(self.weights)

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        a, b = self.weights[site]

        def delta(x):
            adapter = Adapter(a.T, b, self.scale, None if self.magnitude is None else self.magnitude[site])
            return adapter.added(x, value, ctx.linear, site, self.key, self.dropout).astype(value.dtype)

        if site in self.everywhere:
            return value + jnp.where(self.used[site], delta(ctx.input), 0)
        return value + jax.lax.cond(self.used[site], delta, lambda x: jnp.zeros_like(value), ctx.input)


def adapter_loss(params: Adapted, batch: Trunk, key: jax.Array) -> Float[Array, ""]:
    """:func:`train.objective.answer_loss` of the gold tokens and the token that ends their turn. Layers below
    ``params.lowest`` are not run. ``key`` is the random key of dropout."""
    model, depth = params.model, params.model.config.text.num_hidden_layers
    lora = LayeredLoRA.of(params.lora.replace(key=key), depth, params.lowest)
    x = batch.run(model, params.lowest, depth, layered=(lora,), remat=_KEPT[params.remat] or True)
    return answer_loss(model, x, batch.index, batch.valid, batch.target)


@jax.jit
def _embed(model: Model, inputs: Inputs, index, valid) -> Trunk:
    """The examples as they enter layer 0. The inputs are :meth:`vlm_jax.Inputs.turned`."""
    (x, deepstack), _ = model.embed(inputs.turned())
    deepstack = None if deepstack is None else deepstack.swapaxes(0, 1)
    target = jnp.take_along_axis(inputs.input_ids, index, 1)
    return Trunk(x, deepstack, inputs.tokens, inputs.position_ids, index, valid, target)


@functools.partial(jax.jit, static_argnames="lowest")
def _raise(model: Model, data: Trunk, lowest: int) -> Float[Array, "examples tokens width"]:
    return data.run(model, 0, lowest, remat=True)  # remat reads one layer at a time and copies no part of the stack


def embedded_batch(model: Model, batch: Batch, size: int = _CHUNK, **storage) -> Trunk:
    """The examples as they enter layer 0. This does not depend on the placement, so all placements can share it.

    Args:
        size: the number of examples that are run together.
        storage: ``gib`` and ``folder`` of :func:`stored`.
    """
    images = batch.inputs.images
    patches = 0 if images is None else images.patch_mask.shape[1]
    inputs, answers = batch.inputs, positions(batch.spans["answer"] | batch.spans["end"])

    def encode(rows: np.ndarray, at: np.ndarray) -> Fitted:
        aligned = inputs.take(rows, min(1, batch.images)).aligned(batch.images, patches, at)
        index, valid = (part[rows] for part in answers)
        return Fitted(aligned, index, valid)

    return _embedded(model, encode, len(inputs.input_ids), size, **storage)


def embedded_examples(
    model: Model, processor: Processor, examples: Sequence[Example], size: int = _CHUNK, **storage
) -> Trunk:
    """:func:`embedded_batch` for examples whose images do not all fit into memory: only the examples that are run
    together are encoded at a time. With several processes, each encodes the examples that its devices run."""
    room = room_of(examples, processor, model.config)

    def encode(rows: np.ndarray, at: np.ndarray) -> Fitted:
        return fitted([examples[row] for row in rows], room, processor, model.config, at)

    return _embedded(model, encode, len(examples), size, **storage)


def _embedded(
    model: Model, encode: Callable[[np.ndarray, np.ndarray], Fitted], count: int, size: int, **storage
) -> Trunk:
    """The examples ``0`` to ``count - 1`` as they enter layer 0.

    Args:
        encode: numbers of examples, and their rows in the batch -> the encoded examples.
    """
    size = even(min(size, count))

    def parts() -> Iterator[Trunk]:
        process_rows = own_rows(size)
        for rows in _chunks(count, size):
            part = encode(rows[process_rows], process_rows)
            yield _embed(model, *placed_rows((part.inputs.turned(), part.index, part.valid), size))

    return stored(parts(), count, **storage)


def raised(model: Model, data: Trunk, lowest: int, size: int = _CHUNK, **storage) -> Trunk:
    """The examples as they enter layer ``lowest``. ``data`` holds them as they enter layer 0."""
    count = len(data.x)
    size = even(min(size, count))
    if lowest:
        process_rows = own_rows(size)
        chunks = _chunks(count, size)
        parts = (_raise(model, placed_rows(data.take(rows[process_rows]), size), lowest) for rows in chunks)
        data = data.replace(x=stored(parts, count, **storage))
    # The features are not needed if all layers to which DeepStack adds them belong to the trunk.
    unused = data.deepstack is not None and lowest >= data.deepstack.shape[1]
    return data.replace(deepstack=None) if unused else data


def trunk(model: Model, batch: Batch, lowest: int, size: int = _CHUNK) -> Trunk:
    """The examples as they enter layer ``lowest``, in host memory."""
    return raised(model, embedded_batch(model, batch, size), lowest, size)


def _chunks(count: int, size: int) -> np.ndarray:
    """Row numbers in chunks of ``size``, one chunk a row. The last chunk is filled up by repeating the last number."""
    return np.arange(-(-count // size) * size).clip(max=count - 1).reshape(-1, size)


def stored(parts: Iterable, count: int, gib: float = np.inf, folder: Path | None = None):
    """The first ``count`` rows of a pytree that comes in parts, as NumPy arrays. They are in memory if they take at
    most ``gib`` GiB together; otherwise in temporary files, which are deleted when the process ends.

    Args:
        folder: where the temporary files are; None for the system's folder.

    Raises:
        UserError: if the files do not fit on the disk.
    """
    structure: Any = None
    arrays, filled = [], 0
    for part in parts:
        leaves, structure = jax.tree.flatten(fetch(part))
        if not arrays:
            row_bytes = sum(a.nbytes // len(a) for a in leaves)
            new = np.empty if row_bytes * count <= gib * 2**30 else functools.partial(_on_disk, folder)
            arrays = [new((count, *a.shape[1:]), a.dtype) for a in leaves]
        for whole, a in zip(arrays, leaves, strict=True):
            whole[filled : filled + len(a)] = a[: count - filled]
        filled += len(leaves[0])
    return structure.unflatten(arrays)


def _on_disk(folder: Path | None, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise UserError(
                f"{folder or tempfile.gettempdir()} has no room for {size / 2**30:.1f} GiB of frozen activations "
                f"({error.strerror}): train on fewer examples, or raise --trunk-gib if there is memory"
            ) from None
        return np.memmap(file, dtype, "r+", shape=shape)


def prepared(model: Model, lora: LoRA, k: int, remat: str) -> Adapted:
    """The model with an adapter on ``k`` modules that is padded for training. All placements of ``k`` modules whose
    trunks end at the same layer get arrays of the same shapes, so they share one compiled step."""
    lowest = first_layer(lowest_layer(lora))
    return Adapted(model, pad(lora, model, min(k, model.config.text.num_hidden_layers - lowest)), lowest, remat)


def train_lora(
    model: Model,
    names: Sequence[str],
    batch: Batch | Trunk,
    options: LoRAOptions,
    name: str,
    folder: Path | None = None,
    ids: Sequence[str] = (),
) -> LoRA:
    """Trains LoRA on the named modules.

    Args:
        names: the modules that get an adapter, such as ``["L2-attn"]``.
        batch: the encoded examples, or the result of :func:`embedded_batch`, which many placements can share.
        name: the name of the training, for the progress bar and messages.
        folder: the folder for checkpoints and ``metrics.jsonl``. A training that was killed continues from the last
            checkpoint there, and on a CPU its adapter is the same bit for bit.
        ids: the examples' ids, for the error message if the loss stops being a number. By default their row numbers.

    Raises:
        UserError: if the folder holds checkpoints of another training, or if the loss stops being a number.
    """
    params = prepared(model, options.begin(model, names), len(names), options.remat)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    # With several processes the folder is shared and may be a bucket, so temporary files go elsewhere.
    storage = {"gib": options.trunk_gib, "folder": folder if jax.process_count() == 1 else None}
    data = batch if isinstance(batch, Trunk) else embedded_batch(model, batch, **storage)
    data = raised(model, data, params.lowest, **storage)
    count, length = data.x.shape[:2]
    epochs = Epochs(count, options.epochs, options.batch, options.accumulation, options.seed)
    adapters = adapter_parameters(model, names, options.r, options.use_dora)
    flops = lora_step_flops(model, params.lowest, epochs.step_size, length, data.index.shape[1], adapters)
    process_rows = own_rows(options.batch)

    def step_batch(step: int) -> Trunk:
        return data.take(epochs.rows(step)[:, process_rows])

    about = {"tokens": epochs.step_size * length, "flops": flops}
    return compact(fit_adapter(adapter_loss, params, step_batch, epochs, options, names, name, folder, ids, **about))
