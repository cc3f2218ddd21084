"""Which numbers an option accepts: written beside its field, checked in one place."""

import dataclasses
import math
from typing import Any

from vlm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Range:
    """The finite numbers that a field accepts, as an annotation: ``batch: Annotated[int, Range(least=1)] = 16``.

    ``least`` belongs to the range; ``above`` and ``below`` are its open ends.
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
        """What to give: "at least 1", or "a number above 0 and below 1"."""
        ends = [f"{name} {end}" for name, end in (("above", self.above), ("below", self.below)) if end is not None]
        if self.least is None:
            return f"a number {' and '.join(ends)}"
        return " and ".join([f"at least {self.least}", *ends])


def flag(field: dataclasses.Field) -> str:
    """The name of a field on the command line: ``--trace-batch`` for a field that says
    ``tyro.conf.arg(name="trace-batch")``, else the field's own."""
    names = [getattr(note, "name", None) for note in getattr(field.type, "__metadata__", ())]
    return "--" + next(filter(None, names), field.name).replace("_", "-")


def check_ranges(options: Any) -> None:
    """Refuses numbers outside the :class:`Range` of their field, in a dataclass and in those that it holds. A tuple's
    numbers are checked one by one; None is always accepted.

    Raises:
        UserError: naming the flag, its value and what to give.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value)
        for allowed in (note for note in getattr(field.type, "__metadata__", ()) if isinstance(note, Range)):
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and number not in allowed:
                    raise UserError(f"{flag(field)} is {number}: give {allowed}")
