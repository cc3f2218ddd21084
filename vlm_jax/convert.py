"""Converts a Hugging Face folder to an Orbax folder, which stores the arrays in the library's own layout, and back.

python -m vlm_jax.convert mini-qwen3-vl converted/mini-qwen3-vl
"""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import tyro
from safetensors import SafetensorError

from vlm_jax.checkpoints.load import load
from vlm_jax.checkpoints.orbax import save_orbax
from vlm_jax.checkpoints.save import save, with_dtype
from vlm_jax.checkpoints.sources import ORBAX, resolve
from vlm_jax.errors import UserError
from vlm_jax.files import read_json
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
    destination = destination.resolve()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination} exists and is not an empty folder: choose another destination or delete it")
    folder = resolve(source)
    if folder.resolve() in destination.parents:
        raise UserError(f"{destination} is inside the source {folder}: choose another destination")
    config = read_json(folder / "config.json")
    model, _ = load(folder, dtype=dtype)
    form, write = ("Hugging Face", save) if (folder / ORBAX).is_dir() else ("Orbax", save_orbax)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".convert-") as scratch:
            made = Path(scratch) / destination.name
            write(model, made)
            for file in sorted(file for pattern in _KEPT for file in folder.glob(pattern)):
                if file.name != "config.json" and not file.name.endswith(".index.json"):
                    shutil.copyfile(file, made / file.name)
            if dtype is not None:
                config = with_dtype({"dtype": dtype, **config}, dtype)
            (made / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            made.rename(destination)
    except (OSError, ValueError, SafetensorError) as error:  # Orbax reports a full disk as a ValueError
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(f"cannot write {destination} ({reason}): free the disk or choose another destination") from None
    return form


@command
def main(args: Args) -> None:
    form = convert(args.source, args.destination, args.dtype)
    print(f"{args.destination} holds {args.source} in {form} form")


if __name__ == "__main__":
    main(tyro.cli(Args))
