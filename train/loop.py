"""The one training loop: a jitted step over a trainable pytree, checkpoints that resume, metrics as JSON lines."""

import contextlib
import functools
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
    count = jax.tree.leaves(batch)[0].shape[0]
    keys = jax.random.split(key, count)

    def gradients(micro, key):
        return jax.value_and_grad(loss)(state.trainable, frozen, micro, key)

    def accumulate(total, scanned):
        value, grads = gradients(*scanned)
        return jax.tree.map(jnp.add, total, grads), value

    if count == 1:  # nothing to add up: no second set of gradients
        losses, grads = gradients(jax.tree.map(lambda a: a[0], batch), keys[0])
    else:
        zeros = jax.tree.map(jnp.zeros_like, state.trainable)
        grads, losses = jax.lax.scan(accumulate, zeros, (batch, keys))
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
        save_every: checkpoint interval in steps, the last step included; a run that finds a checkpoint goes on from
            it, and was it stopped at any moment, it loses the steps since.

    On SIGTERM, which a scheduler sends some seconds before it takes the machine away, the step at work is finished and,
    with ``save_every``, saved, and the process ends with 143, as one does that the signal ended.

    Raises:
        UserError: if the loss stops being a number.
        SystemExit: on SIGTERM.
    """
    state, first = State(jax.tree.map(jnp.copy, trainable), tx.init(trainable)), 0
    with contextlib.ExitStack() as stack:
        manager = None
        if folder is not None and save_every:
            options = ocp.CheckpointManagerOptions(max_to_keep=1)
            manager = ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)
            stack.callback(manager.close)  # once it has finished what it writes in the background
            if (latest := manager.latest_step()) is not None:
                leaves, treedef = jax.tree.flatten(state)
                state = treedef.unflatten(manager.restore(latest, args=ocp.args.StandardRestore(leaves)))
                first = latest
        if folder is not None:
            _forget_after(folder / "metrics.jsonl", first)
        ends = stack.enter_context(_preempted())
        started = time.perf_counter()
        steps_left = tqdm(range(first, steps), desc=label, initial=first, total=steps, unit="step", mininterval=1.0)
        for step in stack.enter_context(steps_left):
            key = jax.random.fold_in(jax.random.key(seed), step)
            state, metrics = update(state, frozen, batches(step), key, loss=loss, tx=tx)
            done = step + 1
            logs = done % log_every == 0 or done == steps
            ending = ends()
            saves = manager is not None and (done % save_every == 0 or done == steps or ending)
            if not logs and not saves and not ending:
                continue
            metrics = {name: float(value) for name, value in metrics.items()}
            for name, value in metrics.items():
                if not np.isfinite(value):
                    what = name.replace("_", " ")
                    raise UserError(f"{label}: the {what} is {value} at step {done}: lower the learning rate")
            if logs:
                steps_left.set_postfix(loss=f"{metrics['loss']:.3f}")
            if logs and folder is not None:
                record = {"step": done, **metrics, "seconds": round(time.perf_counter() - started, 2)}
                with open(folder / "metrics.jsonl", "a") as log:
                    log.write(json.dumps(record) + "\n")
            if saves:
                # Copies: the next step writes over these arrays while they are being saved.
                leaves = [np.array(leaf) for leaf in jax.tree.leaves(state)]
                manager.save(done, args=ocp.args.StandardSave(leaves))
            if ending:
                on = "; run it again to go on" if saves else ""
                print(f"{label}: ended by SIGTERM after step {done} of {steps}{on}", file=sys.stderr)
                raise SystemExit(128 + signal.SIGTERM)
    return state.trainable


@contextlib.contextmanager
def _preempted() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come since; until the block ends it does nothing else. (Only a main thread can ask.)"""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def _forget_after(file: Path, step: int) -> None:
    """Takes out of a log what a stopped session wrote after its last checkpoint, or broke off while writing."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break
    scratch = file.with_suffix(".part")
    scratch.write_text("".join(kept))
    scratch.replace(file)
