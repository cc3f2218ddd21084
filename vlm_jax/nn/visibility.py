"""Who sees whom in the decoder: causal order, images whose tokens see each other, and the masks of registers."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Int

from vlm_jax.registers import MASKS, Registers
from vlm_jax.typing import Array, ArrayLike


class Tokens(NamedTuple):
    """What visibility depends on, besides the order of the tokens.

    attention_mask: False for padding.
    is_image: the visual tokens; None without images.
    register_index: the number of each register within its image, -1 for other tokens; None without registers.
    """

    attention_mask: Bool[ArrayLike, "batch tokens"]
    is_image: Bool[ArrayLike, "batch tokens"] | None = None
    register_index: Int[ArrayLike, "batch tokens"] | None = None

    def first(self, length: int) -> "Tokens":
        """The first ``length`` tokens of every row."""
        return Tokens(*(None if array is None else array[:, :length] for array in self))


def visible(
    tokens: Tokens, registers: Registers | None = None, bidirectional_images: bool = False
) -> Bool[Array, "batch tokens tokens"]:
    """Which token (axis 1) sees which (axis 2) in full attention. Padding is seen by none."""
    mask = jnp.asarray(tokens.attention_mask)
    seen = jnp.tril(jnp.ones((mask.shape[1],) * 2, bool))[None]
    block = both_ways(tokens, registers, bidirectional_images)
    if block is not None:
        seen = seen | ((block[:, :, None] == block[:, None, :]) & (block[:, :, None] > 0))
    hidden = _hidden(tokens, registers)
    classes = _classes(tokens) if hidden else {}
    for query, key in hidden:
        seen = seen & ~(classes[query][:, :, None] & classes[key][:, None, :])
    return seen & mask[:, None, :]


def visible_to_new(tokens: Tokens, registers: Registers | None) -> Bool[Array, "batch tokens"]:
    """The tokens of the prompt that a generated token sees in full attention."""
    seen = jnp.asarray(tokens.attention_mask)
    for query, key in _hidden(tokens, registers):
        if query == "text":
            # A row without registers has no token of the class "before", and its text is like any other.
            seen = seen & ~_classes(tokens)[key]
    return seen


def both_ways(
    tokens: Tokens, registers: Registers | None, bidirectional_images: bool
) -> Int[Array, "batch tokens"] | None:
    """A number above 0 for tokens that see each other in both directions: tokens with equal numbers do. 0 for tokens
    that see none behind them; None if no token does."""
    marked = []
    if bidirectional_images and tokens.is_image is not None:
        is_image = jnp.asarray(tokens.is_image)
        marked.append((is_image, is_image & ~jnp.pad(is_image, [(0, 0), (1, 0)])[:, :-1]))
    if registers is not None and registers.mask == "mitre" and tokens.register_index is not None:
        index = jnp.asarray(tokens.register_index)
        marked.append((index >= 0, index == 0))
    if not marked:
        return None
    members, first = (sum(part.astype(int) for part in parts) > 0 for parts in zip(*marked, strict=True))
    return jnp.where(members, jnp.cumsum(first, 1), 0)


def _hidden(tokens: Tokens, registers: Registers | None) -> tuple[tuple[str, str], ...]:
    if registers is None or tokens.register_index is None:
        return ()
    return MASKS[registers.mask]


def _classes(tokens: Tokens) -> dict[str, Bool[Array, "batch tokens"]]:
    """The classes of :data:`vlm_jax.registers.MASKS`. In a row without registers all text is "text"."""
    assert tokens.is_image is not None and tokens.register_index is not None, "registers stand behind images"
    register, image = jnp.asarray(tokens.register_index) >= 0, jnp.asarray(tokens.is_image)
    begun = jnp.cumsum(register, 1) > 0
    before = ~begun & ~image & register.any(1, keepdims=True)
    return {"image": image, "register": register, "before": before, "text": ~(image | register | before)}
