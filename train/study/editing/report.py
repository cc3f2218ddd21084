"""The report of P4's study: one table with intervals and paired tests, and its figure."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from eval.tables import Table
from interventions.figures.base import save_figure
from interventions.figures.editing import conditions as draw_conditions
from interventions.statistics import accuracy, change_text, holm, interval_text, paired
from train.study.artifacts import EDITING_SUMMARY
from train.study.editing.recipes import FULL, REPORTED, Condition
from train.study.editing.study import Cell
from train.study.folders import folder_of
from vlm_jax.data import Example
from vlm_jax.data.miniworld import TASKS, has_held_out_wording
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.folder import Run


def parts_of(tested: list[Example], trained_on: set[str]) -> dict[str, np.ndarray]:
    """Name of a column -> which held-out examples it is about. Columns without an example are left out."""
    task = np.array([example.task for example in tested])
    known = np.isin(task, sorted(trained_on))
    held_out = np.array([example.task in TASKS and has_held_out_wording(example) for example in tested])
    parts = {"trained tasks": known, "their held-out wordings": known & held_out}
    parts |= {name: task == name for name in dict.fromkeys(task[~known].tolist())}
    return {name: rows for name, rows in parts.items() if rows.any()}


def report(
    run: Run, cells: Mapping[Condition, list[Cell]], tested: list[Example], clusters: np.ndarray, trained_on: set[str]
) -> str:
    """Writes ``summary.json``, ``tables/`` and the figure.

    Args:
        cells: the cells of each condition, one for each seed.
        clusters: numbers that examples of the same image share (:func:`eval.judging.clusters_of`).

    Returns:
        The table, as Markdown.
    """
    parts = parts_of(tested, trained_on)
    scores = {condition.name: np.stack([cell.scores for cell in of]) for condition, of in cells.items()}
    rows: list[dict[str, Any]] = []
    for condition, of in cells.items():
        steps = [cell.step_seconds for cell in of if cell.step_seconds]
        row: dict[str, Any] = {
            "condition": condition.name,
            "section": condition.section,
            "parameters": of[0].parameters,
            "seeds": len(of),
            "step_seconds": float(np.mean(steps)) if steps else None,
            "step_memory_gib": of[0].step_gib,
            "accuracy": {
                name: accuracy(scores[condition.name][:, where], clusters=clusters[where])
                for name, where in parts.items()
            },
        }
        if condition.name != FULL:
            where = parts["trained tasks"]
            pair = scores[condition.name][:, where], scores[FULL][:, where]
            row["minus_full"] = paired(*pair, clusters=clusters[where])
        rows.append(row)
    compared = [row for row in rows if "minus_full" in row]
    for row, adjusted in zip(compared, holm([row["minus_full"]["p"] for row in compared]), strict=True):
        row["minus_full"]["p_holm"] = float(adjusted)
    content = {"rows": rows, "reported": REPORTED}
    run.save_json("summary.json", content, Artifact("metrics", "Every condition with its interval", EDITING_SUMMARY))
    shown = {
        f"{row['section']}: {row['condition']}": row["accuracy"]["trained tasks"]
        | {"folders": [folder_of(row["condition"])]}
        for row in rows
    }
    save_figure(run, "figures/conditions", draw_conditions, "Accuracy of every condition", accuracy=shown, full=FULL)
    table = Table(
        ("condition", "trained", *parts, f"minus {FULL}", "p (Holm)", "s / step", "GiB / step"),
        [_cells(row, list(parts)) for row in rows],
    )
    table.save(run, "tables/conditions", "Accuracy of every condition on held-out examples")
    return table.markdown()


def _cells(row: dict, parts: list[str]) -> tuple[str, ...]:
    difference = row.get("minus_full")
    return (
        row["condition"],
        f"{row['parameters']:,}",
        *(interval_text(row["accuracy"][part]) for part in parts),
        "-" if difference is None else change_text(difference),
        "-" if difference is None else f"{difference['p_holm']:.3f}",
        "-" if row["step_seconds"] is None else f"{row['step_seconds']:.2f}",
        "-" if row["step_memory_gib"] is None else f"{row['step_memory_gib']:.2f}",
    )
