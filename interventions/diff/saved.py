"""Activations on disk: one sharded tensorstore array for each site, and an index of its rows.

A block of examples fills whole shards, so blocks can be written in any order and by several processes, and a block that
a killed process left half-written is written again as a whole.
"""

import dataclasses
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
import tensorstore as ts
from jaxtyping import Float

from interventions.diff.activations import Computed, Index
from vlm_jax.errors import UserError, unwritten
from vlm_jax.files import read_json
from vlm_jax.runs.processes import Team, apart, everywhere, first, gathered, progress

#: Rows of a shard, which is what is written at once, and of a chunk in it, which is what is read at once.
_SHARD, _CHUNK = 256, 64
_INDEX, _FACTS = "index.npz", "activations.json"
Precision = Literal["float32", "bfloat16"]
_DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


class Layout(NamedTuple):
    """How the rows of the blocks lie in an array of ``total`` rows. Block b has ``counts[b]`` rows from ``begins[b]``
    on; the rows up to the next shard are empty."""

    begins: np.ndarray
    counts: np.ndarray
    total: int

    @classmethod
    def of(cls, index: Index) -> "Layout":
        counts = np.bincount(index.block)
        ends = np.cumsum(-(-counts // _SHARD) * _SHARD)
        return cls(np.concatenate([[0], ends[:-1]]), counts, int(ends[-1]))


def _spec(path: Path) -> dict:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}


def _create(path: Path, shape: tuple[int, int, int], precision: Precision) -> ts.TensorStore:
    layers, _, width = shape
    chunks = {"name": "regular", "configuration": {"chunk_shape": [layers, _SHARD, width]}}
    inner = {"chunk_shape": [1, _CHUNK, width], "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]}
    metadata = {
        "shape": list(shape),
        "data_type": precision,
        "chunk_grid": chunks,
        "codecs": [{"name": "sharding_indexed", "configuration": inner}],
    }
    return ts.open({**_spec(path), "metadata": metadata}, create=True, open=True).result()


def stored_bytes(source: Computed, precision: Precision) -> int:
    """The size on disk of a source's activations."""
    total, item = Layout.of(source.index).total, np.dtype(_DTYPES[precision]).itemsize
    return sum(layers * total * width * item for layers, width in source.shapes.values())


def save_activations(folder: Path, source: Computed, precision: Precision, facts: dict) -> "Saved":
    """Writes activations to a folder, or completes what an earlier session wrote. Prints the size before. Of several
    processes each writes its share.

    Args:
        facts: what the activations depend on, such as the model's fingerprint and the data; JSON.

    Raises:
        UserError: if the disk is too small, or if the folder holds other activations.
    """
    layout = Layout.of(source.index)
    facts = {**facts, **describe(source, precision)}
    size = stored_bytes(source, precision)

    def begin() -> None:
        if (folder / _FACTS).is_file():
            _check_same(folder, facts)
            return
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        print(f"activations: {len(source.index.block):,} tokens, {size / 2**30:.2f} GiB in {folder}")
        if size > free:
            raise UserError(
                f"the activations need {size / 2**30:.2f} GiB, but the disk of {folder} has {free / 2**30:.2f} GiB "
                "free: choose fewer --layers or examples, or do not store them"
            )
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / _INDEX, **source.index._asdict())
        for site, (layers, width) in source.shapes.items():
            _create(folder / site, (layers, layout.total, width), precision)
        # Written last: a folder with this file has its index and its arrays.
        (folder / f"{_FACTS}.part").write_text(json.dumps(facts, indent=2) + "\n")
        os.replace(folder / f"{_FACTS}.part", folder / _FACTS)

    first(begin)
    arrays = {site: ts.open(_spec(folder / site), open=True).result() for site in source.options.sites}
    with apart(source.model) as (team, model):
        _write_share(folder, dataclasses.replace(source, model=model), arrays, layout, precision, team)
    gathered(None)  # every process has written its share
    return Saved.open(folder, facts)


def _write_share(
    folder: Path, source: Computed, arrays: dict[str, ts.TensorStore], layout: Layout, precision: Precision, team: Team
) -> None:
    """Writes the blocks of one team of processes."""
    log, done = folder / f"done.{team.index}", _done(folder)
    if log.is_file() and team.writes:  # without a line that a killed process left incomplete
        log.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")))
    todo = [block for block in team.rows(len(layout.counts)) if block not in done]

    def write_blocks() -> None:
        for block in progress(todo, desc="activations", unit="block", leave=False):
            read = source.read(block)  # by all processes of the team together
            if not team.writes:
                continue
            try:
                for site, values in read.items():
                    begin, stop = layout.begins[block], layout.begins[block] + layout.counts[block]
                    shards = -(-layout.counts[block] // _SHARD) * _SHARD
                    filled = np.zeros((values.shape[0], shards, values.shape[2]), _DTYPES[precision])
                    filled[:, : stop - begin] = values
                    arrays[site][:, begin : begin + shards].write(filled).result()
                with open(log, "a") as file:
                    file.write(f"{block}\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise unwritten(folder, error) from None
            except ValueError as error:  # tensorstore reports a full disk in this way
                raise UserError(f"cannot write {folder} ({str(error).splitlines()[0][:200]}): free the disk") from None

    everywhere(write_blocks)


def describe(source: Computed, precision: Precision) -> dict:
    """What tells stored activations apart, besides the model and the data."""
    options = source.options
    return {
        "sites": list(options.sites),
        "layers": list(source.layers),
        "tokens": options.tokens,
        "activation_batch": options.activation_batch,
        "precision": precision,
        "rows": len(source.index.block),
        "examples": len(source.examples),
    }


def _done(folder: Path) -> set[int]:
    """The blocks that are written. The last line of a killed process may be incomplete, so it needs its line end."""
    lines = [line for path in sorted(folder.glob("done.*")) for line in path.read_text().splitlines(keepends=True)]
    return {int(line) for line in lines if line.endswith("\n") and line.strip().isdecimal()}


def _check_same(folder: Path, facts: dict) -> None:
    """Raises a UserError if a folder holds other activations than ``facts`` describe."""
    stored = read_json(folder / _FACTS)
    if different := sorted(name for name in {*facts, *stored} if stored.get(name) != facts.get(name)):
        name = different[0]
        raise UserError(
            f"{folder} holds other activations ({name} is {stored.get(name)} there and {facts.get(name)} here): choose "
            "another folder or delete it"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Saved:
    """Activations in a folder."""

    folder: Path
    facts: dict
    index: Index
    layout: Layout
    arrays: dict[str, ts.TensorStore]

    @classmethod
    def open(cls, folder: Path, facts: dict | None = None) -> "Saved":
        """The activations of a folder.

        Args:
            facts: what the folder must hold (:func:`save_activations`); None does not check it.

        Raises:
            UserError: if the folder holds no activations, others than ``facts`` describe, or not all of them.
        """
        if not (folder / _FACTS).is_file():
            raise UserError(f"{folder} holds no activations: name a folder that train.sae wrote")
        if facts is not None:
            _check_same(folder, facts)
        try:
            with np.load(folder / _INDEX, allow_pickle=False) as arrays:
                index = Index(**dict(arrays))
            stored = read_json(folder / _FACTS)
            opened = {site: ts.open(_spec(folder / site), open=True).result() for site in stored["sites"]}
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise UserError(f"{folder} is damaged ({str(error).splitlines()[0][:200]}): delete it") from None
        layout = Layout.of(index)
        if missing := len(set(range(len(layout.counts))) - _done(folder)):
            raise UserError(
                f"{folder} lacks {missing} of {len(layout.counts)} blocks: start the command that writes it again"
            )
        return cls(folder, stored, index, layout, opened)

    def read(self, block: int) -> dict[str, Float[np.ndarray, "layers rows width"]]:
        begin, count = self.layout.begins[block], self.layout.counts[block]
        parts = {site: array[:, begin : begin + count].read() for site, array in self.arrays.items()}
        return {site: np.asarray(part.result()).astype(np.float32) for site, part in parts.items()}

    def number(self, layer: int | None) -> int:
        return 0 if layer is None else self.facts["layers"].index(layer)
