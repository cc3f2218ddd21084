"""Checkpoints of a training: written in the background, checked when they are read. The last two are kept."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vlm_jax.checkpoints.fingerprint import checksums
from vlm_jax.errors import UserError
from vlm_jax.mesh.sharding import placed
from vlm_jax.runs.processes import fetch, gathered


def checkpoint_folder(folder: Path, base: str | None) -> epath.Path:
    """The folder for the checkpoints of a training in ``folder``: inside it, or under ``base``, which may be a
    bucket."""
    absolute = os.path.abspath(folder)
    if base is None:
        return epath.Path(absolute) / "checkpoints"
    base = base if "://" in base else os.path.abspath(base)
    return epath.Path(base) / absolute.strip("/") / "checkpoints"


class Checkpoints:
    """Checkpoints of a pytree of arrays, in a folder or a bucket (``gs://``), with one subfolder for each step.

    A checkpoint gets its name when it is complete, so one that a killed process left half-written is never read. It has
    a checksum of every array. If an array is split over a mesh, each process writes the parts that it holds; the array
    can be read on another mesh or on one device.

    Use it as ``with Checkpoints(...) as checkpoints``. Leaving the block waits for checkpoints that are being written.
    """

    def __init__(self, folder: epath.Path, fall_back: bool = False):
        self.folder, self.fall_back = folder, fall_back
        with self._user_errors("cannot write checkpoints to"):
            self.manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is None:
            self._close()
        elif jax.process_count() == 1 or issubclass(kind, UserError | SystemExit):
            # After other errors some processes may be gone, and closing would wait for them.
            with contextlib.suppress(UserError):  # only the error that ended the block is reported
                self._close()

    def _close(self) -> None:
        with self._user_errors("cannot write a checkpoint to"):
            self.manager.wait_until_finished()
            self.manager.close()

    def restore(self, state: Any) -> tuple[Any, int]:
        """The state of the last checkpoint, on the devices of ``state``, and its step. Without a checkpoint: ``state``
        and 0.

        Raises:
            UserError: if the last checkpoint is damaged, and falling back is not allowed or there is no earlier one.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        for number, step in enumerate(steps):
            restored, damage = self._read(step, state)
            if damage is None:
                for damaged in steps[:number]:
                    self.manager.delete(damaged)
                return restored, step
            earlier = steps[number + 1 :]
            if not earlier:
                raise UserError(f"{self.folder / str(step)} cannot be read ({damage}): delete it to begin again")
            if not self.fall_back:
                raise UserError(
                    f"{self.folder / str(step)} cannot be read ({damage}): --fall-back goes on from the one before it, "
                    f"of step {earlier[0]}"
                )
        return state, 0

    def _read(self, step: int, state: Any) -> tuple[Any, str | None]:
        """The state of a step and None, or None and a description of the damage. All processes get the same answer."""
        leaves, structure = jax.tree.flatten(state)
        arrays, sums, damage = [], np.empty(0), None
        try:
            wanted = [*map(_target, leaves), np.zeros((len(leaves), 2), np.uint32)]
            *arrays, sums = self.manager.restore(step, args=ocp.args.StandardRestore(wanted))
        except jax.errors.JaxRuntimeError:  # too little memory, or another process ended: the files may be complete
            raise
        except Exception as error:  # TensorStore raises many kinds of errors for damaged files
            damage = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        damage = next(filter(None, gathered(damage)), None)
        if damage is None and not np.array_equal(_sums(arrays), sums):
            damage = "an array is not what was saved"
        return (None, damage) if damage else (placed(structure.unflatten(arrays)), None)

    @property
    def latest(self) -> int | None:
        """The step of the last checkpoint."""
        return self.manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Starts to write the state after the ``step``-th step. The writing goes on in the background."""
        leaves = jax.tree.leaves(state)
        sums = _sums(leaves)
        with self._user_errors("cannot write a checkpoint to"):
            # The arrays are copied, because the next step overwrites them while the checkpoint is being written.
            self.manager.save(step, args=ocp.args.StandardSave([*map(_copy, leaves), sums]))

    @contextlib.contextmanager
    def _user_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError:  # from the devices or another process
            raise
        except Exception as error:  # from Orbax, TensorStore, the file system or the bucket
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{what} {self.folder} ({reason}): free the disk or choose another folder") from None


class Saving:
    """Decides which steps of a training are saved: every ``every``-th one and the last one; none without
    checkpoints."""

    def __init__(self, checkpoints: Checkpoints | None, every: int):
        self.checkpoints, self.every = checkpoints, every

    @property
    def folder(self) -> epath.Path | None:
        return None if self.checkpoints is None else self.checkpoints.folder

    def latest(self) -> int | None:
        """The step of the last checkpoint."""
        return None if self.checkpoints is None else self.checkpoints.latest

    def restore(self, state: Any) -> tuple[Any, int]:
        """See :meth:`Checkpoints.restore`."""
        return (state, 0) if self.checkpoints is None else self.checkpoints.restore(state)

    def due(self, step: int, last: bool) -> bool:
        """Whether the state after the ``step``-th step must be saved. ``last``: whether no step follows it."""
        return self.checkpoints is not None and (last or step % self.every == 0)

    def save(self, step: int, state: Any) -> None:
        """See :meth:`Checkpoints.save`. Call it only for a step that is :meth:`due`."""
        assert self.checkpoints is not None
        self.checkpoints.save(step, state)


@contextlib.contextmanager
def saving(folder: epath.Path | None, every: int = 1, fall_back: bool = False) -> Iterator[Saving]:
    """A context in which every ``every``-th step of a training is saved to a folder; none if the folder is None."""
    if folder is None:
        yield Saving(None, every)
        return
    with Checkpoints(folder, fall_back) as checkpoints:
        yield Saving(checkpoints, every)


def _split(leaf: Any) -> bool:
    """Whether an array is split over devices."""
    return isinstance(leaf, jax.Array) and not leaf.is_fully_replicated


def _copy(leaf: Any) -> Any:
    return jnp.copy(leaf) if _split(leaf) else np.array(leaf)


def _target(leaf: Any) -> Any:
    if _split(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return np.empty(leaf.shape, leaf.dtype)


def _sums(leaves: list) -> np.ndarray:
    return np.stack(fetch(checksums(leaves)))
