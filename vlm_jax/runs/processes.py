"""Several processes as one command, each started with the same arguments: what one of them decides, what all know.

Training is one program on a mesh over all processes. Traces and answers of different samples have nothing to say to
each other, so there the mesh falls apart into teams (:func:`apart`), each with a whole model and its own samples: as
many as ``data`` allows, so that a model that no single process can hold is still one team's.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from vlm_jax.errors import UserError

#: How long a process may give no sign of life before the others end, and how long one that ends waits for them.
LOST_SECONDS, END_SECONDS = 60, 30


def join(text: str) -> None:
    """Joins the processes that ``--processes`` names. From here on the first alone writes to standard output.

    Raises:
        UserError: if it names none, or if they cannot be found.
    """
    how: dict[str, Any] = {}
    if text != "auto":
        address, *numbers = text.split(",")
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or len(numbers) != 2 or not all(n.strip().isdecimal() for n in numbers):
            raise UserError(f"--processes {text!r}: give auto, or HOST:PORT,COUNT,INDEX such as 10.0.0.1:9000,4,0")
        count, index = map(int, numbers)
        if index >= count:
            raise UserError(f"--processes {text!r}: the index of {count} processes is 0 to {count - 1}, not {index}")
        how = {"coordinator_address": address, "num_processes": count, "process_id": index}
    # XLA's scheduler for concurrency on CPUs lets the collectives of a program overtake each other, in each process in
    # another way, and gloo takes them as they come: the processes end over parts of different sizes.
    ordered = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    if "cpu" in (jax.config.jax_platforms or "cpu"):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ordered}".strip()
    try:
        timeouts = {"heartbeat_timeout_seconds": LOST_SECONDS, "shutdown_timeout_seconds": END_SECONDS}
        jax.distributed.initialize(**how, **timeouts)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--processes {text}: cannot join ({reason}): start every process of the job with this command, and name "
            "HOST:PORT,COUNT,INDEX where no Slurm, GKE, TPU VM or MPI says who they are"
        ) from None
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def is_first() -> bool:
    """Whether this process writes files and shows progress."""
    return jax.process_index() == 0


def first(make: Callable[[], Any]) -> Any:
    """What ``make`` gives in the first process, in all of them; none goes on before it is done.

    Args:
        make: called in the first process alone; returns what JSON has. A :class:`UserError` is raised in all.
    """
    return everywhere(lambda: make() if is_first() else None)[0]


def everywhere(make: Callable[[], Any]) -> list[Any]:
    """What ``make`` gives in each process, in their order, in all of them.

    Args:
        make: returns what JSON has. The :class:`UserError` of one process is raised in all.
    """
    if jax.process_count() == 1:
        return [make()]
    try:
        said = [make(), None]
    except UserError as error:
        said = [None, str(error)]
    told = gathered(said)
    for _, refused in told:
        if refused is not None:
            raise UserError(refused)
    return [value for value, _ in told]


def gathered(value: Any) -> list[Any]:
    """What every process has, as JSON has it, in their order, in all of them."""
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([own.size]))[:, 0]
    # A power of two, so that few programs serve all sizes.
    padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)
    padded[: own.size] = own
    parts = multihost_utils.process_allgather(padded)
    return [json.loads(part[:size].tobytes()) for part, size in zip(parts, sizes, strict=True)]


def fetch(tree: Any, keep: bool = True) -> Any:
    """The arrays of a pytree in host memory, whole, in every process that keeps them (elsewhere, None for each); one
    after the other, and all processes must ask at once."""

    def whole(leaf):
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf) if keep else None

    return jax.tree.map(whole, tree)


def progress(*args: Any, **how: Any) -> tqdm:
    """A progress bar with an ETA, in the first process."""
    return tqdm(*args, disable=not is_first(), **how)


class Team(NamedTuple):
    """Processes that work on the same samples: the ``index``-th of ``count``; and whether this one writes for them."""

    index: int = 0
    count: int = 1
    writes: bool = True

    def own(self, total: int) -> range:
        """Which of ``total`` samples are this team's."""
        return range(self.index, total, self.count)


def team_of(data: int) -> Team:
    """This process's team on a mesh with an axis ``data`` of this size."""
    processes, here = jax.process_count(), jax.process_index()
    count = math.gcd(data, processes)
    size = processes // count
    return Team(here // size, count, here % size == 0)


@contextlib.contextmanager
def apart(*trees: Any) -> Iterator[tuple]:
    """Within it, the mesh in use is that of this process's team. Yields the team, and the pytrees as they lie there:
    the same buffers, of which each team has a whole set, since no parameter is split over ``data``."""
    if jax.process_count() == 1:
        yield (Team(), *trees)
        return
    whole = jax.sharding.get_mesh()
    team = team_of(whole.shape["data"])
    devices = np.split(whole.devices, team.count)[team.index]
    mesh = Mesh(devices, whole.axis_names, axis_types=whole.axis_types)

    def narrowed(leaf):
        if not isinstance(leaf, jax.Array) or not isinstance(leaf.sharding, NamedSharding):
            return leaf
        assert "data" not in jax.tree.leaves(tuple(leaf.sharding.spec)), "a parameter is split over data"
        place = NamedSharding(mesh, leaf.sharding.spec)
        return jax.make_array_from_single_device_arrays(
            leaf.shape, place, [shard.data for shard in leaf.addressable_shards]
        )

    moved = trees if team.count == 1 else jax.tree.map(narrowed, trees)
    with jax.set_mesh(mesh):
        yield (team, *moved)
