"""Converts a Hugging Face folder to an Orbax folder, which stores the arrays in the library's own layout, and back.

python -m vlm_jax.convert mini-qwen3-vl converted/mini-qwen3-vl
"""

import contextlib
import dataclasses
import errno
import io
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import tyro
from safetensors import SafetensorError

from vlm_jax.checkpoints.load import load
from vlm_jax.checkpoints.orbax import save_orbax
from vlm_jax.checkpoints.redundant import untied
from vlm_jax.checkpoints.save import save, with_dtype
from vlm_jax.checkpoints.sources import ORBAX, read_config, resolve
from vlm_jax.errors import UserError
from vlm_jax.files import check_folder, read_json
from vlm_jax.runs.command import command

#: Files that are copied with the weights: tokeniser, image processor, chat template, generation defaults.
_KEPT = ("*.json", "*.jinja", "*.txt", "*.model")


@dataclasses.dataclass(frozen=True)
class Args:
    """Convert a Hugging Face folder to an Orbax folder, or an Orbax folder to a Hugging Face folder. vlm_jax.load reads
    both."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """Embedded model, Hugging Face folder, Orbax folder or hub id."""
    destination: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """New or empty folder. It is written only if the whole conversion succeeds."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision in which the parameters are stored; by default the source's."""


def convert(source: str, destination: Path, dtype: str | None = None) -> str:
    """Writes ``destination``, as a whole or not at all.

    ``config.json`` is copied unchanged, except that its dtype fields become ``dtype`` if that is given.

    Returns:
        The form of the destination: "Orbax" or "Hugging Face".

    Raises:
        UserError: for an unknown or unreadable source, or a destination that is not empty, is inside the source or
            cannot be written.
    """
    check_folder(destination)
    destination = destination.resolve()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination} exists and is not an empty folder: choose another destination or delete it")
    folder = resolve(source)
    if folder.resolve() in destination.parents:
        raise UserError(f"{destination} is inside the source {folder}: choose another destination")
    config = read_json(folder / "config.json")
    model, _ = load(folder, dtype=dtype)
    if read_config(folder).text.tie_word_embeddings and not model.config.text.tie_word_embeddings:
        config = untied(config)  # the files hold a head of its own
    form, write = ("Hugging Face", save) if (folder / ORBAX).is_dir() else ("Orbax", save_orbax)
    with _new_folder(destination) as made:
        write(model, made)
        for file in sorted(file for pattern in _KEPT for file in folder.glob(pattern)):
            if file.name != "config.json" and not file.name.endswith(".index.json"):
                shutil.copyfile(file, made / file.name)
        if dtype is not None:
            config = with_dtype({"dtype": dtype, **config}, dtype)
        (made / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return form


@contextlib.contextmanager
def _new_folder(destination: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``destination``. After an error nothing of it is left.

    Raises:
        UserError: if it cannot be written.
    """
    made = [parent for parent in destination.parents if not parent.exists()]
    scratch = None
    with _quiet():
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(dir=destination.parent, prefix=".convert-"))
            yield scratch / destination.name
            (scratch / destination.name).rename(destination)
            scratch.rmdir()
        except BaseException as error:
            if scratch is not None:
                _remove(scratch)
            for parent in made:
                with contextlib.suppress(OSError):  # another process uses it
                    parent.rmdir()
            if not isinstance(error, OSError | ValueError | SafetensorError):  # ValueError: Orbax, for a full disk
                raise
            raise UserError(
                f"cannot write {destination} ({_reason(error)}): free the disk or choose another destination"
            ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back what is printed, and shows it only if there is no error. If a disk is full, Orbax's threads print a
    traceback for every array, and the error says the same."""
    log, held = logging.getLogger("absl"), io.StringIO()
    before, log.disabled = log.disabled, True
    try:
        with contextlib.redirect_stderr(held):
            yield
    finally:
        log.disabled = before
    sys.stderr.write(held.getvalue())


def _remove(folder: Path) -> None:
    """Deletes a folder. After an error Orbax's threads may still write to it, so it is deleted until it stays away."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)
        if not folder.exists():
            return


#: Why a file cannot be written.
_REASONS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO)


def _reason(error: BaseException) -> str:
    """What the system said, in one line."""
    if isinstance(error, UserError) and error.__context__ is not None:
        error = error.__context__  # the error that a writer put into a sentence of its own
    # TensorStore and safetensors write it somewhere in a longer text.
    if found := [reason for reason in map(os.strerror, _REASONS) if reason in str(error)]:
        return found[0]
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]


@command
def main(args: Args) -> None:
    form = convert(args.source, args.destination, args.dtype)
    print(f"{args.destination} holds {args.source} in {form} form")


if __name__ == "__main__":
    main(tyro.cli(Args))
