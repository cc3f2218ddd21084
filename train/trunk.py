"""LoRA above a frozen trunk: what lies below the lowest adapted layer is run once per example and never again."""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from interventions.adapters import init_lora, lowest_layer
from interventions.kinds import LoRA
from train.loop import fit
from vlm_jax import Model
from vlm_jax.inputs import Inputs
from vlm_jax.prompts import Batch, positions

#: P0 trains with 2e-4 at width 2560. Adam's best rate falls with the width (muP), so narrower models get more.
_LR, _LR_WIDTH = 2e-4, 2560


@dataclasses.dataclass(frozen=True)
class LoRAOptions:
    """How LoRA is trained: P0's appendix D."""

    r: int = 64
    """Rank of LoRA."""
    alpha: float = 16.0
    """LoRA is scaled by alpha / r."""
    dropout: float = 0.05
    """Dropout of LoRA's inputs."""
    epochs: int = 3
    batch: int = 4
    """Examples per micro-batch."""
    accumulation: int = 2
    """Micro-batches per step."""
    lr: float | None = None
    """Peak learning rate, falling linearly to 0; by default P0's 2e-4 at width 2560, times 2560 / width."""
    seed: int = 0
    """Seed of adapters, data order, dropout and tracing noise."""


@flax.struct.dataclass
class Frozen:
    """What training reads and never changes: the model, where the adapter sits, how it is scaled."""

    model: Model
    slot: dict[str, jax.Array]
    scale: jax.Array
    dropout: float = flax.struct.field(pytree_node=False)
    lowest: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Trunk:
    """Examples as training reads them: the residual stream ``x (N, T, D)`` that enters the lowest adapted layer,
    which no adapter changes and which is therefore computed once; DeepStack ``(N, K, T, D)``; gold tokens."""

    x: jax.Array
    deepstack: jax.Array | None
    attention_mask: jax.Array
    position_ids: jax.Array
    is_image: jax.Array | None
    index: jax.Array
    valid: jax.Array
    target: jax.Array


def loss(weights, frozen: Frozen, batch: Trunk, key: jax.Array) -> jax.Array:
    """Mean cross-entropy of the gold tokens and the end of their turn. Layers below ``frozen.lowest`` are not run."""
    text = frozen.model.text
    lora = LoRA(weights, frozen.slot, frozen.scale, key, frozen.dropout)
    window = text.window(batch.attention_mask, batch.position_ids.swapaxes(0, 1), is_image=batch.is_image)
    deepstack = None if batch.deepstack is None else batch.deepstack.swapaxes(0, 1)
    x, _, _ = text.scan(
        batch.x, window, layers=(frozen.lowest, None), deepstack=deepstack, interventions=(lora,), remat=True
    )
    logits = text.logits(text.norm(jnp.take_along_axis(x, jnp.maximum(batch.index - 1, 0)[..., None], 1)))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch.target)
    return jnp.sum(losses * batch.valid) / jnp.sum(batch.valid)


@functools.partial(jax.jit, static_argnames="lowest")
def _trunk(model: Model, inputs: Inputs, index, valid, *, lowest: int) -> Trunk:
    embedded, _ = model.embed(inputs)
    x, deepstack = embedded
    if lowest:
        window = model.window(inputs)
        x, _, _ = model.text.scan(x, window, layers=(0, lowest), deepstack=deepstack)
    # DeepStack ends below the adapters as a rule; then there is nothing of it to keep.
    deepstack = None if deepstack is None or lowest >= len(deepstack) else deepstack.swapaxes(0, 1)
    target = jnp.take_along_axis(inputs.input_ids, index, 1)
    positions = inputs.position_ids.swapaxes(0, 1)
    return Trunk(x, deepstack, inputs.attention_mask, positions, inputs.is_image, index, valid, target)


def trunk(model: Model, batch: Batch, lowest: int, size: int = 32) -> Trunk:
    """The training examples' frozen part, in host memory."""
    count = len(batch.inputs.input_ids)
    index, valid = positions(batch.spans["answer"] | batch.spans["end"])
    rows = np.arange(-(-count // size) * size).clip(max=count - 1).reshape(-1, size)
    parts = [_trunk(model, batch.inputs.take(r, size * batch.images), index[r], valid[r], lowest=lowest) for r in rows]
    return jax.tree.map(lambda *a: np.concatenate(a)[:count], *jax.device_get(parts))


@functools.cache
def optimiser(lr: float, steps: int) -> optax.GradientTransformation:
    """AdamW with a linear schedule (P0, appendix D). Cached, so that equal trainings share one compiled step."""
    return optax.adamw(optax.linear_schedule(lr, 0.0, steps), weight_decay=0.0)


def train_lora(model: Model, names: list[str], batch: Batch, options: LoRAOptions, label: str) -> LoRA:
    """LoRA on the named modules, trained on the encoded examples."""
    key = jax.random.key(options.seed)
    lora = init_lora(model, names, r=options.r, alpha=options.alpha, dropout=options.dropout, key=key)
    lowest = lowest_layer(lora)
    data = trunk(model, batch, lowest)
    count = len(data.x)
    step_size = options.batch * options.accumulation
    per_epoch = max(1, count // step_size)
    steps = per_epoch * options.epochs

    def batches(step: int) -> Trunk:
        rng = np.random.default_rng([options.seed, step // per_epoch])
        order = np.resize(rng.permutation(count), per_epoch * step_size)
        rows = order.reshape(per_epoch, options.accumulation, options.batch)[step % per_epoch]
        return jax.tree.map(lambda a: a[rows], data)

    frozen = Frozen(model, lora.slot, lora.scale, options.dropout, lowest)
    lr = options.lr if options.lr is not None else _LR * _LR_WIDTH / model.config.text.hidden_size
    tx = optimiser(lr, steps)
    weights = fit(loss, lora.weights, frozen, batches, tx, steps=steps, seed=options.seed, label=label)
    return lora.replace(weights=weights)
