"""The options about data that all commands with a task share."""

import dataclasses
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """How the examples of a public dataset are read and shown."""

    data_root: Path | None = None
    """Folder with local copies of datasets from the Hugging Face hub, as ROOT/OWNER/NAME or ROOT/NAME. By default
    datasets are read from the hub."""
    choices: Literal["listed", "lettered", "hidden"] = "listed"
    """How a multiple-choice question shows its choices. listed: as a list of texts, and the answer is a text; lettered:
    as lines with letters, and the answer is a letter; hidden: no choice is shown, and the answer is a text. P0 does not
    specify this."""
    stream: bool = False
    """Read a dataset over the network instead of storing it on the disk first. This is faster if only a few samples of
    a large dataset are needed."""
    skip_bad: bool = False
    """Leave out examples that cannot be read, or that do not fit the model, instead of stopping. How many these are is
    printed; manifest.json lists them with the reasons (left_out)."""
