"""LoRA above a frozen trunk: what lies below the lowest adapted layer is run once per example and never again.

Where adapters sit is data, not shape (:func:`interventions.placement.adapters.pad`), so that placements of one size
share a few compiled steps: one for each of the layers at which the trunk may end (:func:`first_layer`).
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
import optax

from interventions.engine.cost import head_flops, layers_flops
from interventions.kinds.lora import LoRA, low_rank
from interventions.placement.adapters import adapter_parameters, compact, init_lora, lowest_layer, pad
from train.loop import WATCHING, LoopOptions, fit
from train.meter import About
from vlm_jax import Model
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.inputs import Inputs
from vlm_jax.mesh.sharding import even, own_rows, placed_rows
from vlm_jax.prompts import Batch, Fitted, fitted, positions, room_of
from vlm_jax.runs.processes import fetch, first
from vlm_jax.runs.ranges import Range
from vlm_jax.sites import TEXT_LINEARS, Context, Intervention

#: P0 trains with 2e-4 at width 2560. Adam's best rate falls with the width (muP), so narrower models get more.
_LR, _LR_WIDTH = 2e-4, 2560
#: Examples whose trunk is computed together.
_CHUNK = 32
#: The linears whose outputs the backward pass reads.
_WIDE = [name for names in TEXT_LINEARS.values() for name in names if name not in ("self_attn.o_proj", "mlp.down_proj")]
#: What ``remat`` keeps for the backward pass: the values at these sites; the rest of a layer is computed again there.
_KEPT = {
    "full": (),
    "some": ("text.mlp.gate_proj", "text.mlp.up_proj"),
    "none": ("text.resid_mid", *(f"text.{name}" for name in _WIDE)),
}


@dataclasses.dataclass(frozen=True)
class LoRAOptions(LoopOptions):
    """How LoRA is trained: P0's appendix D."""

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


@flax.struct.dataclass
class Frozen:
    """What training reads and never changes: the model, where the adapter sits, how it is scaled, and the first layer
    that is run: at or below the lowest one that the adapter touches."""

    model: Model
    slot: dict[str, jax.Array]
    scale: jax.Array
    dropout: float = flax.struct.field(pytree_node=False)
    lowest: int = flax.struct.field(pytree_node=False)
    remat: str = flax.struct.field(pytree_node=False, default="some")


#: The trunk ends at a multiple of this many layers.
_STRIDE = 2


def first_layer(lowest: int) -> int:
    """Where the trunk ends: at the lowest adapted layer or the one below it. Placements of a size that agree in this
    share a compiled step, for the price of half a layer that is run in vain on average (docs/lora.md)."""
    return lowest // _STRIDE * _STRIDE


@flax.struct.dataclass
class Trunk:
    """Examples as training reads them: the residual stream ``x (N, T, D)`` that enters a layer, which no adapter
    changes and which is therefore computed once; DeepStack ``(N, K, T, D)``; gold tokens."""

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

    def run(self, model: Model, low: int, high: int, **how) -> jax.Array:
        """``x`` after layers ``low`` to ``high - 1``."""
        deepstack = None if self.deepstack is None else self.deepstack.swapaxes(0, 1)
        return model.text.scan(self.x, self.window(model), layers=(low, high), deepstack=deepstack, **how)[0]


@flax.struct.dataclass
class LayeredLoRA(Intervention):
    """LoRA as training runs it: with an array slice for every layer instead of slots, so that the backward pass writes
    each layer's gradient once.

    ``weights[site] = (A^T (L, r, in), B (L, r, out))``: with A the other way round its gradient is a matmul that does
    not turn the layer's input over, which takes several times as long on CPU.
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
        # Where there are as many slots as layers, hardly a layer is without: skipping it costs more than it saves.
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


def loss(weights, frozen: Frozen, batch: Trunk, key: jax.Array) -> jax.Array:
    """Mean cross-entropy of the gold tokens and the end of their turn. Layers below ``frozen.lowest`` are not run."""
    model = frozen.model
    depth = model.config.text.num_hidden_layers
    lora = LayeredLoRA.of(LoRA(weights, frozen.slot, frozen.scale, key, frozen.dropout), depth, frozen.lowest)
    x = batch.run(model, frozen.lowest, depth, layered=(lora,), remat=_KEPT[frozen.remat] or True)
    return answer_loss(model, x, batch.index, batch.valid, batch.target)


def answer_loss(model: Model, x: jax.Array, index: jax.Array, valid: jax.Array, target: jax.Array) -> jax.Array:
    """Mean cross-entropy of the tokens ``target (B, A)`` at positions ``index``, of which ``valid`` count, given the
    last layer's output ``x (B, T, D)``. Only the positions before them are unembedded."""
    at = jnp.maximum(index - 1, 0)[..., None]
    logits = model.text.logits(model.text.norm(jnp.take_along_axis(x, at, 1)))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), target)
    return jnp.sum(losses * valid) / jnp.sum(valid)


@jax.jit
def _embed(model: Model, inputs: Inputs, index, valid) -> Trunk:
    """Of :meth:`Inputs.turned` inputs."""
    (x, deepstack), _ = model.embed(inputs.turned())
    deepstack = None if deepstack is None else deepstack.swapaxes(0, 1)
    target = jnp.take_along_axis(inputs.input_ids, index, 1)
    return Trunk(x, deepstack, inputs.attention_mask, inputs.position_ids, inputs.is_image, index, valid, target)


@functools.partial(jax.jit, static_argnames="lowest")
def _raise(model: Model, data: Trunk, lowest: int) -> jax.Array:
    return data.run(model, 0, lowest, remat=True)  # looks layers up, where a part of the stack would be a copy


def embedded(model: Model, batch: Batch, size: int = _CHUNK, **where) -> Trunk:
    """The examples as they enter layer 0: the same for every placement, so computed once for all of them.

    Args:
        size: examples that are run together.
        where: ``gib`` and ``folder``: see :func:`stored`.
    """
    images = batch.inputs.images
    patches = 0 if images is None else images.patch_mask.shape[1]
    inputs, answers = batch.inputs, positions(batch.spans["answer"] | batch.spans["end"])

    def fit(rows: np.ndarray, at: np.ndarray) -> Fitted:
        own = inputs.take(rows, min(1, batch.images)).aligned(batch.images, patches, at)
        return Fitted(own, *(part[rows] for part in answers))

    return _embedded(model, fit, len(inputs.input_ids), size, **where)


def embedded_examples(model: Model, processor, examples: Sequence[Example], size: int = _CHUNK, **where) -> Trunk:
    """:func:`embedded` of examples whose images would not all fit in memory: as many are encoded at a time as are run
    together, and of several processes each encodes those that its devices run."""
    room = room_of(examples, processor, model.config)

    def fit(rows: np.ndarray, at: np.ndarray) -> Fitted:
        return fitted([examples[row] for row in rows], room, processor, model.config, at)

    return _embedded(model, fit, len(examples), size, **where)


def _embedded(model: Model, fit: Callable[[np.ndarray, np.ndarray], Fitted], count: int, size: int, **where) -> Trunk:
    """The examples ``0`` to ``count - 1`` as ``fit`` encodes them: given the numbers of some, and which rows of a batch
    they are to be."""
    size = even(min(size, count))

    def parts() -> Iterator[Trunk]:
        own = own_rows(size)
        for rows in _chunks(count, size):
            inputs, *answers = fit(rows[own], own)
            yield _embed(model, *placed_rows((inputs.turned(), *answers), size))

    return stored(parts(), count, **where)


def raised(model: Model, data: Trunk, lowest: int, size: int = _CHUNK, **where) -> Trunk:
    """Embedded examples as they enter layer ``lowest``."""
    count = len(data.x)
    size = even(min(size, count))
    if lowest:
        own = own_rows(size)
        chunks = _chunks(count, size)
        parts = (_raise(model, placed_rows(data.take(rows[own]), size), lowest) for rows in chunks)
        data = data.replace(x=stored(parts, count, **where))
    # DeepStack ends below the adapters as a rule; then there is nothing of it to keep.
    over = data.deepstack is not None and lowest >= data.deepstack.shape[1]
    return data.replace(deepstack=None) if over else data


def trunk(model: Model, batch: Batch, lowest: int, size: int = _CHUNK) -> Trunk:
    """The examples' frozen part, in host memory."""
    return raised(model, embedded(model, batch, size), lowest, size)


def _chunks(count: int, size: int) -> np.ndarray:
    """Rows in chunks of one shape: the last one repeats the last row."""
    return np.arange(-(-count // size) * size).clip(max=count - 1).reshape(-1, size)


def stored(parts: Iterable, count: int, gib: float = np.inf, folder: Path | None = None):
    """The first ``count`` rows of a chunked pytree, as NumPy arrays: in memory while all of them together take no more
    than ``gib``, else in temporary files in ``folder`` (the system's where None), which vanish with the process.

    Raises:
        UserError: if the files do not fit on the disk.
    """
    made, treedef, at = [], None, 0
    for part in parts:
        leaves, treedef = jax.tree.flatten(fetch(part))
        if not made:
            row = sum(a.nbytes // len(a) for a in leaves)
            new = np.empty if row * count <= gib * 2**30 else functools.partial(_on_disk, folder)
            made = [new((count, *a.shape[1:]), a.dtype) for a in leaves]
        for whole, a in zip(made, leaves, strict=True):
            whole[at : at + len(a)] = a[: count - at]
        at += len(leaves[0])
    return treedef.unflatten(made)


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


@functools.cache
def optimiser(lr: float, steps: int) -> optax.GradientTransformation:
    """AdamW with a linear schedule (P0, appendix D). Cached, so that equal trainings share one compiled step."""
    return optax.adamw(schedule(lr, steps), weight_decay=0.0)


def schedule(lr: float, steps: int) -> optax.Schedule:
    """Linearly from ``lr`` to 0."""
    return optax.linear_schedule(lr, 0.0, steps)


def step_flops(model: Model, lowest: int, batch: int, length: int, answer: int) -> float:
    """Of the matmuls of a step that trains something above a frozen model, from layer ``lowest`` on: forward, and the
    gradients of the layers' inputs; frozen kernels have none (4 a parameter and token)."""
    depth = model.config.text.num_hidden_layers
    layers = (depth - lowest) / depth * layers_flops(model, batch, length)
    return 2 * (layers + head_flops(model, batch * answer))


def prepared(model: Model, lora: LoRA, k: int, remat: str) -> tuple[LoRA, Frozen]:
    """An adapter on ``k`` modules as it is trained, in arrays as all placements of ``k`` modules have them whose trunks
    end at the same layer; and what its training reads."""
    lowest = first_layer(lowest_layer(lora))
    padded = pad(lora, model, min(k, model.config.text.num_hidden_layers - lowest))
    return padded, Frozen(model, padded.slot, padded.scale, padded.dropout, lowest, remat)


def train_lora(
    model: Model,
    names: Sequence[str],
    batch: Batch | Trunk,
    options: LoRAOptions,
    label: str,
    folder: Path | None = None,
    ids: Sequence[str] = (),
) -> LoRA:
    """LoRA on the named modules, trained on encoded examples.

    Args:
        batch: the examples, or what :func:`embedded` made of them, which spares many placements the same work.
        folder: for checkpoints and ``metrics.jsonl``: a training that was killed goes on from the last checkpoint
            there, to the same adapter bit for bit (on CPU).
        ids: of the examples, to name them where the loss stops being a number; their rows are named where there are
            none.

    Raises:
        UserError: if the folder holds another training's checkpoints; if the loss stops being a number.
    """
    key = jax.random.key(options.seed)
    lora = init_lora(model, names, r=options.r, alpha=options.alpha, dropout=options.dropout, key=key)
    padded, frozen = prepared(model, lora, len(names), options.remat)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    # Several processes share their folder, and the disk under it may be a bucket.
    where = {"gib": options.trunk_gib, "folder": folder if jax.process_count() == 1 else None}
    data = batch if isinstance(batch, Trunk) else embedded(model, batch, **where)
    data = raised(model, data, frozen.lowest, **where)
    count = len(data.x)
    step_size = options.batch * options.accumulation
    per_epoch = max(1, count // step_size)
    steps = per_epoch * options.epochs
    if folder is not None:
        named = [field.name for field in dataclasses.fields(LoRAOptions) if field.name not in _NO_MATTER]
        plan = {name: getattr(options, name) for name in named}
        check_same(folder / "training.json", {**plan, "modules": sorted(names), "examples": count})

    def rows_of(step: int) -> np.ndarray:
        rng = np.random.default_rng([options.seed, step // per_epoch])
        order = np.resize(rng.permutation(count), per_epoch * step_size)
        return order.reshape(per_epoch, options.accumulation, options.batch)[step % per_epoch]

    own = own_rows(options.batch)
    lr = options.lr if options.lr is not None else _LR * _LR_WIDTH / model.config.text.hidden_size
    tx, tokens = optimiser(lr, steps), step_size * data.x.shape[1]
    flops = step_flops(model, frozen.lowest, step_size, data.x.shape[1], data.index.shape[1])
    about = About(
        rate=schedule(lr, steps),
        ids=lambda step: [ids[row] for row in rows_of(step).ravel()] if ids else rows_of(step).ravel(),
        tokens=tokens,
        flops=flops + 6.0 * adapter_parameters(model, names, options.r) * tokens,
    )
    weights = fit(
        loss,
        padded.weights,
        frozen,
        lambda step: data.take(rows_of(step)[:, own]),
        tx,
        steps=steps,
        rows=options.batch,
        seed=options.seed,
        label=label,
        folder=folder,
        options=options,
        about=about,
    )
    return compact(padded.replace(weights=fetch(weights)))


#: Options that change how a training runs and not what comes out.
_NO_MATTER = ("remat", "trunk_gib", *WATCHING)


def check_same(file: Path, plan: dict) -> None:
    """Writes what a training is, or refuses to go on with another one."""
    first(lambda: _check_same(file, plan))


def _check_same(file: Path, plan: dict) -> None:
    plan = json.loads(json.dumps(plan))
    if file.is_file():
        found = json.loads(file.read_text())
        differ = sorted(k for k in plan.keys() | found.keys() if plan.get(k) != found.get(k))
        if differ:
            shown = ", ".join(f"{k} {found.get(k)!r} there, {plan.get(k)!r} here" for k in differ)
            raise UserError(f"{file.parent} holds another training ({shown}): choose another folder or delete it")
    else:
        scratch = file.with_suffix(".partial")
        scratch.write_text(json.dumps(plan, indent=2) + "\n")
        scratch.replace(file)
