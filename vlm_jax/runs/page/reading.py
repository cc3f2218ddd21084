"""Reads run folders for the page. What cannot be read becomes a problem that the page tells; the rest is shown."""

import base64
import csv
import dataclasses
import json
import math
import os
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow.parquet

from vlm_jax.errors import UserError
from vlm_jax.files import parse_json, read_json
from vlm_jax.runs.artifacts import ARTIFACTS, is_listing
from vlm_jax.runs.pictures import INDEX

Read = TypeVar("Read")


class Entry(NamedTuple):
    """An entry of ``artifacts.json``."""

    file: str
    type: str
    title: str
    schema: str | None = None
    data: str | None = None
    """For a figure, the data file from which it was drawn."""


@dataclasses.dataclass
class RunFolder:
    """A run folder that is read, whether its run has ended or not."""

    path: Path
    config: dict
    manifest: dict
    seconds: dict
    entries: list[Entry]
    schemas: dict[str, dict[str, str]]
    problems: list[str]
    """A sentence for each file that could not be read."""
    drawn: set[str] = dataclasses.field(default_factory=set)
    """The data files of figures that the page shows as charts."""
    shown: set[str] = dataclasses.field(default_factory=set)
    """The ids of the samples that the page shows."""

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Reads what describes a run.

        Raises:
            UserError: if the folder is no run folder.
        """
        if not path.is_dir():
            raise UserError(f"{path} is no folder: name the --out of a command")
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is no run folder, because it has no config.json: name the --out of a command")
        folder = cls(path, {}, {}, {}, [], {}, [])
        folder.config = folder.attempt("config.json", read_json) or {}
        for name in ("manifest", "seconds"):
            if (path / f"{name}.json").is_file():
                setattr(folder, name, folder.attempt(f"{name}.json", read_json) or {})
        if not (path / ARTIFACTS).is_file():
            folder.problems.append(f"{ARTIFACTS} is not there yet: the run has written no result")
            return folder
        listing = folder.attempt(ARTIFACTS, read_json)
        if listing is not None and not is_listing(listing):
            folder.problems.append(f"{ARTIFACTS} is damaged: its results are not shown")
        elif listing is not None:
            folder.schemas = listing["schemas"]
            for entry in listing["artifacts"]:
                texts = {name: entry[name] for name in Entry._fields if isinstance(entry.get(name), str)}
                folder.entries.append(Entry(**{"title": entry["file"]} | texts))
        return folder

    @property
    def name(self) -> str:
        """The name by which the page calls it."""
        return str(self.path)

    @property
    def command(self) -> str:
        """The command that made it."""
        return str(self.config.get("command") or "a program")

    def attempt(self, file: str, read: Callable[[Path], Read]) -> Read | None:
        """What ``read`` makes of a file; None if it cannot, which becomes a problem."""
        try:
            return read(self.path / file)
        except Exception as error:  # damaged files can raise any error in the libraries that read them
            reason = " ".join(str(error).split())[:200].removeprefix(f"{self.path}/")
            self.problems.append(f"{file} cannot be read ({reason})")
            return None

    def json(self, file: str) -> Any:
        """The value in a JSON file; None if it cannot be read."""
        return self.attempt(file, lambda path: parse_json(path.read_bytes()))

    def lines(self, file: str, most: int | None = None) -> "Lines | None":
        """The first records of a file with a JSON object on each line. The last line of a run that is going on may be
        incomplete; it is left out."""

        def read(path: Path) -> Lines:
            records, count = [], 0
            with path.open("rb") as opened:
                for line in opened:
                    if not line.endswith(b"\n") and not _is_json(line):
                        break  # it is being written
                    count += 1
                    if most is None or len(records) < most:
                        record = parse_json(line)
                        if not isinstance(record, dict):
                            raise ValueError(f"line {count} holds no object")
                        records.append(record)
            return Lines(records, count)

        return self.attempt(file, read)

    def pictures(self) -> dict[str, list[dict]]:
        """Id of a shown sample -> what is kept of the samples with this id, of which each task can have one: the task,
        the question, the answers, and ``pictures``, addresses that hold the pictures' bytes."""
        found: dict[str, list[dict]] = {}
        for sample in self.kept():
            if sample["id"] in self.shown:
                sources = [source for file in sample["pictures"] if (source := self.embedded(file)) is not None]
                found.setdefault(sample["id"], []).append({**sample, "pictures": sources})
        return found

    def kept(self) -> list[dict]:
        """The samples whose pictures are kept, as ``index.json`` lists them, with their pictures' paths in the run
        folder."""
        found: list[dict] = []

        def read(path: Path) -> None:
            folder = path.parent.relative_to(self.path)
            for sample in parse_json(path.read_bytes()):
                if not isinstance(sample["id"], str):
                    raise ValueError("a sample's id is no text")
                files = [f"{folder}/{name}" for name in sample["pictures"]]
                found.append({**sample, "pictures": files})

        for folder in [entry.file for entry in self.entries if entry.type == "pictures"]:
            self.attempt(f"{folder}/{INDEX}", read)
        return found

    def embedded(self, file: str) -> str | None:
        """A picture as an address that holds its bytes; None if it cannot be read."""
        data = self.attempt(file, Path.read_bytes)
        if data is None:
            return None
        kind = "jpeg" if file.endswith(".jpg") else "png"
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

    def table(self, file: str, most: int) -> "Lines | None":
        """The first rows of a table in CSV or Parquet."""

        def read(path: Path) -> Lines:
            if path.suffix == ".parquet":
                whole = pyarrow.parquet.ParquetFile(path)
                rows: list[dict] = []
                for batch in whole.iter_batches(most):
                    rows += batch.to_pylist()
                    if len(rows) >= most:
                        break
                return Lines(rows[:most], whole.metadata.num_rows)
            with path.open(newline="", encoding="utf-8") as opened:
                head, *cells = csv.reader(opened)
            names = [name if head.count(name) == 1 else f"{name} ({at + 1})" for at, name in enumerate(head)]
            return Lines([dict(zip(names, row, strict=True)) for row in cells[:most]], len(cells))

        return self.attempt(file, read)

    def link(self, file: str, page: Path) -> str:
        """The address of a file, relative to the page."""
        return urllib.parse.quote(os.path.relpath(self.path / file, page.absolute().parent))


class Lines(NamedTuple):
    """Records of a file."""

    records: list[dict]
    count: int
    """How many the file has."""


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line)
    except ValueError:
        return False
    return True


def script_json(value: Any) -> str:
    """JSON that can stand in a script of a page: no text in it can end the script. Numbers that are not finite, which
    JSON lacks, become null."""
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=str)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
