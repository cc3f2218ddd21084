"""Loads a model from a Hugging Face or Orbax folder. The family's key table says which tensor becomes what."""

import functools
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from vlm_jax.checkpoints.leaves import abstract, leaf_name, rows_of, tensor_count
from vlm_jax.checkpoints.orbax import load_orbax
from vlm_jax.checkpoints.precision import EMBEDDINGS, Precision
from vlm_jax.checkpoints.processors import fitting_processor
from vlm_jax.checkpoints.redundant import BUFFERS, HEAD, check_buffers, settle_head
from vlm_jax.checkpoints.save import check_registers
from vlm_jax.checkpoints.sources import INDEX, ORBAX, SINGLE, read_config, resolve
from vlm_jax.config import Config, with_attention
from vlm_jax.configure import check_precision
from vlm_jax.errors import UserError
from vlm_jax.families import FAMILIES
from vlm_jax.families.key_table import Row
from vlm_jax.files import read_json
from vlm_jax.mesh.sharding import sharding
from vlm_jax.processor import Processor

#: safetensors' name of a precision -> NumPy's.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def load(
    source: str | os.PathLike,
    *,
    dtype=None,
    weights=None,
    mesh: jax.sharding.Mesh | None = None,
    attention: str = "xla",
):
    """Loads a model and its processor.

    Tensors are read one parameter at a time. Beyond the finished arrays, host memory holds at most one stacked
    parameter.

    Args:
        source: an embedded model's name (``mini-qwen3-vl``), a Hugging Face folder, a folder that
            ``python -m vlm_jax.convert`` wrote, or a hub id.
        dtype: precision of parameters and activations ("float32", "bfloat16", "float16"); None keeps the checkpoint's.
        weights: "bfloat16" keeps the matrices as a bfloat16 checkpoint has them, in half the memory, while everything
            else is float32. Results are those of ``dtype="float32"``, but for rounding in float32.
        mesh: distributes the parameters over this mesh by the rules of :mod:`vlm_jax.mesh.sharding`. Each process reads
            only the slices that its devices hold, and each slice once.
        attention: "xla", or "splash" for TPU's kernel where it applies (:mod:`vlm_jax.nn.kernels`).

    Returns:
        ``(model, processor)``. The processor is None if the folder has no tokeniser.

    Warns:
        UserWarning: if the files hold another head than the embeddings to which the config ties it, or buffers with
            other numbers than the config determines; once, if the parameters are float32 on an accelerator and
            :func:`vlm_jax.configure` was not called.

    Raises:
        UserError: for an unknown source or architecture; missing, extra or misshapen tensors (all are listed); NaN or
            infinite values; an unreadable file; a pickle checkpoint; with ``weights``, another dtype than float32, or
            matrices that are not bfloat16 in the checkpoint.
    """
    precision = Precision.of(dtype, weights)
    folder = resolve(source)
    config = with_attention(read_config(folder), attention)
    if (folder / ORBAX).is_dir():
        leaves = load_orbax(folder, config, precision, mesh)
    else:
        with ExitStack() as stack:
            tensors = _open(folder, config, stack)
            for handle in {id(handle): handle for handle, _ in tensors.values()}.values():
                check_registers(folder, config, (handle.metadata() or {}).get("registers"))
            config = settle_head(config, tensors, folder, precision.of_leaf(EMBEDDINGS))
            check_buffers(config, tensors, folder)
            rows = _coverage(config, tensors, folder)
            leaves = {row.path: _read_parameter(row, leaf, tensors, config, precision, mesh) for row, leaf in rows}
    check_precision({leaf.dtype for leaf in leaves.values()})
    model = abstract(config)
    paths, treedef = jax.tree_util.tree_flatten_with_path(model)
    model = treedef.unflatten([leaves[leaf_name(path)] for path, _ in paths])
    return model, load_processor(folder, config)


def load_processor(folder: Path, config: Config) -> Processor | None:
    """The processor of a model's folder; None if the folder has no tokeniser.

    Raises:
        UserError: if its files cannot be loaded, or do not belong to the model.
    """
    if not (folder / "tokenizer_config.json").is_file():
        return None
    return fitting_processor(folder, config)


def _open(folder: Path, config: Config, stack: ExitStack) -> dict[str, tuple[Any, str]]:
    """The key table's name of each tensor -> (open file, the tensor's name in it).

    The files are ``model.safetensors`` or those that an index names. ``stack`` closes them.
    """
    index = folder / INDEX
    files, names = [SINGLE], {}
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise UserError(f"{index} has no weight_map: fetch the folder again, whole")
        names = {key: str(file) for key, file in names.items()}
        files = sorted(set(names.values()))
        if SINGLE not in files and (folder / SINGLE).is_file():
            raise UserError(f"{folder} holds {SINGLE} and an index of other files: remove one of them")
    elif not (folder / SINGLE).is_file():
        for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt"):
            for pickle in sorted(folder.glob(pattern)):
                raise UserError(
                    f"{folder} holds only a pickle checkpoint ({pickle.name}), which can run code and is never read: "
                    "save the model as safetensors"
                )
    family, tensors, held = FAMILIES[config.family], {}, set()
    present = {path.name for path in folder.iterdir()}
    for file in files:
        path = folder / file
        if Path(file).name != file:
            raise UserError(f"{index} names {file!r}, which is outside the folder: fetch the folder again")
        if file not in present or (path.exists() and not path.is_file()):
            raise UserError(f"{folder} has no {file}: fetch the folder again, whole")
        try:
            handle = stack.enter_context(safe_open(path, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} cannot be read as safetensors ({error}): it may be cut short, fetch it again"
            ) from None
        for key in handle.keys():  # noqa: SIM118
            if (known := family.in_table(key)) in tensors:
                raise UserError(f"{folder} holds {known} twice, as {key} and {tensors[known][1]}: remove one of them")
            tensors[known] = handle, key
            held.add((key, file))
    if lacking := [f"{key} in {file}" for key, file in names.items() if (key, file) not in held]:
        count, named = len(lacking), "; ".join(lacking)
        raise UserError(f"{index} names {count} tensor(s) that are not there ({named}): fetch the folder again, whole")
    return tensors


def _coverage(config: Config, tensors: dict, folder: Path) -> list[tuple[Row, jax.ShapeDtypeStruct]]:
    """The key table's rows to read.

    Raises:
        UserError: unless the files hold exactly the needed tensors, with the expected shapes and a supported precision.
    """
    rows = rows_of(config)
    problems, needed = [], set()
    for row, leaf in rows:
        ours = leaf.shape[1:] if row.stacked else leaf.shape
        expected = tuple(row.op.hf_shape(ours, config))
        for i in range(tensor_count(row, leaf)):
            key = row.hf.format(i)
            needed.add(key)
            if key not in tensors:
                problems.append(f"missing {FAMILIES[config.family].on_disk(key)} {expected}")
                continue
            handle, name_in_file = tensors[key]
            tensor = handle.get_slice(name_in_file)
            if (shape := tuple(tensor.get_shape())) != expected:
                problems.append(f"misshapen {name_in_file} {shape}, expected {expected}")
            elif tensor.get_dtype() not in DTYPES:
                problems.append(
                    f"{name_in_file} is stored as {tensor.get_dtype()}, only F32, BF16 and F16 are supported"
                )
    # Some published files repeat the tied head, and older ones contain buffers; both have been compared.
    ignored = {HEAD} if config.text.tie_word_embeddings else set()
    extra = (key for key in tensors.keys() - needed - ignored if not key.endswith(BUFFERS))
    extra = (key for key in extra if not key.startswith(FAMILIES[config.family].unread or ("\0",)))
    problems += [f"extra {tensors[key][1]}" for key in sorted(extra)]
    if problems:
        raise UserError(
            f"{folder}: {len(problems)} tensor(s) do not fit the config of a {config.family} ({'; '.join(problems)}): "
            "check that config.json and the weights belong together"
        )
    return rows


def _read_parameter(
    row: Row, leaf: jax.ShapeDtypeStruct, tensors: dict, config: Config, precision: Precision, mesh
) -> jax.Array:
    """Reads one parameter from its tensors and puts it on its devices."""
    stored = [tensors[row.hf.format(i)] for i in range(tensor_count(row, leaf))]
    dtypes = {DTYPES[handle.get_slice(key).get_dtype()]: key for handle, key in stored}
    for found, key in dtypes.items():
        precision.check(row.path, found, key)
    dtype = jnp.dtype(precision.of_leaf(row.path) or jnp.result_type(*dtypes))

    def read_tensor(i: int, where: tuple[slice, ...]) -> np.ndarray:
        """A slice, in our layout, of the parameter's i-th tensor."""
        handle, key = tensors[row.hf.format(i)]
        try:
            # Only the patch embedding, which is small, is read whole for any slice.
            value = row.op.read(handle.get_slice(key), where)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{key} cannot be read ({error}): the file may be cut short, fetch it again") from None
        # NumPy would broadcast a wrong shape when it is assigned below.
        chex.assert_shape(value, tuple(part.stop - part.start for part in where), custom_message=f"key table, {key}")
        with np.errstate(over="ignore"):
            cast = value.astype(dtype, copy=False)
        if not np.isfinite(cast).all():
            if np.isfinite(value).all():
                raise UserError(f"{key} holds numbers that are too large for {dtype}: load it as float32")
            raise UserError(f"{key} holds NaN or infinite numbers: the checkpoint is damaged, fetch it again")
        return cast

    @functools.cache
    def read_slice(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        where = tuple(slice(*bound) for bound in bounds)
        value = np.empty([stop - start for start, stop in bounds], dtype)
        if row.stacked:
            for position, i in enumerate(range(*bounds[0])):
                value[position] = read_tensor(i, where[1:])
        else:
            value[...] = read_tensor(0, where)
        return value

    def callback(index: Any) -> np.ndarray:
        # Several devices may hold the same slice. The cache makes sure that it is read once.
        return read_slice(tuple(s.indices(size)[:2] for s, size in zip(index, leaf.shape, strict=True)))

    if mesh is None:
        return jax.device_put(read_slice(tuple((0, size) for size in leaf.shape)))
    return jax.make_array_from_callback(leaf.shape, sharding(row.path, leaf.shape, mesh), callback)
