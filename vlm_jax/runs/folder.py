"""Run folders: one configuration, one manifest, one process at a time, files that appear whole, a list of the results,
and stages that are not done twice. docs/runs.md shows one."""

import copy
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from vlm_jax.config import Config
from vlm_jax.errors import UserError, unwritten
from vlm_jax.runs.artifacts import ARTIFACTS, Artifact, is_internal, with_artifact
from vlm_jax.runs.configuration import differences, file_digest, named_files, plain, without
from vlm_jax.runs.lock import LOCK, Lock
from vlm_jax.runs.log import Log
from vlm_jax.runs.processes import first, gathered
from vlm_jax.runs.running import running_command

_PACKAGES = ("vlm-jax", "jax", "jaxlib", "flax", "optax", "transformers", "tokenizers", "numpy", "pillow")
#: Where a file grows until it is whole.
_PARTIAL = ".partial"


@dataclasses.dataclass
class Run:
    """An open run folder. Nothing is on disk before the first result is: a refused run leaves no trace.

    Every method that writes a result takes an :class:`~vlm_jax.runs.artifacts.Artifact`, which goes into
    ``artifacts.json``. None stands for a file that is no result; only the names in
    :data:`~vlm_jax.runs.artifacts.INTERNAL` may be written so.

    ``manifest`` is that of the run's first session, with what was pinned since (:meth:`pin`); ``saved`` is the manifest
    as it is on disk. ``lock`` keeps other processes out as long as it is referred to.
    """

    folder: Path
    config: dict
    manifest: dict
    saved: dict | None = None
    lock: "Lock | None" = dataclasses.field(default=None, repr=False)

    @classmethod
    def open(
        cls, folder: Path, args: Any, model: Config | None = None, processor: Any = None, ignored: tuple[str, ...] = ()
    ) -> "Run":
        """Starts a run, or resumes the one of the same command and configuration that ``folder`` holds.

        Args:
            args: the command's frozen dataclass. Where it writes (``out``) is no part of the configuration, nor are the
                ``ignored`` fields, however deep.
            model, processor: what the manifest describes, where the command has them.

        Raises:
            UserError: if the folder holds another run (the differences are named) or anything else, if another process
                is at work in it, or if it cannot be written to.
        """
        opened = []

        def open_in_first() -> tuple:
            run = cls._open(folder, args, model, processor, ignored)
            opened.append(run)
            return run.config, run.manifest, run.saved

        state = first(open_in_first)
        run = opened[0] if opened else cls(folder, *state)
        if jax.process_count() > 1:
            run._check_shared()
        return run

    @classmethod
    def _open(cls, folder: Path, args: Any, model: Config | None, processor: Any, ignored: tuple[str, ...]) -> "Run":
        lock = Lock.take(folder) if (folder / LOCK).is_file() else None
        left_out = {"out", "processes", *ignored}
        options = without(plain(args), left_out)
        # The content of an input file is part of the configuration: a file that was edited makes another run.
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
        if earlier is not None and lock is None:
            lock = Lock.take(folder)
        saved = _read_json(folder / "manifest.json")
        current = manifest(model, processor) if saved is None else copy.deepcopy(saved)
        return cls(folder, config, current, saved, lock)

    def _check_shared(self) -> None:
        """Refuses a folder that is not one and the same for all processes."""
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

    def pin(self, name: str, value: Any) -> None:
        """Puts a fact that results rest on into the manifest, such as the model's fingerprint or where the data come
        from, and holds every later session to it. It is on disk with the next result.

        Args:
            value: anything that JSON has, or dataclasses, paths and tuples.

        Raises:
            UserError: if it was another in an earlier session; the differences are named.
        """
        value = plain(value)
        if name in self.manifest and (changed := differences({name: self.manifest[name]}, {name: value})):
            raise UserError(
                f"{self.folder} was begun with another {name} ({changed}): choose another --out or delete it"
            )
        self.manifest[name] = value

    def path(self, name: str) -> Path:
        """A path in the folder; its parent folders are made."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def has(self, name: str) -> bool:
        """Whether the folder holds a file or folder, as the first process sees it."""
        return first((self.folder / name).exists)

    # Writing. Of several processes the first writes.

    def write(self, name: str, writer: Callable[[Path], object], artifact: Artifact | None) -> Path:
        """Lets ``writer`` make a temporary file or folder, puts it in place whole, and lists it as an artifact."""
        first(lambda: self.write_locally(name, writer, artifact))
        return self.folder / name

    def write_locally(self, name: str, writer: Callable[[Path], object], artifact: Artifact | None) -> None:
        """:meth:`write`, for code that the first process alone runs."""
        if artifact is None and not is_internal(name):
            raise ValueError(f"{name} is a result: say with an Artifact what it is")
        self.begin()
        self._put(name, writer)
        if artifact is not None:
            self._list(name, artifact)

    def add(self, name: str, artifact: Artifact) -> None:
        """Lists a file or folder that a stage wrote by itself, such as the log of a training."""
        first(lambda: self._list(name, artifact))

    def save_json(self, name: str, value: Any, artifact: Artifact | None) -> Path:
        """Writes a JSON file."""
        return self.write(name, lambda path: _write_json(path, value), artifact)

    def save_lines(self, name: str, records: list[dict], artifact: Artifact | None) -> Path:
        """Writes a file of records, a JSON object per line."""
        return self.write(name, lambda path: _write_lines(path, records), artifact)

    def save_arrays(self, name: str, arrays: Mapping[str, Any], artifact: Artifact) -> Path:
        """Writes an ``.npz`` file of named arrays; their dtypes and shapes become the artifact's layout."""
        return self.write(name, lambda path: np.savez(path, **arrays), _with_layout(artifact, arrays))

    def log(self, name: str, artifact: Artifact | None) -> Log:
        """The append-only file ``name`` of records, a JSON object per line, with those of an earlier session."""
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
        """The result of a stage: made and written now, or read from an earlier session.

        Args:
            name: the file of the result. Its suffix says what ``make`` returns: a JSON value (``.json``), records
                (``.jsonl``) or arrays by name (``.npz``).
            write, read: how another file, or a folder, is written and read. Every process reads for itself.
        """
        path = self.folder / name
        form = _FORMS[path.suffix] if write is None or read is None else Form(write, read)
        if not self.has(name):
            made = make()
            self.write(name, lambda temporary: form.write(temporary, made), _with_layout(artifact, made))
            del made  # a model, say, of which a second copy is read below
        value = first(lambda: form.read(path)) if form.broadcast else form.read(path)
        self.add(name, _with_layout(artifact, value))  # an earlier session may have been killed before it did this
        return value

    def timed(self, stage: str, begun: float) -> None:
        """Adds to ``seconds.json`` how long a stage took, summed over the sessions that finished it. The time of a
        session that was killed in the stage is not known."""

        def put() -> None:
            seconds = _read_json(self.folder / "seconds.json") or {}
            seconds[stage] = round(seconds.get(stage, 0) + time.perf_counter() - begun, 1)
            self.write_locally("seconds.json", lambda path: _write_json(path, seconds), None)

        first(put)

    def begin(self) -> None:
        """Puts the configuration and the manifest on disk, before any result."""
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

    def _put(self, name: str, writer: Callable[[Path], object]) -> None:
        """Writes a file or folder elsewhere, then moves it to its place whole."""
        partial = self.folder / _PARTIAL
        try:
            path, temporary = self.path(name), partial / Path(name).name
            shutil.rmtree(partial, ignore_errors=True)  # left by a session that was killed
            partial.mkdir()
            writer(temporary)
            os.replace(temporary, path)
        except OSError as error:
            raise unwritten(self.folder / name, error) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _list(self, name: str, artifact: Artifact) -> None:
        """Puts an entry into ``artifacts.json`` unless it is there."""
        listing = _read_json(self.folder / ARTIFACTS)
        updated = with_artifact(listing, name, artifact)
        if updated != listing:
            self.begin()
            self._put(ARTIFACTS, lambda path: _write_json(path, updated))


class Form(NamedTuple):
    """How a result is written and read, and whether the first process reads it for all."""

    write: Callable[[Path, Any], object]
    read: Callable[[Path], Any]
    broadcast: bool = False


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


#: Suffix of a stage's file -> its form.
_FORMS = {
    ".json": Form(_write_json, lambda path: json.loads(path.read_bytes()), broadcast=True),
    ".jsonl": Form(_write_lines, _read_lines, broadcast=True),
    ".npz": Form(lambda path, arrays: np.savez(path, **arrays), _read_arrays),
}


def _with_layout(artifact: Artifact, value: Any) -> Artifact:
    """The artifact with the dtypes and shapes of named arrays; as it is for other values."""
    if artifact.type != "arrays" or not isinstance(value, Mapping):
        return artifact
    arrays = {name: np.asarray(array) for name, array in value.items()}
    layout = {name: f"{array.dtype.name}{list(array.shape)}" for name, array in arrays.items()}
    return dataclasses.replace(artifact, layout=layout)


def _check_same_run(folder: Path, earlier: dict, config: dict) -> None:
    """Refuses a folder whose configuration is another command's or differs."""
    if earlier.get("command") != config["command"]:
        there, here = (found.get("command") or "a program without a command" for found in (earlier, config))
        raise UserError(f"{folder} holds a run of {there}, not of {here}: choose another --out or delete it")
    if changed := differences(earlier, config):
        raise UserError(f"{folder} holds another run ({changed}): choose another --out or delete it")


def _read_json(file: Path) -> dict | None:
    """A file that the run folder wrote itself; None where there is none."""
    if not file.is_file():
        return None
    try:
        value = json.loads(file.read_text())
        assert isinstance(value, dict)
    except (OSError, ValueError, AssertionError):
        raise UserError(f"{file} is not a run's {file.name}: choose another --out") from None
    return value


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a small folder, by its name, such as an adapter's to be pinned."""
    return {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.is_file()}


def manifest(config: Config | None, processor: Any) -> dict:
    """What results depend on beside the command's options: the model's configuration, versions and the machine."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    images = getattr(processor, "image_processor", None)  # a text-only model's processor has none
    return {
        "family": config and config.family,
        "model_config": config and json.loads(config.hf),
        "image_processor": images and type(images).__name__,
        "versions": {package: version(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "machine": {"devices": [str(d) for d in jax.devices()], "cores": os.cpu_count(), "arch": platform.machine()},
    }
