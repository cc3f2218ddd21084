"""Tables: a header and rows, as Markdown, CSV and LaTeX."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vlm_jax.runs import Run


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells are text already: what a number means decides how it is written."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def markdown(self) -> str:
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)

    def save(self, run: Run, name: str) -> None:
        """``name.md``, ``name.csv`` and ``name.tex`` (booktabs) in a run folder."""
        frame = pd.DataFrame(list(self.rows), columns=list(self.header))
        run.write(f"{name}.md", lambda path: path.write_text(self.markdown()))
        run.write(f"{name}.csv", lambda path: frame.to_csv(path, index=False))
        run.write(f"{name}.tex", lambda path: _latex(path, frame))


def _latex(path: Path, frame: pd.DataFrame) -> None:
    style = frame.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    path.write_text(style.to_latex(hrules=True))


def table1(rows: list[dict], families: list[str]) -> str:
    """P0's Table 1 as Markdown: accuracy per family, and trainable parameters.

    Args:
        rows: ``condition``, ``parameters`` (family -> count, or None) and per family a list of scores, one per seed.
    """
    header = ("LoRA target", *families, "trainable parameters")
    cells = [
        (row["condition"], *(_accuracy(row[family]) for family in families), _parameters(row["parameters"]))
        for row in rows
    ]
    return Table(header, cells).markdown()


def _accuracy(scores: list[dict]) -> str:
    mean = np.mean([score["accuracy"] for score in scores])
    # Seeds share their samples, so averaging over them does not shrink the sampling error.
    error = np.mean([score["stderr"] for score in scores])
    return f"{mean:.3f} ± {error:.3f}"


def _parameters(counts: dict[str, float] | None) -> str:
    if counts is None:
        return "-"
    return " / ".join(dict.fromkeys(f"{count:,.0f}" for count in counts.values()))
