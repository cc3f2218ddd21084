"""Opens a dataset: from a local copy, the cache or the hub, stored or streamed, and checks its schema."""

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from vlm_jax.data.specs import DatasetSpec
from vlm_jax.errors import UserError, nearest

#: Rows read at once: of a stream they are in memory with their images.
_ROWS = 64
_DATA = (".md", ".parquet", ".json", ".jsonl", ".csv", ".arrow", ".yaml")


class Opened(NamedTuple):
    """One of the hub's splits of a dataset, and what it resolved to."""

    spec: DatasetSpec
    split: str
    rows: Any
    """A ``datasets.Dataset``, or an ``IterableDataset`` if streamed."""
    stream: bool
    features: Any
    resolved: str
    """The hub id or the folder."""
    revision: str | None
    """The hub's commit."""
    folder: Path | None
    """Where the files lie that the image column names."""

    def each(self, *, images: bool) -> Iterator[tuple[int, dict, list[pa.Scalar]]]:
        """The rows: their number, their values, and if wanted their image cells, of which nothing is decoded."""
        columns = dict.fromkeys(self._texts + (self._images if images else ()))
        rows = self.rows.select_columns(list(columns)).with_format("arrow")
        numbered = itertools.count()
        for table in rows.iter(batch_size=_ROWS):
            values = table.select(self._texts).to_pylist()
            for place, row in enumerate(values):
                number = next(numbered)
                if self.spec.only is None or str(row[self.spec.only[0]]) == self.spec.only[1]:
                    yield number, row, self._cells(table, place) if images else []

    def pick(self, numbers: Sequence[int]) -> Iterator[tuple[int, dict, list[pa.Scalar]]]:
        """The rows of these numbers, in this order. A stream is read once more, as far as it must be."""
        if self.stream:
            wanted, found = set(numbers), {}
            for number, row, cells in self.each(images=True):
                if number in wanted:
                    found[number] = row, cells
                if len(found) == len(wanted):
                    break
            yield from ((number, *found[number]) for number in numbers)
            return
        rows = self.rows.with_format("arrow")
        for number in numbers:
            table = rows[number]
            yield number, table.select(self._texts).to_pylist()[0], self._cells(table, 0)

    @property
    def _images(self) -> tuple[str, ...]:
        return self.spec.used("image")

    @property
    def _texts(self) -> tuple[str, ...]:
        """All columns that are used but images; a column of file names is both."""
        used = [role for role in self.spec.columns if role != "image"]
        only = (self.spec.only[0],) if self.spec.only else ()
        return tuple(dict.fromkeys(self.spec.used(*used) + only))

    def _cells(self, table: pa.Table, place: int) -> list[pa.Scalar]:
        cells = [table.column(name)[place] for name in self._images]
        # A cell keeps its batch alive: that of a stored dataset lies in a file, that of a stream in memory.
        return [pa.scalar(cell.as_py(), cell.type) for cell in cells] if self.stream else cells


def open_split(spec: DatasetSpec, split: str, root: Path | None, stream: bool) -> Opened:
    """One of the hub's splits, from the first of the dataset's places that has it.

    Raises:
        UserError: if none has it (each place's reason is told), or its columns are not the expected ones.
    """
    import datasets  # takes seconds

    places = [str(place) for place in _places(spec, root)]
    files = spec.data_files and {name: file for name, file in spec.data_files.items() if name == split}
    options = {"data_files": files} if files else {}
    if spec.field is not None:
        options["field"] = spec.field
    reasons = []
    for place in places:
        try:
            cache = None if root is None else cache_of(Path(place))
            builder = datasets.load_dataset_builder(place, spec.config, cache_dir=cache, **options)
            if stream:
                known = builder.config.data_files or builder.info.splits or {}
            else:
                builder.download_and_prepare()
                known = builder.info.splits
            if split not in known:
                raise UserError(f"{spec.name}: {place} has no split {split!r}{nearest(split, known)}")
            rows = builder.as_streaming_dataset(split) if stream else builder.as_dataset(split)
        except UserError:
            raise
        except Exception as error:  # the libraries below raise anything
            reasons.append(f"{place} ({_reason(error)})")
            continue
        features = rows.features or dict.fromkeys(next(iter(rows)))  # a streamed JSON file tells no types
        _check_columns(spec, place, features)
        folder = None if spec.image_folder is None else Path(place) / spec.image_folder
        return Opened(spec, split, rows, stream, features, place, _revision(builder, root), folder)
    if root is not None:
        raise UserError(f"{spec.name} could not be read from {' or '.join(reasons)}: mend the copy under --data-root")
    raise UserError(
        f"{spec.name} could not be loaded from {' or '.join(reasons)}: allow the network (HF_HUB_OFFLINE=0), or set "
        f"HF_DATASETS_CACHE to a cache that holds it, or give --data-root ROOT with a copy of the repository "
        f"(README.md and data files) in ROOT/{spec.hub_ids[0]}"
    )


def cache_of(folder: Path) -> str:
    """Where datasets keeps what it makes of a local folder: one place for each folder in each of its states.

    Left to itself it tells local folders apart by their name and README alone (5.2), and would serve another copy's
    rows, or those of before an edit.
    """
    import datasets

    digest = hashlib.sha256(str(folder.resolve()).encode())
    for file in sorted(file for file in folder.rglob("*") if file.suffix in _DATA):
        status = file.stat()
        digest.update(f"{file}:{status.st_size}:{status.st_mtime_ns}".encode())
    return str(Path(datasets.config.HF_DATASETS_CACHE) / f"local-{digest.hexdigest()[:16]}")


def _places(spec: DatasetSpec, root: Path | None) -> list[str | Path]:
    """The hub ids, or their copies under ``root``."""
    if root is None:
        if spec.image_folder is not None:
            raise UserError(
                f"{spec.name}'s images are not in its repository: give --data-root ROOT with the repository's files in "
                f"ROOT/{spec.hub_ids[0]} and the images in its folder {spec.image_folder}"
            )
        return list(spec.hub_ids)
    tried = [root / name for hub_id in spec.hub_ids for name in (hub_id, hub_id.split("/")[-1])]
    found = [folder for folder in tried if folder.is_dir()]
    if not found:
        shown = " or ".join(map(str, dict.fromkeys(tried)))
        raise UserError(f"{spec.name} is not under --data-root: put a copy of its hub repository at {shown}")
    return found[:1]


def _check_columns(spec: DatasetSpec, place: str, features: Any) -> None:
    expected = {*spec.used(), *((spec.only[0],) if spec.only else ())}
    lacking = sorted(expected - set(features))
    if lacking:
        raise UserError(
            f"{place} has another schema than {spec.name} had: expected columns {', '.join(sorted(expected))}, found "
            f"{', '.join(features)}, lacks {', '.join(lacking)}; pin an older revision in a local copy (--data-root)"
        )
    if spec.answers == "class" and not hasattr(features[spec.columns["gold"]], "names"):
        raise UserError(
            f"{place} has another schema than {spec.name} had: expected a ClassLabel in the column "
            f"{spec.columns['gold']}, found {features[spec.columns['gold']]}; pin an older revision in a local copy "
            "(--data-root)"
        )


def _revision(builder: Any, root: Path | None) -> str | None:
    """The hub's commit that was read: it stands in the files' addresses, or names the cached copy."""
    if root is not None:
        return None
    shown = f"{builder.config.data_files} {builder.hash}"
    found = re.search(r"(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])", shown)
    return found and found[0]


def _reason(error: BaseException) -> str:
    """An error in one line; datasets wraps the cause of a failed preparation."""
    cause = error.__cause__ or error
    return (str(cause).strip().split("\n")[0] or type(cause).__name__)[:160].rstrip(". ")
