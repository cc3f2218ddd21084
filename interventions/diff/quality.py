"""How well dictionaries explain activations they were not trained on: FVU and L0 by token group, dead latents, and what
the model loses when activations are replaced by their reconstructions."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from interventions.dictionary import Dictionary
from interventions.diff.activations import Source
from interventions.diff.place import Place
from interventions.engine.read import Gold
from interventions.engine.sweep import sweep_runs
from interventions.engine.variants import stack
from interventions.kinds.groups import GROUPS, bind, label, members, tokens_of
from interventions.kinds.latents import Latents
from interventions.kinds.layers import slots
from vlm_jax import Model
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.inputs import bucket
from vlm_jax.processor import Processor
from vlm_jax.prompts import batches
from vlm_jax.runs.processes import fetch, progress
from vlm_jax.sites import Stage, stage
from vlm_jax.typing import ArrayLike

#: A difference of mean losses, in nats, that rounding alone can make.
_NO_LOSS = 1e-5


class Sums(NamedTuple):
    """Sums over the tokens of each of :data:`interventions.GROUPS`; G groups, D the width, F latents."""

    count: Float[ArrayLike, " groups"]
    total: Float[ArrayLike, "groups width"]
    """Sum of the activations."""
    square: Float[ArrayLike, " groups"]
    """Sum of their squared norms."""
    error: Float[ArrayLike, " groups"]
    """Sum of the squared errors of their reconstructions."""
    active: Float[ArrayLike, "groups latents"]
    """How often each latent is active."""
    energy: Float[ArrayLike, "groups latents"]
    """Sum of each latent's squared code."""

    def of(self, groups: str) -> "Sums":
        """The sums over a token group, without the axis of groups."""
        return Sums(*(array[members(groups)].sum(0) for array in self))

    def variance(self) -> float:
        """The squared distance of the activations from their mean, summed; for sums without the axis of groups."""
        return float(self.square - self.total @ self.total / self.count)

    def fvu(self) -> float:
        """Fraction of variance unexplained."""
        return float(self.error) / self.variance()

    def published_fvu(self, tokens: float) -> float:
        """FVU as P2's code computes it (:func:`interventions.dictionary.published_fvu`), if ``tokens`` tokens, with
        padding, went through it."""
        mean = self.total / self.count
        return float(self.error) / (self.variance() + (tokens - float(self.count)) * float(mean @ mean))


def measure(source: Source, dictionaries: Mapping[Place, Dictionary], title: str = "") -> dict[Place, Sums]:
    """The sums over all tokens of a source, for every dictionary. The source has the dictionaries' layers."""
    sums: dict[Place, Sums] = {}
    blocks = int(source.index.block.max()) + 1
    for block in progress(range(blocks), desc=f"measure {title}".strip(), unit="block", leave=False):
        values, groups = source.read(block), source.index.group[source.index.block == block]
        padded = bucket(len(groups), 256)
        marks = np.pad(groups, (0, padded - len(groups)), constant_values=GROUPS.index("padding"))
        for place, dictionary in dictionaries.items():
            x = values[place.site][source.number(place.layer)]
            x = np.pad(x, [(0, padded - len(x)), (0, 0)])
            new = jax.tree.map(lambda a: np.asarray(a, np.float64), _sums(dictionary, x, marks))
            sums[place] = new if place not in sums else Sums(*map(np.add, sums[place], new))
    return sums


@jax.jit
def _sums(dictionary: Dictionary, x: Float[jax.Array, "rows width"], groups: Int[jax.Array, " rows"]) -> Sums:
    member = (groups[:, None] == jnp.arange(len(GROUPS))).astype(jnp.float32)
    member = member.at[:, GROUPS.index("padding")].set(0)
    codes = dictionary.codes(x)
    error = ((x - dictionary.decode(codes)) ** 2).sum(-1)
    active, energy = (codes > 0).astype(jnp.float32), codes**2
    squares = (x**2).sum(-1)
    return Sums(member.sum(0), member.T @ x, squares @ member, error @ member, member.T @ active, member.T @ energy)


class Loss(NamedTuple):
    """Mean cross-entropy of the gold answers, in nats for each token, by sample."""

    clean: Float[np.ndarray, " samples"]
    spliced: Float[np.ndarray, " samples"]
    """With the activations replaced by their reconstructions."""
    zeroed: Float[np.ndarray, " samples"]
    """With the activations set to zero."""

    def recovered(self) -> float | None:
        """The share of the loss of zeroed activations that the reconstructions avoid. None if zeroing them costs
        nothing, as for tokens that no later layer reads."""
        clean, spliced, zeroed = (float(array.mean()) for array in self)
        return None if abs(zeroed - clean) < _NO_LOSS else (zeroed - spliced) / (zeroed - clean)


def splice_losses(
    model: Model,
    processor: Processor,
    examples: Sequence[Example],
    dictionaries: Mapping[Place, Dictionary],
    *,
    tokens: str = "all",
    batch: int = 16,
) -> dict[Place, Loss]:
    """What the model loses when each dictionary's reconstructions replace the activations of a token group. Examples
    without a token of the group are left out; for dictionaries of the vision tower, those without a picture."""
    of_patches = any(stage(place.site) is Stage.VISION for place in dictionaries)
    losses: dict[Place, list] = {place: [] for place in dictionaries}
    group: dict[str, Any] = {} if tokens == "all" else {"group": tokens}
    with progress(total=len(examples), desc="splice", unit="sample", leave=False) as bar:
        for rows, encoded in batches(examples, processor, model.config, batch, with_answer=True):
            bar.update(len(rows))
            marked = encoded.spans["image"] if of_patches else tokens_of(tokens, label(encoded))
            changed = marked[: len(rows)].any(1)
            if not changed.any():
                continue
            gold = Gold.of(encoded.inputs, encoded.spans["answer"] | encoded.spans["end"])
            for place, dictionary in dictionaries.items():
                (spliced,) = bind([Latents.splice(dictionary, {place.site: slot_of(model, place)}, **group)], encoded)
                # Without codes and bias, reconstructions are 0. The two variants share the large arrays.
                none = np.zeros_like(spliced.weights["b_dec"])
                zeroed = spliced.replace(weights={**spliced.weights, "b_dec": none}, scale=np.zeros_like(spliced.scale))
                runs = fetch(sweep_runs(model, encoded.inputs, stack([spliced, zeroed]), gold))
                values = -runs.base.log_probability, *-np.asarray(runs.variants.log_probability)
                losses[place].append([np.asarray(value)[: len(rows)][changed] for value in values])
    if not all(losses.values()):
        if of_patches:
            raise UserError(
                "no held-out example has a picture, whose patches these dictionaries read: give other tasks"
            )
        raise UserError(f"no held-out example has a token of the group {tokens!r}: choose another --tokens")
    return {place: Loss(*map(np.concatenate, zip(*parts, strict=True))) for place, parts in losses.items()}


def slot_of(model: Model, place: Place) -> Int[np.ndarray, "*layers"]:
    """The slot table in which a place uses slot 0 and all other layers none of one slot."""
    tower = place.site.partition(".")[0]
    return np.zeros((), np.int32) if place.layer is None else slots(model.depths[tower], [place.layer])
