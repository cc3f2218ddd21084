"""Which precision each parameter has."""

from typing import Any, NamedTuple

from vlm_jax.errors import UserError

#: The path of the token embeddings.
EMBEDDINGS = "text.embed_tokens.weight"
_KNOWN = ("float32", "bfloat16", "float16")


class Precision(NamedTuple):
    """Precision of the parameters; None: as in the checkpoint.

    matrices: of the linears' kernels and the token embeddings. dtype: of all others; activations have it too.
    """

    dtype: str | None = None
    matrices: str | None = None

    @classmethod
    def of(cls, dtype: Any, weights: Any) -> "Precision":
        """From the arguments of :func:`vlm_jax.load`, which are names or types.

        Raises:
            UserError: for unknown ones, or if they exclude each other.
        """
        dtype, weights = (
            value if value is None else getattr(value, "__name__", str(value)) for value in (dtype, weights)
        )
        if dtype is not None and dtype not in _KNOWN:
            raise UserError(f"dtype {dtype!r} is not supported: use float32, bfloat16 or float16")
        if weights is None:
            return cls(dtype, dtype)
        if weights != "bfloat16" or dtype not in (None, "float32"):
            raise UserError(f"weights {weights!r} with dtype {dtype!r} is not supported: use bfloat16 with float32")
        return cls("float32", "bfloat16")

    def of_leaf(self, name: str) -> str | None:
        """The precision of a parameter; None: as in the checkpoint."""
        return self.matrices if _is_matrix(name) else self.dtype

    def check(self, name: str, stored: str, called: str) -> None:
        """Refuses to round a matrix where matrices are to stay as they are in the checkpoint.

        Args:
            name: of the parameter. stored: its dtype in the checkpoint. called: its name there.
        """
        if self.matrices != self.dtype and _is_matrix(name) and stored != self.matrices:
            raise UserError(
                f"{called} is {stored} in the checkpoint, so it would be rounded: drop the bfloat16 weights, or round "
                "the model first, with python -m vlm_jax.convert --dtype bfloat16"
            )


def _is_matrix(name: str) -> bool:
    return name.endswith(".kernel") or name == EMBEDDINGS
