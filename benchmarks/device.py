"""What a GPU does: parity with torch, the grid against hooks, LoRA against PEFT, generation, attention, memory.

    python benchmarks/device.py --size full --json runs/device.json

No part begins after ``--minutes``; one that would is named instead. It needs no network. With ``--size toy``, the
default, it runs on a CPU, to see that it works. It uses the versions that it meets and names them: torch, transformers,
peft, and jax with its CUDA plugin.
"""

import copy
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs a part of the card too

import jax
import jax.numpy as jnp
import lora
import numpy as np
import sweep
import torch
import tyro

import vlm_jax
from vlm_jax.nn.layers import attend
from vlm_jax.sites import NO_TAPS, Context, Probe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))

from hf_oracle import make_batch, tensors, tiny_config, tiny_model

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft", "numpy", "nvidia-cudnn-cu13")
_ROWS = {
    "qwen3_vl": [[9, (4, 6), 3, 6], [12, 4]],
    "qwen2_5_vl": [[9, (4, 6), 3, 6], [12, 4]],
    "gemma3": [[9, (8, 8), 3, 6], [12, 4]],
    "llava": [[9, (6, 6), 3, 6], [12, 4]],
}
_PRECISIONS = {
    "float32": {"dtype": "float32"},
    "float32 over bfloat16 weights": {"dtype": "float32", "weights": "bfloat16"},
    "bfloat16": {"dtype": "bfloat16"},
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure this machine's accelerator, each part beside torch on the same device."""

    size: Literal["toy", "full"] = "toy"
    """toy: small enough for a CPU; full: 28 layers of width 2,048, and the shapes of Qwen3-VL-4B."""
    minutes: float = 8.0
    """No part begins later than this."""
    json: Path | None = None
    """Where to write the figures."""


def versions() -> dict[str, str]:
    """The version of every package that decides what is measured; "-" for one that is not there."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "-"
    return found


def memory_gib() -> dict[str, float | None]:
    """The peaks of both libraries' device memory: of JAX since the process began, of torch in this part."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    other = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"jax": peak and peak / 2**30, "torch": other and other / 2**30}


def parity(_: Args) -> dict[str, Any]:
    """The largest difference of log-probabilities from torch on this device, for tiny models of all families. In
    bfloat16, torch computes in bfloat16 too."""
    found: dict[str, Any] = {}
    for family, rows in _ROWS.items():
        config = tiny_config(family)
        hf = tiny_model(config)
        with torch.no_grad():
            for parameter in hf.parameters():  # so that all precisions have the same weights; buffers stay exact
                parameter.copy_(parameter.to(torch.bfloat16).float())
        batch = make_batch(rows, "left", 0, config)
        real = batch["attention_mask"] == 1
        with tempfile.TemporaryDirectory() as folder:
            copy.deepcopy(hf).to(torch.bfloat16).save_pretrained(folder)
            for name, options in _PRECISIONS.items():
                model, _ = vlm_jax.load(folder, **options)
                ours = model(vlm_jax.Inputs.from_hf(model.config, **batch)).logits
                oracle = copy.deepcopy(hf).to(lora.torch_device(), getattr(torch, options["dtype"])).eval()
                fed = {key: value.to(oracle.device) for key, value in tensors(batch).items()}
                if "pixel_values" in fed:
                    fed["pixel_values"] = fed["pixel_values"].to(oracle.dtype)
                with torch.no_grad():
                    theirs = oracle(**fed).logits.float().cpu().numpy()
                gaps = [jax.nn.log_softmax(np.asarray(a, np.float32)[real], -1) for a in (ours, theirs)]
                found[f"{family}, {name}"] = float(np.abs(np.asarray(gaps[0] - gaps[1])).max())
    return found


def grid(args: Args, shapes: sweep.Args, precisions: tuple[str, ...]) -> dict[str, Any]:
    """The layer x module grid: this library in each precision, and transformers with hooks in two."""
    hf, models = sweep.loaded(shapes, *precisions)
    arrays = sweep.prompt(shapes, shapes.image_tokens)
    found: dict[str, Any] = {"shapes": {k: v for k, v in dataclasses.asdict(shapes).items() if isinstance(v, int)}}
    exact, last = None, None
    for name, model in models.items():
        last = sweep.Sweep(model, arrays, shapes)
        first, median = sweep.seconds(last, shapes.repeats)
        cells = sweep.cells_of(last)
        exact = cells if exact is None else exact
        found[name] = {
            "compile_seconds": first - median,
            "seconds": median,
            "gflops": last.cost.flops / median / 1e9,
            "largest_difference": float(np.abs(cells - exact).max()),
        }
    assert last is not None and exact is not None
    found["cells"] = count = len(last.variants)
    for dtype in (torch.float32, torch.bfloat16):
        hooked = sweep.Hooked(hf, arrays, last, dtype)
        hooked.cell(0)
        run = min(count, shapes.hooked_cells or count)
        begun = time.perf_counter()
        values = np.array([hooked.cell(i) for i in range(run)])
        found[f"hooks, {str(dtype).removeprefix('torch.')}"] = {
            "seconds": (time.perf_counter() - begun) * count / run,
            "cells_run": run,
            "largest_difference": float(np.abs(values - exact[:run]).max()),
        }
    return found


def training(_: Args, shapes: lora.Args) -> dict[str, Any]:
    """A step of LoRA beside PEFT's."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lora.write_model(shapes, folder)
        for placement in shapes.placements:
            lora.write_adapter(shapes, folder, placement)
            found[placement] = lora.compare(shapes, folder, placement)
    return found


def generation(_: Args, shapes: sweep.Args, new_tokens: int) -> dict[str, Any]:
    """Tokens a second of greedy decoding behind a picture, beside transformers' ``generate``."""
    hf, models = sweep.loaded(shapes, "bfloat16")
    arrays = sweep.prompt(shapes, shapes.image_tokens)
    inputs = jax.device_put(vlm_jax.Inputs.from_hf(models["bfloat16"].config, **arrays))
    theirs = hf.to(lora.torch_device(), torch.bfloat16)
    fed = {name: torch.tensor(value, device=theirs.device) for name, value in arrays.items()}
    fed["pixel_values"] = fed["pixel_values"].to(torch.bfloat16)

    def ours(count: int):
        return vlm_jax.generate(models["bfloat16"], inputs, count, eos_token_id=())

    def transformers(count: int):
        with torch.no_grad():
            options = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False}
            return theirs.generate(**fed, **options).cpu().numpy()

    found = {}
    for name, run in (("this library", ours), ("transformers", transformers)):
        one, many = (sweep.seconds(functools.partial(run, count), 3)[1] for count in (1, 1 + new_tokens))
        found[name] = {"prompt_seconds": one, "tokens_per_second": new_tokens / (many - one)}
    return found


def attention(_: Args, length: int) -> dict[str, Any]:
    """Seconds of a prompt's causal attention in bfloat16: this library's own, XLA's and cuDNN's. It says whether the
    library should call cuDNN where nobody looks at the scores."""
    key = jax.random.key(0)
    q = jax.random.normal(key, (4, length, 16, 128)).astype(jnp.bfloat16)
    k = jax.random.normal(key, (4, length, 8, 128)).astype(jnp.bfloat16)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (4, length, length))
    kernel = jax.nn.dot_product_attention
    sides: dict[str, Callable] = {
        "this library": lambda q, k: attend(q, k, k, mask, Probe((), NO_TAPS, Context()), "text", causal=True),
        "jax.nn, xla": lambda q, k: kernel(q, k, k, is_causal=True, implementation="xla"),
        "jax.nn, cudnn": lambda q, k: kernel(q, k, k, is_causal=True, implementation="cudnn"),
    }
    found: dict[str, Any] = {}
    for name, side in sides.items():
        try:
            program = jax.jit(side).lower(q, k).compile()
        except Exception as error:  # cuDNN is missing on a CPU, or refuses these shapes
            found[name] = f"not available: {str(error).splitlines()[0][:100]}"
            continue
        seconds = sweep.seconds(functools.partial(program, q, k), 9)[1]
        found[name] = {"seconds": seconds, "temporary_mib": program.memory_analysis().temp_size_in_bytes / 2**20}
    return found


def parts(args: Args) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Name and function of every part, the most important first."""
    toy = args.size == "toy"
    small = {"layers": 3, "width": 128, "heads": 4, "groups": 2, "ffn": 256, "image_tokens": 64, "after": 16}
    wide = {"layers": 28, "width": 2048, "heads": 16, "groups": 8, "head_dim": 128, "ffn": 6144}
    large = {"layers": 36, "width": 2560, "heads": 32, "groups": 8, "head_dim": 128, "ffn": 9728}
    first = sweep.Args(repeats=3, hooked_cells=8, **(small if toy else wide))
    steps = lora.Args(repeats=3, memory=False)
    if toy:
        steps = dataclasses.replace(steps, layers=3, width=64, heads=2, ffn=128, tokens=32, upper=1, vocabulary=256)
    yield "parity", functools.partial(parity, args)
    yield "grid", functools.partial(grid, args, first, tuple(_PRECISIONS))
    yield "attention", functools.partial(attention, args, 256 if toy else 4096)
    yield "lora", functools.partial(training, args, steps)
    yield "generation", functools.partial(generation, args, first, 8 if toy else 64)
    if not toy:
        shapes = sweep.Args(repeats=3, hooked_cells=4, **large)
        yield "grid of Qwen3-VL-4B's shapes", functools.partial(grid, args, shapes, tuple(_PRECISIONS)[1:])


def main(args: Args) -> None:
    vlm_jax.configure(cache=None)  # so that compilation is measured
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    begun = time.perf_counter()
    device = jax.local_devices()[0].device_kind
    found: dict[str, Any] = {"versions": versions(), "device": device, "host": lora.machine()}
    print(json.dumps(found, indent=2))
    for name, part in parts(args):
        if time.perf_counter() - begun > 60 * args.minutes:
            found[name] = f"left out: it would have begun after {args.minutes:g} minutes"
        else:
            started = time.perf_counter()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            try:
                found[name] = part()
            except Exception as error:  # the other parts are measured all the same
                found[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
            found[name] |= {"part_seconds": time.perf_counter() - started, "peak_gib": memory_gib()}
        print(f"{name}: {json.dumps(found[name], indent=2)}", flush=True)
        if args.json is not None:  # after every part, so that a machine that goes away leaves what it measured
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
