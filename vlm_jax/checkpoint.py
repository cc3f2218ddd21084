"""Loads and saves Hugging Face folders, driven by the family's key table."""

import json
import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from vlm_jax.config import Config
from vlm_jax.errors import UserError, nearest
from vlm_jax.families import FAMILIES, family_of
from vlm_jax.model import Model
from vlm_jax.table import Row

MINI = Path(__file__).parent / "mini"


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
    return family_of(hf.get("model_type"), str(where)).read_config(hf, str(where))


def load(source: str | os.PathLike, *, dtype=None, mesh: jax.sharding.Mesh | None = None):
    """A model and its processor.

    Args:
        source: an embedded name (``mini-qwen3-vl``), a Hugging Face folder, or a hub id.
        dtype: of the parameters; the checkpoint's own where None.
        mesh: put the parameters on every device of this mesh (replicated).

    Returns:
        ``(model, processor)``; the processor is None where the folder has no tokeniser.

    Raises:
        UserError: unknown source or architecture; missing, extra or misshapen tensors (all of them listed);
            an unreadable file.
    """
    folder = resolve(source)
    config = read_config(folder)
    sharding = None if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with ExitStack() as stack:
        tensors = _open(folder, stack)
        rows = _coverage(config, tensors, folder)
        leaves = {row.path: jax.device_put(_read(row, count, tensors, dtype), sharding) for row, count in rows}
    model = abstract(config)
    paths, treedef = jax.tree_util.tree_flatten_with_path(model)
    model = treedef.unflatten([leaves[leaf_name(path)] for path, _ in paths])
    if not (folder / "tokenizer_config.json").is_file():
        return model, None
    try:
        return model, FAMILIES[config.family].load_processor(folder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: the tokeniser or image processor cannot be loaded ({reason}): repair it") from None


def load_with_processor(source: str | os.PathLike):
    """:func:`load` for commands, which cannot do without a tokeniser."""
    model, processor = load(source)
    if processor is None:
        raise UserError(f"{source} has no tokenizer_config.json: add the tokeniser's files to the folder")
    return model, processor


def save(model: Model, folder: str | os.PathLike) -> Path:
    """Writes ``config.json`` and ``model.safetensors`` under Hugging Face keys; an existing file is replaced whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    leaves = {leaf_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]}
    for row, _ in _rows(model.config):
        value = leaves[row.path]
        slices = value if row.stacked else [value]
        for i, part in enumerate(slices):
            tensors[row.hf.format(i)] = np.ascontiguousarray(row.op.to_hf(part, model.config))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        save_file(tensors, Path(scratch) / "model.safetensors", metadata={"format": "pt"})
        (Path(scratch) / "config.json").write_text(json.dumps(json.loads(model.config.hf), indent=2) + "\n")
        for file in ("model.safetensors", "config.json"):
            (Path(scratch) / file).chmod(0o644)
            shutil.move(Path(scratch) / file, folder / file)
    # What an earlier, sharded checkpoint left here would be loaded instead of this one.
    for stale in (*folder.glob("model-*-of-*.safetensors"), *folder.glob("model.safetensors.index.json")):
        stale.unlink()
    return folder


def abstract(config: Config) -> Model:
    """The model's structure and shapes without any array."""
    return jax.eval_shape(lambda: Model(config, jax.random.key(0)))


def leaf_name(path) -> str:
    """``text.layers.mlp.gate_proj.kernel`` for a path in the model's pytree."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def _rows(config: Config) -> list[tuple[Row, int]]:
    """The rows that a model of this config has, each with the number of its tensors."""
    shapes = {leaf_name(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(abstract(config))[0]}
    table = {row.path: row for row in FAMILIES[config.family].TABLE}
    assert shapes.keys() <= table.keys(), f"the key table lacks {shapes.keys() - table.keys()}"
    return [(row, shapes[path][0] if row.stacked else 1) for path, row in table.items() if path in shapes]


def _open(folder: Path, stack: ExitStack) -> dict[str, tuple]:
    """Tensor name -> (open file, name), over one ``model.safetensors`` or the files of an index."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict):
            raise UserError(f"{index} has no weight_map: fetch the folder again, whole")
        files = sorted(set(map(str, names.values())))
    tensors = {}
    for file in files:
        path = folder / file
        if Path(file).name != file or not path.is_file():
            raise UserError(f"{folder} has no {file}: fetch the folder again, whole")
        try:
            handle = stack.enter_context(safe_open(path, framework="flax"))
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} cannot be read as safetensors ({error}): it may be cut short, fetch it again"
            ) from None
        tensors |= dict.fromkeys(handle.keys(), handle)
    return tensors


def _coverage(config: Config, tensors: dict, folder: Path) -> list[tuple[Row, int]]:
    """The rows to read, once every tensor is known to be wanted exactly once and every shape to fit."""
    shapes = {leaf_name(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(abstract(config))[0]}
    rows = _rows(config)
    problems, wanted = [], set()
    for row, count in rows:
        ours = shapes[row.path][1:] if row.stacked else shapes[row.path]
        expected = tuple(row.op.hf_shape(ours, config))
        for i in range(count):
            key = row.hf.format(i)
            wanted.add(key)
            if key not in tensors:
                problems.append(f"missing {key} {expected}")
                continue
            found = tuple(tensors[key].get_slice(key).get_shape())
            if found != expected:
                problems.append(f"misshapen {key} {found}, expected {expected}")
    # Some published files repeat the tied head.
    ignored = {"lm_head.weight"} if config.text.tie_word_embeddings else set()
    problems += [f"extra {key}" for key in sorted(tensors.keys() - wanted - ignored)]
    if problems:
        raise UserError(
            f"{folder}: {len(problems)} tensor(s) do not fit the config ({'; '.join(problems)}): "
            "check that config.json and the weights belong together"
        )
    return rows


def _read(row: Row, count: int, tensors: dict, dtype) -> jax.Array:
    keys = [row.hf.format(i) for i in range(count)]
    try:
        parts = [row.op.to_ours(tensors[key].get_tensor(key)) for key in keys]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{keys[0]} cannot be read ({error}): the file may be cut short, fetch it again") from None
    value = jnp.stack(parts) if row.stacked else parts[0]
    return value.astype(dtype or value.dtype)
