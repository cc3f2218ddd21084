"""The training loop that all trainings share: steps, checkpoints, and a log of metrics."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import grain
import jax
import optax
import tyro
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool

from train.checkpoints import Saving, checkpoint_folder, saving
from train.meter import About, Meter, Tracker, check_trackers
from train.preemption import end, preemption
from train.profiling import Profile
from train.readings import Readings
from train.step import Loss, State, Step, step_bytes, update
from train.subsets import Label, all_trained, partitioned, split
from vlm_jax.mesh.sharding import placed, placed_rows
from vlm_jax.runs.processes import first, is_first, progress
from vlm_jax.runs.ranges import Range, check_ranges


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """How a training is saved and watched. These options do not change its result."""

    save_every: Annotated[int, Range(least=1)] = 100
    """Number of steps from one checkpoint to the next. A stopped training continues from the last checkpoint."""
    checkpoints: str | None = None
    """Folder or bucket for the checkpoints, such as gs://BUCKET/FOLDER. By default they are in the run folder."""
    fall_back: bool = False
    """If the last checkpoint is damaged, continue from the one before it instead of stopping with an error."""
    track: Annotated[tuple[Tracker, ...], tyro.conf.arg(metavar="TRACKER [TRACKER ...]")] = ()
    """Also write the log of the training to tensorboard (needs the package tensorboardX) or wandb. The file
    metrics.jsonl is always written."""
    profile_steps: Annotated[int, Range(least=0)] = 0
    """Number of steps to profile, beginning with the third. The profile goes to profile/, beside metrics.jsonl; xprof
    and TensorBoard show it."""
    step_memory: bool = False
    """Also write to the log what memory a step needs on one device, as its compiled program states it. The step is
    compiled once more for this, or read from the cache of compiled programs."""

    def check_loop(self) -> None:
        """Raises a UserError for a number outside its range, or for a tracker that is not installed."""
        check_ranges(self)
        check_trackers(self.track)


#: Batches are made while the device works on earlier ones. One thread, because fast tokenisers are not thread-safe.
_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)

#: Options that may differ when a run continues.
WATCHING = tuple(field.name for field in dataclasses.fields(LoopOptions))


def forget(folder: Path, options: LoopOptions) -> None:
    """Removes the checkpoints of a finished training."""
    first(lambda: checkpoint_folder(folder, options.checkpoints).rmtree(missing_ok=True))


class Trained(NamedTuple):
    """The result of a training."""

    params: Any
    """The whole pytree of parameters, trained and frozen."""
    counters: Any = None
    alive: Bool[Array, " members"] | None = None
    """Which members were trained to the end; None if there are no members."""


def fit(
    loss: Loss,
    params: Any,
    batches: Callable[[int], Any],
    transforms: Mapping[str, optax.GradientTransformation],
    label: Label = all_trained,
    *,
    steps: int,
    rows: int | None = None,
    seed: int = 0,
    clip: float | None = None,
    project: Callable[[Any], Any] | None = None,
    counters: Any = None,
    members: int | None = None,
    name: str = "train",
    folder: Path | None = None,
    options: LoopOptions | None = None,
    about: About | None = None,
    log_every: int = 10,
) -> Trained:
    """Trains some leaves of a pytree for ``steps`` steps, on the mesh in use if there is one.

    Leaves that ``label`` freezes stay bit-equal. They are not differentiated, not copied, and not in the optimiser's
    state.

    Args:
        loss: see :data:`train.step.Loss`; its key differs from step to step and from micro-batch to micro-batch.
        params: a pytree of all arrays that the loss reads besides the batch: a model, interventions, or both.
        batches: step -> batch, whose arrays have a leading axis of micro-batches. It must be a pure function of the
            step, so that a resumed run reads the same data. It is called in a thread, some steps ahead.
        transforms: label -> optimiser of the leaves with this label.
        label: path of a leaf -> its label; the label "freeze" (:data:`train.subsets.FREEZE`) has no optimiser.
        rows: the number of rows of a micro-batch, if ``batches`` returns only the rows of this process
            (:func:`vlm_jax.mesh.sharding.own_rows`); None if it returns whole batches in every process.
        clip: the largest global norm of the gradients, over all labels; with members, of each member's gradients.
        project: a function of the pytree that is applied after each update, for constraints such as rows of norm 1. It
            returns the pytree with changed trained leaves; changes to frozen leaves have no effect.
        counters: a pytree of arrays that the loss gets and returns changed. They get no gradients.
        members: how many trainings run side by side; a mesh divides them among its devices. The loss returns one loss
            for each of them (as from jax.vmap), and every trained leaf has a leading axis of this size. Each member has
            its own optimiser. A member whose loss or gradient stops being a number keeps its parameters from before and
            is reported; the others go on.
        name: the name of the training, for the progress bar and messages.
        folder: the folder for ``metrics.jsonl`` (:class:`train.meter.Meter`) and checkpoints; None writes nothing.
        options: how the training is saved and watched; None saves no checkpoints. If there is a checkpoint, the
            training continues from it, so a stopped training loses only the steps since its last checkpoint.
        about: facts about the steps, for the log.
        log_every: the number of steps from one line of the log to the next.

    On SIGTERM (:mod:`train.preemption`) the current step is finished, its state is saved if checkpoints are, and the
    process ends with code 143.

    Raises:
        UserError: if the loss stops being a number; the message names the step and its examples, and the last
            checkpoint is from a step before it. If the folder cannot be written to. If the last checkpoint is damaged.
        SystemExit: on SIGTERM.
    """
    about = about or About()
    trained, rest = split(params, label)
    step = Step(loss, partitioned(transforms, label, clip), project, members)
    # Members are independent, so each device can have some of them. (Several processes could then not read each other's
    # counts of living members, so there every device has all.)
    divided = ["batch"] if members and jax.process_count() == 1 else []
    state, rest = placed(step.begin(trained, counters), *divided), placed(rest)
    step = dataclasses.replace(step, places=_places(state))
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(_saving(folder, options))
        state, begun = _restored(state, checkpoints, folder, name)
        meter = None
        if folder is not None:
            meter = stack.enter_context(Meter(folder, about, begun, options.track if options else (), name))
        ends = stack.enter_context(preemption())
        profile = stack.enter_context(_profile(folder, options, begun))
        made = stack.enter_context(_prefetched(batches, begun, steps))
        readings = Readings(name, about, checkpoints.latest, state.alive)
        bar = progress(range(begun, steps), desc=name, initial=begun, total=steps, unit="step", mininterval=1.0)
        for number in stack.enter_context(bar):
            done = number + 1
            batch = next(made)
            batch = placed(batch, None, "batch") if rows is None else placed_rows(batch, rows, axis=1)
            profile.before(done)
            inputs = rest, batch, jax.random.fold_in(jax.random.key(seed), number)
            state, metrics = update(state, *inputs, step=step)
            if number == begun and meter is not None and options and options.step_memory:
                meter.step_bytes = step_bytes(state, *inputs, step=step)
            profile.after(done, state)
            readings.add(done, metrics)
            ending = ends(done)
            logs = done % log_every == 0 or done == steps
            saves = checkpoints.due(done, last=done == steps or ending)
            if logs or saves or ending:
                metrics = readings.read()
            if logs:
                bar.set_postfix(loss=f"{metrics['loss']:.3f}")
            if logs and meter is not None:
                meter.log(done, metrics)
            if saves:
                checkpoints.save(done, state)
            if ending:
                end(name, done, steps, saves)
    return Trained(rest.joined(state.trained), state.counters, state.alive)


def _saving(folder: Path | None, options: LoopOptions | None) -> contextlib.AbstractContextManager[Saving]:
    if folder is None or options is None:
        return saving(None)
    return saving(checkpoint_folder(folder, options.checkpoints), options.save_every, options.fall_back)


def _restored(state: State, checkpoints: Saving, folder: Path | None, name: str) -> tuple[State, int]:
    """The state of the last checkpoint, and the number of steps that led to it. Prints a note if there is a log but no
    checkpoint."""
    state, begun = checkpoints.restore(state)
    logged = folder is not None and (folder / "metrics.jsonl").is_file()
    if checkpoints.folder is not None and logged and not begun and is_first():
        print(f"{name}: no checkpoint in {checkpoints.folder}, begins at step 0", file=sys.stderr)
    return state, begun


def _profile(folder: Path | None, options: LoopOptions | None, begun: int) -> Profile:
    if folder is None or options is None:
        return Profile(None, begun, 0)
    return Profile(folder / "profile", begun, options.profile_steps)


@contextlib.contextmanager
def _prefetched(batches: Callable[[int], Any], begun: int, steps: int) -> Iterator[Iterator[Any]]:
    """The batches of steps ``begun`` to ``steps - 1``. A thread makes them ahead of their steps."""
    made = iter(grain.MapDataset.range(begun, steps).map(batches).to_iter_dataset(_AHEAD))
    try:
        yield made
    finally:
        made.close()


def _places(state: State) -> tuple | None:
    """The shardings of a state's leaves on a mesh; None without a mesh."""
    leaves = jax.tree.leaves(state)
    if all(isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding) for leaf in leaves):
        return tuple(leaf.sharding for leaf in leaves)
    return None
