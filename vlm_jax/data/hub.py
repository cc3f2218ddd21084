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
from vlm_jax.files import is_url

#: Rows that are read at once. When streaming, their images are in memory too.
_ROWS = 64
_DATA = (".md", ".parquet", ".json", ".jsonl", ".csv", ".arrow", ".yaml")


class Opened(NamedTuple):
    """An opened split of a dataset, and its location."""

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
    """The folder of the files that the image column names."""

    def each(self, *, images: bool) -> Iterator[tuple[int, dict, list[pa.Scalar]]]:
        """The number, the values and, if ``images``, the image cells of each row. No image is decoded."""
        columns = dict.fromkeys(self._texts + (self._images if images else ()))
        rows = self.rows.select_columns(list(columns)).with_format("arrow")
        numbered = itertools.count()
        for table in rows.iter(batch_size=_ROWS):
            values = table.select(self._texts).to_pylist()
            for index, row in enumerate(values):
                number = next(numbered)
                if self.spec.only is None or str(row[self.spec.only[0]]) == self.spec.only[1]:
                    yield number, row, self._cells(table, index) if images else []

    def pick(self, numbers: Sequence[int]) -> Iterator[tuple[int, dict, list[pa.Scalar]]]:
        """The rows with these numbers, in this order. A stream is read again from its start to the last of them."""
        if self.stream:
            wanted, picked = set(numbers), {}
            for number, row, cells in self.each(images=True):
                if number in wanted:
                    picked[number] = row, cells
                if len(picked) == len(wanted):
                    break
            yield from ((number, *picked[number]) for number in numbers)
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
        """All columns in use except images. A column of file names can be an image and, say, an ``image_id``."""
        used = [role for role in self.spec.columns if role != "image"]
        only = (self.spec.only[0],) if self.spec.only else ()
        return tuple(dict.fromkeys(self.spec.used(*used) + only))

    def _cells(self, table: pa.Table, index: int) -> list[pa.Scalar]:
        cells = [table.column(name)[index] for name in self._images]
        # A cell keeps its whole batch alive. A stored dataset's batch is a mapped file, but a stream's is in memory, so
        # its cells are copied.
        return [pa.scalar(cell.as_py(), cell.type) for cell in cells] if self.stream else cells


def open_split(spec: DatasetSpec, split: str, root: Path | None, stream: bool) -> Opened:
    """Opens one of the hub's splits, from the first of the dataset's locations that has it.

    Args:
        root: folder with local copies; None for the hub.
        stream: read over the network without storing.

    Raises:
        UserError: if no location has it (the message gives each one's reason), or if its columns are not the expected
            ones.
    """
    import datasets  # takes seconds

    locations = [str(location) for location in _locations(spec, root)]
    files = spec.data_files and {name: file for name, file in spec.data_files.items() if name == split}
    options: dict[str, Any] = {"data_files": files} if files else {}
    if spec.field is not None:
        options["field"] = spec.field
    reasons = []
    for location in locations:
        try:
            cache = None if root is None else cache_of(Path(location))
            builder = datasets.load_dataset_builder(location, spec.config, cache_dir=cache, **options)
            if stream:
                known = builder.config.data_files or builder.info.splits or {}
            else:
                builder.download_and_prepare()
                known = builder.info.splits or {}
            if split not in known:
                raise UserError(f"{spec.name}: {location} has no split {split!r}{nearest(split, known)}")
            rows = builder.as_streaming_dataset(split) if stream else builder.as_dataset(split)
        except UserError:
            raise
        except Exception as error:  # datasets and the libraries below it raise errors of many kinds
            reasons.append(f"{location} ({reason(error)})")
            continue
        features = rows.features or dict.fromkeys(next(iter(rows)))  # a streamed JSON file has no types
        _check_columns(spec, location, features)
        folder = None if spec.image_folder is None else Path(location) / spec.image_folder
        return Opened(spec, split, rows, stream, features, location, _revision(builder, root), folder)
    if root is not None:
        raise UserError(f"{spec.name} could not be read from {' or '.join(reasons)}: repair the copy under --data-root")
    raise UserError(
        f"{spec.name} could not be loaded from {' or '.join(reasons)}: allow the network (HF_HUB_OFFLINE=0), or set "
        f"HF_DATASETS_CACHE to a cache that holds it, or give --data-root ROOT with a copy of the repository "
        f"(README.md and data files) in ROOT/{spec.hub_ids[0]}"
    )


def cache_of(folder: Path) -> str:
    """The cache folder of a local folder's rows: another one for each folder, and again after each edit.

    The datasets library (5.2) identifies a local folder by its name and README alone. In a shared cache it would return
    the rows of another copy, or the rows from before an edit.
    """
    import datasets

    digest = hashlib.sha256(str(folder.resolve()).encode())
    for file in sorted(file for file in folder.rglob("*") if file.suffix in _DATA):
        status = file.stat()
        digest.update(f"{file}:{status.st_size}:{status.st_mtime_ns}".encode())
    return str(Path(datasets.config.HF_DATASETS_CACHE) / f"local-{digest.hexdigest()[:16]}")


def _locations(spec: DatasetSpec, root: Path | None) -> list[str | Path]:
    """The hub ids of a dataset, or the first copy of them under ``root``."""
    if root is None:
        if spec.image_folder is not None:
            raise UserError(
                f"{spec.name}'s images are not in its repository: give --data-root ROOT with the repository's files in "
                f"ROOT/{spec.hub_ids[0]} and the images in its folder {spec.image_folder}"
            )
        return list(spec.hub_ids)
    if is_url(root):
        raise UserError(f"--data-root {root} is a URL: download the datasets, or mount the bucket, and name the folder")
    candidates = [root / name for hub_id in spec.hub_ids for name in (hub_id, hub_id.split("/")[-1])]
    folders: list[str | Path] = [folder for folder in candidates if folder.is_dir()]
    if not folders:
        listed = " or ".join(map(str, dict.fromkeys(candidates)))
        raise UserError(f"{spec.name} is not under --data-root: put a copy of its hub repository at {listed}")
    return folders[:1]


def _check_columns(spec: DatasetSpec, location: str, features: Any) -> None:
    expected = {*spec.used(), *((spec.only[0],) if spec.only else ())}
    missing = sorted(expected - set(features))
    if missing:
        raise UserError(
            f"{location} has another schema than {spec.name} had: expected columns {', '.join(sorted(expected))}, "
            f"found {', '.join(features)}, lacks {', '.join(missing)}; "
            "pin an older revision in a local copy (--data-root)"
        )
    if spec.answers == "class" and not hasattr(features[spec.columns["gold"]], "names"):
        raise UserError(
            f"{location} has another schema than {spec.name} had: expected a ClassLabel in the column "
            f"{spec.columns['gold']}, found {features[spec.columns['gold']]}; pin an older revision in a local copy "
            "(--data-root)"
        )


def _revision(builder: Any, root: Path | None) -> str | None:
    """The hub's commit that was read, None of a local copy. The files' addresses or the cached copy's name hold it."""
    if root is not None:
        return None
    addresses = f"{builder.config.data_files} {builder.hash}"
    commit = re.search(r"(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])", addresses)
    return commit and commit[0]


def reason(error: BaseException) -> str:
    """An error in one line. The datasets library wraps the cause of a failed preparation, so the cause is shown."""
    cause = error.__cause__ or error
    if isinstance(cause, ModuleNotFoundError):
        return f"its files are to be fetched with the package {cause.name}, which is not installed"
    return (str(cause).strip().split("\n")[0] or type(cause).__name__)[:160].rstrip(". ")
