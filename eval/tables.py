"""Tables: a header and rows, as Markdown, CSV and LaTeX."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from vlm_jax.runs.folder import Run


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
