"""How data state which options are right: by text, by letter or by index."""

import string
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from vlm_jax.errors import UserError

Form = Literal["option", "letter", "index"]
"""option: the text of a right option, in any case; letter: its letter, as in ``B``, ``b`` or ``(B)``; index: its number
from 0, as an integer or as text."""
FORMS: tuple[Form, ...] = ("option", "letter", "index")


def index_of(form: Form, value: Any, options: Sequence[str | None]) -> int | None:
    """The index of the option that ``value`` states in this form; None if it states none, or a blank option (None)."""
    index = _READERS[form](value, options)
    return index if index is not None and 0 <= index < len(options) and options[index] is not None else None


def _by_text(value: Any, options: Sequence[str | None]) -> int | None:
    wanted = as_text(value).strip()
    for form in (str.strip, lambda text: text.strip().casefold()):
        forms = [None if option is None else form(option) for option in options]
        if forms.count(form(wanted)) == 1:
            return forms.index(form(wanted))
    return None


def _by_letter(value: Any, options: Sequence[str | None]) -> int | None:
    letter = value.strip().strip("()[].:").upper() if isinstance(value, str) else ""
    return string.ascii_uppercase.index(letter) if len(letter) == 1 and letter in string.ascii_uppercase else None


def _by_index(value: Any, options: Sequence[str | None]) -> int | None:
    if isinstance(value, str):
        return int(value) if value.strip().isdecimal() and len(value) < 9 else None
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    return int(value) if whole else None


_READERS = {"option": _by_text, "letter": _by_letter, "index": _by_index}


def as_text(value: Any) -> str:
    """A value as the text of an answer: numbers as JSON writes them, whole ones without a fraction.

    Raises:
        TypeError: for anything but a text, a number, true or false.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):  # a column of numbers may have become one of floats
        return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)
    raise TypeError(f"{value!r} is no text or number")


class Row(NamedTuple):
    """A row of a multiple-choice task."""

    where: str
    """What an error message calls the row."""
    options: Sequence[str | None]
    """Its options; None for a blank one, which keeps its letter and index."""
    stated: Sequence[Any]
    """What states the right option, or each of the right ones."""


def readings(row: Row) -> dict[Form, list[int | None]]:
    """Each form in which the row states its right options -> their indices.

    Raises:
        UserError: if there is none.
    """
    found: dict[Form, list[int | None]] = {
        form: [index_of(form, value, row.options) for value in row.stated] for form in FORMS
    }
    read: dict[Form, list[int | None]] = {form: indices for form, indices in found.items() if None not in indices}
    if not read:
        shown = ", ".join(repr(option) for option in row.options if option is not None)
        if all(any(indices[i] is not None for indices in found.values()) for i in range(len(row.stated))):
            raise UserError(
                f"{row.where} states its answers {_shown(row.stated)} in several ways: write the texts, the letters or "
                "the indices of the right options"
            )
        texts = [as_text(option).strip().casefold() for option in row.options if option is not None]
        if any(texts.count(as_text(value).strip().casefold()) > 1 for value in row.stated):
            raise UserError(f"{row.where}: several of its options have the text {_shown(row.stated)}: write its letter")
        raise UserError(
            f"{row.where}: its answer {_shown(row.stated)} is neither one of its options ({shown[:200]}), nor an "
            f"option's letter, nor its index from 0: correct it"
        )
    return read


def decide(rows: Iterable[Row], *, leave_out: bool = False) -> Form:
    """The form in which all rows state their right options.

    Args:
        leave_out: pass over rows that state none of their options, and take the form that most rows fit. The caller
            leaves out the others.

    Raises:
        UserError: if no form fits all rows, or if several do and disagree about a row.
    """
    found = []
    for row in rows:
        try:
            found.append((row, readings(row)))
        except UserError:
            if not leave_out:
                raise
    fits = set(FORMS)
    for row, read in found if not leave_out else ():
        fits &= read.keys()
        if not fits:
            raise UserError(
                f"{row.where} states its answer {_shown(row.stated)} in another way than the rows before: write the "
                "text, the letter or the index of the right option in all rows"
            )
    if leave_out:
        counts = {form: sum(form in read for _, read in found) for form in FORMS}
        fits = {form for form in FORMS if counts[form] == max(counts.values())}
    for row, read in found:
        if len({tuple(read[form]) for form in fits & read.keys()}) > 1:
            raise UserError(
                f"{row.where}: its answer {_shown(row.stated)} can be read as {' or '.join(sorted(fits))}, and no row "
                "tells which is meant: write the letters of the right options in all rows"
            )
    return next(form for form in FORMS if form in fits)


def _shown(stated: Sequence[Any]) -> str:
    return ", ".join(repr(value)[:60] for value in stated)
