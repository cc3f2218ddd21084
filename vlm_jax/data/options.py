"""The options about data that all commands with a task share."""

import dataclasses
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """How the examples of a public dataset are read and shown."""

    data_root: Path | None = None
    """Folder with local copies of hub datasets, as ROOT/OWNER/NAME or ROOT/NAME. By default the hub is used."""
    choices: Literal["listed", "lettered", "hidden"] = "listed"
    """How a multiple-choice question shows its choices: as a list of texts (the answer is a text), as lettered lines
    (the answer is a letter), or not at all. The paper P0 does not specify this."""
    stream: bool = False
    """Read a dataset over the network without storing it. Use it for a few samples of a large dataset."""
