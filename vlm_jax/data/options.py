"""How the examples of a real dataset are made: the options that every command with a task shares."""

import dataclasses
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """How the examples of a real dataset are made."""

    data_root: Path | None = None
    """Folder with local copies of hub datasets, ROOT/OWNER/NAME or ROOT/NAME; by default the hub is asked."""
    choices: Literal["listed", "lettered", "hidden"] = "listed"
    """How a multiple-choice question shows its choices: as a list of texts (the answer is a text), as lettered lines
    (the answer is a letter), or not at all. P0 does not say."""
    stream: bool = False
    """Read a dataset over the network instead of storing it: for a few samples of a large one."""
