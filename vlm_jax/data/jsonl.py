"""Reads a user's examples from a JSON Lines file."""

import json
import pathlib

from PIL import Image

from vlm_jax.data.example import TASK_FAMILIES, Example
from vlm_jax.errors import UserError, nearest

_REQUIRED = ("id", "image", "question", "answers")


def read_jsonl(path: str | pathlib.Path) -> list[Example]:
    """The examples of a file with one JSON object on each line.

    An object is ``{"id": .., "image": "a.png" or ["a.png", ..], "question": .., "answers": [..]}``, with the optional
    keys ``"choices": [..]`` and ``"family": "knowledge" or "perception"``. Image paths are relative to the file's
    folder. Every image is decoded here, so that a broken one is reported before any work starts.

    Raises:
        UserError: for an unreadable file, or a line that is not such an object; the message gives the line number.
    """
    path = pathlib.Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: save it as UTF-8 JSON Lines") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): name an existing .jsonl file") from None
    examples: list[Example] = []
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        example = _parse(line, path, where)
        if example.id in line_of_id:
            first = line_of_id[example.id]
            raise UserError(f"{where}: id {example.id!r} was used on line {first}: give each line its own id")
        line_of_id[example.id] = number
        examples.append(example)
    if not examples:
        raise UserError(f"{path}, line 1: the file holds no example: write one JSON object a line")
    return examples


def _parse(line: str, path: pathlib.Path, where: str) -> Example:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        reason = f"{error.msg}, column {error.colno}"
        raise UserError(f"{where}: not JSON ({reason}): write one JSON object a line") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object: write one with the fields {', '.join(_REQUIRED)}")
    for field in _REQUIRED:
        if field not in record:
            raise UserError(f"{where}: lacks the field {field!r}: add it")
    images = [record["image"]] if isinstance(record["image"], str) else record["image"]
    choices = record.get("choices")
    family = record.get("family")
    _check(_is_text(record["id"]), where, "id", "a non-empty string")
    _check(images == [] or _is_texts(images), where, "image", "an image's path, a list of paths, or [] for none")
    _check(_is_text(record["question"]), where, "question", "a non-empty string")
    _check(_is_texts(record["answers"]), where, "answers", "a non-empty list of non-empty strings")
    _check(choices is None or _is_texts(choices), where, "choices", "a non-empty list of non-empty strings")
    if family is not None and family not in TASK_FAMILIES:
        raise UserError(f"{where}: unknown family {family!r}{nearest(str(family), TASK_FAMILIES)}")
    return Example(
        id=record["id"],
        images=tuple(_load_image(path.parent / name, where) for name in images),
        question=record["question"],
        answers=tuple(record["answers"]),
        choices=None if choices is None else tuple(choices),
        family=family,
        task=path.stem,
    )


def _check(valid: bool, where: str, field: str, expected: str) -> None:
    if not valid:
        raise UserError(f"{where}: the field {field!r} must be {expected}: correct it")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _load_image(path: pathlib.Path, where: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{where}: image {path} does not exist: paths are relative to the file's folder") from None
    except Exception:  # broken bytes can make a decoder raise any error
        raise UserError(
            f"{where}: image {path} is broken or not an image: replace it with a whole PNG or JPEG"
        ) from None
