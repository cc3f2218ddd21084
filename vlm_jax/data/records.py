"""Turns a dataset's row into an example: its gold answers, its choices and the text of its question."""

import ast
import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from vlm_jax.data.example import IMAGE_MARK, Example, without_leading_marks
from vlm_jax.data.images import LazyImages
from vlm_jax.data.specs import DatasetSpec
from vlm_jax.data.stated import FORMS, Form, as_text, index_of
from vlm_jax.errors import UserError

Choices = Literal["listed", "lettered", "hidden"]
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
#: MMBench numbers the rotations of question i as i + 1,000,000, i + 2,000,000 and so on.
_ROTATION = 1_000_000


class GoldAnswers(NamedTuple):
    """The gold answers of a row."""

    answers: tuple[str, ...] = ()
    """Acceptable texts, the commonest first; empty where the answer is withheld."""
    choices: tuple[str, ...] | None = None
    right: tuple[int, ...] = ()
    """The indices of the right choices."""

    @property
    def gold(self) -> int | None:
        """The index of the right choice, where there is exactly one."""
        return self.right[0] if len(self.right) == 1 else None


def missing(value: Any) -> bool:
    """Whether a cell is empty: null, blank, NaN, or the text "nan"."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str) and value.strip() in ("", "nan")


def as_texts(value: Any, written: bool = False) -> tuple[str, ...]:
    """The texts in a cell: a list of texts or of ``{"answer": text}``, or one text; numbers are taken as text.

    Args:
        written: whether a text may be a list that was written as a string.
    """
    if written and isinstance(value, str):
        for read in (ast.literal_eval, json.loads):
            try:
                parsed = read(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            if isinstance(parsed, list):
                value = parsed
                break
    values = [value] if isinstance(value, str | int | float | dict) else value or ()
    return tuple(as_text(v["answer"] if isinstance(v, dict) else v) for v in values if v is not None)


def commonest_first(texts: Sequence[str]) -> tuple[str, ...]:
    """The texts with the most frequent first. Repeats stay, blanks come last, and texts that are equally frequent stay
    in the order of their first occurrence."""
    counts, first_index = Counter(texts), {}
    for index, text in enumerate(texts):
        first_index.setdefault(text, index)
    return tuple(sorted(texts, key=lambda text: (not text.strip(), -counts[text], first_index[text])))


def _cell(spec: DatasetSpec, row: dict, role: str) -> Any:
    column = spec.columns.get(role)
    return None if column is None else row[column]


def _texts(spec: DatasetSpec, row: dict, role: str) -> tuple[str, ...]:
    return as_texts(_cell(spec, row, role), spec.columns.get(role) in spec.written)


def options_of(spec: DatasetSpec, row: dict) -> list[str | None]:
    """A row's options, from one column that lists them or from one column for each. A blank one is None, so that the
    others keep their letters and indices."""
    column = spec.columns["choices"]
    if isinstance(column, str):
        cell = row[column]
        values = as_texts(cell, True) if column in spec.written else [] if missing(cell) else cell
        if not isinstance(values, list | tuple):
            raise UserError(f"its {column} is {str(values)[:80]!r}, not a list: write a list of texts")
    else:
        values = [row[name] for name in column]
    options = [None if missing(value) else as_text(value) for value in values]
    while options and options[-1] is None:
        options.pop()
    return options


def stated_of(spec: DatasetSpec, row: dict) -> list:
    """What states the right choice of a row, or each of the right ones; empty where it is withheld."""
    gold = _cell(spec, row, "gold")
    return [value for value in (gold if isinstance(gold, list) else [gold]) if not missing(value)]


def gold_answers(spec: DatasetSpec, row: dict, names: Sequence[str] | None) -> GoldAnswers:
    """The gold answers of a row, read by its dataset's :data:`vlm_jax.data.specs.AnswerForm`.

    Args:
        names: the class names, where the gold column is a ClassLabel.
    """
    gold = _cell(spec, row, "gold")
    match spec.answers:
        case "texts":
            texts = commonest_first(_texts(spec, row, "answers"))
            return GoldAnswers(texts if texts and texts[0].strip() else ())
        case "text":
            return GoldAnswers(() if missing(gold) else (str(gold).strip(),))
        case "conversation":
            replies = [turn["value"].strip() for turn in _cell(spec, row, "question") if turn["from"] == "gpt"]
            return GoldAnswers(tuple(replies[:1]) if replies and replies[0] else ())
        case "yes_no":
            return GoldAnswers(() if missing(gold) else ({0: "no", 1: "yes"}.get(gold, str(gold).strip()),))
        case "shown_letter":
            letter = "" if missing(gold) else str(gold).strip()[:1]
            return GoldAnswers((letter,), None, (_LETTERS.index(letter),)) if letter in set(_LETTERS) else GoldAnswers()
        case "class":
            return GoldAnswers() if missing(gold) else _chosen("index", [gold], names or ())
    options, stated = options_of(spec, row), stated_of(spec, row)
    if not stated or stated == [-1]:  # -1 stands for a withheld index
        return GoldAnswers()
    return _chosen(spec.answers, stated, options) if options else GoldAnswers(_texts(spec, row, "gold"))


def _chosen(form: Form, stated: Sequence[Any], options: Sequence[str | None]) -> GoldAnswers:
    right = [index_of(form, value, options) for value in stated]
    choices = [option for option in options if option is not None]
    kept = [sum(option is not None for option in options[:index]) for index in right if index is not None]
    if len(kept) < len(right):
        raise ValueError(f"{stated} states no choice of {choices}")
    return GoldAnswers(tuple(choices[index] for index in kept), tuple(choices), tuple(kept))


def _question(spec: DatasetSpec, row: dict) -> str:
    if "question" not in spec.columns:
        return spec.ask.format(question="")
    question = _cell(spec, row, "question")
    if isinstance(question, list) and all(isinstance(turn, dict) for turn in question):  # turns of a conversation
        question = next((turn.get("value") for turn in question if turn.get("from") == "human"), None)
    if missing(question):
        raise UserError("its question is empty: write one, or leave the row out")
    if not isinstance(question, str):
        raise UserError(f"its question is {str(question)[:80]!r}, not a text: write a text")
    rest, _ = without_leading_marks(question)
    question = question if IMAGE_MARK in rest else rest  # images come first anyway
    return spec.ask.format(question=question.strip())


def group_of(spec: DatasetSpec, row: dict) -> str | None:
    """The name of the group of rows that are scored together with this one; None if it is scored alone."""
    group = _cell(spec, row, "group")
    if group is None:
        return None
    return str(int(group) % _ROTATION) if spec.metric == "circular" else str(group)


def label_of(spec: DatasetSpec, row: dict, split: str, number: int) -> str:
    """An example's id: the dataset's name, the hub's split, and the row's id or, without one, its number."""
    row_id = _cell(spec, row, "id")
    return f"{spec.name}/{split}/{number if row_id is None else row_id}"


def image_of(spec: DatasetSpec, row: dict, images: LazyImages, label: str) -> str:
    """The name of a row's image: from the dataset's columns, or a digest of the files, or the row's own ``label``."""
    columns = spec.used("image_id")
    if columns and not any(missing(row[column]) for column in columns):
        return f"{spec.name}/" + "/".join(str(row[column]) for column in columns)
    return f"{spec.name}/{images.digest()}" if len(images) else label


def example_of_row(
    spec: DatasetSpec,
    row: dict,
    images: LazyImages,
    gold: GoldAnswers,
    *,
    label: str,
    image: str,
    choices: Choices,
    task: str,
) -> Example:
    """The example of a row that has an answer.

    The hint, the question and each choice are on separate lines. With ``choices="listed"`` a choice is "- text". With
    "lettered" it is "A. text", P1's request for a letter follows, and the gold answer is a letter. With "hidden" no
    choice is shown.

    Args:
        label: the example's id.
        image: the name of its image.
        task: the name that the user asked for.
    """
    lines = [_question(spec, row)]
    hint, metric, answers = _cell(spec, row, "hint"), spec.metric, gold.answers
    if not missing(hint):
        lines.insert(0, str(hint).strip())
    if spec.answers in (*FORMS, "class"):
        if gold.choices is None or gold.gold is None or choices == "hidden":
            metric = "exact_match"
        if gold.choices is not None and choices == "listed":
            lines += ["Choices:", *(f"- {choice}" for choice in gold.choices)]
        if gold.choices is not None and choices == "lettered":
            if len(gold.choices) > len(_LETTERS):
                raise UserError(f"{spec.name} has {len(gold.choices)} choices, too many for letters: use listed")
            lines += [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, gold.choices, strict=False)]
            lines.append("Answer with the option's letter from the given choices directly.")
            answers = tuple(_LETTERS[index] for index in gold.right)
        direct = commonest_first(_texts(spec, row, "answers"))
        if choices == "hidden" and direct and direct[0].strip():
            answers, metric = direct, "vqa_accuracy"
    subtask = _cell(spec, row, "subtask")
    if isinstance(subtask, list):
        subtask = ", ".join(map(str, subtask))
    return Example(
        id=label,
        images=images,
        question="\n".join(lines),
        answers=answers,
        choices=gold.choices,
        family=spec.family,
        task=task,
        gold=gold.gold,
        metric=metric,
        subtask=None if missing(subtask) else str(subtask),
        image_id=image,
        group=group_of(spec, row),
    )
