"""Read-outs: functions of a run's last hidden state. They unembed only the positions that are scored."""

from typing import Any, ClassVar, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from vlm_jax import Inputs, Model, UserError
from vlm_jax.inputs import bucket
from vlm_jax.prompts import positions
from vlm_jax.typing import Array, ArrayLike


class ReadOut(Protocol):
    """The part of a run that a sweep returns. A read-out is a flax dataclass, so that its arrays are arguments of the
    program.

    ``first``, a static field, is the index of the first token that it needs. A sweep shares only tokens before it. A
    read-out of the residual stream itself has a class attribute ``normed = False``; it then gets the last layer's
    output before the final norm.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    first: int

    def __call__(self, model: Model, x: Float[ArrayLike, "batch tokens width"], start: int) -> Any:
        """Any pytree of arrays, from the last hidden state ``x`` after the final norm. ``start`` is the index of its
        first token in the sequence."""
        ...


def reads_normed(read: ReadOut) -> bool:
    """Whether a read-out gets the last layer's output after the final norm."""
    return getattr(read, "normed", True)


class Runs(NamedTuple):
    """The read-outs of a sweep: of the variants, with a leading axis of N; of the base run; and of the clean run (None
    if there is none)."""

    variants: Any
    base: Any
    clean: Any


class Scores(NamedTuple):
    """The scores of gold tokens: log-probabilities ``logp``; ``hit``, whether a token is the likeliest one; ``valid``,
    which entries are tokens at all. The other entries are 0. In a sweep, the first axis is the variants."""

    logp: Float[ArrayLike, "*variants batch answers"]
    hit: Bool[ArrayLike, "*variants batch answers"]
    valid: Bool[ArrayLike, "*variants batch answers"]

    @property
    def log_probability(self) -> Float[ArrayLike, "*variants batch"]:
        """The mean of the gold tokens' log-probabilities."""
        return jnp.sum(self.logp, -1) / jnp.sum(self.valid, -1)

    @property
    def probability(self) -> Float[ArrayLike, "*variants batch"]:
        """The geometric mean of the gold tokens' probabilities (P0, equation 1)."""
        return jnp.exp(self.log_probability)

    @property
    def correct(self) -> Bool[ArrayLike, "*variants batch"]:
        """Whether greedy decoding would write just these tokens."""
        return (self.hit | ~self.valid).all(-1)


@flax.struct.dataclass
class Gold:
    """Scores the gold tokens ``target`` at the positions ``index``. Entries that are not ``valid`` fill up rows with
    fewer tokens."""

    target: Int[ArrayLike, "batch answers"]
    index: Int[ArrayLike, "batch answers"]
    valid: Bool[ArrayLike, "batch answers"]
    first: int = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, inputs: Inputs, answer_mask: Bool[ArrayLike, "batch tokens"]) -> "Gold":
        """Scores the tokens that ``answer_mask`` marks in ``inputs``.

        Raises:
            UserError: if a row has no such token, or if one of them is the first token of its row.
        """
        answer = np.asarray(answer_mask, bool)
        if not answer.any(1).all():
            raise UserError(
                f"row {int(np.argmin(answer.any(1)))} has no gold answer token: mark at least one in its mask"
            )
        # Each position is unembedded, so one or two tokens do not get the room of four.
        most = int(answer.sum(1).max())
        index, valid = positions(answer, most if most <= 2 else bucket(most, 4))
        if (index[valid] == 0).any():
            raise UserError("a gold token is the first of its row, so nothing predicts it: put the prompt before it")
        target = np.take_along_axis(np.asarray(inputs.input_ids), index, 1)
        return cls(target, index, valid, int(index[valid].min() - 1) // 8 * 8)

    def __call__(self, model: Model, x: Float[ArrayLike, "batch tokens width"], start: int) -> Scores:
        # Without the maximum, unused entries of ``index`` would lie outside of ``x``.
        before = jnp.maximum(jnp.asarray(self.index) - 1 - start, 0)
        logits = model.text.logits(jnp.take_along_axis(x, before[..., None], 1)).astype(jnp.float32)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits, -1), jnp.asarray(self.target)[..., None], -1)[..., 0]
        valid = jnp.asarray(self.valid)
        return Scores(jnp.where(valid, logp, 0), (jnp.argmax(logits, -1) == self.target) & valid, valid)


@flax.struct.dataclass
class Logits:
    """The logits of the last token of every prompt; ``index`` is its position."""

    index: Int[ArrayLike, "batch"]
    first: int = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, inputs: Inputs) -> "Logits":
        mask = np.asarray(inputs.attention_mask)
        index = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
        return cls(index, int(index.min()) // 8 * 8)

    def __call__(
        self, model: Model, x: Float[ArrayLike, "batch tokens width"], start: int
    ) -> Float[Array, "batch vocab"]:
        return model.text.logits(x[jnp.arange(len(x)), jnp.asarray(self.index) - start])


@flax.struct.dataclass
class LogitDifference:
    """How much likelier the gold answer is than a foil: the difference of their tokens' logits at the first token
    in which the two answers differ (Zhang and Nanda 2024)."""

    gold: Int[ArrayLike, "batch"]
    foil: Int[ArrayLike, "batch"]
    index: Int[ArrayLike, "batch"]
    first: int = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, inputs: Inputs, answer_mask: Bool[ArrayLike, "batch tokens"], foils: Inputs) -> "LogitDifference":
        """For prompts ``inputs`` and ``foils`` that differ only in their answers. ``answer_mask`` marks the
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

    def __call__(self, model: Model, x: Float[ArrayLike, "batch tokens width"], start: int) -> Float[Array, "batch"]:
        rows = jnp.arange(len(x))
        logits = model.text.logits(x[rows, jnp.asarray(self.index) - 1 - start]).astype(jnp.float32)
        return logits[rows, self.gold] - logits[rows, self.foil]


@flax.struct.dataclass
class Projections:
    """The residual stream behind the last layer along N directions, summed over the tokens ``where``. On
    :meth:`vlm_jax.Model.up_to` a layer, it reads linear functions of the residual stream at that layer."""

    directions: Float[ArrayLike, "directions width"]
    where: Bool[ArrayLike, "batch tokens"]
    first: int = flax.struct.field(pytree_node=False)
    normed: ClassVar[bool] = False

    @classmethod
    def of(
        cls, directions: Float[ArrayLike, "directions width"], where: Bool[np.ndarray, "batch tokens"]
    ) -> "Projections":
        """
        Raises:
            UserError: if no token is marked.
        """
        if not where.any():
            raise UserError("no token is marked to read the residual stream at: mark at least one")
        return cls(jnp.asarray(directions, jnp.float32), where, int(where.any(0).argmax()) // 8 * 8)

    def __call__(
        self, model: Model, x: Float[ArrayLike, "batch tokens width"], start: int
    ) -> Float[Array, "batch directions"]:
        where = jax.lax.dynamic_slice_in_dim(jnp.asarray(self.where), start, x.shape[1], 1)
        return jnp.einsum("btd,bt,nd->bn", x.astype(jnp.float32), where.astype(jnp.float32), self.directions)


@flax.struct.dataclass
class Odds:
    """The log-odds of some first tokens of an answer against others, such as yes against no (P2).

    index: the position of the last token of every prompt, which writes the answer's first token.
    """

    index: Int[ArrayLike, "batch"]
    yes: Int[ArrayLike, "yes"]
    no: Int[ArrayLike, "no"]
    first: int = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, inputs: Inputs, yes: Int[ArrayLike, "yes"], no: Int[ArrayLike, "no"]) -> "Odds":
        """For prompts without answers."""
        last = Logits.of(inputs)
        return cls(last.index, jnp.asarray(yes), jnp.asarray(no), last.first)

    def __call__(self, model: Model, x: Float[ArrayLike, "batch tokens width"], start: int) -> Float[Array, "batch"]:
        logits = model.text.logits(x[jnp.arange(len(x)), jnp.asarray(self.index) - start]).astype(jnp.float32)
        return jax.nn.logsumexp(logits[:, self.yes], -1) - jax.nn.logsumexp(logits[:, self.no], -1)
