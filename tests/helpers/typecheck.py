"""The type checker that the tests' import hook applies to every function (tests/conftest.py)."""

from typing import Any, get_args

import numpy as np
from beartype import BeartypeConf, FrozenDict, beartype
from jaxtyping import AbstractArray

#: An int is a float, as for static type checkers, and NumPy's scalars are numbers.
_NUMBERS = FrozenDict({int: int | np.integer, float: float | int | np.floating | np.integer})
_check = beartype(conf=BeartypeConf(hint_overrides=_NUMBERS))


def checked(function):
    """Checks the shapes in a function's signature with beartype. Other annotations are not checked, for speed, and
    because functions refuse a user's mistake, such as an unknown name, by a UserError of their own.

    Constructors pass too: JAX rebuilds pytrees with leaves of any type (shardings, sentinels).
    """
    hints = getattr(function, "__annotations__", {})
    shapes = {name: hint for name, hint in hints.items() if _has_shape(hint)}
    if not shapes or function.__name__ == "__init__":
        return function
    function.__annotations__ = shapes
    return _check(function)


def _has_shape(hint: Any) -> bool:
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(_has_shape, get_args(hint)))
