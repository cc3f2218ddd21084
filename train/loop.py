"""The one training loop: a jitted step over a trainable pytree, checkpoints that resume, metrics as JSON lines."""

import contextlib
import dataclasses
import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import optax
import tyro
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from train.checkpoints import Checkpoints, checkpoint_folder
from train.meter import About, Meter, Tracker, check_trackers, unsound
from vlm_jax.errors import UserError
from vlm_jax.mesh.sharding import placed, placed_rows
from vlm_jax.runs.processes import first, is_first, progress
from vlm_jax.runs.ranges import Range, check_ranges


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """How a training is kept and watched: what comes out of it does not depend on these."""

    save_every: Annotated[int, Range(least=1)] = 100
    """Steps between checkpoints of a training; a stopped one goes on from the last."""
    checkpoints: str | None = None
    """Where checkpoints go, such as gs://BUCKET/FOLDER; into the run folder by default."""
    fall_back: bool = False
    """Where the last checkpoint is damaged, go on from the one before it."""
    track: Annotated[tuple[Tracker, ...], tyro.conf.arg(metavar="TRACKER [TRACKER ...]")] = ()
    """Also report to tensorboard (package tensorboardX) or wandb; metrics.jsonl is always written."""
    profile_steps: Annotated[int, Range(least=0)] = 0
    """Profile so many steps, from the third on, into profile/ beside the metrics (xprof or TensorBoard shows them)."""

    def check_loop(self) -> None:
        """Refuses options that cannot be."""
        check_ranges(self)
        check_trackers(self.track)


#: Batches are made while the device works on those before. (One thread: a fast tokeniser is not made for more.)
_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)

#: Names of options that do not make a run another run.
WATCHING = tuple(field.name for field in dataclasses.fields(LoopOptions))


def forget(folder: Path, options: LoopOptions) -> None:
    """Removes the checkpoints of a training that is done."""
    first(lambda: checkpoint_folder(folder, options.checkpoints).rmtree(missing_ok=True))


class State(NamedTuple):
    """All that a step changes."""

    trainable: Any
    opt_state: Any


#: ``loss(trainable, frozen, batch, key) -> scalar``
Loss = Callable[[Any, Any, Any, jax.Array], jax.Array]


@functools.partial(jax.jit, static_argnames=("loss", "tx", "places"), donate_argnames="state")
def update(state: State, frozen, batch, key, *, loss: Loss, tx: optax.GradientTransformation, places=None):
    """One step. ``batch`` has a leading axis of micro-batches, whose gradients are averaged. ``places``: where the
    state's leaves lie, on a mesh."""
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
    state = State(optax.apply_updates(state.trainable, updates), opt_state)
    if places is not None:  # where it lay before, or the next step would be another program
        leaves, treedef = jax.tree.flatten(state)
        state = treedef.unflatten(map(jax.lax.with_sharding_constraint, leaves, places))
    return state, metrics


def fit(
    loss: Loss,
    trainable,
    frozen,
    batches: Callable[[int], Any],
    tx: optax.GradientTransformation,
    *,
    steps: int,
    rows: int | None = None,
    seed: int = 0,
    label: str = "train",
    folder: Path | None = None,
    options: LoopOptions | None = None,
    about: About | None = None,
    log_every: int = 10,
):
    """Trains for ``steps`` steps and returns the trained pytree: on the mesh in use, where there is one.

    Args:
        loss: see :data:`Loss`; its key differs from step to step and from micro-batch to micro-batch.
        trainable: the only arrays that change; ``frozen`` is handed to the loss as it is.
        batches: step -> batch with a leading micro-batch axis. A pure function of the step, so that a resumed run
            reads the same data; called in a thread, some steps ahead.
        rows: of a micro-batch, where ``batches`` gives only those that are this process's own
            (:func:`vlm_jax.mesh.sharding.own_rows`); all processes have whole batches where None.
        folder: where ``metrics.jsonl`` (:class:`train.meter.Meter`) and checkpoints go; nothing is written where None.
        options: how the training is kept and watched; no checkpoints where None. A run that finds a checkpoint goes on
            from it, and was it stopped at any moment, it loses the steps since.
        about: what the log is to know of the steps.

    On SIGTERM, which a scheduler sends some seconds before it takes the machine away, the step at work is finished and
    saved where checkpoints are, and the process ends with 143, as one does that the signal ended. Of several processes
    one that gets the signal is enough: all end after the same step.

    Raises:
        UserError: if the loss stops being a number, naming the step and its examples: the last checkpoint is of a step
            before it. If the folder cannot be written to, or its last checkpoint is damaged.
        SystemExit: on SIGTERM.
    """
    about = about or About()
    state, frozen, begun = placed(State(jax.tree.map(jnp.copy, trainable), tx.init(trainable))), placed(frozen), 0
    places = _places(state)
    with contextlib.ExitStack() as stack:
        checkpoints = meter = None
        profiled = 0
        if folder is not None and options is not None:
            profiled = options.profile_steps
            checkpoints = stack.enter_context(
                Checkpoints(checkpoint_folder(folder, options.checkpoints), options.fall_back)
            )
            state, begun = checkpoints.restore(state)
            if not begun and (folder / "metrics.jsonl").is_file() and is_first():
                print(f"{label}: no checkpoint in {checkpoints.folder}, begins at step 0", file=sys.stderr)
        if folder is not None:
            meter = Meter(folder, about, begun, options.track if options else (), label)
            stack.callback(meter.close)
        ends = stack.enter_context(_preempted())
        profile = stack.enter_context(contextlib.ExitStack())
        made = iter(grain.MapDataset.range(begun, steps).map(batches).to_iter_dataset(_AHEAD))
        stack.callback(made.close)
        unread: list[tuple[int, dict]] = []
        bar = progress(range(begun, steps), desc=label, initial=begun, total=steps, unit="step", mininterval=1.0)
        for step in stack.enter_context(bar):
            done = step + 1
            if profiled and done == begun + 3:
                profile.enter_context(jax.profiler.trace(str(folder / "profile")))
            key = jax.random.fold_in(jax.random.key(seed), step)
            batch = next(made)
            batch = placed(batch, None, "batch") if rows is None else placed_rows(batch, rows, axis=1)
            state, metrics = update(state, frozen, batch, key, loss=loss, tx=tx, places=places)
            unread.append((done, metrics))
            if profiled and done == begun + 2 + profiled:
                jax.block_until_ready(state)
                profile.close()
            logs = done % log_every == 0 or done == steps
            ending = ends(done)
            saves = checkpoints is not None and (done % options.save_every == 0 or done == steps or ending)
            if not logs and not saves and not ending:
                continue
            last = _read(unread, label, about, checkpoints)
            unread.clear()
            if logs:
                bar.set_postfix(loss=f"{last['loss']:.3f}")
                if meter is not None:
                    meter.log(done, last)
            if saves:
                checkpoints.save(done, state)
            if ending:
                on = "; run it again to go on" if saves else ""
                print(f"{label}: ended by SIGTERM after step {done} of {steps}{on}", file=sys.stderr)
                raise SystemExit(128 + signal.SIGTERM)
    return state.trainable


def _places(state: State) -> tuple | None:
    """Where the leaves of a state on a mesh lie; None without a mesh."""
    leaves = jax.tree.leaves(state)
    if all(isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding) for leaf in leaves):
        return tuple(leaf.sharding for leaf in leaves)
    return None


def _read(unread: list[tuple[int, dict]], label: str, about: About, checkpoints: Checkpoints | None) -> dict:
    """The last of some steps' metrics, once all are known to be numbers."""
    for done, metrics in unread:
        metrics = {name: float(metrics[name]) for name in sorted(metrics, key="loss".__ne__)}
        if (what := unsound(metrics)) is not None:
            on = "" if about.ids is None else f" (examples {', '.join(map(str, about.ids(done - 1)))})"
            kept = None if checkpoints is None else checkpoints.latest
            kept = f"; the checkpoint of step {kept} is kept" if kept else ""
            raise UserError(
                f"{label}: {what} at step {done}{on}: lower the learning rate or look at what it was given{kept}"
            )
    return metrics


@contextlib.contextmanager
def _preempted() -> Iterator[Callable[[int], bool]]:
    """Whether SIGTERM has come and the processes end after this step; until the block ends it does nothing else. (Only
    a main thread can ask.)"""
    if jax.process_count() > 1:  # JAX agrees with the others on a step
        yield multihost_utils.reached_preemption_sync_point
        return
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: came.is_set()
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield lambda step: came.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
