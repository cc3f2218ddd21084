"""How parameters and activations are split over the devices of a mesh.

The dimensions of parameters and activations have logical axes, such as "heads". The table ``RULES`` maps logical axes
to the axes of the mesh. A mesh has three axes. ``data`` and ``fsdp`` split the rows of a batch. ``fsdp`` also splits
the parameters along the model's width. ``tensor`` splits heads, MLP and vocabulary. A mesh axis splits a dimension only
if the parts are equal. A dimension without a logical axis is not split. Adapters, editors and norms are replicated:
every device holds them whole.
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
#: Logical axis -> the mesh axes that may split it, in the order in which they are tried.
RULES = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "vocab": ("tensor", "fsdp"),
    "heads": ("tensor",),
    "mlp": ("tensor",),
}

_INTO_HEADS, _FROM_HEADS = ("embed", "heads"), ("heads", "embed")
_INTO_MLP, _FROM_MLP = ("embed", "mlp"), ("mlp", "embed")
#: The end of a parameter's path -> the logical axes of its last dimensions. Dimensions before them, such as the axis of
#: stacked layers, are not split.
AXES: dict[str, tuple[str | None, ...]] = {
    # The width (None) is not split. If it were, the lookup of every token would need communication.
    "embed_tokens.weight": ("vocab", None),
    "lm_head.kernel": (None, "vocab"),
    **{f"{name}.kernel": _INTO_HEADS for name in ("q_proj", "k_proj", "v_proj")},
    **{f"{name}.kernel": _FROM_HEADS for name in ("o_proj", "out_proj")},
    # The outputs of attn.qkv are all queries, then all keys, then all values. If they were split, a device would get
    # the queries of one head and the keys of another. So only the model's width is split: here the inputs of attn.qkv
    # and the outputs of attn.proj.
    **{"attn.qkv.kernel": ("embed", None), "attn.proj.kernel": (None, "embed")},
    **{f"{name}.kernel": _INTO_MLP for name in ("gate_proj", "up_proj", "fc1", "mlp.linear_fc1")},
    **{f"{name}.kernel": _FROM_MLP for name in ("down_proj", "fc2", "mlp.linear_fc2")},
}
#: The ends of the paths of kernels that every device holds whole. They are the kernels that run only once per image. A
#: kernel must be in ``AXES`` or here; else :func:`axes_of` raises an error. Biases, norms and position embeddings are
#: always replicated and need no entry.
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
        UserError: if the text does not describe a mesh, or if the product of its sizes is not the number of devices.
    """
    sizes = mesh_sizes(text)
    devices = jax.devices() if devices is None else devices
    if math.prod(sizes.values()) != len(devices):
        product = " x ".join(str(size) for size in sizes.values())
        raise UserError(
            f"--mesh {text!r} needs {product} = {math.prod(sizes.values())} devices, but there are {len(devices)}: "
            "choose sizes whose product is the number of devices"
        )
    # The processes are divided into equal teams, and each team gets consecutive indices of the axis ``data``. The
    # number of teams is the largest that divides both the size of that axis and the number of processes.
    # runs/processes.py forms the same teams.
    processes = sorted({device.process_index for device in devices})
    teams = math.gcd(sizes["data"], len(processes))
    team_shape = (sizes["data"] // teams, sizes["fsdp"], sizes["tensor"])
    team_meshes = []
    for team_processes in np.split(np.array(processes), teams):
        team_devices = [device for device in devices if device.process_index in team_processes]
        team_meshes.append(mesh_utils.create_device_mesh(team_shape, team_devices, allow_split_physical_axes=True))
    # Interventions gather and scatter anywhere in the model. AxisType.Explicit refuses that, so the axes are Auto.
    return Mesh(np.concatenate(team_meshes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def check_mesh(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Checks that the size of the axis ``tensor`` divides the text model's numbers of heads and of key-value heads.

    Raises:
        UserError: if it does not.
    """
    tensor, text = mesh.shape.get("tensor", 1), config.text
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    largest = math.gcd(heads, kv_heads)
    if largest % tensor:
        fits = [size for size in range(1, largest + 1) if largest % size == 0]
        raise UserError(
            f"--mesh: tensor={tensor} does not divide the model's {heads} heads and {kv_heads} key-value heads: "
            f"choose one of {', '.join(map(str, fits))}"
        )


def spec_of(shape: tuple[int, ...], axes: tuple[str | None, ...], sizes: dict[str, int]) -> PartitionSpec:
    """How to split an array over a mesh. A mesh axis splits a dimension only if the parts are equal, and it splits only
    one dimension of an array.

    Args:
        axes: the logical axis of each dimension; None for a dimension that is not split.
        sizes: mesh axis -> its size.
    """
    spec, used = [], set()
    for size, axis in zip(shape, axes, strict=True):
        mesh_axes: list[str] = []
        for name in RULES[axis] if axis else ():
            if name in sizes and name not in used and size % math.prod(sizes[n] for n in (*mesh_axes, name)) == 0:
                mesh_axes.append(name)
        used.update(mesh_axes)
        spec.append(tuple(mesh_axes) if len(mesh_axes) > 1 else mesh_axes[0] if mesh_axes else None)
    return PartitionSpec(*spec)


def axes_of(path: str) -> tuple[str | None, ...]:
    """The logical axes of the last dimensions of the parameter at ``path``; empty if it is replicated.

    Raises:
        LookupError: if the parameter is a kernel and is in neither ``AXES`` nor ``REPLICATED``.
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
    """Tells the compiler to split ``x`` over the mesh in use, which ``jax.set_mesh`` sets, and returns ``x``. Without a
    mesh it does nothing.

    Args:
        axes: the logical axis of each dimension of ``x``; None for a dimension that is not split.
    """
    sizes = free_axes()
    if math.prod(sizes.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(x.shape, axes, sizes))


def placed(tree: Any, *axes: str | None) -> Any:
    """Copies a pytree of host arrays to the mesh in use, where each device gets only its part.

    Arrays that are already on the devices of the mesh stay as they are. Without a mesh it returns the tree unchanged.

    Args:
        axes: the logical axes of the first dimensions of each array. The other dimensions are not split.
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
    """``count`` rounded up, so that the mesh in use splits so many rows into equal parts."""
    sizes = free_axes()
    return bucket(count, math.prod(sizes.get(name, 1) for name in RULES["batch"]))


def own_rows(count: int) -> Int[np.ndarray, " rows"]:
    """The numbers, in ascending order, of the rows that are on this process's devices if a batch of ``count`` rows is
    split over the mesh in use. Without a mesh, these are all rows."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return np.arange(count)
    layout = NamedSharding(mesh, spec_of((count,), ("batch",), dict(mesh.shape)))
    return np.unique([np.arange(count)[block] for block in layout.addressable_devices_indices_map((count,)).values()])


def placed_rows(tree: Any, count: int, axis: int = 0) -> Any:
    """Copies the arrays of a batch of ``count`` rows to the mesh in use. Without a mesh it returns the tree unchanged.

    Args:
        tree: arrays that hold only this process's rows of the batch (:func:`own_rows`).
        axis: the axis of the rows. Along this axis an array may have several entries for each row, such as several
            images, but every row must have the same number of them.
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

        def device_part(index):
            start, stop, _ = index[axis].indices(shape[axis])
            return leaf[(*index[:axis], _among(rows, entries, start, stop), *index[axis + 1 :])]

        return jax.make_array_from_callback(shape, layout, device_part)

    return jax.tree.map(put, tree)


def _among(rows: Int[np.ndarray, " rows"], entries: int, start: int, stop: int) -> slice:
    """The slice of a process's array that holds the entries ``start`` to ``stop - 1`` of the whole batch.

    Args:
        rows: the numbers of the rows that the process holds.
        entries: how many entries each row has.
    """
    first = int(np.searchsorted(rows, start // entries)) * entries
    return slice(first, first + stop - start)


def shards(axis: str, size: int) -> int:
    """The number of parts into which the mesh in use splits a dimension that has this size and this logical axis."""
    sizes = free_axes()
    (mesh_axes,) = spec_of((size,), (axis,), sizes)
    return math.prod(sizes[name] for name in (mesh_axes if isinstance(mesh_axes, tuple) else (mesh_axes,)) if name)


def free_axes() -> dict[str, int]:
    """Axis -> its size, for the axes of the mesh in use. It leaves out the axes over which an enclosing ``shard_map``
    has already split the arrays. The others are free to split them further."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto}
