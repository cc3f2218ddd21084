"""Random damage to folders of JSON and safetensors files: what transfers, editors and other programs do to them."""

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

#: Values that may be written in place of others.
ODD = (None, True, False, 0, -1, 1, 2.5, 10**40, float("inf"), float("nan"), "", "x", "(", [], [0], ["x"], {}, {"x": 1})


def damage(folder: Path, rng: random.Random, swaps: tuple[tuple[str, str], ...] = ()) -> str:
    """Damages one file of a folder, and says how.

    Args:
        swaps: parts of tensor names and what else may stand there.
    """
    path = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    changes: list[Callable[[Path, random.Random], str]] = [_bytes]
    if path.suffix == ".json":
        changes += [_json] * 6
    elif path.suffix == ".safetensors":
        changes += [lambda path, rng: _tensors(path, rng, swaps)] * 6
    return f"{path.name}: {rng.choice(changes)(path, rng)}"


def _bytes(path: Path, rng: random.Random) -> str:
    """Damage that a program sees that reads the file's structure; other bytes of tensors would be other tensors."""
    whole = path.read_bytes()
    how = rng.choice(["cut", "emptied", "longer", "removed", "a folder", "a pickle", "another byte", "a link"])
    at = rng.randrange(min(len(whole), 300))
    match how:
        case "cut":
            path.write_bytes(whole[: rng.randrange(len(whole))])
        case "emptied":
            path.write_bytes(b"")
        case "longer":
            path.write_bytes(whole + b"\x00}")
        case "another byte":
            path.write_bytes(whole[:at] + bytes([rng.choice([0, 34, 123, 255])]) + whole[at + 1 :])
        case _:
            path.unlink()
    if how == "a folder":
        path.mkdir()
    if how == "a pickle":
        path.with_suffix(".bin").write_bytes(whole)
    if how == "a link":
        path.symlink_to("nowhere")
    return f"{how} at {at}" if how == "another byte" else how


def _json(path: Path, rng: random.Random) -> str:
    value = json.loads(path.read_text())
    parent, key = value, rng.choice(sorted(value))
    while isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.7:
        parent = parent[key]
        key = rng.choice(sorted(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    how = rng.choice(["removed", "odd", "odd", "odd", "text", "in a list", "another name", "one more", "all"])
    match how:
        case "removed":
            del parent[key]
        case "odd":
            parent[key] = copy.deepcopy(rng.choice(ODD))
        case "text":
            parent[key] = str(parent[key])
        case "in a list":
            parent[key] = [parent[key]]
        case "another name" if isinstance(parent, dict):
            parent[f"{key}_2"] = parent.pop(key)
        case "all":
            value = copy.deepcopy(rng.choice(ODD))
        case _:
            value["one_more"] = copy.deepcopy(rng.choice(ODD))
    path.write_text(json.dumps(value))
    return f"{key!r} {how}: {str(parent[key])[:60]!r}" if how == "odd" else f"{key!r} {how}"


def _tensors(path: Path, rng: random.Random, swaps: tuple[tuple[str, str], ...]) -> str:
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    old, new = rng.choice([swap for swap in swaps if swap[0] in name] or [(name[:-1], name[:-2])])
    how = rng.choice(["removed", "dtype", "turned", "flat", "number", "renamed", "twice", "one more", "one less"])
    match how:
        case "removed":
            del tensors[name]
        case "dtype":
            dtype: Any = rng.choice([np.int8, np.int64, np.float64, np.bool_, np.uint8])
            tensors[name] = value.astype(dtype)
        case "turned":
            square = value.shape == value.shape[::-1]  # turned, it would be another matrix
            tensors[name] = value[None] if square else np.ascontiguousarray(value.T)
        case "flat":
            tensors[name] = value.ravel()
        case "number":
            tensors[name] = value.copy()
            tensors[name].flat[rng.randrange(value.size)] = rng.choice([np.nan, np.inf, -np.inf])
        case "renamed":
            tensors[name.replace(old, new)] = tensors.pop(name)
        case "twice":
            tensors.setdefault(name.replace(old, new), value + 1)
        case "one more":
            tensors[rng.choice(["x", f"{name}.x", f"x.{name}"])] = value
        case "one less":
            tensors[name] = np.ascontiguousarray(value[:-1])
    save_file(tensors, path)
    return f"{name} {how} ({old} -> {new})" if how in ("renamed", "twice") else f"{name} {how}"


def damaged_copy(folder: Path, into: Path, seed: int, swaps: tuple[tuple[str, str], ...] = ()) -> tuple[Path, str]:
    """A copy of a folder with one to three damages, and what they are."""
    rng = random.Random(seed)
    made = shutil.copytree(folder, into / str(seed))
    said = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        try:
            said.append(damage(made, rng, swaps))
        except Exception as error:  # an earlier damage keeps it from being read
            said.append(f"nothing more ({type(error).__name__})")
    return made, "; ".join(said)
