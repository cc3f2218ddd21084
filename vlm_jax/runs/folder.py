"""Run folders: one configuration, one manifest, one process at a time, files that appear whole, and stages that are not
done twice."""

import copy
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vlm_jax.config import Config
from vlm_jax.errors import UserError, unwritten
from vlm_jax.runs.lock import LOCK, Lock
from vlm_jax.runs.log import Log
from vlm_jax.runs.processes import first, gathered

_PACKAGES = ("vlm-jax", "jax", "jaxlib", "flax", "optax", "transformers", "tokenizers", "numpy", "pillow")
#: Where a file grows until it is whole.
_PARTIAL = ".partial"


@dataclasses.dataclass
class Run:
    """An open run folder. Nothing is on disk before the first result is: a refused run leaves no trace.

    ``manifest`` is that of the run's first session, with what was pinned since (:meth:`pin`); ``saved`` is how it is on
    disk. ``lock`` keeps other processes out as long as it is referred to.
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
        """Starts a run, or goes on with it where ``folder`` holds one of the same configuration.

        Args:
            args: the command's frozen dataclass; where it writes (``out``) does not make a run another run, nor do the
                ``ignored`` fields, however deep.
            model, processor: what the manifest describes, where the command has them.

        Raises:
            UserError: if the folder holds another run (the differences are named) or anything else, if another process
                is at work in it, or if it cannot be written to.
        """
        opened = []

        def open_here() -> tuple:
            run = cls._open(folder, args, model, processor, ignored)
            opened.append(run)
            return run.config, run.manifest, run.saved

        told = first(open_here)
        run = opened[0] if opened else cls(folder, *told)
        if jax.process_count() > 1:
            run._seen_by_all()
        return run

    @classmethod
    def _open(cls, folder: Path, args: Any, model: Config | None, processor: Any, ignored: tuple[str, ...]) -> "Run":
        lock = Lock.take(folder) if (folder / LOCK).is_file() else None
        config = _without(_plain(args), {"out", "processes", *ignored})
        # A file that was edited since makes it another run.
        config["files"] = {path: _digest(Path(path)) for path in _files(config)}
        found = _read(folder / "config.json")
        if found is not None:
            if differ := _differences(_without(found, {"out", "processes", *ignored}), config):
                raise UserError(f"{folder} holds another run ({differ}): choose another --out or delete it")
        elif folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {_PARTIAL, LOCK}):
            raise UserError(f"{folder} exists and is not a run folder: choose another --out or delete it")
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(f"cannot write to {existing}: choose another --out")
        if found is not None and lock is None:
            lock = Lock.take(folder)
        saved = _read(folder / "manifest.json")
        known = manifest(model, processor) if saved is None else copy.deepcopy(saved)
        return cls(folder, config, known, saved, lock)

    def _seen_by_all(self) -> None:
        """Refuses a folder that is not one and the same for all processes."""

        path = self.folder / LOCK

        def mark() -> str:
            self.lock = self.lock or Lock.take(self.folder)
            path.write_text(mark := os.urandom(8).hex())
            return mark

        told = first(mark)
        blind = [n for n, sees in enumerate(gathered(path.is_file() and path.read_text() == told)) if not sees]
        if blind:
            raise UserError(
                f"process {blind[0]} does not see {self.folder}, which the first one made: choose an --out on a disk "
                "that all processes share, such as NFS or a mounted bucket"
            )

    def pin(self, name: str, value: Any) -> None:
        """Puts a fact that results rest on into the manifest, such as the model's fingerprint or where the data come
        from, and holds every later session to it. It is on disk with the next result.

        Args:
            value: anything that JSON has, or dataclasses, paths and tuples.

        Raises:
            UserError: if it was another in an earlier session; the differences are named.
        """
        value = _plain(value)
        if name in self.manifest and (differ := _differences({name: self.manifest[name]}, {name: value})):
            raise UserError(
                f"{self.folder} was begun with another {name} ({differ}): choose another --out or delete it"
            )
        self.manifest[name] = value

    def path(self, name: str) -> Path:
        """A path in the folder, its parents made."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def has(self, name: str) -> bool:
        """Whether the folder holds a file or folder, as the first process sees it."""
        return first((self.folder / name).exists)

    def write(self, name: str, writer: Callable[[Path], None]) -> Path:
        """Lets ``writer`` make a temporary file or folder, then puts it in place whole; of several processes, the first
        does."""
        first(lambda: self.write_locally(name, writer))
        return self.folder / name

    def write_locally(self, name: str, writer: Callable[[Path], None]) -> None:
        """:meth:`write`, for code that the first process alone runs."""
        self.begin()
        self._put(name, writer)

    def begin(self) -> None:
        """Puts the configuration and the manifest on disk before any result is."""
        if self.lock is None:
            lock = Lock.take(self.folder)
            if (self.folder / "config.json").exists():
                raise UserError(
                    f"another process began a run in {self.folder} meanwhile: choose another --out or start again"
                )
            self.lock = lock
        if self.saved != self.manifest:
            # What is on disk says of which run it is before any of the results is.
            for file, value in (("config.json", self.config), ("manifest.json", self.manifest)):
                self._put(file, functools.partial(_write_json, value))
            self.saved = copy.deepcopy(self.manifest)

    def _put(self, name: str, writer: Callable[[Path], None]) -> None:
        partial = self.folder / _PARTIAL
        try:
            path, temporary = self.path(name), partial / Path(name).name
            shutil.rmtree(partial, ignore_errors=True)  # what a killed session left behind
            partial.mkdir()
            writer(temporary)
            os.replace(temporary, path)
        except OSError as error:
            raise unwritten(self.folder / name, error) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def save_json(self, name: str, value: Any) -> Path:
        return self.write(name, functools.partial(_write_json, value))

    def save_lines(self, name: str, records: list[dict]) -> Path:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        return self.write(name, lambda path: path.write_text(text))

    def save_arrays(self, name: str, **arrays: Any) -> Path:
        return self.write(name, lambda path: np.savez(path, **arrays))

    def log(self, name: str) -> Log:
        """The append-only file ``name`` of records, a JSON object a line, with what an earlier session left there."""
        return Log(self, name)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What the file ``name`` of a stage holds, made now or read from an earlier, interrupted run: a JSON value
        (``.json``), records (``.jsonl``) or arrays by their names (``.npz``)."""
        path = self.folder / name
        save = _SAVE[path.suffix]
        if not self.has(name):
            save(self, name, make())
        if path.suffix == ".npz":  # which every process reads for itself
            with np.load(path) as arrays:
                return dict(arrays)
        if path.suffix == ".jsonl":
            return first(lambda: [json.loads(line) for line in path.read_bytes().splitlines()])
        return first(lambda: json.loads(path.read_bytes()))

    def timed(self, stage: str, begun: float) -> None:
        """Adds to ``seconds.json`` how long a stage took, over the sessions that came to its end: what one that was
        killed within it had spent is not known."""

        def put() -> None:
            seconds = json.loads(file.read_text()) if (file := self.folder / "seconds.json").is_file() else {}
            spent = seconds.get(stage, 0) + time.perf_counter() - begun
            self.write_locally("seconds.json", functools.partial(_write_json, {**seconds, stage: round(spent, 1)}))

        first(put)


#: How :meth:`Run.once` keeps a stage.
_SAVE = {
    ".json": Run.save_json,
    ".jsonl": Run.save_lines,
    ".npz": lambda run, name, arrays: run.save_arrays(name, **arrays),
}


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a small folder, by its name, such as an adapter's to be pinned."""
    return {path.name: _digest(path) for path in sorted(folder.iterdir()) if path.is_file()}


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(value: Any) -> Iterator[str]:
    """The files that a plain value names, however deep."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _files(part)
    elif isinstance(value, str) and os.path.isfile(value):
        yield value


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """What nested dicts hold, under dotted names."""
    if not isinstance(value, dict):
        return {name: value}
    parts = [_leaves(part, f"{name}.{key}" if name else key) for key, part in value.items()]
    return dict(item for part in parts for item in part.items())


def _differences(there: dict, here: dict) -> str:
    """What is not the same in two dicts, in words; empty where all is."""
    a, b = _leaves(there), _leaves(here)
    differ = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    return ", ".join(f"{name} {a.get(name)!r} there, {b.get(name)!r} here" for name in differ)


def _read(file: Path) -> dict | None:
    """A run's own file; None where there is none."""
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text())
        assert isinstance(found, dict)
    except (OSError, ValueError, AssertionError):
        raise UserError(f"{file} is not a run's {file.name}: choose another --out") from None
    return found


def _write_json(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _without(value: Any, names: set[str]) -> Any:
    """Nested dicts without these keys."""
    if not isinstance(value, dict):
        return value
    return {name: _without(part, names) for name, part in value.items() if name not in names}


def _plain(value: Any) -> Any:
    """Dataclasses, paths and tuples as JSON has them."""
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    return json.loads(json.dumps(value, default=str))


def manifest(config: Config | None, processor: Any) -> dict:
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
