"""P0: causal tracing of a task's examples. Every choice that the paper leaves open is an option.

python -m interventions.trace --task mini-okvqa --limit 64 --out runs/trace
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from interventions.options import StateOptions
from interventions.statistics import NOT_ENOUGH, interval_text
from interventions.trace.options import TraceOptions
from interventions.trace.tokens import save_token_maps
from interventions.trace.tracing import trace_task, with_gold_first
from vlm_jax import Model
from vlm_jax.data import source, task_label
from vlm_jax.data.options import DataOptions
from vlm_jax.errors import UserError
from vlm_jax.runs.command import command
from vlm_jax.runs.options import ModelOptions
from vlm_jax.runs.ranges import Range
from vlm_jax.runs.startup import load_examples, start


@dataclasses.dataclass(frozen=True)
class Args(TraceOptions, StateOptions, DataOptions, ModelOptions):
    """Trace which layers' attention and MLP outputs restore the answer when the prompt is corrupted (P0)."""

    task: str = "mini-okvqa"
    """The task to trace: a name, a family (knowledge, perception), a dataset, a JSONL file or a folder."""
    split: str = "trace"
    """Which split of a named task to use: trace, train, eval or test."""
    limit: Annotated[int, Range(least=1)] = 96
    """How many samples to trace."""
    reference: str | None = None
    """With --patch mean: the task whose samples (of --split, at most --limit) give the means; by default the traced
    samples themselves."""
    maps: Annotated[int | None, Range(least=1)] = None
    """With --positions each: of how many samples every token is restored by itself; 2 by default."""
    out: Path = Path("runs/trace")
    """Run folder: samples.jsonl, trace.parquet, summary.json, summary.parquet, heatmap.png, intervals.png and, with
    --positions each, token_maps/."""


@command
def main(args: Args) -> None:
    loaded = load_examples(args.task, split=args.split, limit=args.limit, options=args)
    examples = [with_gold_first(example, args.gold) for example in loaded]
    data: Any = source(args.task, split=args.split, options=args)
    others = None
    if args.reference is not None:
        if args.patch != "mean":
            raise UserError("--reference gives the means of --patch mean: give both, or drop it")
        others = load_examples(args.reference, split=args.split, limit=args.limit, options=args)
        data = {"task": data, "reference": source(args.reference, split=args.split, options=args)}

    def check(model: Model) -> None:
        args.check(model.config.text.num_hidden_layers)

    if args.maps is not None and args.positions != ("each",):
        raise UserError("--maps belongs to --positions each: give both, or drop it")
    read = [*examples, *(others or ())]
    run, model, processor = start(args, read, data, check=check, ignored=("maps",), shown=examples)
    model, acting = args.applied(run, model, args.model)
    task = task_label(args.task)
    summary = trace_task(run, "", model, processor, task, examples, args, interventions=acting, reference=others)
    if args.positions == ("each",):
        save_token_maps(run, model, processor, examples, args, args.maps or 2, acting)
    print(
        f"{args.task}: {summary['samples']} samples, TE <= 0 in {summary['te_not_positive']}, "
        f"p_clean {summary['p_clean']:.3f}, p_corrupt {summary['p_corrupt']:.3f}"
    )
    rows = {row["cell"]: row for row in summary["cells"] if row["statistic"] == args.statistic}
    if absent := [cell for cell, count in summary["missing"].items() if count == summary["samples"]]:
        print(f"  no sample has the tokens of {len(absent)} cells, such as {absent[0]}")
    for name in summary["ranking"][:10]:
        print(f"  {name:10s} RR {interval_text(rows[name], 'rr', '+')}")
    if not summary["stability"]:
        print(f"  how stable the ranking is: {NOT_ENOUGH}")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
