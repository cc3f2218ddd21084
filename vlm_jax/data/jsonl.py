"""Reads a user's examples from a JSON Lines file."""

import dataclasses
import json
import math
import pathlib
import string

from PIL import Image

from vlm_jax.data.example import TASK_FAMILIES, Example
from vlm_jax.data.images import decoded, located, read_file
from vlm_jax.data.stated import Form, Row, as_text, decide, index_of, readings
from vlm_jax.errors import UserError, nearest
from vlm_jax.files import parse_json, read_text

_REQUIRED = ("id", "image", "question", "answers")
#: Files that make a folder a dataset of another kind (:mod:`vlm_jax.data.folder`).
_DATASET = (".parquet", ".arrow", ".json", ".csv", ".yaml", ".yml")


def file_in(folder: pathlib.Path) -> pathlib.Path | None:
    """The ``.jsonl`` file of a folder that holds just one, whose first line has the fields of :func:`read_jsonl`, with
    pictures beside it or below; None for another folder."""
    files = [path for path in folder.iterdir() if path.is_file()]
    lines = [path for path in files if path.suffix == ".jsonl"]
    if len(lines) != 1 or any(path.suffix in _DATASET for path in files):
        return None
    try:
        with open(lines[0], encoding="utf-8") as file:
            first = parse_json(file.readline())
    except ValueError:
        return None
    if not isinstance(first, dict) or not first.keys() >= set(_REQUIRED):
        return None
    pictures = Image.registered_extensions()
    beside = (path for path in folder.rglob("*") if path.suffix.lower() in pictures)
    return lines[0] if next(beside, None) is not None else None


def read_jsonl(path: str | pathlib.Path, bad: dict[str, str] | None = None) -> list[Example]:
    """The examples of a file with one JSON object on each line.

    An object is ``{"id": .., "image": "a.png" or ["a.png", ..], "question": .., "answers": [..]}``, with the optional
    keys ``"choices": [..]``, ``"family": "knowledge" or "perception"`` and ``"subject": ..``, a part of the question.
    Image paths are relative to the file's folder. Every image is decoded here, so that a broken one is reported before
    any work starts. Where there are choices, the answers state the right ones, in the same form on all lines
    (:func:`vlm_jax.data.stated.decide`).

    Args:
        bad: where bad lines are listed, with the reason, and left out.

    Raises:
        UserError: for an unreadable file, or a line that is not such an object; the message gives the line number.
    """
    path = pathlib.Path(path)
    lines = read_text(path).split("\n")
    examples: list[Example] = []
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            example = _parse(line, path, where)
            if example.choices:
                readings(_row(example, where))
            if example.id in line_of_id:
                first = line_of_id[example.id]
                raise UserError(f"{where}: id {example.id!r} was used on line {first}: give each line its own id")
        except UserError as error:
            if bad is None:
                raise
            bad[where] = str(error)
            continue
        line_of_id[example.id] = number
        examples.append(example)
    if not examples:
        raise UserError(
            f"{path}, line 1: the file holds no {'good ' if bad else ''}example: write one JSON object a line"
        )
    rows = [_row(example, f"{path}, line {line_of_id[example.id]}") for example in examples if example.choices]
    form = decide(rows, leave_out=bad is not None) if rows else None
    kept = []
    for example in examples:
        if example.choices is None or form is None:
            kept.append(example)
        elif (right := _right_choices(form, example)) is not None:
            kept.append(_with_choices(example, form, right))
        else:
            assert bad is not None, "decide has read all lines in this form"
            bad[f"{path}, line {line_of_id[example.id]}"] = "it states the right choice in another way than most lines"
    return kept


def _row(example: Example, where: str) -> Row:
    return Row(where, example.choices or (), example.answers)


def _right_choices(form: Form, example: Example) -> list[int] | None:
    """The indices of the right choices; None if an answer states none in this form."""
    found = [index_of(form, answer, example.choices or ()) for answer in example.answers]
    return None if None in found else [index for index in found if index is not None]


def _with_choices(example: Example, form: Form, right: list[int]) -> Example:
    """The example with its right choice, and the choices' texts as answers; or their letters, if its line states
    letters, because the question is then expected to show them."""
    assert example.choices is not None
    shown = string.ascii_uppercase if form == "letter" else example.choices
    answers = tuple(shown[index] for index in right)
    gold = right[0] if len(set(right)) == 1 else None
    metric = example.metric if gold is None else "multiple_choice"
    return dataclasses.replace(example, gold=gold, answers=answers, metric=metric)


def _parse(line: str, path: pathlib.Path, where: str) -> Example:
    try:
        record = parse_json(line)
    except ValueError as error:
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)[:100]
        raise UserError(f"{where}: not JSON ({reason}): write one JSON object a line") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object: write one with the fields {', '.join(_REQUIRED)}")
    for field in _REQUIRED:
        if field not in record:
            raise UserError(f"{where}: lacks the field {field!r}: add it")
    images = [record["image"]] if isinstance(record["image"], str) else record["image"]
    choices = record.get("choices")
    family = record.get("family")
    _check(_is_text(record["id"]) or _is_number(record["id"]), where, "id", "a non-empty string or a number")
    _check(images == [] or _is_texts(images), where, "image", "an image's path, a list of paths, or [] for none")
    _check(_is_text(record["question"]), where, "question", "a non-empty string")
    answers = record["answers"] if isinstance(record["answers"], list) else [record["answers"]]
    _check(_is_values(answers), where, "answers", "a text, a number, or a list of these")
    _check(choices is None or _is_values(choices), where, "choices", "a non-empty list of texts or numbers")
    subject = record.get("subject")
    _check(subject is None or _is_text(subject), where, "subject", "a non-empty part of the question")
    if subject is not None and record["question"].count(subject) != 1:
        raise UserError(
            f"{where}: its question has the subject {subject!r} {record['question'].count(subject)} times: name a part "
            "that it has once"
        )
    if family is not None and family not in TASK_FAMILIES:
        raise UserError(f"{where}: unknown family {family!r}{nearest(str(family), TASK_FAMILIES)}")
    return Example(
        id=as_text(record["id"]),
        images=tuple(_load_image(path.parent, name, where) for name in images),
        question=record["question"],
        answers=tuple(map(as_text, answers)),
        choices=None if choices is None else tuple(map(as_text, choices)),
        family=family,
        task=path.stem,
        subject=subject,
    )


def _check(valid: bool, where: str, field: str, expected: str) -> None:
    if not valid:
        raise UserError(f"{where}: the field {field!r} must be {expected}: correct it")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_number(value: object) -> bool:
    """Whether it is a finite number, or true or false."""
    return isinstance(value, int | float) and math.isfinite(value)


def _is_values(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_text(v) or _is_number(v) for v in value)


def _load_image(folder: pathlib.Path, name: str, where: str) -> Image.Image:
    try:
        file = read_file(located(folder, name))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    try:
        return decoded(file)
    except UserError as error:
        raise UserError(f"{where}: {folder / name}: {error}") from None
