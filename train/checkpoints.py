"""The states of a training on disk: written in the background, checked when they are read, the last two kept."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vlm_jax.errors import UserError
from vlm_jax.fingerprint import checksums
from vlm_jax.processes import fetch


def place(folder: Path, base: str | None) -> epath.Path:
    """Where the checkpoints of a training in ``folder`` are: there, or under ``base``, which may be a bucket."""
    if base is None:
        return epath.Path(folder.absolute()) / "checkpoints"
    return epath.Path(base) / str(folder).strip("/") / "checkpoints"


class Checkpoints:
    """Checkpoints of a pytree of arrays, in a folder or a bucket (``gs://``), a subfolder a step.

    A checkpoint appears under its name once it is whole, so that what a killed process was writing is never read. Each
    has a checksum of every array. Arrays that are split over a mesh are written by the processes that hold them, and
    may be read on another mesh or on one device.
    """

    def __init__(self, folder: epath.Path, fall_back: bool = False):
        self.folder, self.fall_back = folder, fall_back
        with self._said("cannot write checkpoints to"):
            self.manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2))

    def restore(self, state: Any) -> tuple[Any, int]:
        """The last state and the number of steps behind it; ``state`` itself, and 0, where there is none.

        Args:
            state: arrays of the shapes, precisions and places that are wanted.

        Raises:
            UserError: if it is damaged and there is no telling to fall back, or nothing to fall back to.
        """
        for step in sorted(self.manager.all_steps(), reverse=True):
            damage = None
            try:
                found = self._read(step, state)
            except Exception as error:  # TensorStore reports damage with errors of many kinds
                damage = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            else:
                if found is not None:
                    return found, step
                damage = "an array is not what was saved"
            earlier = [other for other in self.manager.all_steps() if other < step]
            if not earlier:
                raise UserError(f"{self.folder / str(step)} cannot be read ({damage}): delete it to begin again")
            if not self.fall_back:
                raise UserError(
                    f"{self.folder / str(step)} cannot be read ({damage}): --fall-back goes on from the one before it, "
                    f"of step {max(earlier)}"
                )
            self.manager.delete(step)
        return state, 0

    def _read(self, step: int, state: Any) -> Any:
        """The state of a step; None where a checksum is not the one that was saved."""
        leaves, treedef = jax.tree.flatten(state)
        wanted = [*map(_target, leaves), np.zeros((len(leaves), 2), np.uint32)]
        *found, sums = self.manager.restore(step, args=ocp.args.StandardRestore(wanted))
        return treedef.unflatten(found) if np.array_equal(_sums(found), sums) else None

    @property
    def latest(self) -> int | None:
        """The step of the last checkpoint."""
        return self.manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        leaves = jax.tree.leaves(state)
        sums = _sums(leaves)
        with self._said("cannot write a checkpoint to"):
            # Copies: the next step writes over these arrays while they are being saved.
            self.manager.save(step, args=ocp.args.StandardSave([*map(_copy, leaves), sums]))

    def close(self) -> None:
        """Waits for what is being written."""
        with self._said("cannot write a checkpoint to"):
            self.manager.wait_until_finished()
            self.manager.close()

    @contextlib.contextmanager
    def _said(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of Orbax, TensorStore, the file system or the bucket
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{what} {self.folder} ({reason}): free the disk or choose another folder") from None


def _whole(leaf: Any) -> bool:
    """Whether one process holds all of an array."""
    return not isinstance(leaf, jax.Array) or leaf.is_fully_replicated or jax.process_count() == 1


def _copy(leaf: Any) -> Any:
    return np.array(leaf) if _whole(leaf) else jnp.copy(leaf)


def _target(leaf: Any) -> Any:
    return np.asarray(leaf) if _whole(leaf) else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _sums(leaves: list) -> np.ndarray:
    return np.stack(fetch(checksums(leaves)))
