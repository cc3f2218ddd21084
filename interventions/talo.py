"""P3: TaLo. Which layers hurt a task, and what does cutting one at test time change? (methods: arXiv 2602.01167)

python -m interventions.talo --tasks mini-okvqa mini-docvqa --out runs/talo

The model is asked once, by :func:`tabulate`, which samples are right under every cut; the rest is
:mod:`interventions.selection` on that table.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import tyro

from interventions.cost import Meter, estimate
from interventions.kinds import Gate, UniformAttention, table
from interventions.read import Gold
from interventions.selection import (
    BASE,
    Choice,
    SelectOptions,
    Similarity,
    assess,
    gains,
    in_two,
    layer_name,
    outside,
    permuted,
    resampled,
    select,
    similarity,
    together,
    tree,
)
from interventions.statistics import percentiles
from interventions.store import save_interventions
from interventions.sweep import stack, sweep_runs
from vlm_jax import Model
from vlm_jax.command import command
from vlm_jax.data import Example, load_task, source, task_label
from vlm_jax.data.miniworld import TASKS
from vlm_jax.errors import UserError
from vlm_jax.fingerprint import fingerprint
from vlm_jax.options import DataOptions, ModelOptions
from vlm_jax.processes import fetch, progress
from vlm_jax.prompts import batches, check_fit
from vlm_jax.runs import Run

Cut = Literal["attn", "mlp", "block", "uniform"]
#: A sweep takes longer to compile than padding costs.
_LENGTH_STEP = 32


def layer_cut(depth: int, layer: int, cut: Cut) -> Gate | UniformAttention:
    """Takes something of one decoder layer out, at every token, generated ones included.

    "attn": its attention adds nothing, as if q, k, v and o were zero (the paper's cut). "uniform": it attends evenly to
    all it sees, as if q were zero. "mlp" and "block" (attention and MLP) are extensions of ours.
    """
    if cut not in get_args(Cut):
        raise UserError(f"unknown cut {cut!r}: use one of {', '.join(get_args(Cut))}")
    if cut == "uniform":
        return UniformAttention(table(depth, [layer]))
    return Gate.cut(depth, [layer], ("attn", "mlp") if cut == "block" else (cut,))


def tabulate(
    model: Model, processor, examples: Sequence[Example], cut: Cut = "attn", *, batch: int = 32, label: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Which examples the model answers, as it is ``base (N,)`` and with each layer cut ``correct (L, N)``, bool.

    Right is forced-greedy: at every token of the gold answer and of its turn's end, the likeliest token is that token,
    so greedy decoding would write ``answers[0]`` to the letter and stop.
    """
    depth = model.config.text.num_hidden_layers
    cuts = [layer_cut(depth, layer, cut) for layer in range(depth)]
    groups = list(batches(examples, processor, model.config, batch, step=_LENGTH_STEP))
    golds = [Gold.of(encoded.inputs, encoded.spans["answer"] | encoded.spans["end"]) for _, encoded in groups]
    asked = [(encoded.inputs, stack(cuts), gold) for (_, encoded), gold in zip(groups, golds, strict=True)]
    costs = [estimate(model, *sweep) for sweep in asked]
    right = np.zeros((1 + depth, len(examples)), bool)
    bar = progress(total=len(examples), desc=f"cut {cut} {label}".strip(), unit="sample")
    with Meter(sum(costs[1:], costs[0])), bar:
        for (rows, _), sweep in zip(groups, asked, strict=True):
            runs = fetch(sweep_runs(model, *sweep))
            right[0, rows] = runs.base.correct[: len(rows)]
            right[1:, rows] = runs.variants.correct[:, : len(rows)]
            bar.update(len(rows))
    return right[0], right[1:]


def subtask(example: Example) -> str:
    """An example's task, and its category within it where the task has any."""
    return example.task if example.subtask is None else f"{example.task}: {example.subtask}"


class Task(NamedTuple):
    """A task's samples and their table: ``base (N,)``, ``correct (L, N)``, and their sub-tasks ``strata (N,)``."""

    examples: list[Example]
    base: np.ndarray
    correct: np.ndarray
    strata: np.ndarray


@dataclasses.dataclass(frozen=True)
class Args(SelectOptions, DataOptions, ModelOptions):
    """Find, for every task, which layers hurt it, choose one to cut on a few samples, and measure that on others (P3).

    Accuracy is forced-greedy: greedy decoding would write the first gold answer to the letter and stop.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    """Task names, families (knowledge, perception, p0-knowledge ...), JSONL files or folders."""
    cut: Cut = "attn"
    """What is taken out of a layer: its attention's output (attn, the paper's), the even attention of zeroed queries
    (uniform), its MLP's output (mlp), or attention and MLP (block)."""
    split: str = "eval"
    """Split of named tasks: trace, train, eval or test."""
    limit: int | None = 240
    """Samples of every task: the pool takes up to a third of them, the others evaluate the choice."""
    by: Literal["task", "subtask"] = "task"
    """Whose interaction vectors are compared. Sub-tasks are a dataset's categories."""
    similarity: Similarity = "pearson"
    """What is compared of two interaction vectors."""
    batch: int = 32
    """Samples per compiled call."""
    draws: int = 1000
    """Probe sets, bootstrap resamples and permutations."""
    seed: int = 0
    """Seed of the choice and of all draws."""
    out: Path = Path("runs/talo")
    """Run folder: results.json, samples.jsonl, vectors.npz, figures, and per task its table.npz and cut.safetensors."""


def load_tasks(args: Args) -> dict[str, list[Example]]:
    """The examples of every task, by its label."""
    named = {task_label(name): name for name in args.tasks}
    if len(named) != len(args.tasks) or not named:
        raise UserError(f"--tasks is {' '.join(args.tasks) or 'empty'}: give at least one task, each once")
    loaded = {label: load_task(name, split=args.split, limit=args.limit, options=args) for label, name in named.items()}
    for label, examples in loaded.items():
        try:
            args.check(len(examples))
        except UserError as error:
            raise UserError(f"{label}: {error}") from None
    return loaded


def study(task: Task, args: Args) -> tuple[dict, Choice]:
    """The choice for a task, its gain on the eval set with an interval over that set's samples, and the controls."""
    base, correct, strata = task.base, task.correct, task.strata
    choice = select(base, correct, strata, args, np.random.default_rng(args.seed))
    rows = outside(len(base), choice)
    gained = gains(base, correct, choice.layer)[rows]
    spread = resampled(gained[None], args.draws, np.random.default_rng(args.seed))
    return {
        "samples": len(base),
        "base": float(base.mean()),
        "layer": layer_name(choice.layer),
        "probe_gain": choice.gain,
        "probe_samples": len(choice.probe),
        "rounds": choice.rounds,
        "eval_samples": len(rows),
        "eval_base": float(base[rows].mean()),
        "eval_gain": {**percentiles(spread.ravel()), "mean": float(gained.mean())},
        "over_probe_sets": assess(base, correct, strata, args, args.draws, args.seed),
        "best_of_all": permuted(base, correct, args.layers(len(correct)), args.draws, args.seed),
    }, choice


def records(task: Task, choice: Choice) -> list[dict]:
    """A line per sample: what it was used for, and whether it is right without a cut and with each layer cut."""
    used = np.full(len(task.base), "eval", object)
    used[choice.pool], used[choice.probe] = "pool", "probe"
    return [
        {
            "id": e.id,
            "subtask": about,
            "question": e.question,
            "answer": e.answers[0],
            "used": role,
            "base": bool(base),
            "cut": cut.tolist(),
        }
        for e, about, role, base, cut in zip(
            task.examples, task.strata.tolist(), used, task.base, task.correct.T, strict=True
        )
    ]


def compare(run: Run, tasks: dict[str, Task], args: Args) -> list[dict]:
    """Saves and draws the interaction vectors, and returns the two halves of their tree: the tasks or sub-tasks, and
    how often, of resamples, the two of them that part most easily are in the same half."""
    from interventions.figures import interactions

    deltas = {}
    for label, task in tasks.items():
        for about in np.unique(task.strata) if args.by == "subtask" else [label]:
            rows = task.strata == about if args.by == "subtask" else slice(None)
            deltas[str(about)] = (task.correct.astype(float) - task.base)[:, rows]
    names, rng = list(deltas), np.random.default_rng(args.seed)
    vectors = np.stack([delta.mean(1) for delta in deltas.values()])
    # Layer 0, which every task needs, would make all of them alike.
    tried = args.layers(vectors.shape[1])
    low, high = np.percentile([resampled(d, args.draws, rng) for d in deltas.values()], [2.5, 97.5], axis=1)
    alike = similarity(vectors[:, tried], args.similarity)
    halves = together([delta[tried] for delta in deltas.values()], args.similarity, args.draws, args.seed)
    arrays = {"delta": vectors, "low": low, "high": high, "similarity": alike, "together": halves}
    run.save_arrays("vectors.npz", names=np.array(names), **arrays)
    shown = names, vectors, (low > 0) | (high < 0), alike, tree(alike) if len(names) > 1 else None
    run.write("tasks.png", lambda path: interactions(path, *shown, label=args.similarity))
    first = in_two(vectors[:, tried], args.similarity)[0]
    return [
        {"names": [names[i] for i in half], "together": float(halves[np.ix_(half, half)].min())}
        for half in (np.flatnonzero(first), np.flatnonzero(~first))
        if len(half) and len(names) > 1
    ]


def show(results: dict, args: Args) -> None:
    """Prints two tables: what was chosen and what it gained, and how far such a choice can be trusted."""

    def span(part: dict) -> str:
        return f"{part['mean']:+.3f} [{part['low']:+.3f}, {part['high']:+.3f}]"

    print(f"{f'cut: {args.cut}':18s} base  layer   on {args.shot:2d}+   on the others [95 %]")
    for label, r in results.items():
        print(f"{label:16s} {r['base']:6.3f}  {r['layer']:5s}  {r['probe_gain']:+6.3f}   {span(r['eval_gain'])}")
    print(
        f"\n{f'{args.draws} probe sets':16s} on them  on the others [95 %]     minus a random layer     stable  "
        "best of all     p"
    )
    for label, r in results.items():
        over, best = r["over_probe_sets"], r["best_of_all"]
        print(
            f"{label:16s} {over['probe_gain']:+7.3f}  {span(over['held_out'])}  {span(over['over_random'])}  "
            f"{over['stability']:6.2f}  {layer_name(best['layer']):>3s} {best['delta']:+.3f}  {best['p']:6.3f}"
        )
    print()


@command
def main(args: Args) -> None:
    for name in ("batch", "draws"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}: give at least 1")
    loaded = load_tasks(args)
    model, processor = args.load()
    args.layers(model.config.text.num_hidden_layers)
    for examples in loaded.values():
        check_fit(examples, processor, model.config)
    run = Run.open(args.out, args, model.config, processor)
    run.pin("model", fingerprint(model))
    run.pin("data", {name: source(name, split=args.split, options=args) for name in args.tasks})
    tasks, results, lines = {}, {}, []
    for label, examples in loaded.items():

        def make(label=label, examples=examples) -> dict:
            base, correct = tabulate(model, processor, examples, args.cut, batch=args.batch, label=label)
            return {"base": base, "correct": correct}

        strata = np.array([subtask(example) for example in examples])
        tasks[label] = Task(examples, **run.once(f"{label}/table.npz", make), strata=strata)
        results[label], choice = study(tasks[label], args)
        lines += [{"task": label, **record} for record in records(tasks[label], choice)]
        if choice.layer != BASE:
            cut = layer_cut(model.config.text.num_hidden_layers, choice.layer, args.cut)
            run.write(f"{label}/cut.safetensors", lambda path, cut=cut: save_interventions(path, (cut,)))
    run.save_lines("samples.jsonl", lines)
    halves = compare(run, tasks, args)
    run.save_json("results.json", {"metric": "forced_greedy", "tasks": results, "halves": halves})
    show(results, args)
    for half in halves:
        how_often = f"in {half['together']:.2f} of resamples or more" if len(half["names"]) > 1 else "the only one"
        print(f"alike ({args.similarity}; {how_often}): {', '.join(half['names'])}")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
