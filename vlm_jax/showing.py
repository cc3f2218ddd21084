"""How objects that hold arrays look in a terminal and in a notebook: as their fields and shapes, not as numbers."""

import html
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Class = TypeVar("Class", bound=type)

#: Entries of a dict or list that are shown, and numbers of an array.
_ENTRIES, _NUMBERS = 8, 6


def shown(cls: Class) -> Class:
    """Class decorator: gives a dataclass or a NamedTuple a short ``repr`` and a table for notebooks.

    Fields that are None are left out. A class can have a ``_notes_html`` method, whose HTML stands below the table.
    """

    def table(self) -> str:
        notes = self._notes_html() if hasattr(self, "_notes_html") else ""
        return titled(type(self).__name__, table_html(_fields(self))) + notes

    cls.__repr__, cls._repr_html_ = fields_in_words, table
    return cls


def fields_in_words(value: Any) -> str:
    """The class of a dataclass or NamedTuple, and its fields in a few words each."""
    fields = ", ".join(f"{name}={described(field)}" for name, field in _fields(value))
    return f"{type(value).__name__}({fields})"


def described(value: Any) -> str:
    """A value in a few words: an array as its dtype and shape, and its numbers if they are few."""
    if isinstance(value, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        kind = f"{value.dtype}[{','.join(map(str, value.shape))}]"
        is_known = isinstance(value, np.ndarray | np.generic)
        if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer):
            is_known = value.is_fully_addressable and not value.is_deleted()
        if not is_known or value.size > _NUMBERS or not _is_numeric(value):
            return kind
        return f"{kind} {np.array2string(np.asarray(value), precision=4, separator=', ')}".replace("\n", "")
    if isinstance(value, Mapping):
        return "{" + _some(f"{name}: {described(part)}" for name, part in value.items()) + "}"
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return "(" + _some(described(part) for part in value) + ")"
    return repr(value)


def table_html(rows: Iterable[tuple[str, Any]]) -> str:
    """A table of names and values in HTML. Dicts become tables of their own."""
    cells = []
    for name, value in rows:
        if isinstance(value, Mapping):
            inner = table_html((str(key), part) for key, part in value.items())
        else:
            inner = html.escape(value if isinstance(value, str) else described(value))
        cells.append(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th><td style='text-align:left'>{inner}</td></tr>"
        )
    return f"<table>{''.join(cells)}</table>"


def titled(title: str, body: str) -> str:
    """HTML under a title."""
    return f"<b>{html.escape(title)}</b>{body}"


def _fields(value: Any) -> list[tuple[str, Any]]:
    names = value._fields if isinstance(value, tuple) else value.__dataclass_fields__
    return [(name, field) for name in names if (field := getattr(value, name)) is not None]


def _some(parts: Iterable[str]) -> str:
    found = list(parts)
    more = [f"... {len(found) - _ENTRIES} more"] if len(found) > _ENTRIES else []
    return ", ".join(found[:_ENTRIES] + more)


def _is_numeric(value: Any) -> bool:
    return not jnp.issubdtype(value.dtype, jax.dtypes.extended)
