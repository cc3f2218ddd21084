"""The numbers that an option accepts. They are written in the annotation of its field and checked in one place."""

import dataclasses
import math
from typing import Any

from vlm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Range:
    """The finite numbers that a field accepts, as an annotation: ``limit: Annotated[int, Range(least=1)] = 96``.

    ``least`` and ``most`` are in the range. ``above`` and ``below`` are limits that are not in it. Without a limit, the
    largest number is that of 32 bits, beyond which seeds and array indices fail.
    """

    least: float | None = None
    above: float | None = None
    below: float | None = None
    most: float = 2**31 - 1

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and value <= self.most
        )

    def __str__(self) -> str:
        """The range in words, for error messages, such as "at least 1" or "a number above 0 and below 1"."""
        ends = [f"at least {self.least}"] if self.least is not None else []
        ends += [f"{name} {end}" for name, end in (("above", self.above), ("below", self.below)) if end is not None]
        ends += [f"at most {self.most}"] if self.most < Range.most or not ends else []
        return " and ".join(ends) if self.least is not None else f"a number {' and '.join(ends)}"


#: A number of examples, rows or tokens that are computed together.
BATCH = Range(least=1, most=2**16)
#: A learning rate.
RATE = Range(above=0, most=100)


def flag(field: dataclasses.Field) -> str:
    """The flag of a field on the command line: the name in its annotation ``tyro.conf.arg(name=...)`` if it has one,
    else the field's name."""
    names = [getattr(note, "name", None) for note in getattr(field.type, "__metadata__", ())]
    return "--" + next(filter(None, names), field.name).replace("_", "-")


def check_ranges(options: Any) -> None:
    """Checks all numbers of a dataclass, and of dataclasses in its fields, against the :class:`Range` of their field.
    The numbers of a tuple or a dict are checked one by one. None is always accepted.

    Raises:
        UserError: for a number outside its range.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value)
            continue
        for allowed in (note for note in getattr(field.type, "__metadata__", ()) if isinstance(note, Range)):
            numbers = value if isinstance(value, tuple) else value.values() if isinstance(value, dict) else (value,)
            for number in numbers:
                if number is not None and number not in allowed:
                    raise UserError(f"{flag(field)} is {number}: give {_larger(number, allowed)}")


def _larger(number: float, allowed: Range) -> str:
    """The range in words, with its largest number if that is exceeded."""
    return f"at most {allowed.most}" if allowed.most < number < math.inf else str(allowed)
