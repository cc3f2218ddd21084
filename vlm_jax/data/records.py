"""A row of a dataset -> an example: its answers, its choices, and the question as it is put."""

import ast
import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from vlm_jax.data.example import Example
from vlm_jax.data.images import LazyImages
from vlm_jax.data.specs import DatasetSpec
from vlm_jax.errors import UserError

Choices = Literal["listed", "lettered", "hidden"]
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
#: MMBench numbers the rotations of question i as i + 1,000,000, i + 2,000,000 ...
_ROTATION = 1_000_000


class GoldAnswers(NamedTuple):
    """What a row says is right; no ``answers`` where it is withheld."""

    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] | None = None
    gold: int | None = None


def missing(value: Any) -> bool:
    """Whether a cell says nothing: null, blank, NaN, or the word that NaN became."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str) and value.strip() in ("", "nan")


def as_texts(value: Any) -> tuple[str, ...]:
    """The texts of a list, of a list written out as a string, of a list of ``{"answer": text}``, or of one text."""
    if isinstance(value, str):
        for read in (ast.literal_eval, json.loads):
            try:
                found = read(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            if isinstance(found, list):
                value = found
                break
        else:
            value = [value]
    return tuple(str(v["answer"] if isinstance(v, dict) else v) for v in value or () if v is not None)


def commonest_first(texts: Sequence[str]) -> tuple[str, ...]:
    """Repeats kept; blanks last; equals in the order in which they came."""
    counts, first = Counter(texts), {}
    for place, text in enumerate(texts):
        first.setdefault(text, place)
    return tuple(sorted(texts, key=lambda text: (not text.strip(), -counts[text], first[text])))


def _cell(spec: DatasetSpec, row: dict, role: str) -> Any:
    column = spec.columns.get(role)
    return None if column is None else row[column]


def _options(spec: DatasetSpec, row: dict) -> tuple[str, ...]:
    """A row's choices, from one column or from one each."""
    column = spec.columns["choices"]
    found = as_texts(row[column]) if isinstance(column, str) else [row[name] for name in column]
    return tuple(str(value) for value in found if not missing(value))


def gold_answers(spec: DatasetSpec, row: dict, names: Sequence[str] | None) -> GoldAnswers:
    """What a row says is right, by the form in which its dataset says so; ``names`` are those of a ClassLabel."""
    gold = _cell(spec, row, "gold")
    match spec.answers:
        case "texts":
            texts = commonest_first(as_texts(_cell(spec, row, "answers")))
            return GoldAnswers(texts if texts and texts[0].strip() else ())
        case "text":
            return GoldAnswers(() if missing(gold) else (str(gold).strip(),))
        case "conversation":
            said = [turn["value"].strip() for turn in _cell(spec, row, "question") if turn["from"] == "gpt"]
            return GoldAnswers(tuple(said[:1]) if said and said[0] else ())
        case "yes_no":
            return GoldAnswers(() if missing(gold) else ({0: "no", 1: "yes"}.get(gold, str(gold).strip()),))
        case "shown_letter":
            letter = "" if missing(gold) else str(gold).strip()[:1]
            return GoldAnswers((letter,), None, _LETTERS.index(letter)) if letter in set(_LETTERS) else GoldAnswers()
        case "letter":
            options = _options(spec, row)
            if missing(gold):
                return GoldAnswers()
            return _right(options, _LETTERS.find(str(gold).strip()[:1])) if options else GoldAnswers(as_texts(gold))
        case "index":
            return GoldAnswers() if missing(gold) else _right(_options(spec, row), int(gold))
        case "class":
            return GoldAnswers() if missing(gold) else _right(tuple(names or ()), int(gold))


def _right(choices: tuple[str, ...], gold: int) -> GoldAnswers:
    return GoldAnswers((choices[gold],), choices, gold) if 0 <= gold < len(choices) else GoldAnswers()


def _question(spec: DatasetSpec, row: dict) -> str:
    question = _cell(spec, row, "question") or ""
    if not isinstance(question, str):  # turns of a conversation
        question = next((turn["value"] for turn in question if turn["from"] == "human"), "").replace("<image>", "")
    return spec.ask.format(question=question.strip())


def group_of(spec: DatasetSpec, row: dict) -> str | None:
    """Which rows are scored together with this one."""
    group = _cell(spec, row, "group")
    if group is None:
        return None
    return str(int(group) % _ROTATION) if spec.metric == "circular" else str(group)


def label_of(spec: DatasetSpec, row: dict, split: str, number: int) -> str:
    """An example's id: its dataset, the hub's split, and its own id or the row's number."""
    own = _cell(spec, row, "id")
    return f"{spec.name}/{split}/{number if own is None else own}"


def image_of(spec: DatasetSpec, row: dict, images: LazyImages, label: str) -> str:
    """Which image a row is about: what the dataset says, or else a digest of the files."""
    columns = spec.used("image_id")
    if columns and not any(missing(row[column]) for column in columns):
        return f"{spec.name}/" + "/".join(str(row[column]) for column in columns)
    return f"{spec.name}/{images.digest()}" if len(images) else label


def example_of_row(
    spec: DatasetSpec,
    row: dict,
    images: LazyImages,
    found: GoldAnswers,
    *,
    label: str,
    image: str,
    choices: Choices,
    task: str,
) -> Example:
    """The example of a row that has an answer.

    The hint, the question and the choices are each on lines of their own. Listed, the choices are "- text"; lettered,
    they are "A. text", followed by P1's request for a letter, and the answer is a letter.
    """
    lines = [_question(spec, row)]
    hint, metric, answers = _cell(spec, row, "hint"), spec.metric, found.answers
    if not missing(hint):
        lines.insert(0, str(hint).strip())
    if spec.answers in ("index", "letter", "class"):
        if found.choices is None or choices == "hidden":
            metric = "exact_match"
        if found.choices is not None and choices == "listed":
            lines += ["Choices:", *(f"- {choice}" for choice in found.choices)]
        if found.choices is not None and choices == "lettered":
            if len(found.choices) > len(_LETTERS):
                raise UserError(f"{spec.name} has {len(found.choices)} choices, too many for letters: use listed")
            lines += [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, found.choices, strict=False)]
            lines.append("Answer with the option's letter from the given choices directly.")
            answers = (_LETTERS[found.gold],)
        direct = commonest_first(as_texts(_cell(spec, row, "answers")))
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
        choices=found.choices,
        family=spec.family,
        task=task,
        gold=found.gold,
        metric=metric,
        subtask=None if missing(subtask) else str(subtask),
        image_id=image,
        group=group_of(spec, row),
    )
