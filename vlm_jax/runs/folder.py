"""Run folders. Each has one configuration, one manifest, and a list of its results. Only one process works in it at a
time, files appear only when they are complete, and finished stages are not done again. docs/runs.md shows an example.
"""

import copy
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError

from vlm_jax.config import Config
from vlm_jax.errors import UserError, unwritten
from vlm_jax.files import check_folder, parse_json, read_json
from vlm_jax.processor import Processor
from vlm_jax.runs.artifacts import ARTIFACTS, Artifact, is_internal, is_listing, with_artifact
from vlm_jax.runs.code import code
from vlm_jax.runs.configuration import differences, file_digest, named_files, plain, without
from vlm_jax.runs.lock import LOCK, Lock
from vlm_jax.runs.log import Log, records_of
from vlm_jax.runs.processes import first, gathered
from vlm_jax.runs.running import running_command

_PACKAGES = ("vlm-jax", "jax", "jaxlib", "flax", "optax", "transformers", "tokenizers", "numpy", "pillow")
#: The folder in which a file is written until it is complete.
_PARTIAL = ".partial"
#: What a run folder may hold before its manifest is written.
_WITHOUT_MANIFEST = {"config.json", _PARTIAL, LOCK}


@dataclasses.dataclass
class Run:
    """An open run folder. Its first file is written with the first result, so a run that stops with an error before
    that leaves no files.

    Every method that writes a result takes an :class:`~vlm_jax.runs.artifacts.Artifact`, its entry in
    ``artifacts.json``. Pass None for a file that is not a result; its name must match one of
    :data:`~vlm_jax.runs.artifacts.INTERNAL`.
    """

    folder: Path
    config: dict
    """The command and its options, as ``config.json`` has them."""
    manifest: dict
    """The manifest of the run's first session, and the facts that were pinned since (:meth:`pin`)."""
    saved: dict | None = None
    """The manifest that is on disk."""
    lock: "Lock | None" = dataclasses.field(default=None, repr=False)
    """Keeps other processes out of the folder while this object exists."""
    when_begun: Callable[["Run"], object] | None = dataclasses.field(default=None, repr=False)
    """Writes what should stand beside every result. It is called after the manifest, before the first result."""
    formats: tuple[str, ...] = ()
    """Formats of figures besides PNG."""

    @classmethod
    def open(
        cls,
        folder: Path,
        args: Any,
        model: Config | None = None,
        processor: Processor | None = None,
        ignored: tuple[str, ...] = (),
    ) -> "Run":
        """Starts a run. If ``folder`` holds a run of the same command with the same configuration, continues it.

        Args:
            args: the command's options, a frozen dataclass. The configuration has all fields except ``out``,
                ``processes``, ``page``, ``figures`` and the ``ignored`` ones, which are left out at all depths.
            model, processor: the model's configuration and its processor, for the manifest, if the command has them.

        Raises:
            UserError: if the folder holds another run (the message names the differences) or other files, if another
                process is at work in it, or if it cannot be written to.
        """
        opened = []

        def open_in_first() -> tuple:
            run = cls._open(folder, args, model, processor, ignored)
            opened.append(run)
            return run.config, run.manifest, run.saved

        state = first(open_in_first)
        run = opened[0] if opened else cls(folder, *state)
        run.formats = tuple(getattr(args, "figures", ()))
        if jax.process_count() > 1:
            run._check_shared()
        return run

    @classmethod
    def check(cls, folder: Path, args: Any, ignored: tuple[str, ...] = ()) -> None:
        """Checks, before a model is loaded, that :meth:`open` may use the folder.

        Raises:
            UserError: if the folder holds another run or other files, or cannot be written to.
        """
        first(lambda: cls._configured(folder, args, ignored))

    @staticmethod
    def _configured(folder: Path, args: Any, ignored: tuple[str, ...]) -> tuple[dict, bool]:
        """The run's configuration, and whether the folder holds this run already."""
        check_folder(folder, "--out")
        for path in (folder, *folder.parents):
            if path.is_symlink() and not path.exists():
                raise UserError(f"{path} is a link to {os.readlink(path)}, which does not exist: make that folder")
        left_out = {"out", "processes", "page", "figures", *ignored}
        options = without(plain(args), left_out)
        # The content of input files is part of the configuration: with an edited file it is another run.
        digests_of_files = {path: file_digest(Path(path)) for path in named_files(options)}
        config = {"command": running_command(), **options, "files": digests_of_files}
        earlier = _read_json(folder / "config.json")
        if earlier is not None:
            _check_same_run(folder, without(earlier, left_out), config)
        elif folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {_PARTIAL, LOCK}):
            raise UserError(f"{folder} exists and is not a run folder: choose another --out or delete it")
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(f"cannot write to {existing}: choose another --out")
        return config, earlier is not None

    @classmethod
    def _open(
        cls, folder: Path, args: Any, model: Config | None, processor: Processor | None, ignored: tuple[str, ...]
    ) -> "Run":
        check_folder(folder, "--out")
        lock = Lock.take(folder) if (folder / LOCK).is_file() else None
        config, earlier = cls._configured(folder, args, ignored)
        if earlier and lock is None:
            lock = Lock.take(folder)
        saved = _read_json(folder / "manifest.json")
        if saved is None and earlier and {path.name for path in folder.iterdir()} - _WITHOUT_MANIFEST:
            raise UserError(
                f"{folder} lacks manifest.json, which says from which model and data its results come: choose another "
                "--out or delete it"
            )
        current = run_manifest(model, processor) if saved is None else copy.deepcopy(saved)
        return cls(folder, config, current, saved, lock)

    def _check_shared(self) -> None:
        """Raises a UserError if the processes do not all see the same folder."""
        path = self.folder / LOCK

        def mark() -> str:
            self.lock = self.lock or Lock.take(self.folder)
            path.write_text(text := os.urandom(8).hex())
            return text

        expected = first(mark)
        sees_mark = gathered(path.is_file() and path.read_text() == expected)
        if not all(sees_mark):
            raise UserError(
                f"process {sees_mark.index(False)} does not see {self.folder}, which the first one made: choose an "
                "--out on a disk that all processes share, such as NFS or a mounted bucket"
            )

    def pin(self, name: str, value: Any, *, from_the_start: bool = False) -> None:
        """Adds a fact to the manifest on which results depend, such as the model's fingerprint or the source of the
        data. Later sessions must pin the same value. The manifest is written with the next result.

        Args:
            value: a value of JSON's types, or dataclasses, paths and tuples.
            from_the_start: whether the fact is pinned before any result is written, so that a folder with results must
                have it.

        Raises:
            UserError: if an earlier session pinned another value (the message names the differences), or did not pin
                what is pinned from the start.
        """
        value = plain(value)
        if name in self.manifest and (changed := differences({name: self.manifest[name]}, {name: value})):
            raise UserError(
                f"{self.folder} was begun with another {name} ({changed}): choose another --out or delete it"
            )
        lacks = from_the_start and self.saved is not None and name not in self.saved
        if lacks and (self.folder / ARTIFACTS).is_file():
            raise UserError(
                f"{self.folder / 'manifest.json'} does not say with which {name} its results were made: choose another "
                "--out or delete the folder"
            )
        self.manifest[name] = value

    def path(self, name: str) -> Path:
        """The path of a file in the folder. Its parent folders are made."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def has(self, name: str) -> bool:
        """Whether the folder has a file or folder of this name. The first process decides for all."""
        return first((self.folder / name).exists)

    # Writing. If there are several processes, the first one writes.

    def write(self, name: str, writer: Callable[[Path], object], artifact: Artifact | None) -> Path:
        """Lets ``writer`` write a temporary file or folder, moves it to its place, and lists it as an artifact."""
        first(lambda: self.write_locally(name, writer, artifact))
        return self.folder / name

    def write_locally(self, name: str, writer: Callable[[Path], object], artifact: Artifact | None) -> None:
        """:meth:`write`, for code that only the first process runs."""
        if artifact is None and not is_internal(name):
            raise ValueError(f"{name} is a result: say with an Artifact what it is")
        self.begin()
        self._put(name, writer)
        if artifact is not None:
            self.add_locally(name, artifact)

    def add(self, name: str, artifact: Artifact) -> None:
        """Lists a file or folder that was not written by :meth:`write`, such as the log of a training."""
        first(lambda: self.add_locally(name, artifact))

    def save_json(self, name: str, value: Any, artifact: Artifact | None) -> Path:
        """Writes a JSON file."""
        return self.write(name, lambda path: _write_json(path, value), artifact)

    def save_lines(self, name: str, records: list[dict], artifact: Artifact | None) -> Path:
        """Writes a file of records, one JSON object on each line."""
        return self.write(name, lambda path: _write_lines(path, records), artifact)

    def save_arrays(self, name: str, arrays: Mapping[str, Any], artifact: Artifact) -> Path:
        """Writes named arrays to an ``.npz`` file. Their dtypes and shapes become the artifact's layout."""
        return self.write(name, lambda path: np.savez(path, **arrays), _with_layout(artifact, arrays))

    def log(self, name: str, artifact: Artifact | None) -> Log:
        """The file ``name`` of records, one JSON object on each line, to which records are appended. It already has the
        records of earlier sessions."""
        return Log(self, name, artifact=artifact)

    def once(
        self,
        name: str,
        make: Callable[[], Any],
        artifact: Artifact,
        *,
        write: Callable[[Path, Any], object] | None = None,
        read: Callable[[Path], Any] | None = None,
    ) -> Any:
        """The result of a stage. If an earlier session wrote it, it is read; otherwise it is made and written.

        Args:
            name: the file of the result. Its suffix tells the type of the value that ``make`` returns: a JSON value
                (``.json``), a list of records (``.jsonl``) or named arrays (``.npz``).
            write, read: functions that write and read the result, for other files and for folders. Every process calls
                ``read``.
        """
        path = self.folder / name
        file_format = _FORMATS[path.suffix] if write is None or read is None else FileFormat(write, read)
        if not self.has(name):
            made = make()
            self.write(name, lambda temporary: file_format.write(temporary, made), _with_layout(artifact, made))
            del made  # it may be a large model, which is read again below
        value = first(lambda: file_format.read(path)) if file_format.broadcast else file_format.read(path)
        self.add(name, _with_layout(artifact, value))  # an earlier session may have been killed before this line
        return value

    def timed(self, stage: str, begun: float) -> None:
        """Adds the time that a stage took to its time in ``seconds.json``. A session that was killed during the stage
        does not count, because its time is not known.

        Args:
            begun: the value of ``time.perf_counter()`` at the beginning of the stage.
        """

        def put() -> None:
            seconds = _read_json(self.folder / "seconds.json") or {}
            earlier = seconds.get(stage)
            earlier = earlier if isinstance(earlier, int | float) else 0
            seconds[stage] = round(earlier + time.perf_counter() - begun, 1)
            self.write_locally("seconds.json", lambda path: _write_json(path, seconds), None)

        first(put)

    def begin(self) -> None:
        """Writes the configuration and the manifest. This happens before the first result is written."""
        if self.lock is None:
            lock = Lock.take(self.folder)
            if (self.folder / "config.json").exists():
                raise UserError(
                    f"another process began a run in {self.folder} meanwhile: choose another --out or start again"
                )
            self.lock = lock
        if self.saved != self.manifest:
            for name, value in (("config.json", self.config), ("manifest.json", self.manifest)):
                self._put(name, functools.partial(_write_json, value=value))
            self.saved = copy.deepcopy(self.manifest)
        if self.when_begun is not None:
            write, self.when_begun = self.when_begun, None
            write(self)

    def _put(self, name: str, writer: Callable[[Path], object]) -> None:
        """Writes a file or folder under a temporary name, then moves it to its place."""
        partial = self.folder / _PARTIAL
        try:
            path, temporary = self.path(name), partial / Path(name).name
            shutil.rmtree(partial, ignore_errors=True)  # a session that was killed may have left it
            partial.mkdir()
            writer(temporary)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            raise unwritten(self.folder / name, error) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def add_locally(self, name: str, artifact: Artifact) -> None:
        """:meth:`add`, for code that only the first process runs. The same entry is not added twice."""
        if self._listing_with(name, artifact) is None:
            return
        self.begin()  # it may list files of its own, so the listing is read again
        updated = self._listing_with(name, artifact)
        if updated is not None:
            self._put(ARTIFACTS, lambda path: _write_json(path, updated))

    def _listing_with(self, name: str, artifact: Artifact) -> dict | None:
        """The listing on disk with one more entry; None if it has the entry already."""
        listing = _read_json(self.folder / ARTIFACTS)
        if listing is not None and not is_listing(listing):
            raise UserError(f"{self.folder / ARTIFACTS} is damaged: choose another --out or delete the folder")
        updated = with_artifact(listing, name, artifact)
        return None if updated == listing else updated


class FileFormat(NamedTuple):
    """How a result is written and read. ``broadcast``: whether the first process reads it for all processes."""

    write: Callable[[Path, Any], object]
    read: Callable[[Path], Any]
    broadcast: bool = False


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _read_lines(path: Path) -> list[dict]:
    return records_of(path, path.read_bytes())


def _read_value(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and this stage is done again") from None


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and this stage is done again") from None


#: Suffix of a stage's file -> its format.
_FORMATS = {
    ".json": FileFormat(_write_json, _read_value, broadcast=True),
    ".jsonl": FileFormat(_write_lines, _read_lines, broadcast=True),
    ".npz": FileFormat(lambda path, arrays: np.savez(path, **arrays), _read_arrays),
}


def _with_layout(artifact: Artifact, value: Any) -> Artifact:
    """The artifact, with the dtypes and shapes of the arrays as its layout if the value is named arrays."""
    if artifact.type != "arrays" or not isinstance(value, Mapping):
        return artifact
    arrays = {name: np.asarray(array) for name, array in value.items()}
    layout = {name: f"{array.dtype.name}{list(array.shape)}" for name, array in arrays.items()}
    return dataclasses.replace(artifact, layout=layout)


def _check_same_run(folder: Path, earlier: dict, config: dict) -> None:
    """Raises a UserError if the folder's configuration is of another command, or has other options."""
    if earlier.get("command") != config["command"]:
        old, new = (options.get("command") or "a program without a command" for options in (earlier, config))
        raise UserError(f"{folder} holds a run of {old}, not of {new}: choose another --out or delete it")
    if changed := differences(earlier, config):
        raise UserError(f"{folder} holds another run ({changed}): choose another --out or delete it")


def _read_json(file: Path) -> dict | None:
    """The content of one of the run folder's JSON files; None if the file does not exist."""
    if not file.is_file():
        return None
    try:
        return read_json(file)
    except UserError as error:
        raise UserError(f"{error}, or choose another --out") from None


def digests(folder: Path) -> dict[str, str]:
    """File name -> SHA-256, for every file of a small folder, such as an adapter's."""
    return {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.is_file()}


def run_manifest(config: Config | None, processor: Processor | None) -> dict:
    """The facts, besides the command's options, on which results depend: the model's configuration, the library's code,
    the versions of packages, and the machine."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    images = getattr(processor, "image_processor", None)  # None for a text-only model
    return {
        "family": config and config.family,
        "model_config": config and json.loads(config.hf),
        "image_processor": images and type(images).__name__,
        "code": code(),
        "versions": {package: version(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "machine": {"devices": [str(d) for d in jax.devices()], "cores": os.cpu_count(), "arch": platform.machine()},
    }
