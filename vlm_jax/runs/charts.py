"""The rows of a figure: its main numbers in one form for each type of artifact, for programs that draw it in their own
way, such as the report page.

A figure's data file holds what its drawer needs, in the drawer's own form, and a :class:`Chart` of its main numbers.
"""

from typing import Any, NamedTuple

#: Type of artifact -> the fields that each row of its chart has. ``panel`` is the part of the figure, ``series`` what a
#: colour stands for. Rows may have others: ``low`` and ``high``, the bounds of an interval; ``cell``, a trace's cell;
#: ``folders``, the folders of the run that hold the samples behind a mark; and further facts, which are shown in words.
FIELDS = {
    "heat_map": ("panel", "x", "y", "value"),
    "curves": ("panel", "series", "x", "y"),
    "intervals": ("panel", "row", "series", "value", "low", "high"),
    "bars": ("panel", "x", "series", "value"),
    "scatter": ("panel", "series", "x", "y"),
}


class Chart(NamedTuple):
    """A figure as rows."""

    rows: list[dict[str, Any]]
    """What is drawn: an object for each cell, point, bar or interval."""
    titles: dict[str, str]
    """Field of the rows -> its title, with the unit. A field without one is named as it is."""

    def missing(self, type: str) -> str | None:
        """A field that the rows of this type need and one lacks; None if none does."""
        needed = FIELDS.get(type, ())
        return next((field for row in self.rows for field in needed if field not in row), None)
