"""The type checker that the tests' import hook applies to every function (tests/conftest.py)."""

from typing import Any, get_args

import numpy as np
from beartype import BeartypeConf, FrozenDict, beartype
from jaxtyping import AbstractArray

#: An int is a float, as for static type checkers, and NumPy's scalars are numbers.
_NUMBERS = FrozenDict({int: int | np.integer, float: float | int | np.floating | np.integer})
_check = beartype(conf=BeartypeConf(hint_overrides=_NUMBERS))


def checked(function):
    """Checks functions whose signatures have shapes, with beartype; other functions pass unchecked, for speed.

    Constructors pass too: JAX rebuilds pytrees with leaves of any type (shardings, sentinels).
    """
    hints = getattr(function, "__annotations__", {}).values()
    return _check(function) if function.__name__ != "__init__" and any(map(_has_shape, hints)) else function


def _has_shape(hint: Any) -> bool:
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(_has_shape, get_args(hint)))
