"""How fast sparse dictionaries train here and in PyTorch: the same TopK autoencoder on the same activations.

    python benchmarks/sae.py --json runs/sae_speed.json

Both sides take turns in one process, step by step, so that other work on the machine slows both alike. Here all
dictionaries are trained in one step; in PyTorch one after the other, as its users do. Times are medians of the turns
after the first. Dead latents have no loss of their own on either side. Memory is measured afterwards, each side in a
separate process.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

Side = Literal["here", "PyTorch"]
SIDES: tuple[Side, ...] = ("here", "PyTorch")


@dataclasses.dataclass(frozen=True)
class Args:
    """Time training steps of TopK dictionaries."""

    width: int = 1024
    latents: int = 16384
    k: int = 50
    tokens: int = 1024
    """Tokens in a step."""
    dictionaries: tuple[int, ...] = (1, 8)
    """Numbers of dictionaries that are trained side by side."""
    repeats: int = 5
    """Turns."""
    memory: bool = True
    """Also measure the peak memory of each side, in separate processes."""
    json: Path | None = None
    """Where to write the figures."""


def activations(args: Args, count: int) -> np.ndarray:
    """Random activations ``(count, tokens, width)``."""
    return np.random.default_rng(0).standard_normal((count, args.tokens, args.width), np.float32)


def here(args: Args, count: int) -> Callable[[], float]:
    """A step of this library on ``count`` dictionaries, one for each layer; it returns the mean FVU."""
    import jax
    import jax.numpy as jnp

    from interventions.diff.place import Place
    from train.dictionaries import DictionaryOptions, begin, counters_of, member_label, unit_decoder
    from train.objective import adamw
    from train.step import Step, update
    from train.subsets import partitioned, split

    x = activations(args, count)
    options = DictionaryOptions(latents=args.latents, k=args.k, aux_k=0)
    places = [Place("text.resid_post", layer) for layer in range(count)]
    params, loss = begin(x, places, places, options, None)
    step = Step(loss, partitioned({"dictionary": adamw(lambda _: 1e-4)}, member_label, 1.0), unit_decoder, count)
    trained, rest = split(params, member_label)
    held = [step.begin(trained, counters_of(params))]
    batch = {"text.resid_post": jnp.asarray(x)[None]}

    def run() -> float:
        held[0], metrics = update(held[0], rest, batch, jax.random.key(0), step=step)
        return float(metrics["fvu"].mean())

    return run


def in_pytorch(args: Args, count: int) -> Callable[[], float]:
    """The same step in PyTorch, for one dictionary after the other."""
    import torch

    class Autoencoder(torch.nn.Module):
        def __init__(self, seed: int):
            super().__init__()
            decoder = torch.randn(args.latents, args.width, generator=torch.Generator().manual_seed(seed))
            decoder /= decoder.norm(dim=-1, keepdim=True)
            self.W_dec = torch.nn.Parameter(decoder)
            self.W_enc = torch.nn.Parameter(decoder.T.clone())
            self.b_enc = torch.nn.Parameter(torch.zeros(args.latents))
            self.b_dec = torch.nn.Parameter(torch.zeros(args.width))

        def forward(self, x):
            values, index = (x @ self.W_enc + self.b_enc).topk(args.k, dim=-1, sorted=False)
            codes = torch.zeros(len(x), args.latents).scatter(-1, index, values.relu())
            return codes @ self.W_dec + self.b_dec

    models = [Autoencoder(seed) for seed in range(count)]
    optimisers = [torch.optim.Adam(model.parameters(), 1e-4) for model in models]
    x = torch.from_numpy(activations(args, count))

    def run() -> float:
        total = 0.0
        for model, optimiser, values in zip(models, optimisers, x, strict=True):
            error = ((values - model(values)) ** 2).sum()
            loss = error / ((values - values.mean(0)) ** 2).sum()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            with torch.no_grad():
                model.W_dec /= model.W_dec.norm(dim=-1, keepdim=True)
            total += float(loss.detach())
        return total / count

    return run


MAKERS = {"here": here, "PyTorch": in_pytorch}


def timed(args: Args, count: int) -> dict[str, dict[str, float]]:
    """Side -> median seconds of a step, and the FVU after the last one."""
    runs = {side: MAKERS[side](args, count) for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    last = {}
    for turn in range(args.repeats + 1):
        for side, run in runs.items():
            begun = time.perf_counter()
            last[side] = run()
            if turn:  # the first turn compiles
                seconds[side].append(time.perf_counter() - begun)
    return {side: {"seconds": statistics.median(seconds[side]), "fvu": last[side]} for side in SIDES}


def peak_memory(args: Args, side: Side, count: int) -> float:
    """GiB of a process that makes three steps of one side, without what it has after its imports."""
    code = (
        "import re, sys; import jax, torch; sys.path.insert(0, 'benchmarks'); import sae\n"
        # Not ru_maxrss, which a process inherits from the one that starts it.
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
        "before = peak()\n"
        f"run = sae.MAKERS[{side!r}](sae.Args(**{dataclasses.asdict(args) | {'json': None}!r}), {count})\n"
        "[run() for _ in range(3)]\n"
        "print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 2**20


def main(args: Args) -> None:
    from lora import machine

    import vlm_jax

    vlm_jax.configure()
    print(machine())
    print("| dictionaries | side | seconds a step | tokens x dictionaries a second | ratio | FVU | GiB |")
    print("|---|---|---|---|---|---|---|")
    results = {}
    for count in args.dictionaries:
        found = timed(args, count)
        for side in SIDES:
            seconds = found[side]["seconds"]
            found[side] |= {"rate": count * args.tokens / seconds, "ratio": found["PyTorch"]["seconds"] / seconds}
            if args.memory:
                found[side]["gib"] = peak_memory(args, side, count)
            gib = f"{found[side]['gib']:.2f}" if args.memory else "-"
            print(
                f"| {count} | {side} | {seconds:.3f} | {found[side]['rate']:,.0f} | {found[side]['ratio']:.2f} | "
                f"{found[side]['fvu']:.3f} | {gib} |",
                flush=True,
            )
        results[count] = found
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine(), "args": dataclasses.asdict(args) | {"json": None}, "results": results}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
