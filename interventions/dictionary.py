"""Sparse dictionaries (sparse autoencoders) of activations: codes, reconstructions, and how much they explain."""

from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.errors import UserError
from vlm_jax.typing import ArrayLike

Architecture = Literal["topk", "jumprelu"]


@flax.struct.dataclass
class Dictionary:
    """A dictionary of F latents for activations of width D. With leading axes it is several of one shape.

    The codes of an activation x are ``h = act(x W_enc + b_enc)``, its reconstruction is ``h W_dec + b_dec``. Both are
    in the activations' own units: a normalisation that training used is folded into the arrays.

    architecture: "topk" keeps the ``k`` largest positive pre-activations; "jumprelu" those above ``threshold``, which
    is 0 everywhere for a plain ReLU.
    """

    W_enc: Float[ArrayLike, "*members width latents"]
    b_enc: Float[ArrayLike, "*members latents"]
    W_dec: Float[ArrayLike, "*members latents width"]
    b_dec: Float[ArrayLike, "*members width"]
    threshold: Float[ArrayLike, "*members latents"] | None = None
    architecture: Architecture = flax.struct.field(pytree_node=False, default="topk")
    k: int | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def latents(self) -> int:
        """The number F of latents."""
        return self.W_dec.shape[-2]

    @property
    def width(self) -> int:
        """The width D of the activations."""
        return self.W_dec.shape[-1]

    def pre_activations(self, x: Float[ArrayLike, "*rows width"]) -> Float[Array, "*rows latents"]:
        """``x W_enc + b_enc``."""
        return jnp.asarray(x) @ self.W_enc + self.b_enc

    def codes(self, x: Float[ArrayLike, "*rows width"]) -> Float[Array, "*rows latents"]:
        """The latents' activations h."""
        before = self.pre_activations(x)
        if self.architecture == "jumprelu":
            return jnp.where(before > jnp.asarray(self.threshold), jax.nn.relu(before), 0)
        values, index = top(before, self.k)
        return scattered(jax.nn.relu(values), index, self.latents)

    def decode(self, codes: Float[ArrayLike, "*rows latents"]) -> Float[Array, "*rows width"]:
        """``h W_dec + b_dec``."""
        return jnp.asarray(codes) @ self.W_dec + self.b_dec

    def __call__(self, x: Float[ArrayLike, "*rows width"]) -> Float[Array, "*rows width"]:
        """The reconstruction of activations."""
        return self.decode(self.codes(x))

    def scaled(self, factor: Float[ArrayLike, "*members"] | float) -> "Dictionary":
        """The same dictionary for activations that are ``factor`` times as large: its codes and reconstructions become
        ``factor`` times as large, and the directions stay the same."""
        factor = jnp.asarray(factor)[..., None]
        threshold = None if self.threshold is None else self.threshold * factor
        return self.replace(b_enc=self.b_enc * factor, b_dec=self.b_dec * factor, threshold=threshold)

    def member(self, index: int) -> "Dictionary":
        """One of several dictionaries."""
        return jax.tree.map(lambda a: a[index], self)


def top(before: Float[ArrayLike, "*rows latents"], k: int | None):
    """The ``k`` largest pre-activations of each row, and their indices."""
    assert k is not None, "a TopK dictionary has k"
    return jax.lax.top_k(before, k)


def scattered(
    values: Float[ArrayLike, "*rows k"], index: Int[ArrayLike, "*rows k"], latents: int
) -> Float[Array, "*rows latents"]:
    """An array of zeros with ``values`` at the indices of each row."""
    flat = jnp.zeros((index.size // index.shape[-1], latents), values.dtype)
    rows = jnp.arange(len(flat))[:, None]
    flat = flat.at[rows, index.reshape(len(flat), -1)].set(values.reshape(len(flat), -1))
    return flat.reshape(*index.shape[:-1], latents)


def check_dictionary(dictionary: Dictionary, where: str) -> Dictionary:
    """The dictionary of a file, if its arrays fit together.

    Args:
        where: the file, for error messages.

    Raises:
        UserError: for arrays of other shapes, numbers that are not finite, or a k outside 1 to F.
    """
    width, latents = np.shape(dictionary.W_enc)[-2:]
    wanted = {"W_enc": (width, latents), "b_enc": (latents,), "W_dec": (latents, width), "b_dec": (width,)}
    wanted |= {"threshold": (latents,)} if dictionary.threshold is not None else {}
    for name, shape in wanted.items():
        array = getattr(dictionary, name)
        if np.shape(array) != shape:
            raise UserError(f"{where}: {name} has shape {np.shape(array)}, but W_enc asks for {shape}: fetch it again")
        if not np.isfinite(array).all():
            raise UserError(f"{where}: {name} holds a number that is not finite: train or fetch it again")
    if dictionary.architecture == "topk" and not 1 <= (dictionary.k or 0) <= latents:
        raise UserError(f"{where}: k is {dictionary.k}, but there are {latents} latents: give 1 to {latents}")
    if dictionary.architecture == "jumprelu" and dictionary.threshold is None:
        raise UserError(f"{where}: a JumpReLU dictionary needs thresholds, but the file has none: fetch it again")
    return dictionary


def fvu(
    x: Float[ArrayLike, "rows width"],
    reconstruction: Float[ArrayLike, "rows width"],
    valid: Bool[ArrayLike, "rows"] | None = None,
) -> Float[Array, ""]:
    """Fraction of variance unexplained: the squared error of the reconstructions, divided by the squared distance of
    the activations from their mean. Only ``valid`` rows count (None: all)."""
    weight = (jnp.ones(len(x)) if valid is None else jnp.asarray(valid).astype(jnp.float32))[:, None]
    mean = (x * weight).sum(0) / weight.sum()
    return (weight * (x - reconstruction) ** 2).sum() / (weight * (x - mean) ** 2).sum()


def published_fvu(
    x: Float[ArrayLike, "rows width"],
    reconstruction: Float[ArrayLike, "rows width"],
    valid: Bool[ArrayLike, "rows"],
) -> Float[Array, ""]:
    """FVU as P2's released code computes it. Rows that are not valid are set to 0 before the mean is subtracted, so
    each of them adds the squared mean to the variance. The value is too small if many rows are not valid; it is here to
    compare with published numbers."""
    weight = jnp.asarray(valid).astype(jnp.float32)[:, None]
    kept = x * weight
    mean = kept.sum(0) / weight.sum()
    return (weight * (x - reconstruction) ** 2).sum() / ((kept - mean) ** 2).sum()
