"""The report of P1's study of Registering: one table with intervals and paired tests, and its figure."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from eval.tables import Table
from interventions.figures.base import save_figure
from interventions.figures.editing import conditions as draw_conditions
from interventions.statistics import accuracy, change_text, holm, interval_text, paired
from train.study.artifacts import REGISTERING_SUMMARY
from train.study.folders import folder_of
from train.study.registering.options import compared_with
from train.study.registering.recipes import REPORTED, Condition
from train.study.registering.study import Cell
from vlm_jax.data import Example
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.folder import Run


def report(run: Run, cells: Mapping[Condition, list[Cell]], tested: list[Example], clusters: np.ndarray) -> str:
    """Writes ``summary.json``, ``tables/`` and the figure.

    Args:
        cells: the cells of each condition, one for each seed.
        clusters: numbers that examples of the same image share (:func:`eval.judging.clusters_of`).

    Returns:
        The table, as Markdown.
    """
    task = np.array([example.task for example in tested])
    family = np.array([example.family or "other" for example in tested])
    families = {name: family == name for name in dict.fromkeys(family.tolist())}
    parts = {
        "all": np.ones(len(tested), bool),
        **families,
        **{name: task == name for name in dict.fromkeys(task.tolist())},
    }
    right = {condition: np.stack([cell.right for cell in of]) for condition, of in cells.items()}

    def mean(values: np.ndarray, where: np.ndarray) -> dict:
        return accuracy(values[:, where], clusters=clusters[where])

    rows: list[dict[str, Any]] = []
    for condition, of in cells.items():
        cut = None if of[0].cut is None else np.stack([cell.cut for cell in of if cell.cut is not None])
        row: dict[str, Any] = {
            "condition": condition.name,
            "section": condition.section,
            "seeds": len(of),
            "accuracy": {name: mean(right[condition], where) for name, where in parts.items() if where.any()},
            "failed": mean(np.stack([cell.failed for cell in of]), parts["all"]),
            "cut": None if cut is None else mean(cut, parts["all"]),
        }
        other = compared_with(condition)
        if other != condition:
            row["compared_with"] = other.name
            row["difference"] = paired(right[condition], right[other], clusters=clusters)
        rows.append(row)
    compared = [row for row in rows if "difference" in row]
    for row, adjusted in zip(compared, holm([row["difference"]["p"] for row in compared]), strict=True):
        row["difference"]["p_holm"] = float(adjusted)
    content = {"rows": rows, "reported": REPORTED}
    run.save_json(
        "summary.json", content, Artifact("metrics", "Every condition with its interval", REGISTERING_SUMMARY)
    )
    shown = {
        f"{row['section']}: {row['condition']}": row["accuracy"]["all"] | {"folders": [folder_of(row["condition"])]}
        for row in rows
    }
    whole = rows[0]["condition"]
    save_figure(run, "figures/conditions", draw_conditions, "Accuracy of every condition", accuracy=shown, full=whole)
    head = (
        "condition",
        "all",
        *families,
        "no possible answer",
        "text reads no register",
        "minus",
        "difference",
        "p (Holm)",
    )
    table = Table(head, [_cells(row, list(families)) for row in rows])
    table.save(run, "tables/conditions", "Accuracy of every condition on held-out examples")
    return table.markdown()


def _cells(row: dict, families: list[str]) -> tuple[str, ...]:
    difference = row.get("difference")
    return (
        row["condition"],
        *(interval_text(row["accuracy"][part]) for part in ("all", *families)),
        f"{row['failed']['mean']:.3f}",
        "-" if row["cut"] is None else interval_text(row["cut"]),
        row.get("compared_with", "-"),
        "-" if difference is None else change_text(difference),
        "-" if difference is None else f"{difference['p_holm']:.3f}",
    )
