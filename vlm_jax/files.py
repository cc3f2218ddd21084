"""Reads small files, with errors that tell a user what to do."""

import json
from pathlib import Path

from vlm_jax.errors import UserError


def order_metadata(path: Path) -> None:
    """Sorts the metadata in the header of a safetensors file. safetensors writes them in an order that differs from
    process to process, and then equal results would not be equal files."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        assert len(text) == size, "the same entries in another order have the same length"
        file.seek(8)
        file.write(text)


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        UserError: if the file cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): repair it or fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object: repair it or fetch it again")
    return value
