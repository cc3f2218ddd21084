"""LoRA above a frozen trunk: the layers below the lowest adapted one are run once for each example, not at every step.

Adapters are padded (:func:`interventions.placement.adapters.pad`), so that placements of one size have arrays of the
same shapes. They share a few compiled steps: one for each layer at which the trunk may end (:func:`first_layer`).
"""

import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from interventions.kinds.lora import LoRA, low_rank
from interventions.placement.adapters import adapter_parameters, compact, init_lora, lowest_layer, pad
from train.loop import WATCHING, LoopOptions, fit
from train.meter import About
from train.objective import Epochs, LabelOptions, answer_loss, linear, scaled_rate
from train.subsets import FREEZE
from vlm_jax import Model
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.inputs import Inputs
from vlm_jax.mesh.sharding import even, own_rows, placed_rows
from vlm_jax.nn.flops import lora_step_flops
from vlm_jax.prompts import Batch, Fitted, fitted, positions, room_of
from vlm_jax.runs.processes import fetch, first
from vlm_jax.runs.ranges import Range
from vlm_jax.sites import TEXT_LINEARS, Context, Intervention

#: P0's peak learning rate, at width 2560.
_LR = 2e-4
#: Labels of the trained arrays: A and B of every adapter. LoRA+ (Hayou et al. 2024) gives B the larger rate.
LABELS = ("lora_a", "lora_b")
#: Examples whose trunk is computed together.
_CHUNK = 32
#: The linears whose outputs the backward pass reads.
_WIDE = [name for names in TEXT_LINEARS.values() for name in names if name not in ("self_attn.o_proj", "mlp.down_proj")]
#: remat -> the sites whose values are kept for the backward pass, which computes the rest of a layer again.
_KEPT = {
    "full": (),
    "some": ("text.mlp.gate_proj", "text.mlp.up_proj"),
    "none": ("text.resid_mid", *(f"text.{name}" for name in _WIDE)),
}


@dataclasses.dataclass(frozen=True)
class LoRAOptions(LabelOptions, LoopOptions):
    """How LoRA is trained: P0's appendix D. The labels for --label-lr and --label-decay are lora_a and lora_b."""

    r: Annotated[int, Range(least=1)] = 64
    """Rank of LoRA."""
    alpha: float = 16.0
    """LoRA is scaled by alpha / r."""
    dropout: Annotated[float, Range(least=0, below=1)] = 0.05
    """Share of LoRA's inputs that are dropped in training."""
    epochs: Annotated[int, Range(least=1)] = 3
    """How often all training examples are seen."""
    batch: Annotated[int, Range(least=1)] = 4
    """Training examples of a micro-batch."""
    accumulation: Annotated[int, Range(least=1)] = 2
    """Micro-batches whose gradients are averaged in a step."""
    lr: float | None = None
    """Peak learning rate, which falls linearly to 0. By default P0's 2e-4 at width 2560, times 2560 / width."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the initial adapter, the order of the data and dropout."""
    remat: Literal["full", "some", "none"] = "some"
    """How much of a layer is computed again in the backward pass. full: all of it, which needs least memory; some: all
    except the outputs of the MLP's gate and up; none: only what is cheap."""
    trunk_gib: float = 4.0
    """Memory in GiB for the activations that enter the lowest adapted layer, of all examples. The rest goes to a
    temporary file."""

    def check_loop(self) -> None:
        super().check_loop()
        self.check_labels(LABELS)


@flax.struct.dataclass
class Adapted:
    """A model with the adapter that is trained.

    lowest: the first layer that is run, at or below the lowest one that the adapter touches. remat: see
    :class:`LoRAOptions`.
    """

    model: Model
    lora: LoRA
    lowest: int = flax.struct.field(pytree_node=False)
    remat: str = flax.struct.field(pytree_node=False, default="some")


def label(path: str) -> str:
    """The rule of :class:`Adapted`: A and B of the adapter are trained, the model and the slots are not."""
    if path.startswith("lora.weights."):
        return LABELS[int(path.rpartition(".")[2])]
    return FREEZE


#: The trunk ends at a multiple of this many layers.
_STRIDE = 2


def first_layer(lowest: int) -> int:
    """Where the trunk ends: at the lowest adapted layer or the one below it. So fewer steps have to be compiled, and on
    average half a layer is run without need (docs/lora.md)."""
    return lowest // _STRIDE * _STRIDE


@flax.struct.dataclass
class Trunk:
    """Examples as training reads them: the residual stream ``x (N, T, D)`` that enters a layer, which is computed once
    because no adapter changes it; DeepStack's features ``(N, K, T, D)``; the gold tokens."""

    x: jax.Array
    deepstack: jax.Array | None
    attention_mask: jax.Array
    position_ids: jax.Array
    is_image: jax.Array | None
    index: jax.Array
    valid: jax.Array
    target: jax.Array

    def take(self, rows) -> "Trunk":
        """Some of the examples, in memory."""
        return jax.tree.map(lambda a: np.asarray(a[rows]), self)

    def window(self, model: Model):
        return model.text.window(self.attention_mask, self.position_ids.swapaxes(0, 1), is_image=self.is_image)

    def run(self, model: Model, low: int, high: int, **options) -> jax.Array:
        """``x`` after layers ``low`` to ``high - 1``."""
        deepstack = None if self.deepstack is None else self.deepstack.swapaxes(0, 1)
        return model.text.scan(self.x, self.window(model), layers=(low, high), deepstack=deepstack, **options)[0]


@flax.struct.dataclass
class LayeredLoRA(Intervention):
    """LoRA as training runs it: with one slice of an array for each layer instead of slots, so that the backward pass
    writes each layer's gradient once.

    ``weights[site] = (A^T (L, r, in), B (L, r, out))``. A is transposed, because its gradient is then a matmul without
    a transposed copy of the layer's input, which would take several times as long on a CPU.
    """

    weights: dict[str, tuple[jax.Array, jax.Array]]
    used: dict[str, jax.Array]
    scale: jax.Array
    key: jax.Array
    dropout: float = flax.struct.field(pytree_node=False)
    everywhere: frozenset[str] = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, lora: LoRA, depth: int, lowest: int) -> "LayeredLoRA":
        weights, used = {}, {}
        for site, (a, b) in lora.weights.items():
            slot = jnp.minimum(lora.slot[site], len(a) - 1)
            weights[site] = a.swapaxes(1, 2)[slot], b[slot]
            used[site] = lora.slot[site] < len(a)
        # With as many slots as layers, almost every layer has an adapter: skipping the others costs more than it saves.
        everywhere = frozenset(site for site, (a, _) in lora.weights.items() if len(a) >= depth - lowest)
        key = jax.vmap(functools.partial(jax.random.fold_in, lora.key))(jnp.arange(depth))
        return cls(weights, used, jnp.full(depth, lora.scale), key, lora.dropout, everywhere)

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(self.weights)

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        a, b = self.weights[site]

        def delta(x):
            return low_rank(x, a.T, b, self.scale, site, self.key, self.dropout).astype(value.dtype)

        if site in self.everywhere:
            return value + jnp.where(self.used[site], delta(ctx.input), 0)
        return value + jax.lax.cond(self.used[site], delta, lambda x: jnp.zeros_like(value), ctx.input)


def loss(params: Adapted, batch: Trunk, key: jax.Array) -> jax.Array:
    """:func:`train.objective.answer_loss` of the gold tokens and the end of their turn. Layers below ``params.lowest``
    are not run; ``key`` is for dropout."""
    model, depth = params.model, params.model.config.text.num_hidden_layers
    lora = LayeredLoRA.of(params.lora.replace(key=key), depth, params.lowest)
    x = batch.run(model, params.lowest, depth, layered=(lora,), remat=_KEPT[params.remat] or True)
    return answer_loss(model, x, batch.index, batch.valid, batch.target)


@jax.jit
def _embed(model: Model, inputs: Inputs, index, valid) -> Trunk:
    """The examples as they enter layer 0, from :meth:`Inputs.turned` inputs."""
    (x, deepstack), _ = model.embed(inputs.turned())
    deepstack = None if deepstack is None else deepstack.swapaxes(0, 1)
    target = jnp.take_along_axis(inputs.input_ids, index, 1)
    return Trunk(x, deepstack, inputs.attention_mask, inputs.position_ids, inputs.is_image, index, valid, target)


@functools.partial(jax.jit, static_argnames="lowest")
def _raise(model: Model, data: Trunk, lowest: int) -> jax.Array:
    return data.run(model, 0, lowest, remat=True)  # with remat, layers are looked up and no part of the stack is copied


def embedded(model: Model, batch: Batch, size: int = _CHUNK, **where) -> Trunk:
    """The examples as they enter layer 0. That is the same for every placement, so it is computed once for all.

    Args:
        size: examples that are run together.
        where: ``gib`` and ``folder``: see :func:`stored`.
    """
    images = batch.inputs.images
    patches = 0 if images is None else images.patch_mask.shape[1]
    inputs, answers = batch.inputs, positions(batch.spans["answer"] | batch.spans["end"])

    def encode(rows: np.ndarray, at: np.ndarray) -> Fitted:
        aligned = inputs.take(rows, min(1, batch.images)).aligned(batch.images, patches, at)
        return Fitted(aligned, *(part[rows] for part in answers))

    return _embedded(model, encode, len(inputs.input_ids), size, **where)


def embedded_examples(model: Model, processor, examples: Sequence[Example], size: int = _CHUNK, **where) -> Trunk:
    """:func:`embedded` of examples whose images would not all fit in memory: only those that are run together are
    encoded at a time. With several processes, each encodes the examples that its devices run."""
    room = room_of(examples, processor, model.config)

    def encode(rows: np.ndarray, at: np.ndarray) -> Fitted:
        return fitted([examples[row] for row in rows], room, processor, model.config, at)

    return _embedded(model, encode, len(examples), size, **where)


def _embedded(
    model: Model, encode: Callable[[np.ndarray, np.ndarray], Fitted], count: int, size: int, **where
) -> Trunk:
    """The examples ``0`` to ``count - 1``. ``encode`` gets the numbers of some examples and the rows of a batch that
    they fill."""
    size = even(min(size, count))

    def parts() -> Iterator[Trunk]:
        process_rows = own_rows(size)
        for rows in _chunks(count, size):
            inputs, *answers = encode(rows[process_rows], process_rows)
            yield _embed(model, *placed_rows((inputs.turned(), *answers), size))

    return stored(parts(), count, **where)


def raised(model: Model, data: Trunk, lowest: int, size: int = _CHUNK, **where) -> Trunk:
    """Embedded examples as they enter layer ``lowest``."""
    count = len(data.x)
    size = even(min(size, count))
    if lowest:
        process_rows = own_rows(size)
        chunks = _chunks(count, size)
        parts = (_raise(model, placed_rows(data.take(rows[process_rows]), size), lowest) for rows in chunks)
        data = data.replace(x=stored(parts, count, **where))
    # Above the layers that DeepStack adds features to, they are not needed any more.
    unused = data.deepstack is not None and lowest >= data.deepstack.shape[1]
    return data.replace(deepstack=None) if unused else data


def trunk(model: Model, batch: Batch, lowest: int, size: int = _CHUNK) -> Trunk:
    """The examples' frozen part, in host memory."""
    return raised(model, embedded(model, batch, size), lowest, size)


def _chunks(count: int, size: int) -> np.ndarray:
    """Rows in chunks of one shape: the last one repeats the last row."""
    return np.arange(-(-count // size) * size).clip(max=count - 1).reshape(-1, size)


def stored(parts: Iterable, count: int, gib: float = np.inf, folder: Path | None = None):
    """The first ``count`` rows of a chunked pytree, as NumPy arrays: in memory if they take at most ``gib`` together,
    else in temporary files in ``folder`` (None: the system's folder), which vanish with the process.

    Raises:
        UserError: if the files do not fit on the disk.
    """
    arrays, structure, filled = [], None, 0
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
    """The model with an adapter on ``k`` modules, padded for training: all placements of ``k`` modules whose trunks end
    at the same layer have arrays of the same shapes."""
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
    """LoRA on the named modules, trained on encoded examples.

    Args:
        batch: the examples, or their trunk from :func:`embedded`, which many placements can share.
        name: of the training, for the progress bar and messages.
        folder: for checkpoints and ``metrics.jsonl``. A training that was killed goes on from its last checkpoint
            there, to the same adapter bit for bit (on CPU).
        ids: of the examples, for the error message if the loss stops being a number; their rows by default.

    Raises:
        UserError: if the folder holds another training's checkpoints; if the loss stops being a number.
    """
    key = jax.random.key(options.seed)
    lora = init_lora(model, names, r=options.r, alpha=options.alpha, dropout=options.dropout, key=key)
    params = prepared(model, lora, len(names), options.remat)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    # With several processes the folder is shared and may be a bucket, so temporary files go elsewhere.
    where = {"gib": options.trunk_gib, "folder": folder if jax.process_count() == 1 else None}
    data = batch if isinstance(batch, Trunk) else embedded(model, batch, **where)
    data = raised(model, data, params.lowest, **where)
    count, length = data.x.shape[:2]
    epochs = Epochs(count, options.epochs, options.batch, options.accumulation, options.seed)
    if folder is not None:
        compared = [field.name for field in dataclasses.fields(LoRAOptions) if field.name not in _NO_MATTER]
        settings = {option: getattr(options, option) for option in compared}
        check_same(folder / "training.json", {**settings, "modules": sorted(names), "examples": count})

    def ids_of(step: int) -> Sequence:
        rows = epochs.rows(step).ravel()
        return [ids[row] for row in rows] if ids else rows

    lr = options.lr if options.lr is not None else scaled_rate(_LR, model.config.text.hidden_size)
    transforms, rates = options.optimisers(LABELS, lr, functools.partial(linear, steps=epochs.steps))
    adapters = adapter_parameters(model, names, options.r)
    flops = lora_step_flops(model, params.lowest, epochs.step_size, length, data.index.shape[1], adapters)
    process_rows = own_rows(options.batch)
    trained = fit(
        loss,
        params,
        lambda step: data.take(epochs.rows(step)[:, process_rows]),
        transforms,
        label,
        steps=epochs.steps,
        rows=options.batch,
        seed=options.seed,
        name=name,
        folder=folder,
        options=options,
        about=About(rate=rates, ids=ids_of, tokens=epochs.step_size * length, flops=flops),
    )
    return compact(params.lora.replace(weights=fetch(trained.params.lora.weights)))


#: Options that change how a training runs, but not its result.
_NO_MATTER = ("remat", "trunk_gib", *WATCHING)


def check_same(file: Path, settings: dict) -> None:
    """Writes the settings of a training to a file; refuses to go on with another training's.

    Raises:
        UserError: if the file holds other settings.
    """
    first(lambda: _check_same(file, settings))


def _check_same(file: Path, settings: dict) -> None:
    settings = json.loads(json.dumps(settings))
    if file.is_file():
        kept = json.loads(file.read_text())
        differ = sorted(k for k in settings.keys() | kept.keys() if settings.get(k) != kept.get(k))
        if differ:
            shown = ", ".join(f"{k} {kept.get(k)!r} there, {settings.get(k)!r} here" for k in differ)
            raise UserError(f"{file.parent} holds another training ({shown}): choose another folder or delete it")
    else:
        scratch = file.with_suffix(".partial")
        scratch.write_text(json.dumps(settings, indent=2) + "\n")
        scratch.replace(file)
