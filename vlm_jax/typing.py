"""Names for array types in signatures, in jaxtyping's notation: ``Float[Array, "batch tokens width"]``.

The tests check them while programs are traced (``tests/conftest.py``); at run time they cost nothing. An axis has the
same size wherever its name stands in one signature.
"""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

Array = jax.Array
#: Arrays that go into a program: of JAX, constants in NumPy, or ``ShapeDtypeStruct`` where it is only compiled.
#: Static checkers see Any, as these types have no common base with the operators of arrays.
if TYPE_CHECKING:
    ArrayLike = Any
else:
    ArrayLike = jax.Array | np.ndarray | jax.ShapeDtypeStruct
