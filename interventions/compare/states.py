"""Two finished runs of one command that can be compared: the same options and data, another state of the model."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from interventions.options import StateOptions
from vlm_jax.errors import UserError
from vlm_jax.files import check_regular, parse_json, read_json
from vlm_jax.runs.configuration import differences, without
from vlm_jax.runs.log import records_of

#: Options that may differ: they choose the model's state, or how the work is divided. The number of samples may differ
#: too where what is measured of one does not depend on others. (A trace's noise has the samples' standard deviation.)
_FREE = {
    *(field.name for field in dataclasses.fields(StateOptions)),
    *("model", "dtype", "weights", "attention", "mesh", "files", "batch", "maps", "steps"),
    *("skip_bad", "stream", "data_root"),
}


class State(NamedTuple):
    """A run folder of a command on one state of a model."""

    folder: Path
    config: dict
    manifest: dict

    @classmethod
    def of(cls, folder: str | Path) -> "State":
        """The state whose run is in the folder.

        Raises:
            UserError: for a folder that is not one of a run.
        """
        folder = Path(folder)
        for name in ("config.json", "manifest.json"):
            if not (folder / name).is_file():
                raise UserError(f"{folder} is not a finished run, because it has no {name}: name a command's --out")
        return cls(folder, read_json(folder / "config.json"), read_json(folder / "manifest.json"))

    @property
    def name(self) -> str:
        """The model with what was applied to it, in words."""
        applied = (self.config.get(name) or [] for name in ("adapter", "intervention"))
        return " + ".join([str(self.config.get("model")), *itertools.chain(*applied)])

    def read(self, name: str) -> Any:
        """The value of a JSON file of the run."""
        return parse_json(self._file(name).read_text())

    def lines(self, name: str) -> list[dict]:
        """The records of a JSON Lines file of the run."""
        path = self._file(name)
        return records_of(path, path.read_bytes())

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of an ``.npz`` file of the run."""
        with np.load(self._file(name)) as found:
            return dict(found)

    def _file(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing, because the run was stopped early: run its command again to finish it")
        check_regular(path)
        return path


def check_same(first: State, second: State) -> None:
    """Raises a UserError unless both runs are of one command, with the same options and data."""
    commands = [state.config.get("command") for state in (first, second)]
    if commands[0] != commands[1]:
        raise UserError(f"{first.folder} is of {commands[0]} and {second.folder} of {commands[1]}: name two alike")
    free = _FREE if commands[0] == "interventions.trace" else _FREE | {"limit"}
    if changed := differences(without(first.config, free), without(second.config, free)):
        raise UserError(
            f"{second.folder} (here) was made with other options than {first.folder} (there): {changed}: run one of "
            "them again"
        )
    data = [{name: state.manifest.get(name) for name in ("data", "prompt")} for state in (first, second)]
    if changed := differences(*data):
        raise UserError(f"{first.folder} and {second.folder} read other samples ({changed}): run one of them again")


class Shared(NamedTuple):
    """The samples that two runs have in common."""

    first: Int[np.ndarray, " shared"]
    """Their rows in the first run."""
    second: Int[np.ndarray, " shared"]
    """Their rows in the second run."""
    left_out: int
    """How many samples only one of them has."""


def shared(first: Sequence[str], second: Sequence[str], where: str) -> Shared:
    """The samples of two lists of ids that are in both.

    Raises:
        UserError: if fewer than two are.
    """
    rows = {name: row for row, name in enumerate(second)}
    pairs = [(row, rows[name]) for row, name in enumerate(first) if name in rows]
    if len(pairs) < 2:
        raise UserError(f"the runs have {len(pairs)} samples of {where} in common: compare runs on the same samples")
    both = np.array(pairs).T
    return Shared(both[0], both[1], len(set(first) ^ set(second)))
