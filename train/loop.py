"""The one training loop: a jitted step over a trainable pytree, checkpoints that resume, metrics as JSON lines."""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from tqdm import tqdm

from vlm_jax.errors import UserError


class State(NamedTuple):
    """All that a step changes."""

    trainable: Any
    opt_state: Any


#: ``loss(trainable, frozen, batch, key) -> scalar``
Loss = Callable[[Any, Any, Any, jax.Array], jax.Array]


@functools.partial(jax.jit, static_argnames=("loss", "tx"), donate_argnames="state")
def update(state: State, frozen, batch, key, *, loss: Loss, tx: optax.GradientTransformation):
    """One step. ``batch`` has a leading axis of micro-batches, whose gradients are averaged."""

    def accumulate(total, scanned):
        micro, key = scanned
        value, grads = jax.value_and_grad(loss)(state.trainable, frozen, micro, key)
        return jax.tree.map(jnp.add, total, grads), value

    count = jax.tree.leaves(batch)[0].shape[0]
    zeros = jax.tree.map(jnp.zeros_like, state.trainable)
    grads, losses = jax.lax.scan(accumulate, zeros, (batch, jax.random.split(key, count)))
    grads = jax.tree.map(lambda g: g / count, grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
    metrics = {"loss": losses.mean(), "grad_norm": optax.tree.norm(grads)}
    return State(optax.apply_updates(state.trainable, updates), opt_state), metrics


def fit(
    loss: Loss,
    trainable,
    frozen,
    batches: Callable[[int], Any],
    tx: optax.GradientTransformation,
    *,
    steps: int,
    seed: int = 0,
    label: str = "train",
    folder: Path | None = None,
    save_every: int = 0,
    log_every: int = 10,
):
    """Trains for ``steps`` steps and returns the trained pytree.

    Args:
        loss: see :data:`Loss`; its key differs from step to step and from micro-batch to micro-batch.
        trainable: the only arrays that change; ``frozen`` is handed to the loss as it is.
        batches: step -> batch with a leading micro-batch axis. A pure function of the step, so that a resumed
            run reads the same data.
        folder: where metrics (``metrics.jsonl``) and checkpoints go; nothing is written where None.
        save_every: checkpoint interval in steps; a run that finds a checkpoint goes on from it.

    Raises:
        UserError: if the loss stops being a number.
    """
    state, first = State(jax.tree.map(jnp.copy, trainable), tx.init(trainable)), 0
    manager = None
    if folder is not None and save_every:
        options = ocp.CheckpointManagerOptions(max_to_keep=1, save_interval_steps=save_every)
        manager = ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)
        if (latest := manager.latest_step()) is not None:
            leaves, treedef = jax.tree.flatten(state)
            state = treedef.unflatten(manager.restore(latest, args=ocp.args.StandardRestore(leaves)))
            first = latest
    started = time.perf_counter()
    with tqdm(range(first, steps), desc=label, initial=first, total=steps, unit="step", mininterval=1.0) as bar:
        for step in bar:
            key = jax.random.fold_in(jax.random.key(seed), step)
            state, metrics = update(state, frozen, batches(step), key, loss=loss, tx=tx)
            if (step + 1) % log_every == 0 or step + 1 == steps:
                metrics = {name: float(value) for name, value in metrics.items()}
                if not jnp.isfinite(metrics["loss"]):
                    raise UserError(
                        f"{label}: the loss is {metrics['loss']} at step {step + 1}: lower the learning rate"
                    )
                bar.set_postfix(loss=f"{metrics['loss']:.3f}")
                if folder is not None:
                    record = {"step": step + 1, **metrics, "seconds": round(time.perf_counter() - started, 2)}
                    with open(folder / "metrics.jsonl", "a") as log:
                        log.write(json.dumps(record) + "\n")
            if manager is not None:
                manager.save(step + 1, args=ocp.args.StandardSave(jax.tree.leaves(state)))
    if manager is not None:
        manager.wait_until_finished()
        manager.close()
    return state.trainable
