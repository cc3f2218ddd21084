"""The results that follow from TaLo's tables: the choice for every task, and how similar the tasks are."""

import numpy as np

from interventions.statistics import percentiles, widened
from interventions.talo.artifacts import VECTORS
from interventions.talo.options import Args
from interventions.talo.selection import (
    BASE,
    Choice,
    assess,
    gains,
    in_two,
    layer_name,
    outside,
    permuted,
    resampled_vectors,
    select,
    similarity,
    together,
    tree,
)
from interventions.talo.tables import TaskTable
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.folder import Run


def task_report(task: TaskTable, args: Args) -> tuple[dict, Choice]:
    """The choice for a task, its gain on the eval set with an interval over that set's samples, and the controls."""
    base, correct, strata = task.base, task.correct, task.strata
    choice = select(base, correct, strata, args, np.random.default_rng(args.seed))
    rows = outside(len(base), choice)
    gained = gains(base, correct, choice.layer)[rows]
    spread = percentiles(resampled_vectors(gained[None], args.draws, np.random.default_rng(args.seed)).ravel())
    if choice.layer != BASE:  # without a cut the gain is 0, and nothing is uncertain
        ends = widened(spread["low"], spread["high"], (gained > 0).sum(), (gained < 0).sum(), len(rows))
        spread |= {"low": float(ends[0]), "high": float(ends[1])}
    return {
        "samples": len(base),
        "base": float(base.mean()),
        "layer": layer_name(choice.layer),
        "probe_gain": choice.gain,
        "probe_samples": len(choice.probe),
        "rounds": choice.rounds,
        "eval_samples": len(rows),
        "eval_base": float(base[rows].mean()),
        "eval_gain": {**spread, "mean": float(gained.mean())},
        "over_probe_sets": assess(base, correct, strata, args, args.draws, args.seed),
        "best_of_all": permuted(base, correct, args.layers(len(correct)), args.draws, args.seed),
    }, choice


def records(task: TaskTable, choice: Choice) -> list[dict]:
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


def compare(run: Run, tasks: dict[str, TaskTable], args: Args) -> list[dict]:
    """Saves and draws the interaction vectors, and returns the two halves of their tree.

    Returns:
        For each half, ``names``: its tasks or sub-tasks. ``together``: the smallest share, over pairs of them, of
        resamples in which the pair is in the same half.
    """
    from interventions.figures.base import save_figure
    from interventions.figures.talo import interactions

    deltas = {}
    for label, task in tasks.items():
        for about in np.unique(task.strata) if args.by == "subtask" else [label]:
            rows = task.strata == about if args.by == "subtask" else slice(None)
            deltas[str(about)] = (task.correct.astype(float) - task.base)[:, rows]
    names, rng = list(deltas), np.random.default_rng(args.seed)
    vectors = np.stack([delta.mean(1) for delta in deltas.values()])
    # Every task needs layer 0, so it would make all tasks similar.
    tried = args.layers(vectors.shape[1])
    low, high = np.percentile([resampled_vectors(d, args.draws, rng) for d in deltas.values()], [2.5, 97.5], axis=1)
    for row, delta in enumerate(deltas.values()):
        gained, lost = ((sign * delta > 0).sum(1) for sign in (1, -1))
        low[row], high[row] = widened(low[row], high[row], gained, lost, delta.shape[1])
    alike = similarity(vectors[:, tried], args.similarity)
    halves = together([delta[tried] for delta in deltas.values()], args.similarity, args.draws, args.seed)
    arrays = {"delta": vectors, "low": low, "high": high, "similarity": alike, "together": halves}
    artifact = Artifact("arrays", "Interaction vectors of the tasks and their similarity", VECTORS)
    run.save_arrays("vectors.npz", {"names": np.array(names), **arrays}, artifact)
    save_figure(
        run,
        "tasks",
        interactions,
        "Change in accuracy when a layer is cut, and how similar the tasks are",
        names=names,
        vectors=vectors,
        sure=(low > 0) | (high < 0),
        similarity=alike,
        tree=tree(alike) if len(names) > 1 else None,
        label=args.similarity,
        samples=[delta.shape[1] for delta in deltas.values()],
    )
    first = in_two(vectors[:, tried], args.similarity)[0]
    return [
        {"names": [names[i] for i in half], "together": float(halves[np.ix_(half, half)].min())}
        for half in (np.flatnonzero(first), np.flatnonzero(~first))
        if len(half) and len(names) > 1
    ]
