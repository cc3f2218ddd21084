"""Reads small files, with errors that tell a user what to do."""

import json
from pathlib import Path

from vlm_jax.errors import UserError


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
