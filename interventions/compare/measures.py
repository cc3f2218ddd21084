"""What two runs of each command have in common to compare, as rows of changes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from interventions import statistics
from interventions.compare.states import Shared, State, shared
from interventions.flow.shares import Reading
from interventions.kinds.groups import members
from interventions.modules import split_cell
from interventions.statistics import LEAST, holm, paired, paired_columns
from interventions.statistics.bootstrap import percentile_bounds
from interventions.statistics.comparison import two_sided
from interventions.trace.samples import check_lines, effects
from vlm_jax.errors import UserError


class Changes(NamedTuple):
    """What changed from one run to another."""

    rows: list[dict]
    """In the form of :data:`interventions.compare.artifacts.CHANGES`."""
    samples: int
    left_out: int


def _rows(
    task: str, measure: str, samples: int | Sequence[int], names: Sequence[str], layers: Iterable, found: Mapping
) -> list[dict]:
    """A row for each of some things of which one measure was taken, with p-values adjusted for their number."""
    counts = [samples] * len(names) if isinstance(samples, int) else samples
    found = {key: np.atleast_1d(np.asarray(found[key], float)) for key in _KEYS}
    known = ~np.isnan(found["p"])
    adjusted = np.full(len(known), np.nan)
    adjusted[known] = holm(found["p"][known])
    return [
        {
            "task": task,
            "measure": measure,
            "of": name,
            "layer": layer,
            "samples": int(counts[row]),
            **{key: _number(found[key][row]) for key in _KEYS},
            "p_holm": _number(adjusted[row]),
        }
        for row, (name, layer) in enumerate(zip(names, layers, strict=True))
        if not np.isnan(found["change"][row])
    ]


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


_KEYS = ("first", "second", "change", "low", "high", "p")


def _paired(first: Any, second: Any, **options: Any) -> dict:
    """The change of a mean score; see :func:`interventions.statistics.paired`, which subtracts the other way round."""
    found = paired(second, first, **options)
    p = None if found["low"] is None else found["p"]
    return {**found, "first": found["second"], "second": found["first"], "change": found["difference"], "p": p}


def traces(first: State, second: State, seed: int) -> Changes:
    """RR of every cell, p_clean, TE, and the share of samples that greedy decoding answers correctly.

    RR is computed in both runs from the same resampled samples; each run leaves out its own samples with a small TE.
    """
    lines = [state.lines("samples.jsonl") for state in (first, second)]
    for state, of_run in zip((first, second), lines, strict=True):
        check_lines(of_run, state.folder / "samples.jsonl")
    both = shared(*([line["id"] for line in of_run] for of_run in lines), where="the trace")
    kept = [[of_run[row] for row in rows] for of_run, rows in zip(lines, both[:2], strict=True)]
    clean, te, correct = (
        [np.array([line[name] for line in of_run], float) for of_run in kept] for name in ("p_clean", "te", "correct")
    )
    summary, count = first.read("summary.json"), len(kept[0])
    task, cells = summary["task"], list(summary["rr"])
    if cells != list(second.read("summary.json")["rr"]):
        raise UserError(f"{first.folder} and {second.folder} have other cells: compare models of the same depth")
    ie = [effects(of_run, cells) for of_run in kept]
    options = {"min_te": first.config["min_te"], "eps": first.config["eps"], "statistic": first.config["statistic"]}
    # So many that Holm's adjustment for all cells can still give a small p-value.
    resamples = max(10_000, 200 * len(cells))
    rates, draws = [], []
    for state, one_te, one_ie in zip((first, second), te, ie, strict=True):
        try:
            rates.append(statistics.rr(one_te, one_ie, **options))
        except UserError as error:
            raise UserError(f"{state.folder}: {error}") from None
        draws.append(statistics.rr_resamples(one_te, one_ie, seed=seed, resamples=resamples, **options))
    moved = draws[1] - draws[0]
    ends = dict(zip(("low", "high"), percentile_bounds(moved), strict=True)) | {"p": two_sided(moved)}
    counted = np.min([_counted(*of_run, **options) for of_run in zip(te, ie, strict=True)], 0)
    ends = {name: np.where(counted >= LEAST, end, np.nan) for name, end in ends.items()}
    found = {"first": rates[0], "second": rates[1], "change": rates[1] - rates[0], **ends}
    rows = _rows(task, "RR", counted.tolist(), cells, [split_cell(c)[0] for c in cells], found)
    means = {"p_clean": clean, "TE": [values.mean(1) for values in te], "correct": correct}
    for measure, (one, other) in means.items():
        rows += _rows(task, measure, count, ["all samples"], [None], _paired(one, other, seed=seed))
    return Changes(rows, count, both.left_out)


def _counted(te: np.ndarray, ie: np.ndarray, min_te: float, statistic: str, **_: Any) -> Int[np.ndarray, "cells"]:
    """How many samples count in each cell's RR."""
    counts = np.ones(len(te), bool) if statistic == "ratio_of_means" else te.mean(1) >= min_te
    return (counts[:, None] & ~np.isnan(ie).any(1)).sum(0)


def flows(first: State, second: State, seed: int) -> Changes:
    """Of every task: the shares of attention by layer, equation 2 of P1, accuracy under each cut, and the change of
    p(gold) by each cut."""
    rows, count, left_out = [], 0, 0
    results, others = first.read("results.json"), second.read("results.json")
    for task in results:
        edges = list(results[task]["windows"]["change"])
        if edges != list(others[task]["windows"]["change"]):
            raise UserError(f"{first.folder} and {second.folder} cut other edges in windows: give both the same")
        lines = [state.lines(f"{task}/samples.jsonl") for state in (first, second)]
        both = shared(*(list(dict.fromkeys(line["id"] for line in of_run)) for of_run in lines), where=task)
        count, left_out = count + len(both.first), left_out + both.left_out
        rows += _attention(task, first, second, both, seed)
        rows += _answers(task, lines, both, seed)
        rows += _windows(task, edges, first, second, both, seed)
    return Changes(rows, count, left_out)


def _attention(task: str, first: State, second: State, both: Shared, seed: int) -> list[dict]:
    readings = []
    for state, kept in zip((first, second), both[:2], strict=True):
        reading = Reading(**state.arrays(f"{task}/attention.npz"))
        readings.append(Reading(*(part[kept] for part in reading)))
    if readings[0].mass.shape[1:3] != readings[1].mass.shape[1:3]:
        raise UserError(
            f"{first.folder} and {second.folder} are of models of other depths: compare models of one shape"
        )
    present = [
        group
        for group in ("before", "image", "image_end", "register", "text")
        if all(reading.tokens[:, members(group)].any() for reading in readings)
    ]
    measures = {f"attention to {group}": [reading.share(group).mean(2) for reading in readings] for group in present}
    if "image_end" in present or "register" in present:
        measures["ratio"] = [reading.ratio() for reading in readings]
    rows = []
    for measure, (one, other) in measures.items():
        layers = range(one.shape[1])
        found = paired_columns(one, other, seed=seed)
        rows += _rows(task, measure, len(one), [f"layer {layer}" for layer in layers], layers, found)
    return rows


def _answers(task: str, lines: list[list[dict]], both: Shared, seed: int) -> list[dict]:
    tables: list[dict[str, dict[str, bool]]] = []  # condition -> id -> whether the answer is right
    for of_run in lines:
        table: dict[str, dict[str, bool]] = {}
        for line in of_run:
            cut = f"without {line['edge']}" if line["edge"] else "nothing cut"
            cut += f" in layers {line['layers']}" if line["layers"] else ""
            cut += f" ({line['mode']})" if line["mode"] else ""
            table.setdefault(cut, {})[line["id"]] = line["correct"]
        tables.append(table)
    ids = [list(dict.fromkeys(line["id"] for line in of_run)) for of_run in lines]
    kept = [ids[0][row] for row in both.first]
    conditions = [name for name in tables[0] if name in tables[1]]
    found = []
    for condition in conditions:
        one, other = ([float(table[condition][name]) for name in kept] for table in tables)
        found.append(_paired(one, other, seed=seed))
    joined = {key: [one[key] for one in found] for key in _KEYS}
    return _rows(task, "accuracy", len(kept), conditions, [None] * len(conditions), joined)


def _windows(task: str, edges: list[str], first: State, second: State, both: Shared, seed: int) -> list[dict]:
    effects = []
    for state, kept in zip((first, second), both[:2], strict=True):
        found = state.arrays(f"{task}/windows.npz")
        effects.append({name: found[name][kept] for name in ("base", "window", "whole")})
    rows = _rows(
        task,
        "p(gold)",
        len(both.first),
        ["nothing cut"],
        [None],
        _paired(*(effect["base"] for effect in effects), seed=seed),
    )
    for number, edge in enumerate(edges):
        one, other = (effect["window"][:, number] - effect["base"][:, None] for effect in effects)
        layers, found = range(one.shape[1]), paired_columns(one, other, seed=seed)
        names = [f"{edge}, window at layer {layer}" for layer in layers]
        rows += _rows(task, f"change of p(gold) without {edge}", len(one), names, layers, found)
    return rows


def accuracies(first: State, second: State, seed: int) -> Changes:
    """The mean score of every task and of all samples. Samples of one picture are resampled together."""
    lines = [state.lines("samples.jsonl") for state in (first, second)]
    both = shared(*([line["id"] for line in of_run] for of_run in lines), where="the task")
    kept = [[of_run[row] for row in rows] for of_run, rows in zip(lines, both[:2], strict=True)]
    one, other = (np.array([line["score"] for line in of_run], float) for of_run in kept)
    tasks, clusters = (np.array([line[name] for line in kept[0]]) for name in ("task", "cluster"))
    rows = []
    names = list(dict.fromkeys(tasks.tolist()))
    for name in names if len(names) == 1 else [*names, "all"]:
        of = np.full(len(tasks), True) if name == "all" else tasks == name
        found = _paired(one[of], other[of], clusters=clusters[of], seed=seed)
        rows += _rows(name, "accuracy", int(of.sum()), ["all samples"], [None], found)
    return Changes(rows, len(one), both.left_out)


#: Command -> how two of its runs are compared.
MEASURES: dict[str, Callable[[State, State, int], Changes]] = {
    "interventions.trace": traces,
    "interventions.flow": flows,
    "eval.accuracy": accuracies,
}
