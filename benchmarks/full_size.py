"""Qwen3-VL-4B at its true size: writes a random checkpoint, loads it, traces one sample, deletes it.

python benchmarks/full_size.py --folder /some/disk/with/10GB
"""

import dataclasses
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
import tyro
from safetensors.numpy import save_file
from tqdm import tqdm

import vlm_jax
from interventions import causal_trace
from vlm_jax.checkpoints.leaves import abstract
from vlm_jax.checkpoints.sources import INDEX
from vlm_jax.families import FAMILIES
from vlm_jax.published import PUBLISHED, published_config

SHARD_BYTES = 2 * 10**9


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure peak memory and seconds of loading and tracing a checkpoint of a published size."""

    folder: Path = Path("runs/full-size")
    """Where the checkpoint is written (9 GB for Qwen3-VL-4B); deleted afterwards."""
    name: Literal["Qwen3-VL-2B", "Qwen3-VL-4B", "Qwen3-VL-8B"] = "Qwen3-VL-4B"
    """Published configuration."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision on load."""
    weights: Literal["bfloat16"] | None = None
    """bfloat16: with --dtype float32, the matrices stay as the checkpoint has them."""
    image_tokens: int = 16
    """Visual tokens of the traced sample, a square number; 32 of text are around them."""
    keep: bool = False
    """Do not delete the checkpoint."""
    stage: bool = False
    """Only load and trace the checkpoint that is in the folder. The benchmark calls itself with it."""


def write(args: Args) -> None:
    """A random bfloat16 checkpoint under the published tensor names, in shards with an index."""
    config = published_config(args.name)
    family = FAMILIES[config.family]
    args.folder.mkdir(parents=True)
    (args.folder / "config.json").write_text(json.dumps(PUBLISHED[args.name]))
    rng = np.random.default_rng(0)
    shapes = vlm_jax.checkpoints.leaves.named_leaves(abstract(config))
    rows = [row for row in family.table if row.path in shapes]
    shards, index, size = [{}], {}, 0
    for row in tqdm(rows, desc="write", unit="tensor"):
        shape = shapes[row.path].shape
        for i in range(shape[0]) if row.stacked else [0]:
            ours = shape[1:] if row.stacked else shape
            value = rng.standard_normal(row.op.hf_shape(ours, config), np.float32)
            value = 1 + 0.1 * value if "norm" in row.path and row.path.endswith("weight") else 0.02 * value
            shards[-1][family.on_disk(row.hf.format(i))] = value.astype(ml_dtypes.bfloat16)
            size += 2 * value.size
            if size > SHARD_BYTES:
                _flush(args.folder, shards, index)
                size = 0
    if shards[-1]:
        _flush(args.folder, shards, index)
    (args.folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _flush(folder: Path, shards: list[dict], index: dict) -> None:
    file = f"model-{len(shards):05d}.safetensors"
    save_file(shards[-1], folder / file)
    index |= dict.fromkeys(shards[-1], file)
    shards[-1] = {}
    shards.append({})


class Peak:
    """Peak anonymous memory in GiB while the block runs: arrays, without the pages of mapped files."""

    def __enter__(self):
        self.gib, self.stop = 0.0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while not self.stop.wait(0.05):
            status = Path("/proc/self/status").read_text()
            self.gib = max(self.gib, int(status.split("RssAnon:")[1].split()[0]) / 2**20)

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()


def load_and_trace(args: Args) -> None:
    begun = time.perf_counter()
    with Peak() as peak:
        model, _ = vlm_jax.load(args.folder, dtype=args.dtype, weights=args.weights)
    weights = sum(leaf.nbytes for leaf in vlm_jax.checkpoints.leaves.named_leaves(model).values())
    largest = max(vlm_jax.checkpoints.leaves.named_leaves(model).items(), key=lambda item: item[1].nbytes)
    print(f"weights {weights / 2**30:.2f} GiB, the largest stack {largest[1].nbytes / 2**30:.2f} GiB ({largest[0]})")
    print(f"load {time.perf_counter() - begun:.0f} s, peak {peak.gib:.2f} GiB of anonymous memory")
    vision, rng = model.config.vision, np.random.default_rng(0)
    image, side = args.image_tokens, 2 * int(args.image_tokens**0.5)
    text = rng.integers(10, 1000, 32)
    ids = np.concatenate([text[:12], [model.config.image_token_id] * image, text[12:]])[None]
    inputs = vlm_jax.Inputs.from_hf(
        model.config,
        input_ids=ids,
        pixel_values=rng.standard_normal((side**2, vision.patch_dim), np.float32),
        image_grid_thw=np.array([[1, side, side]]),
    )
    question, answer = np.zeros((2, *ids.shape), bool)
    question[:, 14 + image : 26 + image], answer[:, -2:] = True, True
    begun = time.perf_counter()
    with Peak() as peak:
        trace = causal_trace(model, inputs, question, answer)
        rr = np.asarray(trace.rr)
    assert np.isfinite(rr).all() and rr.shape == (1, model.config.text.num_hidden_layers, 2)
    print(
        f"trace of one sample of {ids.shape[1]} tokens, {rr.size} cells: {time.perf_counter() - begun:.0f} s, "
        f"peak {peak.gib:.2f} GiB"
    )


def main(args: Args) -> None:
    if args.stage:
        load_and_trace(args)
        return
    if args.folder.exists():
        raise SystemExit(f"{args.folder} exists: choose another --folder")
    try:
        begun = time.perf_counter()
        write(args)
        total = sum(file.stat().st_size for file in args.folder.glob("*.safetensors"))
        print(f"wrote {total / 1e9:.2f} GB in {time.perf_counter() - begun:.0f} s")
        # In a separate process, so that only loading and tracing count.
        stage = [
            "--folder",
            str(args.folder),
            "--dtype",
            args.dtype,
            "--image-tokens",
            str(args.image_tokens),
            "--stage",
        ]
        stage += [] if args.weights is None else ["--weights", args.weights]
        subprocess.run([sys.executable, __file__, *stage], check=True)
    finally:
        if not args.keep:
            shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
