"""Compares the run folders of one command on two states of a model."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from interventions.compare.measures import MEASURES
from interventions.compare.states import State, check_same
from interventions.statistics import interval_text
from vlm_jax.errors import UserError

#: How many rows of a measure are printed.
_SHOWN = 10


class Compared(NamedTuple):
    """What changed from the first run to the second."""

    command: str
    first: State
    second: State
    samples: int
    """Number of samples that both runs have."""
    left_out: int
    """Number of samples that only one of them has."""
    changes: list[dict]
    """In the form of :data:`interventions.compare.artifacts.CHANGES`."""

    @property
    def names(self) -> tuple[str, str]:
        """Short, different names of both states."""
        names = self.first.name, self.second.name
        return names if names[0] != names[1] else (str(self.first.folder), str(self.second.folder))

    def __repr__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterable[str]:
        """The comparison as text. Of a measure with many rows, those with the largest changes are shown."""
        yield f"first: {self.names[0]}\nsecond: {self.names[1]}\n{self.samples} samples of {self.command}"
        if self.left_out:
            yield f"note: {self.left_out} samples that only one run has are left out"
        groups: dict[tuple, list[dict]] = {}
        for row in self.changes:
            groups.setdefault((row["task"], row["measure"]), []).append(row)
        for (task, measure), rows in groups.items():
            largest = sorted(rows, key=lambda row: -abs(row["change"]))[:_SHOWN]
            hidden = f", the {_SHOWN} largest of {len(rows)} changes" if len(rows) > _SHOWN else ""
            yield f"\n{task}, {measure}{hidden}"
            width = max(len(row["of"]) for row in largest)
            yield f"  {'':{width}s}    first   second   change [95 % interval]; p (Holm)"
            for row in largest:
                p = "" if row["p_holm"] is None else f"; {row['p_holm']:.4f}"
                change = interval_text(row, "change", "+")
                yield f"  {row['of']:{width}s}  {row['first']:7.3f}  {row['second']:7.3f}   {change}{p}"


def compare(first: str | Path, second: str | Path, *, seed: int = 0) -> Compared:
    """What changed from one state of a model to another: paired differences, on the samples that both runs have, with
    95 % bootstrap intervals and p-values.

    Args:
        first, second: run folders of one command (interventions.trace, interventions.flow or eval.accuracy) with the
            same options and data, such as one of a model and one with ``--adapter``.
        seed: of the bootstrap.

    Raises:
        UserError: for folders that are not finished runs, or that cannot be compared.
    """
    states = State.of(first), State.of(second)
    check_same(*states)
    command = states[0].config["command"]
    if command not in MEASURES:
        raise UserError(f"runs of {command} cannot be compared, only those of {', '.join(MEASURES)}")
    changes = MEASURES[command](*states, seed)
    return Compared(command, *states, changes.samples, changes.left_out, changes.rows)
