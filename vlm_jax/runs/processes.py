"""Runs one command on several processes, which are all started with the same arguments, and exchanges values.

Training is one program on a mesh over all processes. Traces and answers of different samples are independent, so for
them the mesh is divided into teams (:func:`apart`). Each team has a whole model and works on its share of the samples.
The mesh's axis ``data`` sets the number of teams. A model that is too large for one process is divided among the
several processes of a team.
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

#: After this many seconds without a sign of life a process counts as lost, and the others end.
#: At its end, a process waits this many seconds for the others.
LOST_SECONDS, END_SECONDS = 60, 30


def join(text: str) -> None:
    """Joins the processes of a job. Afterwards only the first process writes to standard output.

    Args:
        text: the value of ``--processes``: "auto" or "HOST:PORT,COUNT,INDEX".

    Raises:
        UserError: if the text has another form, or if the processes cannot be reached.
    """
    address_options: dict[str, Any] = {}
    if text != "auto":
        address, *numbers = text.split(",")
        host, _, port = address.rpartition(":")
        possible = port.isdecimal() and len(port) < 6 and 0 < int(port) < 2**16
        if not host or not possible or len(numbers) != 2 or not all(n.strip().isdecimal() for n in numbers):
            raise UserError(f"--processes {text!r}: give auto, or HOST:PORT,COUNT,INDEX such as 10.0.0.1:9000,4,0")
        count, index = map(int, numbers)
        if count < 1:
            raise UserError(f"--processes {text!r}: a job has at least 1 process, not {count}")
        if index >= count:
            raise UserError(f"--processes {text!r}: the index of {count} processes is 0 to {count - 1}, not {index}")
        address_options = {"coordinator_address": address, "num_processes": count, "process_id": index}
    # XLA's concurrency scheduler on CPUs may reorder a program's collectives, differently in each process. gloo matches
    # collectives by their order, so parts of different sizes would meet and the processes would end.
    ordered_collectives = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    if "cpu" in (jax.config.jax_platforms or "cpu"):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ordered_collectives}".strip()
    try:
        timeouts: dict[str, Any] = {"heartbeat_timeout_seconds": LOST_SECONDS, "shutdown_timeout_seconds": END_SECONDS}
        jax.distributed.initialize(**address_options, **timeouts)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--processes {text}: cannot join ({reason}): start every process of the job with this command, and give "
            "HOST:PORT,COUNT,INDEX unless Slurm, GKE, a TPU VM or MPI gives the addresses"
        ) from None
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def is_first() -> bool:
    """Whether this process writes files and shows progress."""
    return jax.process_index() == 0


def first(make: Callable[[], Any]) -> Any:
    """Calls ``make`` in the first process and returns its value in all processes, which wait for it.

    Args:
        make: called only in the first process; returns a value that JSON can represent. Its :class:`UserError` is
            raised in all processes.
    """
    return everywhere(lambda: make() if is_first() else None)[0]


def everywhere(make: Callable[[], Any]) -> list[Any]:
    """Calls ``make`` in every process and returns the list of all values, in the order of the processes, in every
    process.

    Args:
        make: returns a value that JSON can represent. A :class:`UserError` in one process is raised in all.
    """
    if jax.process_count() == 1:
        return [make()]
    try:
        outcome = [make(), None]
    except UserError as error:
        outcome = [None, str(error)]
    outcomes = gathered(outcome)
    for _, message in outcomes:
        if message is not None:
            raise UserError(message)
    return [value for value, _ in outcomes]


def gathered(value: Any) -> list[Any]:
    """The list of the ``value`` of every process, in the order of the processes. The values must fit into JSON."""
    if jax.process_count() == 1:
        return [value]
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([encoded.size]))[:, 0]
    # Sizes are padded to a power of two, so that few programs are compiled.
    padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)
    padded[: encoded.size] = encoded
    parts = multihost_utils.process_allgather(padded)
    return [json.loads(part[:size].tobytes()) for part, size in zip(parts, sizes, strict=True)]


def fetch(tree: Any, keep: bool = True) -> Any:
    """Copies the whole arrays of a pytree to host memory, one after the other. All processes must call it together.

    Args:
        keep: whether this process gets the arrays. Otherwise it gets None in place of each array.
    """

    def whole(leaf):
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf) if keep else None

    return jax.tree.map(whole, tree)


def progress(*args: Any, **options: Any) -> tqdm:
    """A progress bar that shows the remaining time. Only the first process shows it."""
    return tqdm(*args, disable=not is_first(), **options)


class Team(NamedTuple):
    """A group of processes that work on the same samples."""

    index: int = 0
    count: int = 1
    """The number of teams."""
    writes: bool = True
    """Whether this process writes the team's results."""

    def rows(self, total: int) -> range:
        """The numbers of the samples, out of ``total``, that this team works on."""
        return range(self.index, total, self.count)


def team_of(data: int) -> Team:
    """This process's team on a mesh whose axis ``data`` has this size."""
    processes, index = jax.process_count(), jax.process_index()
    count = math.gcd(data, processes)
    size = processes // count
    return Team(index // size, count, index % size == 0)


@contextlib.contextmanager
def apart(*trees: Any) -> Iterator[tuple]:
    """A context in which the mesh in use is the part of the mesh that belongs to this process's team.

    Yields:
        The team, and the pytrees on the team's mesh. No array is copied: parameters are never split over ``data``, so
        each team already has all parts of every array.
    """
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
        team_sharding = NamedSharding(mesh, leaf.sharding.spec)
        return jax.make_array_from_single_device_arrays(
            leaf.shape, team_sharding, [shard.data for shard in leaf.addressable_shards]
        )

    moved = trees if team.count == 1 else jax.tree.map(narrowed, trees)
    with jax.set_mesh(mesh):
        yield (team, *moved)
