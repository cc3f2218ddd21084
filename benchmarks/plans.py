"""The planning table of docs/pods.md: real compilations for slices, without a TPU.

    python benchmarks/plans.py --json runs/plans.jsonl

Needs the extra tpu-aot. Takes a minute or two per row; rows that are in the file already are not compiled again.
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import jax
import tyro

from train.plan import Args as PlanArgs
from train.plan import compiled
from vlm_jax.errors import UserError

#: model -> slice -> mesh for traces, mesh for training, and what LoRA recomputes. Each splits the model as little, and
#: recomputes as little, as fits into memory.
MESHES = {
    "Qwen3-VL-4B": {
        "v5e:2x4": ("data=4,tensor=2", "fsdp=4,tensor=2", "some"),
        "v5e:4x4": ("data=8,tensor=2", "fsdp=8,tensor=2", "some"),
        "v6e:4x4": ("data=16", "fsdp=16", "some"),
        "v5p:2x2x4": ("data=16", "fsdp=16", "some"),
    },
    "Gemma-3-12B": {
        "v5e:2x4": ("data=2,tensor=4", "fsdp=8", "full"),
        "v5e:4x4": ("data=4,tensor=4", "fsdp=16", "full"),
        "v6e:4x4": ("data=8,tensor=2", "fsdp=16", "some"),
        "v5p:2x2x4": ("data=16", "fsdp=16", "some"),
    },
    "Qwen2.5-VL-72B": {"v5p:4x4x4": ("data=8,tensor=8", None, None)},
    # P4's model.
    "LLaVA-1.5-7B": {"v5e:2x4": (None, "fsdp=8", None)},
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Compile P0's trace and LoRA steps, and P4's editors', for TPU slices and print what they need."""

    models: tuple[str, ...] = tuple(MESHES)
    """Which models."""
    jobs: tuple[Literal["trace", "lora", "edit"], ...] = ("trace", "lora", "edit")
    """Which jobs; training steps compile for minutes."""
    batch: int = 16
    """Samples per batch, over all chips."""
    length: int = 1024
    """Tokens of a prompt."""
    json: Path = Path("runs/plans.jsonl")
    """Where the results are kept, a JSON line each."""


def rows(args: Args):
    """(title, arguments of train.plan)"""
    for model in args.models:
        for topology, (trace, training, remat) in MESHES[model].items():
            sizes = {"batch": args.batch, "length": args.length}
            if trace is not None and "trace" in args.jobs:
                yield "trace", PlanArgs(model, "trace", topology, trace, **sizes)
            if remat is not None and "lora" in args.jobs:
                options = {**sizes, "remat": remat}
                yield f"LoRA, all modules, remat {remat}", PlanArgs(model, "lora", topology, training, **options)
                yield f"LoRA, k = 10, remat {remat}", PlanArgs(model, "lora", topology, training, k=10, **options)
            if training is not None and "edit" in args.jobs:
                yield "edit", PlanArgs(model, "edit", topology, training, **sizes)


def line(title: str, result: dict) -> str:
    """A row of the table."""
    args, gib = result["args"], 2**30
    moved = ", ".join(f"{kind} {times:,.0f}" for kind, (times, _) in result["collectives"].items())
    name, seconds = max(result["bounds"].items(), key=lambda pair: pair[1])
    memory = " + ".join(f"{result[name] / gib:.2f}" for name in ("arguments", "idle", "temporaries", "outputs"))
    cells = (
        *(args["model"], title, args["topology"], args["mesh"], memory),
        f"{result['total'] / gib:.2f}{'' if result['fits'] else ' (does not fit)'}",
        *(moved, f"{1e3 * seconds:,.0f} ({name})", f"{result['seconds']:.0f}"),
    )
    return "| " + " | ".join(cells) + " |"


def main(args: Args) -> None:
    known = {}
    if args.json.is_file():
        known = {json.dumps(result["args"]): result for result in map(json.loads, args.json.read_text().splitlines())}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for title, plan in rows(args):
        key = json.dumps({name: value for name, value in dataclasses.asdict(plan).items() if name != "json"})
        if key not in known:
            try:
                known[key] = compiled(plan).asdict()
            except (UserError, jax.errors.JaxRuntimeError) as error:
                print(f"{title} {plan}: {str(error).splitlines()[0]}", flush=True)
                continue
            with open(args.json, "a") as file:
                file.write(json.dumps(known[key]) + "\n")
        lines.append(line(title, known[key]))
        print(lines[-1], flush=True)
    header = "| model | job | slice | mesh | GiB a chip: read + not read + temporary + results | in all | collectives "
    print(f"\n{header}| at the least, ms | compiled in, s |\n|{'---|' * 9}")
    print("\n".join(lines))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main(tyro.cli(Args))
