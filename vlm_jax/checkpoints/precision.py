"""Which precision each parameter has."""

from typing import Any, NamedTuple

from vlm_jax.errors import UserError


class Precision(NamedTuple):
    """Precision of the matrices, that is of linears and token embeddings, and of everything else, by which activations
    go. None: as in the checkpoint."""

    dtype: Any = None
    matrices: Any = None

    @classmethod
    def of(cls, dtype: Any, weights: Any) -> "Precision":
        """From the arguments of :func:`vlm_jax.load`.

        Raises:
            UserError: if they exclude each other.
        """
        name = getattr(weights, "__name__", str(weights))
        if weights is None:
            return cls(dtype, dtype)
        if name != "bfloat16" or (dtype is not None and getattr(dtype, "__name__", str(dtype)) != "float32"):
            raise UserError(f"weights {name!r} with dtype {str(dtype)!r} is not supported: use bfloat16 with float32")
        return cls("float32", "bfloat16")

    def of_leaf(self, name: str) -> Any:
        """The precision of a parameter; None: as in the checkpoint."""
        return self.matrices if _is_matrix(name) else self.dtype

    def is_kept(self, name: str) -> bool:
        """Whether a parameter is one that must be in the checkpoint as it will be in the model."""
        return self.matrices != self.dtype and _is_matrix(name)


def would_round(name: str) -> str:
    """What is said of a matrix that has other numbers in its file."""
    return (
        f"{name} is not bfloat16 in the checkpoint, so it would be rounded: drop the bfloat16 weights, or round the "
        "model first, with python -m vlm_jax.convert --dtype bfloat16"
    )


def _is_matrix(name: str) -> bool:
    return name.endswith(".kernel") or name == "text.embed_tokens.weight"
