"""What the result files of a run folder are. ``artifacts.json`` lists every one of them (docs/runs.md)."""

import dataclasses
import fnmatch
from collections.abc import Mapping

#: The file of a run folder that lists its results.
ARTIFACTS = "artifacts.json"

#: Every type of artifact and what a file of it holds. A reader, such as a report page, chooses by type how to show it.
TYPES = {
    "heat_map": "figure data: values on a grid, such as layers x modules",
    "curves": "figure data: lines over layers, sizes or shares",
    "intervals": "figure data: estimates with their intervals",
    "bars": "figure data: heights by category",
    "scatter": "figure data: points",
    "figure": "a picture, drawn from the data file that its entry names",
    "table": "rows and columns, for people (Markdown, CSV, LaTeX) or for statistics (Parquet)",
    "samples": "a JSON line per sample",
    "metrics": "a JSON object of scores and counts",
    "training": "a JSON line per logged step of a training",
    "arrays": "named arrays, or one array as nested JSON lists",
    "placement": "a JSON list of module names: where an adapter acts",
    "adapter": "a PEFT folder",
    "model": "a Hugging Face folder",
    "intervention": "a safetensors file of saved interventions",
}

#: Files that are no results, as patterns: what a run needs in order to resume and to say what it is.
INTERNAL = (
    "config.json",
    "manifest.json",
    "*/manifest.json",
    ARTIFACTS,
    "seconds.json",
    ".lock",
    ".partial/*",
    "predictions.jsonl",
    "*/predictions.jsonl",
    "*.*-of-*.jsonl",
    *(
        f"{folder}training/{part}"
        for folder in ("", "*/")
        for part in ("training.json", "checkpoints/*", "profile/*", "tensorboard/*", "wandb/*")
    ),
)


@dataclasses.dataclass(frozen=True)
class Schema:
    """The fields of a file's records, objects, arrays or columns.

    It has a name because files of one name can have different fields: a trace's ``samples.jsonl`` is not an
    evaluation's.
    """

    name: str
    fields: Mapping[str, str]
    """Field -> what it holds, with its shape and unit."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """What one result file or folder is.

    Attributes:
        type: one of :data:`TYPES`.
        title: one line for a reader who sees this file alone.
        schema: the fields, where the file has any.
        layout: array or column -> dtype and shape, such as ``float32[96, 8, 2]``, where that differs from run to run.
        data: of a figure, the data file that it was drawn from.
    """

    type: str
    title: str
    schema: Schema | None = None
    layout: Mapping[str, str] | None = None
    data: str | None = None

    def __post_init__(self):
        if self.type not in TYPES:
            raise ValueError(f"unknown type of artifact {self.type!r}: use one of {', '.join(TYPES)}")

    def entry(self, file: str) -> dict:
        """The artifact as ``artifacts.json`` has it."""
        entry = {"file": file, "type": self.type, "title": self.title}
        if self.schema is not None:
            entry["schema"] = self.schema.name
        if self.layout is not None:
            entry["layout"] = dict(self.layout)
        if self.data is not None:
            entry["data"] = self.data
        return entry


def is_internal(file: str) -> bool:
    """Whether a file of a run folder, by its relative path, is none of its results."""
    return any(fnmatch.fnmatchcase(file, pattern) for pattern in INTERNAL)


def with_artifact(listing: dict | None, file: str, artifact: Artifact) -> dict:
    """The content of ``artifacts.json`` with one more file, or with a file's new entry.

    Entries and schemas are sorted by name, so that a run that was killed and resumed leaves the same bytes as one that
    was not.

    Args:
        listing: the content so far; None where there is no file yet.
    """
    listing = listing or {"artifacts": [], "schemas": {}}
    entries = {entry["file"]: entry for entry in listing["artifacts"]} | {file: artifact.entry(file)}
    schemas = dict(listing["schemas"])
    if artifact.schema is not None:
        name, fields = artifact.schema.name, dict(artifact.schema.fields)
        if schemas.setdefault(name, fields) != fields:
            raise ValueError(f"{file}: the schema {name!r} is already listed with other fields, give it another name")
    return {"artifacts": [entries[file] for file in sorted(entries)], "schemas": dict(sorted(schemas.items()))}
