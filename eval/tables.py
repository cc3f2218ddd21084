"""Tables: a header and rows, as Markdown, CSV and LaTeX."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.folder import Run


@dataclasses.dataclass(frozen=True)
class Table:
    """A header and rows of text cells. The caller formats numbers, because it knows their units and precision."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def markdown(self) -> str:
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)

    def save(self, run: Run, name: str, title: str) -> None:
        """Writes ``name.md``, ``name.csv`` and ``name.tex`` (booktabs) into a run folder."""
        frame = pd.DataFrame(list(self.rows), columns=list(self.header))
        artifact = Artifact("table", title, layout=dict.fromkeys(self.header, "text"))
        run.write(f"{name}.md", lambda path: path.write_text(self.markdown()), artifact)
        run.write(f"{name}.csv", lambda path: frame.to_csv(path, index=False), artifact)
        run.write(f"{name}.tex", lambda path: _latex(path, frame), artifact)


def _latex(path: Path, frame: pd.DataFrame) -> None:
    style = frame.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    path.write_text(style.to_latex(hrules=True))
