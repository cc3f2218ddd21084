"""Run folders: one configuration, one manifest, files that appear whole, and stages that are not done twice."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vlm_jax.config import Config
from vlm_jax.errors import UserError

_PACKAGES = ("vlm-jax", "jax", "jaxlib", "flax", "optax", "transformers", "tokenizers", "numpy", "pillow")


@dataclasses.dataclass(frozen=True)
class Run:
    """An open run folder. Nothing is on disk before the first result is: a refused run leaves no trace."""

    folder: Path
    config: dict
    manifest: dict

    @classmethod
    def open(
        cls, folder: Path, args: Any, model: Config | None = None, processor: Any = None, ignored: tuple[str, ...] = ()
    ) -> "Run":
        """Starts a run, or goes on with it where ``folder`` holds one of the same configuration.

        Args:
            args: the command's frozen dataclass; where it writes (``out``) does not make a run another run, nor do the
                ``ignored`` fields.
            model, processor: what the manifest describes, where the command has them.

        Raises:
            UserError: if the folder holds another run (the differences are named) or anything else, or cannot be
                written to.
        """
        config = {k: v for k, v in _plain(args).items() if k not in ("out", *ignored)}
        # A file that was edited since makes it another run.
        values = [v for value in config.values() for v in (value if isinstance(value, list) else [value])]
        config["files"] = {v: _digest(Path(v)) for v in values if isinstance(v, str) and Path(v).is_file()}
        file = folder / "config.json"
        if file.is_file():
            try:
                found = json.loads(file.read_text())
                assert isinstance(found, dict)
            except (OSError, ValueError, AssertionError):
                raise UserError(f"{file} is not a run's config.json: choose another --out") from None
            differ = sorted(k for k in config.keys() | found.keys() if config.get(k) != found.get(k))
            if differ:
                shown = ", ".join(f"{k} {found.get(k)!r} there, {config.get(k)!r} here" for k in differ)
                raise UserError(f"{folder} holds another run ({shown}): choose another --out or delete it")
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not a run folder: choose another --out or delete it")
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(f"cannot write to {existing}: choose another --out")
        # Float32 means float32, on accelerators too.
        jax.config.update("jax_default_matmul_precision", "highest")
        if jax.config.jax_compilation_cache_dir is None:
            # What one run compiled, the next one loads.
            jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "vlm-jax"))
        shutil.rmtree(folder / ".partial", ignore_errors=True)
        return cls(folder, config, manifest(model, processor))

    def path(self, name: str) -> Path:
        """A path in the folder, its parents made."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, name: str, writer: Callable[[Path], None]) -> Path:
        """Lets ``writer`` fill a temporary file, then puts it in place whole."""
        if name not in ("config.json", "manifest.json") and not (self.folder / "manifest.json").is_file():
            self.save_json("config.json", self.config)
            self.save_json("manifest.json", self.manifest)
        temporary = None
        try:
            path = self.path(name)
            temporary = self._partial() / path.name
            writer(temporary)
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder / name} ({error.strerror}): free the disk or choose another --out"
            ) from None
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
                temporary.parent.rmdir()
        return path

    def write_folder(self, name: str, writer: Callable[[Path], None]) -> Path:
        """Lets ``writer`` make a temporary folder, then puts it in place whole."""
        path, temporary = self.path(name), self._partial() / Path(name).name
        shutil.rmtree(temporary, ignore_errors=True)
        writer(temporary)
        temporary.rename(path)
        temporary.parent.rmdir()
        return path

    def _partial(self) -> Path:
        """Where files grow. What a killed session left there is of no use."""
        return self.path(".partial/_").parent

    def save_json(self, name: str, value: Any) -> Path:
        return self.write(name, lambda path: path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n"))

    def save_lines(self, name: str, records: list[dict]) -> Path:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        return self.write(name, lambda path: path.write_text(text))

    def save_arrays(self, name: str, **arrays: Any) -> Path:
        return self.write(name, lambda path: np.savez(path, **arrays))

    def log(self, name: str) -> "Log":
        """The append-only file ``name`` of records, a JSON object a line, with what an earlier session left there."""
        return Log(self, name)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The JSON value of stage ``name``, made now or read from an earlier, interrupted run."""
        path = self.folder / name
        if not path.is_file():
            self.save_json(name, make())
        return json.loads(path.read_text())

    def timed(self, stage: str, begun: float) -> None:
        """Notes in ``seconds.json`` how long a stage took, over all the sessions of a run."""
        seconds = json.loads(file.read_text()) if (file := self.folder / "seconds.json").is_file() else {}
        self.save_json("seconds.json", {**seconds, stage: round(time.perf_counter() - begun, 1)})


class Log:
    """Records that are on disk as soon as they are known, in an order that does not change from session to session.

    A killed run leaves a file that ends anywhere; what is kept of it are whole batches. Without a run, records are in
    memory alone.
    """

    def __init__(self, run: Run | None = None, name: str = ""):
        self.run, self.name = run, name
        self.records: list[dict] = []
        if run is not None and (path := run.folder / name).is_file():
            whole = path.read_bytes().rpartition(b"\n")[0]
            self.records = [json.loads(line) for line in whole.splitlines()]

    def missing(self, batches: Iterable[tuple[Sequence[int], Any]]) -> Iterator[tuple[Sequence[int], Any]]:
        """Those of the batches (rows and content) whose records are not all there. What follows the first of them is
        taken back: :meth:`append` its records before the next one is asked for."""
        done, cut = 0, False
        for rows, batch in batches:
            if not cut and done + len(rows) <= len(self.records):
                done += len(rows)
                continue
            if not cut:
                self._keep(done)
                cut = True
            yield rows, batch
        if not cut:
            self._keep(done)

    def append(self, records: Sequence[dict]) -> None:
        """Writes the records of one batch and makes sure that they are on the disk."""
        if self.run is None:
            self.records += records
            return
        if not self.records:
            self.run.write(self.name, lambda path: path.write_bytes(b""))
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        try:
            with open(self.run.folder / self.name, "ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"cannot write {self.run.folder / self.name} ({error.strerror}): free the disk or choose another --out"
            ) from None
        self.records += [json.loads(line) for line in text.encode().splitlines()]

    def _keep(self, count: int) -> None:
        """Cuts the file after ``count`` records."""
        self.records = self.records[:count]
        if self.run is not None and (path := self.run.folder / self.name).is_file():
            with open(path, "rb+") as file:
                for _ in range(count):
                    file.readline()
                file.truncate(file.tell())


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
