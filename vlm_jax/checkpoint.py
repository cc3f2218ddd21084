"""Loads and saves Hugging Face folders, driven by the family's key table; Orbax folders for fast restarts."""

import dataclasses
import functools
import json
import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vlm_jax import families
from vlm_jax.config import Config
from vlm_jax.errors import UserError, nearest
from vlm_jax.families import FAMILIES
from vlm_jax.model import Model
from vlm_jax.sharding import sharding
from vlm_jax.table import Row

MINI = Path(__file__).parent / "mini"
SINGLE, INDEX, ORBAX = "model.safetensors", "model.safetensors.index.json", "orbax"
#: Tensors that are no parameters: older files saved what is computed from the config.
BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")
_DISK = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def embedded_models() -> list[str]:
    """Names of the models that ship with the library."""
    return sorted(p.parent.name for p in MINI.glob("*/config.json"))


def resolve(source: str | os.PathLike) -> Path:
    """The folder behind an embedded name, a local folder or a hub id."""
    path = Path(source)
    if (path / "config.json").is_file():
        return path
    if path.exists():
        raise UserError(f"{source} holds no config.json: name a Hugging Face model folder")
    if str(source) in embedded_models():
        return MINI / str(source)
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise UserError(
            f"unknown model {str(source)!r}: no such folder or embedded model{nearest(str(source), embedded_models())}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"])
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"cannot fetch {str(source)!r} from the hub ({type(error).__name__}): check the id and the network, "
            f"or give a local folder or an embedded model ({', '.join(embedded_models())})"
        ) from None


def read_json(path: Path) -> dict:
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): repair it or fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: repair it or fetch it again")
    return value


def read_config(folder: Path) -> Config:
    """The config of a Hugging Face folder."""
    where = folder / "config.json"
    hf = read_json(where)
    if (folder / "generation_config.json").is_file():
        # What generation stops at is often written there alone.
        generation = read_json(folder / "generation_config.json")
        hf |= {k: generation[k] for k in ("eos_token_id", "pad_token_id") if generation.get(k) is not None}
    return families.read_config(hf, str(where))


def load(source: str | os.PathLike, *, dtype=None, mesh: jax.sharding.Mesh | None = None, attention: str = "xla"):
    """A model and its processor.

    Every tensor goes from the file to its device layer by layer: host memory beyond the finished arrays stays below
    one stacked parameter.

    Args:
        source: an embedded name (``mini-qwen3-vl``), a Hugging Face folder, a folder that
            ``python -m vlm_jax.convert`` wrote, or a hub id.
        dtype: of the parameters ("float32", "bfloat16", "float16"); the checkpoint's own where None.
        mesh: put the parameters on this mesh by the rules of :mod:`vlm_jax.sharding`; each process reads the slices
            that its devices hold, each once.
        attention: "xla", or "splash": TPU's kernel where it applies (:mod:`vlm_jax.kernels`).

    Returns:
        ``(model, processor)``; the processor is None where the folder has no tokeniser.

    Raises:
        UserError: unknown source or architecture; missing, extra, misshapen or NaN-filled tensors (all that are
            missing, extra or misshapen are listed); an unreadable file; a pickle checkpoint.
    """
    if dtype is not None and getattr(dtype, "__name__", str(dtype)) not in _DISK.values():
        raise UserError(f"dtype {dtype!r} is not supported: use float32, bfloat16 or float16")
    folder = resolve(source)
    config = with_attention(read_config(folder), attention)
    if (folder / ORBAX).is_dir():
        leaves = _load_orbax(folder, config, dtype, mesh)
    else:
        with ExitStack() as stack:
            tensors = _open(folder, config, stack)
            rows = _coverage(config, tensors, folder)
            leaves = {row.path: _read(row, leaf, tensors, config, dtype, mesh) for row, leaf in rows}
    model = abstract(config)
    paths, treedef = jax.tree_util.tree_flatten_with_path(model)
    model = treedef.unflatten([leaves[leaf_name(path)] for path, _ in paths])
    if not (folder / "tokenizer_config.json").is_file():
        return model, None
    try:
        return model, FAMILIES[config.family].load_processor(folder)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: the tokeniser or image processor cannot be loaded ({reason}): repair it") from None


def save(model: Model, folder: str | os.PathLike, *, shard_bytes: int = 5 * 10**9) -> Path:
    """Writes ``config.json`` and the tensors, named as transformers does; an existing checkpoint is replaced whole.

    Args:
        shard_bytes: beyond this size there are several files and an index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    family, leaves = FAMILIES[model.config.family], named_leaves(model)
    places = [(row, i) for row, leaf in _rows(model.config) for i in range(_count(row, leaf))]
    shards: list[list[tuple[Row, int]]] = [[]]
    filled = 0
    for row, i in places:
        size = leaves[row.path].nbytes // _count(row, leaves[row.path])
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((row, i))
        filled += size
    index: dict[str, str] = {}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for number, shard in enumerate(shards):
            file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE
            tensors = {}
            for row, i in shard:
                value = np.asarray(leaves[row.path][i] if row.stacked else leaves[row.path])
                tensors[family.on_disk(row.hf.format(i))] = np.ascontiguousarray(row.op.to_hf(value, model.config))
            try:
                save_file(tensors, Path(scratch) / file, metadata={"format": "pt"})
            except (SafetensorError, OSError) as error:
                raise UserError(f"cannot write {folder / file} ({error}): free the disk or choose another") from None
            index |= dict.fromkeys(tensors, file)
        (Path(scratch) / "config.json").write_text(json.dumps(_config_of(model), indent=2) + "\n")
        if len(shards) > 1:
            total = sum(leaf.nbytes for leaf in leaves.values())
            value = {"metadata": {"total_size": total}, "weight_map": index}
            (Path(scratch) / INDEX).write_text(json.dumps(value, indent=2) + "\n")
        # What an earlier checkpoint left here would be loaded instead of this one.
        for stale in (*folder.glob("model*.safetensors"), folder / INDEX):
            stale.unlink(missing_ok=True)
        shutil.rmtree(folder / ORBAX, ignore_errors=True)
        for file in sorted(Path(scratch).iterdir()):
            file.chmod(0o644)
            shutil.move(file, folder / file.name)
    return folder


def with_attention(config: Config, attention: str) -> Config:
    """The config of the same model with another implementation of its attention.

    Raises:
        UserError: if that cannot do what the model asks for.
    """
    if attention not in ("xla", "splash"):
        raise UserError(f"unknown attention {attention!r}: use 'xla' or 'splash'")
    if attention == "splash" and not config.text.only_causal:
        raise UserError(
            f"attention 'splash' is causal and nothing else, but a {config.family} has sliding layers or images that "
            "see both ways: use 'xla'"
        )
    return dataclasses.replace(config, text=dataclasses.replace(config.text, attention=attention))


def abstract(config: Config) -> Model:
    """The model's structure and shapes without any array."""
    return jax.eval_shape(lambda: Model(config, jax.random.key(0)))


def leaf_name(path) -> str:
    """``text.layers.mlp.gate_proj.kernel`` for a path in the model's pytree."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def named_leaves(model: Model) -> dict[str, Any]:
    """Every parameter (or its shape, in an abstract model) by its path."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]}


def _rows(config: Config) -> list[tuple[Row, jax.ShapeDtypeStruct]]:
    """The rows that a model of this config has, each with our shape."""
    shapes = named_leaves(abstract(config))
    table = {row.path: row for row in FAMILIES[config.family].table}
    assert shapes.keys() <= table.keys(), f"the key table lacks {shapes.keys() - table.keys()}"
    return [(row, shapes[path]) for path, row in table.items() if path in shapes]


def _count(row: Row, leaf: Any) -> int:
    """How many tensors of a file make up this parameter."""
    return leaf.shape[0] if row.stacked else 1


def _open(folder: Path, config: Config, stack: ExitStack) -> dict[str, tuple[Any, str]]:
    """The table's tensor name -> (open file, its name there), over one ``model.safetensors`` or the files of an
    index."""
    index = folder / INDEX
    files = [SINGLE]
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict):
            raise UserError(f"{index} has no weight_map: fetch the folder again, whole")
        files = sorted(set(map(str, names.values())))
    elif not (folder / SINGLE).is_file():
        for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt"):
            for pickle in sorted(folder.glob(pattern)):
                raise UserError(
                    f"{folder} holds only a pickle checkpoint ({pickle.name}), which can run code and is never read: "
                    "save the model as safetensors"
                )
    family, tensors = FAMILIES[config.family], {}
    for file in files:
        path = folder / file
        if Path(file).name != file:
            raise UserError(f"{index} names {file!r}, which lies outside of the folder: fetch the folder again")
        if not path.is_file():
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
    return tensors


def _coverage(config: Config, tensors: dict, folder: Path) -> list[tuple[Row, jax.ShapeDtypeStruct]]:
    """The rows to read, once every tensor is known to be wanted exactly once and every shape to fit."""
    rows = _rows(config)
    problems, wanted = [], set()
    for row, leaf in rows:
        ours = leaf.shape[1:] if row.stacked else leaf.shape
        expected = tuple(row.op.hf_shape(ours, config))
        for i in range(_count(row, leaf)):
            key = row.hf.format(i)
            wanted.add(key)
            if key not in tensors:
                problems.append(f"missing {FAMILIES[config.family].on_disk(key)} {expected}")
                continue
            handle, disk = tensors[key]
            part = handle.get_slice(disk)
            if (found := tuple(part.get_shape())) != expected:
                problems.append(f"misshapen {disk} {found}, expected {expected}")
            elif part.get_dtype() not in ("F32", "BF16", "F16"):
                problems.append(f"{disk} is stored as {part.get_dtype()}, only F32, BF16 and F16 are supported")
    # Some published files repeat the tied head, and older ones hold buffers.
    ignored = {"lm_head.weight"} if config.text.tie_word_embeddings else set()
    extra = (key for key in tensors.keys() - wanted - ignored if not key.endswith(BUFFERS))
    problems += [f"extra {tensors[key][1]}" for key in sorted(extra)]
    if problems:
        raise UserError(
            f"{folder}: {len(problems)} tensor(s) do not fit the config of a {config.family} ({'; '.join(problems)}): "
            "check that config.json and the weights belong together"
        )
    return rows


def _read(row: Row, leaf: jax.ShapeDtypeStruct, tensors: dict, config: Config, dtype, mesh) -> jax.Array:
    """One parameter, from its tensors to its devices."""
    own = tensors[row.hf.format(0)]
    dtype = jnp.dtype(dtype or _DISK[own[0].get_slice(own[1]).get_dtype()])

    def tensor(i: int, where: tuple[slice, ...]) -> np.ndarray:
        handle, key = tensors[row.hf.format(i)]
        try:
            # A slice of ours is a slice of theirs in all but the patch embedding, which is small.
            value = row.op.read(handle.get_slice(key), where)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{key} cannot be read ({error}): the file may be cut short, fetch it again") from None
        if not np.isfinite(value).all():
            raise UserError(f"{key} holds NaN or infinite numbers: the checkpoint is damaged, fetch it again")
        return value

    @functools.cache
    def part(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        where = tuple(slice(*bound) for bound in bounds)
        value = np.empty([stop - start for start, stop in bounds], dtype)
        if row.stacked:
            for place, i in enumerate(range(*bounds[0])):
                value[place] = tensor(i, where[1:])
        else:
            value[...] = tensor(0, where)
        return value

    def callback(index: tuple[slice, ...]) -> np.ndarray:
        # Several devices may hold the same slice, which is then read once.
        return part(tuple(s.indices(size)[:2] for s, size in zip(index, leaf.shape, strict=True)))

    if mesh is None:
        return jax.device_put(part(tuple((0, size) for size in leaf.shape)))
    return jax.make_array_from_callback(leaf.shape, sharding(row.path, leaf.shape, mesh), callback)


def _config_of(model: Model) -> dict:
    """The model's ``config.json``, with the precision that its parameters have now."""
    return with_dtype(json.loads(model.config.hf), str(model.text.embed_tokens.weight[...].dtype))


def with_dtype(config: Any, dtype: str) -> Any:
    """A ``config.json`` whose dtype fields, those of its parts too, say ``dtype``."""
    if not isinstance(config, dict):
        return config
    return {k: dtype if k in ("dtype", "torch_dtype") else with_dtype(v, dtype) for k, v in config.items()}


def save_orbax(model: Model, folder: Path) -> None:
    """Writes ``config.json`` and an Orbax checkpoint, which ``load`` takes too."""
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / ORBAX).absolute(), named_leaves(model), force=True)
    (folder / "config.json").write_text(json.dumps(_config_of(model), indent=2) + "\n")


def _load_orbax(folder: Path, config: Config, dtype, mesh) -> dict[str, jax.Array]:
    path = (folder / ORBAX).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            found = checkpointer.metadata(path).item_metadata.tree
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is no readable Orbax checkpoint ({error}): convert the model again") from None
        wanted = named_leaves(abstract(config))
        problems = [f"missing {name}" for name in sorted(wanted.keys() - found.keys())]
        problems += [f"extra {name}" for name in sorted(found.keys() - wanted.keys())]
        problems += [
            f"misshapen {name} {tuple(found[name].shape)}, expected {wanted[name].shape}"
            for name in sorted(wanted.keys() & found.keys())
            if tuple(found[name].shape) != wanted[name].shape
        ]
        if problems:
            raise UserError(
                f"{folder}: {len(problems)} array(s) do not fit the config ({'; '.join(problems)}): "
                "convert the model again"
            )
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = {
            name: jax.ShapeDtypeStruct(
                leaf.shape,
                dtype or found[name].dtype,
                sharding=here if mesh is None else sharding(name, leaf.shape, mesh),
            )
            for name, leaf in wanted.items()
        }
        try:
            leaves = checkpointer.restore(path, target)
        except Exception as error:  # TensorStore reports damage with errors of many kinds
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path} cannot be read ({reason}): convert the model again") from None
    for name, leaf in leaves.items():
        if not jnp.isfinite(leaf).all():
            raise UserError(f"{name} in {path} holds NaN or infinite numbers: convert the model again")
    return leaves
