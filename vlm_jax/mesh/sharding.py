"""How a program lies on a mesh: logical axes of every parameter and of what flows between the layers, and one rules
table from those to the mesh's axes.

A mesh is data x fsdp x tensor. ``data`` and ``fsdp`` split the rows of a batch, ``fsdp`` the parameters along the
model's width too, ``tensor`` the heads, the MLP and the vocabulary. What a rule does not name, or what its axes do not
divide, is replicated: adapters, editors, norms.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlm_jax.config import Config
from vlm_jax.errors import UserError, nearest
from vlm_jax.inputs import bucket

MESH_AXES = ("data", "fsdp", "tensor")
#: Logical axis -> mesh axes.
RULES = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "vocab": ("tensor", "fsdp"),
    "heads": ("tensor",),
    "mlp": ("tensor",),
}

_INTO_HEADS, _FROM_HEADS = ("embed", "heads"), ("heads", "embed")
_INTO_MLP, _FROM_MLP = ("embed", "mlp"), ("mlp", "embed")
#: The last parts of a parameter's path -> the logical axes of its last dimensions. What is not here is replicated.
AXES = {
    # Looked up by rows that lie apart over fsdp too: with the width apart, every token's would have to be put together.
    "embed_tokens.weight": ("vocab", None),
    "lm_head.kernel": (None, "vocab"),
    **{f"{name}.kernel": _INTO_HEADS for name in ("q_proj", "k_proj", "v_proj")},
    **{f"{name}.kernel": _FROM_HEADS for name in ("o_proj", "out_proj")},
    # Queries, keys and values in one: split by heads, a device would have to fetch its heads' from others.
    **{"attn.qkv.kernel": ("embed", None), "attn.proj.kernel": (None, "embed")},
    **{f"{name}.kernel": _INTO_MLP for name in ("gate_proj", "up_proj", "fc1", "mlp.linear_fc1")},
    **{f"{name}.kernel": _FROM_MLP for name in ("down_proj", "fc2", "mlp.linear_fc2")},
}


def mesh_sizes(text: str) -> dict[str, int]:
    """``"data=2,tensor=4"`` as ``{"data": 2, "fsdp": 1, "tensor": 4}``.

    Raises:
        UserError: for anything else.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in MESH_AXES:
            raise UserError(f"--mesh {text!r}: unknown axis {name!r}{nearest(name, MESH_AXES)}")
        if name in sizes:
            raise UserError(f"--mesh {text!r} names the axis {name} twice: give each once")
        if not size.isdecimal() or not int(size):
            raise UserError(f"--mesh {text!r}: the size of {name} is {size!r}, give a whole number such as {name}=2")
        sizes[name] = int(size)
    return {name: sizes.get(name, 1) for name in MESH_AXES}


def make_mesh(text: str, devices=None) -> Mesh:
    """The mesh that ``--mesh`` describes, over all devices (or those given).

    Raises:
        UserError: if it is no mesh, or not of as many devices as there are.
    """
    sizes = mesh_sizes(text)
    devices = jax.devices() if devices is None else devices
    if math.prod(sizes.values()) != len(devices):
        shape = " x ".join(str(size) for size in sizes.values())
        raise UserError(
            f"--mesh {text!r} is of {shape} = {math.prod(sizes.values())} devices, but there are {len(devices)}: "
            "make the product of its sizes the number of devices"
        )
    # Processes lie along data as far as it goes round, so that the mesh falls into teams (runs/processes.py).
    processes = sorted({device.process_index for device in devices})
    teams = math.gcd(sizes["data"], len(processes))
    shape = (sizes["data"] // teams, sizes["fsdp"], sizes["tensor"])
    parts = []
    for members in np.split(np.array(processes), teams):
        own = [device for device in devices if device.process_index in members]
        parts.append(mesh_utils.create_device_mesh(shape, own, allow_split_physical_axes=True))
    # Auto: interventions gather and write wherever they like inside the model, which explicit sharding would refuse.
    return Mesh(np.concatenate(parts), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def check_mesh(config: Config, mesh: Mesh) -> None:
    """Refuses a mesh that would cut the text model's heads apart."""
    tensor, text = mesh.shape.get("tensor", 1), config.text
    heads, groups = text.num_attention_heads, text.num_key_value_heads
    most = math.gcd(heads, groups)
    if most % tensor:
        fits = [size for size in range(1, most + 1) if most % size == 0]
        raise UserError(
            f"--mesh: tensor={tensor} does not divide the model's {heads} heads and {groups} key-value heads: "
            f"choose one of {', '.join(map(str, fits))}"
        )


def spec_of(shape: tuple[int, ...], axes: tuple[str | None, ...], sizes: dict[str, int]) -> PartitionSpec:
    """Where an array lies whose dimensions have these logical axes, on a mesh of these sizes."""
    spec, used = [], set()
    for size, axis in zip(shape, axes, strict=True):
        names: list[str] = []
        for name in RULES[axis] if axis else ():
            if name in sizes and name not in used and size % math.prod(sizes[n] for n in (*names, name)) == 0:
                names.append(name)
        used.update(names)
        spec.append(tuple(names) if len(names) > 1 else names[0] if names else None)
    return PartitionSpec(*spec)


def sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where the parameter at ``path`` lies."""
    axes = next((axes for suffix, axes in AXES.items() if path.endswith(f".{suffix}")), ())
    return NamedSharding(mesh, spec_of(shape, (None,) * (len(shape) - len(axes)) + axes, dict(mesh.shape)))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Says where a value lies whose dimensions have these logical axes: nothing without a mesh (``jax.set_mesh``)."""
    sizes = free_axes()
    if math.prod(sizes.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(x.shape, axes, sizes))


def placed(tree: Any, *axes: str | None) -> Any:
    """A pytree of host arrays on the mesh in use, their first dimensions having these logical axes, the others none:
    every device gets its part and no more. What is on the mesh already stays there; without a mesh, all stays."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return tree

    def put(leaf):
        if isinstance(leaf, jax.Array) and leaf.sharding.device_set == set(mesh.devices.flat):
            return leaf
        leaf = np.asarray(leaf)
        spec = spec_of(leaf.shape, (*axes, *(None,) * leaf.ndim)[: leaf.ndim], dict(mesh.shape))
        return jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, spec), leaf.__getitem__)

    return jax.tree.map(put, tree)


def even(count: int) -> int:
    """The rows of a batch of at least ``count`` that the mesh in use splits evenly."""
    sizes = free_axes()
    return bucket(count, math.prod(sizes.get(name, 1) for name in RULES["batch"]))


def own_rows(count: int) -> np.ndarray:
    """Which rows of a batch of ``count`` lie on this process's devices: all of them without a mesh."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return np.arange(count)
    place = NamedSharding(mesh, spec_of((count,), ("batch",), dict(mesh.shape)))
    return np.unique([np.arange(count)[block] for block in place.addressable_devices_indices_map((count,)).values()])


def placed_rows(tree: Any, count: int, axis: int = 0) -> Any:
    """A batch of ``count`` rows on the mesh in use, of whose arrays every process has those of its :func:`own_rows`
    along ``axis``: of each array as many entries for every row, one or more."""
    mesh, own = jax.sharding.get_mesh(), own_rows(count)
    if mesh.empty:
        return tree
    place = NamedSharding(mesh, PartitionSpec(*(None,) * axis, *spec_of((count,), ("batch",), dict(mesh.shape))))

    def put(leaf):
        leaf = np.asarray(leaf)
        each, over = divmod(leaf.shape[axis], len(own))
        assert each and not over, f"{leaf.shape[axis]} entries for {len(own)} rows"
        shape = (*leaf.shape[:axis], count * each, *leaf.shape[axis + 1 :])

        def part(index):
            start, stop, _ = index[axis].indices(shape[axis])
            return leaf[(*index[:axis], _among(own, each, start, stop), *index[axis + 1 :])]

        return jax.make_array_from_callback(shape, place, part)

    return jax.tree.map(put, tree)


def _among(own: np.ndarray, each: int, start: int, stop: int) -> slice:
    """Where entries ``start`` to ``stop``, of which every row has ``each``, are among those of one's own rows."""
    first = int(np.searchsorted(own, start // each)) * each
    return slice(first, first + stop - start)


def shards(axis: str, size: int) -> int:
    """Into how many parts the mesh splits a dimension of this size with this logical axis."""
    sizes = free_axes()
    (names,) = spec_of((size,), (axis,), sizes)
    return math.prod(sizes[name] for name in (names if isinstance(names, tuple) else (names,)) if name)


def free_axes() -> dict[str, int]:
    """The axes of the mesh in use that are not already split by hand (``shard_map``), and their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto}
