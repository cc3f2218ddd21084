"""What holds of every run folder: ``artifacts.json`` lists all results and describes them as they are; every figure can
be drawn again from its data, byte for byte."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from interventions.figures.redraw import figures_of, redraw
from vlm_jax.runs.artifacts import is_internal

#: The types of artifacts that are folders.
FOLDERS = ("adapter", "dictionaries", "model", "pictures", "token_maps")


def unlisted(folder: Path) -> list[str]:
    """Files that are neither internal nor listed, by themselves or with the folder that they lie in."""
    listed = {entry["file"] for entry in _listing(folder)["artifacts"]}
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [
        str(name)
        for name in names
        if not is_internal(str(name)) and not {str(part) for part in (name, *name.parents)} & listed
    ]


def check_run_folder(folder: Path, scratch: Path) -> None:
    """Fails unless the folder describes itself; ``scratch`` is a folder to draw into."""
    listing = _listing(folder)
    assert not (names := unlisted(folder)), f"not listed: {names}"
    files = [entry["file"] for entry in listing["artifacts"]]
    assert files == sorted(set(files)) and not [name for name in files if is_internal(name)]
    for entry in listing["artifacts"]:
        path = folder / entry["file"]
        assert path.exists(), f"{entry['file']} is listed and does not exist"
        assert entry["title"] and path.is_dir() == (entry["type"] in FOLDERS)
        if "schema" in entry:
            check_fields(path, entry, listing["schemas"][entry["schema"]])
    assert {entry["schema"] for entry in listing["artifacts"] if "schema" in entry} == listing["schemas"].keys()
    for picture, data in figures_of(folder).items():
        redraw(folder / data, scratch / picture)
        assert (scratch / picture).read_bytes() == (folder / picture).read_bytes(), f"{picture} is drawn differently"


def check_fields(path: Path, entry: dict, fields: dict) -> None:
    """Fails where a file has a field that its schema lacks. A field in capitals stands for names that vary."""
    known = {field.partition(".")[0] for field in fields}
    if any(field.isupper() for field in known):
        return
    match path.suffix:
        case ".jsonl":
            records = [json.loads(line) for line in path.read_text().splitlines()]
            assert records and all(record.keys() <= known for record in records), (path, known)
            assert entry["type"] != "samples" or all(record.keys() == known for record in records), (path, known)
        case ".npz":
            with np.load(path) as arrays:
                assert set(arrays.files) == known == entry["layout"].keys(), (path, known)
                for name, layout in entry["layout"].items():
                    assert layout == f"{arrays[name].dtype.name}{list(arrays[name].shape)}"
        case ".parquet":
            assert set(pq.read_schema(path).names) <= known, (path, known)
        case ".json":
            content = json.loads(path.read_text())
            assert not isinstance(content, dict) or content.keys() <= known, (path, known, content.keys() - known)


def _listing(folder: Path) -> dict:
    return json.loads((folder / "artifacts.json").read_text())
