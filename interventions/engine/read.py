"""Read-outs: functions of a run's last hidden state. They unembed only the positions that are scored."""

from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import Inputs, Model, UserError
from vlm_jax.inputs import bucket
from vlm_jax.prompts import positions


class ReadOut(Protocol):
    """The part of a run that a sweep returns. A read-out is a flax dataclass, so that its arrays are arguments of the
    program.

    ``first``, a static field, is the index of the first token that it needs. A sweep shares only tokens before it.
    """

    first: int

    def __call__(self, model: Model, x: jax.Array, start: int) -> Any:
        """Any pytree of arrays, from ``x (B, S, D)`` after the final norm; ``start``: the index of its first token in
        the sequence."""

    def replace(self, **changes: Any) -> "ReadOut": ...


class Runs(NamedTuple):
    """The read-outs of a sweep: of the variants, with a leading axis of N; of the base run; and of the clean run (None
    if there is none)."""

    variants: Any
    base: Any
    clean: Any


class Scores(NamedTuple):
    """The scores of gold tokens, ``(..., B, A)`` each: log-probabilities ``logp``; ``hit``, whether a token is the
    likeliest one; ``valid``, which entries are tokens at all. The other entries are 0."""

    logp: jax.Array
    hit: jax.Array
    valid: jax.Array

    @property
    def log_probability(self) -> jax.Array:
        """The mean of the gold tokens' log-probabilities ``(..., B)``."""
        return jnp.sum(self.logp, -1) / jnp.sum(self.valid, -1)

    @property
    def probability(self) -> jax.Array:
        """The geometric mean of the gold tokens' probabilities ``(..., B)`` (P0, equation 1)."""
        return jnp.exp(self.log_probability)

    @property
    def correct(self) -> jax.Array:
        """Whether greedy decoding would write just these tokens ``(..., B)``."""
        return (self.hit | ~self.valid).all(-1)


@flax.struct.dataclass
class Gold:
    """Scores the gold tokens ``target (B, A)`` at the positions ``index (B, A)``. Entries that are not ``valid (B, A)``
    fill up rows with fewer tokens."""

    target: jax.Array
    index: jax.Array
    valid: jax.Array
    first: int = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, inputs: Inputs, answer_mask) -> "Gold":
        """Scores the tokens that ``answer_mask (B, T)`` marks in ``inputs``.

        Raises:
            UserError: if a row has no such token, or if one of them is the first token of its row.
        """
        answer = np.asarray(answer_mask, bool)
        if not answer.any(1).all():
            raise UserError(
                f"row {int(np.argmin(answer.any(1)))} has no gold answer token: mark at least one in its mask"
            )
        index, valid = positions(answer, bucket(int(answer.sum(1).max()), 4))
        if (index[valid] == 0).any():
            raise UserError("a gold token is the first of its row, so nothing predicts it: put the prompt before it")
        target = np.take_along_axis(np.asarray(inputs.input_ids), index, 1)
        return cls(target, index, valid, int(index[valid].min() - 1) // 8 * 8)

    def __call__(self, model: Model, x: jax.Array, start: int) -> Scores:
        # Without the maximum, unused entries of ``index`` would lie outside of ``x``.
        before = jnp.maximum(jnp.asarray(self.index) - 1 - start, 0)
        logits = model.text.logits(jnp.take_along_axis(x, before[..., None], 1)).astype(jnp.float32)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits, -1), jnp.asarray(self.target)[..., None], -1)[..., 0]
        valid = jnp.asarray(self.valid)
        return Scores(jnp.where(valid, logp, 0), (jnp.argmax(logits, -1) == self.target) & valid, valid)


@flax.struct.dataclass
class Logits:
    """The logits ``(B, V)`` of the last token of every prompt; ``index (B,)`` is where it is."""

    index: jax.Array
    first: int = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, inputs: Inputs) -> "Logits":
        mask = np.asarray(inputs.attention_mask)
        index = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
        return cls(index, int(index.min()) // 8 * 8)

    def __call__(self, model: Model, x: jax.Array, start: int) -> jax.Array:
        return model.text.logits(x[jnp.arange(len(x)), jnp.asarray(self.index) - start])


@flax.struct.dataclass
class LogitDifference:
    """How much likelier the gold answer is than a foil: the difference of their tokens' logits ``(B,)`` at the first
    token in which the two answers differ (Zhang and Nanda 2024)."""

    gold: jax.Array
    foil: jax.Array
    index: jax.Array
    first: int = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, inputs: Inputs, answer_mask, foils: Inputs) -> "LogitDifference":
        """For prompts ``inputs`` and ``foils`` that differ only in their answers. ``answer_mask (B, T)`` marks the
        answers in ``inputs``.

        Raises:
            UserError: if a foil equals the gold answer.
        """
        begins = np.asarray(answer_mask).argmax(1)
        width = min(inputs.input_ids.shape[1], foils.input_ids.shape[1])
        gold, foil = (np.asarray(i.input_ids)[:, :width] for i in (inputs, foils))
        differ = (gold != foil) & (np.arange(width) >= begins[:, None])
        if not differ.any(1).all():
            raise UserError(f"row {int(np.argmin(differ.any(1)))} has its gold answer as its foil: give another one")
        index = differ.argmax(1)
        rows = np.arange(len(index))
        return cls(gold[rows, index], foil[rows, index], index, int(index.min() - 1) // 8 * 8)

    def __call__(self, model: Model, x: jax.Array, start: int) -> jax.Array:
        rows = jnp.arange(len(x))
        logits = model.text.logits(x[rows, jnp.asarray(self.index) - 1 - start]).astype(jnp.float32)
        return logits[rows, self.gold] - logits[rows, self.foil]
