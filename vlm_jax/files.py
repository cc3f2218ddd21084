"""Reads small files, with errors that tell a user what to do."""

import json
import re
from pathlib import Path
from typing import Any

from vlm_jax.errors import UserError


def is_url(name: object) -> bool:
    """Whether a text that should name a file or a folder is a URL, such as a bucket's."""
    return re.match(r"[a-z][a-z0-9+.-]+:/", str(name), re.IGNORECASE) is not None


def check_folder(name: object, what: str = "") -> None:
    """Raises a UserError for a URL or a ``~``, which Python would take for names of local folders. ``what``: the option
    that gives it."""
    named = f"{what} {name}".strip()
    if is_url(name):
        raise UserError(f"{named} is a URL, not a folder: mount the bucket and name the folder (docs/pods.md)")
    if str(name).startswith("~"):
        raise UserError(f"{named} begins with ~, which only a shell replaces: write the path out")


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


def read_text(path: Path) -> str:
    """The text of a regular UTF-8 file, without a byte-order mark.

    Raises:
        UserError: if there is no such file (a named pipe would be waited for without end), or if it is not UTF-8.
    """
    try:
        if not path.is_file():
            reason = "not a regular file" if path.exists() else "no such file"
            raise UserError(f"cannot read {path} ({reason}): name an existing file")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read {str(path)[:200]} ({error.strerror}): name an existing file") from None


def check_regular(path: Path) -> None:
    """Raises a UserError if the path is a folder or a named pipe, for which a reader would wait without end."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file: name a file")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: if it is not JSON, is nested too deeply, has an integer of thousands of digits, or text that UTF-8
            cannot hold (half of a surrogate pair).
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if "\\ud" in (text.decode(errors="replace") if isinstance(text, bytes) else text).lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        UserError: if the file cannot be read or holds something else.
    """
    text = read_text(path)
    try:
        value = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): repair it or fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object: repair it or fetch it again")
    return value
