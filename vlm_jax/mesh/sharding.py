"""How parameters and activations are split over the devices of a mesh.

Parameters and activations have logical axes, and one table maps logical axes to the axes of the mesh. A mesh is data x
fsdp x tensor: ``data`` and ``fsdp`` split the rows of a batch, ``fsdp`` also splits the parameters along the model's
width, ``tensor`` splits heads, MLP and vocabulary. A dimension that has no logical axis, or whose size the mesh's axes
do not divide, is not split. Adapters, editors and norms are replicated.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from vlm_jax.config import Config
from vlm_jax.errors import UserError, nearest
from vlm_jax.inputs import bucket
from vlm_jax.typing import ArrayLike

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
#: The last parts of a parameter's path -> the logical axes of its last dimensions.
AXES: dict[str, tuple[str | None, ...]] = {
    # Split along the vocabulary only: if the width were split too, every token looked up would need communication.
    "embed_tokens.weight": ("vocab", None),
    "lm_head.kernel": (None, "vocab"),
    **{f"{name}.kernel": _INTO_HEADS for name in ("q_proj", "k_proj", "v_proj")},
    **{f"{name}.kernel": _FROM_HEADS for name in ("o_proj", "out_proj")},
    # One kernel computes queries, then keys, then values. Split along its outputs, it would give a device the queries
    # of one head and the keys of another, so it is split along its inputs.
    **{"attn.qkv.kernel": ("embed", None), "attn.proj.kernel": (None, "embed")},
    **{f"{name}.kernel": _INTO_MLP for name in ("gate_proj", "up_proj", "fc1", "mlp.linear_fc1")},
    **{f"{name}.kernel": _FROM_MLP for name in ("down_proj", "fc2", "mlp.linear_fc2")},
}
#: The last parts of the paths of kernels that every device holds whole: those that run once per image. Biases, norms
#: and position embeddings are replicated without being named. A kernel in neither table is an error.
REPLICATED = (
    "patch_embed.kernel",
    "patch_embedding.kernel",
    *(f"merger.{name}.kernel" for name in ("linear_1", "linear_2", "linear_fc1", "linear_fc2")),
    *(f"deepstack_merger_list.{name}.kernel" for name in ("linear_fc1", "linear_fc2")),
    *(f"multi_modal_projector.{name}.kernel" for name in ("linear_1", "linear_2", "mm_input_projection")),
)


def mesh_sizes(text: str) -> dict[str, int]:
    """``"data=2,tensor=4"`` as ``{"data": 2, "fsdp": 1, "tensor": 4}``.

    Raises:
        UserError: if the text has another form.
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


def make_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that ``--mesh`` describes, over all devices or those given.

    Raises:
        UserError: if the text does not describe a mesh, or the mesh has another number of devices.
    """
    sizes = mesh_sizes(text)
    devices = jax.devices() if devices is None else devices
    if math.prod(sizes.values()) != len(devices):
        shape = " x ".join(str(size) for size in sizes.values())
        raise UserError(
            f"--mesh {text!r} is of {shape} = {math.prod(sizes.values())} devices, but there are {len(devices)}: "
            "make the product of its sizes the number of devices"
        )
    # Each step along data is one group of processes, as far as the numbers divide: runs/processes.py makes them teams.
    processes = sorted({device.process_index for device in devices})
    teams = math.gcd(sizes["data"], len(processes))
    shape = (sizes["data"] // teams, sizes["fsdp"], sizes["tensor"])
    parts = []
    for members in np.split(np.array(processes), teams):
        team = [device for device in devices if device.process_index in members]
        parts.append(mesh_utils.create_device_mesh(shape, team, allow_split_physical_axes=True))
    # Auto, because interventions gather and scatter anywhere in the model, which explicit sharding refuses.
    return Mesh(np.concatenate(parts), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def check_mesh(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Refuses a mesh whose ``tensor`` axis does not divide the text model's heads."""
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
    """How to split an array whose dimensions have these logical axes, on a mesh with axes of these sizes."""
    spec, used = [], set()
    for size, axis in zip(shape, axes, strict=True):
        names: list[str] = []
        for name in RULES[axis] if axis else ():
            if name in sizes and name not in used and size % math.prod(sizes[n] for n in (*names, name)) == 0:
                names.append(name)
        used.update(names)
        spec.append(tuple(names) if len(names) > 1 else names[0] if names else None)
    return PartitionSpec(*spec)


def axes_of(path: str) -> tuple[str | None, ...]:
    """The logical axes of the last dimensions of the parameter at ``path``; empty if it is replicated.

    Raises:
        LookupError: for a kernel that neither ``AXES`` nor ``REPLICATED`` names.
    """
    for suffix, axes in AXES.items():
        if path.endswith(f".{suffix}"):
            return axes
    if path.endswith(".kernel") and not any(path.endswith(f".{suffix}") for suffix in REPLICATED):
        raise LookupError(f"nothing says how to split the kernel {path!r}: add it to AXES or REPLICATED in {__name__}")
    return ()


def sharding(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """How the parameter at ``path`` is split over the mesh."""
    axes = axes_of(path)
    return NamedSharding(mesh, spec_of(shape, (None,) * (len(shape) - len(axes)) + axes, dict(mesh.shape)))


def constrain(x: ArrayLike, *axes: str | None) -> Any:
    """``x``, with the constraint that it is split by these logical axes, one for each of its dimensions.

    Without a mesh (``jax.set_mesh``) it returns ``x`` unchanged.
    """
    sizes = free_axes()
    if math.prod(sizes.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(x.shape, axes, sizes))


def placed(tree: Any, *axes: str | None) -> Any:
    """A pytree of host arrays on the mesh in use: each device gets only its part.

    Arrays that are on the mesh already stay as they are. Without a mesh it returns the tree unchanged.

    Args:
        axes: logical axes of the first dimensions of each array; the other dimensions are not split.
    """
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
    """``count`` rows, rounded up so that the mesh in use splits them evenly."""
    sizes = free_axes()
    return bucket(count, math.prod(sizes.get(name, 1) for name in RULES["batch"]))


def own_rows(count: int) -> Int[np.ndarray, " rows"]:
    """Which rows of a batch of ``count`` are on this process's devices, in ascending order: all of them without a
    mesh."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return np.arange(count)
    layout = NamedSharding(mesh, spec_of((count,), ("batch",), dict(mesh.shape)))
    return np.unique([np.arange(count)[block] for block in layout.addressable_devices_indices_map((count,)).values()])


def placed_rows(tree: Any, count: int, axis: int = 0) -> Any:
    """A batch of ``count`` rows on the mesh in use. Each process passes only its :func:`own_rows` of each array.

    Without a mesh it returns the tree unchanged.

    Args:
        axis: the axis of the rows. Along it an array may have several entries for each row, the same number for all.
    """
    mesh, rows = jax.sharding.get_mesh(), own_rows(count)
    if mesh.empty:
        return tree
    layout = NamedSharding(mesh, PartitionSpec(*(None,) * axis, *spec_of((count,), ("batch",), dict(mesh.shape))))

    def put(leaf):
        leaf = np.asarray(leaf)
        entries, rest = divmod(leaf.shape[axis], len(rows))
        assert entries and not rest, f"{leaf.shape[axis]} entries for {len(rows)} rows"
        shape = (*leaf.shape[:axis], count * entries, *leaf.shape[axis + 1 :])

        def part(index):
            start, stop, _ = index[axis].indices(shape[axis])
            return leaf[(*index[:axis], _among(rows, entries, start, stop), *index[axis + 1 :])]

        return jax.make_array_from_callback(shape, layout, part)

    return jax.tree.map(put, tree)


def _among(rows: Int[np.ndarray, " rows"], entries: int, start: int, stop: int) -> slice:
    """Where a process holds the entries ``start`` to ``stop`` of a whole batch.

    Args:
        rows: the rows that the process holds. entries: how many entries each row has.
    """
    first = int(np.searchsorted(rows, start // entries)) * entries
    return slice(first, first + stop - start)


def shards(axis: str, size: int) -> int:
    """Into how many parts the mesh in use splits a dimension of this size with this logical axis."""
    sizes = free_axes()
    (names,) = spec_of((size,), (axis,), sizes)
    return math.prod(sizes[name] for name in (names if isinstance(names, tuple) else (names,)) if name)


def free_axes() -> dict[str, int]:
    """The axes of the mesh in use, and their sizes, except those that an enclosing ``shard_map`` already splits."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto}
