"""Describes the result files of a run folder. ``artifacts.json`` lists all of them (docs/runs.md)."""

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any

#: The file of a run folder that lists its results.
ARTIFACTS = "artifacts.json"

#: Type of artifact -> the content of its file. Programs that show results, such as a report page, choose the view by
#: type.
TYPES = {
    "heat_map": "figure data: values on a grid, such as layers x modules",
    "curves": "figure data: lines over layers, sizes or shares",
    "intervals": "figure data: estimates with their intervals",
    "bars": "figure data: heights by category",
    "scatter": "figure data: points",
    "figure": "a picture, drawn from the data file that its entry names",
    "table": "rows and columns, for people (Markdown, CSV, LaTeX) or for statistics (Parquet)",
    "samples": "a JSON line for each sample",
    "pictures": "a folder of the samples' pictures; index.json names them and has the questions",
    "token_maps": "a folder: values of single tokens, such as attention, and the pictures over which they are laid",
    "metrics": "a JSON object of scores and counts",
    "training": "a JSON line for each logged step of a training",
    "arrays": "named arrays, or one array as nested JSON lists",
    "placement": "a JSON list of the modules on which an adapter acts",
    "adapter": "a PEFT folder",
    "model": "a Hugging Face folder",
    "intervention": "a safetensors file of saved interventions",
    "dictionaries": "a folder of SAELens folders, one for each dictionary",
}

#: Patterns of files that are not results: those that describe a run, and those that a run needs to continue.
INTERNAL = (
    "config.json",
    "manifest.json",
    "*/manifest.json",
    ARTIFACTS,
    "page.html",
    "compared.html",
    "seconds.json",
    ".lock",
    ".partial/*",
    "predictions.jsonl",
    "*/predictions.jsonl",
    "*.*-of-*.jsonl",
    *(
        f"{folder}training/{part}"
        for folder in ("", "*/")
        for part in ("training.json", "checkpoints/*", "activations/*", "profile/*", "tensorboard/*", "wandb/*")
    ),
)


@dataclasses.dataclass(frozen=True)
class Schema:
    """The fields of a file: of its records, of its object, its arrays or its columns.

    A schema has a name, because files with the same name can have different fields: the ``samples.jsonl`` of a trace
    and that of an evaluation differ.
    """

    name: str
    fields: Mapping[str, str]
    """Field -> its meaning, with shape and unit."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """The description of one result file or folder.

    Attributes:
        type: one of :data:`TYPES`.
        title: one line that explains the file to a reader who sees no other file.
        schema: the fields; None if the file has no fields.
        layout: array or column -> its dtype and shape, such as ``float32[96, 8, 2]``, if these differ from run to run.
        data: for a figure, the data file from which it was drawn.
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
        """The artifact's entry in ``artifacts.json``."""
        entry: dict[str, Any] = {"file": file, "type": self.type, "title": self.title}
        if self.schema is not None:
            entry["schema"] = self.schema.name
        if self.layout is not None:
            entry["layout"] = dict(self.layout)
        if self.data is not None:
            entry["data"] = self.data
        return entry


def is_internal(file: str) -> bool:
    """Whether a file, given by its path in the run folder, is not a result."""
    return any(fnmatch.fnmatchcase(file, pattern) for pattern in INTERNAL)


def is_listing(value: dict) -> bool:
    """Whether a value has the form of ``artifacts.json``."""
    entries, schemas = value.get("artifacts"), value.get("schemas")
    return (
        isinstance(entries, list)
        and all(isinstance(entry, dict) and _are_texts(entry.get("file"), entry.get("type")) for entry in entries)
        and isinstance(schemas, dict)
        and all(isinstance(fields, dict) for fields in schemas.values())
    )


def _are_texts(*values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def with_artifact(listing: dict | None, file: str, artifact: Artifact) -> dict:
    """The content of ``artifacts.json`` after a file was added or its entry was replaced.

    Entries and schemas are sorted by name. So a run that was killed and continued writes the same bytes as a run
    without interruption.

    Args:
        listing: the content so far; None if the file does not exist yet.
    """
    listing = listing or {"artifacts": [], "schemas": {}}
    entries = {entry["file"]: entry for entry in listing["artifacts"]} | {file: artifact.entry(file)}
    schemas = dict(listing["schemas"])
    if artifact.schema is not None:
        name, fields = artifact.schema.name, dict(artifact.schema.fields)
        if not schemas.get(name, fields).keys() <= fields.keys():
            raise ValueError(f"{file}: the schema {name!r} is already listed with other fields, give it another name")
        schemas[name] = fields  # a newer version may have more, and describe them in other words
    return {"artifacts": [entries[file] for file in sorted(entries)], "schemas": dict(sorted(schemas.items()))}
