"""The numbers that an option accepts. They are written in the annotation of its field and checked in one place."""

import dataclasses
import math
from typing import Any

from vlm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Range:
    """The finite numbers that a field accepts, as an annotation: ``batch: Annotated[int, Range(least=1)] = 16``.

    ``least`` is the smallest number in the range. ``above`` and ``below`` are limits that are not in the range.
    """

    least: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """The range in words, for error messages: "at least 1", or "a number above 0 and below 1"."""
        ends = [f"{name} {end}" for name, end in (("above", self.above), ("below", self.below)) if end is not None]
        if self.least is None:
            return f"a number {' and '.join(ends)}"
        return " and ".join([f"at least {self.least}", *ends])


def flag(field: dataclasses.Field) -> str:
    """The flag of a field on the command line: the name in its annotation ``tyro.conf.arg(name=...)`` if it has one,
    else the field's name."""
    names = [getattr(note, "name", None) for note in getattr(field.type, "__metadata__", ())]
    return "--" + next(filter(None, names), field.name).replace("_", "-")


def check_ranges(options: Any) -> None:
    """Checks all numbers of a dataclass, and of dataclasses in its fields, against the :class:`Range` of their field.
    The numbers of a tuple are checked one by one. None is always accepted.

    Raises:
        UserError: for a number outside its range.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value)
            continue
        for allowed in (note for note in getattr(field.type, "__metadata__", ()) if isinstance(note, Range)):
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and number not in allowed:
                    raise UserError(f"{flag(field)} is {number}: give {allowed}")
