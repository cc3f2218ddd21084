"""The layer x module grid as users of other tools write it: nnsight, TransformerLens, and PyTorch's hooks, beside ours.

    make .venv-peers/installed && python benchmarks/peers.py

Every side traces the same prompt of the same random Qwen3-VL in a process of its own, because the tools need other
packages: seconds without loading, peak memory, lines of the user's code, and the largest difference of a cell from
ours. The code of every side is one function of ``peer_sides.py``.
"""

import dataclasses
import inspect
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import peer_sides
import sweep
import tyro
from lora import machine

import vlm_jax

HERE = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Args(sweep.Args):
    """Compare the grid with other tools' (options of the model: those of benchmarks/sweep.py)."""

    python: Path = HERE.parent / ".venv-peers" / "bin" / "python"
    """The Python that has the other tools."""
    sides: tuple[str, ...] = tuple(peer_sides.SIDES)
    """Which of them to run."""
    cells: int | None = 8
    """Run only this many cells of the others and extrapolate; None: all."""


def lines(function) -> int:
    """Lines of code, without comments, docstrings and blank ones."""
    source = inspect.getsource(function).replace(inspect.getdoc(function) or " ", "")
    return sum(bool(line.strip()) and line.strip()[0] not in '#"' for line in source.splitlines()) - 1


def ours(model, arrays: dict, noise: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """The grid with this library."""
    from interventions import causal_trace

    inputs = vlm_jax.Inputs.from_hf(model.config, **arrays)
    trace = causal_trace(model, inputs, noise.any(-1), gold, noise=noise)
    return np.asarray(trace.ie + trace.p_corrupt[:, None, None])[0].ravel()


def main(args: Args) -> None:
    vlm_jax.configure(cache=None)  # so that the first call compiles
    arrays = sweep.prompt(args, args.image_tokens)
    length = arrays["input_ids"].shape[1]
    noise = 0.05 * np.random.default_rng(1).normal(size=(1, length, args.width)).astype(np.float32)
    noise[:, : -args.after], noise[:, -4:] = 0, 0
    gold = np.arange(length)[None] >= length - 4
    print(f"{machine()}; {length} tokens, {args.layers} layers, width {args.width}, float32")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sweep.build(args).save_pretrained(folder)
        np.savez(folder / "prompt.npz", noise=noise, gold=gold, **arrays)
        model, _ = vlm_jax.load(folder)
        peer_sides.forget_peak()
        begun = time.perf_counter()
        exact = ours(model, arrays, noise, gold)
        first = time.perf_counter() - begun
        begun = time.perf_counter()
        exact = ours(model, arrays, noise, gold)
        again = time.perf_counter() - begun
        rows.append(("this library, first call", first, peer_sides.peak_gib(), lines(ours), 0.0))
        rows.append(("this library, next call", again, peer_sides.peak_gib(), lines(ours), 0.0))
        for side in args.sides:
            command = [args.python, HERE / "peer_sides.py", side, folder, str(args.cells or len(exact))]
            done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                print(f"{side}: {reason[:200]}", file=sys.stderr)
                continue
            found = json.loads(done.stdout.strip().splitlines()[-1])
            cells = np.array(found["cells"])
            seconds = found["before_seconds"] + found["cells_seconds"] * len(exact) / len(cells)
            difference = np.abs(cells - exact[: len(cells)]).max()
            rows.append((found["name"], seconds, found["peak_gib"], lines(peer_sides.SIDES[side]), difference))
    print(f"\n| tool | grid of {len(exact)} cells (s) | times ours | peak memory (GiB) | lines | largest difference |")
    print("|---|---|---|---|---|---|")
    for name, seconds, peak, count, difference in rows:
        print(f"| {name} | {seconds:.1f} | {seconds / rows[1][1]:.1f} | {peak:.1f} | {count} | {difference:.0e} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
