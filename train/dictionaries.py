"""How sparse dictionaries are trained: several at once, for layers and seeds, in one compiled step (P2)."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Bool, Float, Int

from interventions.dictionary import Dictionary, fvu, scattered, top
from interventions.diff.activations import Shuffled
from interventions.diff.place import Place
from train.loop import LoopOptions, fit
from train.meter import About
from train.objective import adamw, warmup_linear
from train.subsets import FREEZE
from vlm_jax.errors import UserError
from vlm_jax.runs.processes import fetch
from vlm_jax.runs.ranges import RATE, Range
from vlm_jax.typing import ArrayLike

Activation = Literal["topk", "batchtopk", "jumprelu"]
#: The learning rate for a dictionary of this many latents (Gao et al. 2024).
_LR, _LATENTS = 2e-4, 2**14
#: The weight of the auxiliary loss (Gao et al. 2024), and how fast BatchTopK's threshold follows its batches.
_AUX_WEIGHT, _THRESHOLD_RATE = 1 / 32, 0.01
#: The key of a batch's visual tokens, beside the sites.
_IMAGES = "images"
#: Rows of a batch whose active decoder rows are gathered together. They must fit into a core's cache.
_ROWS = 16
#: JumpReLU's first threshold, for activations with a standard deviation of 1.
_FIRST_THRESHOLD = 0.1


@dataclasses.dataclass(frozen=True)
class DictionaryOptions(LoopOptions):
    """How dictionaries are trained."""

    latents: Annotated[int | None, Range(least=1)] = None
    """Number of latents of a dictionary. By default 8 times the activations' width; for an adaptation, as before."""
    k: Annotated[int | None, Range(least=1)] = None
    """Number of latents that are active at once: in every token (topk), on average (batchtopk), or as the aim of the
    sparsity loss (jumprelu). By default 16; for an adaptation, as before."""
    activation: Activation = "topk"
    """Which latents are active. topk: the K largest; batchtopk: the K x N largest of N tokens in training, and later
    those above a fixed threshold; jumprelu: those above a trained threshold of their own."""
    seeds: Annotated[tuple[int, ...], Range(least=0), tyro.conf.arg(metavar="SEED [SEED ...]")] = (0,)
    """Seeds of the initial arrays; each gives a dictionary of every layer. The first is also the seed of the order of
    the tokens, which all dictionaries read together."""
    epochs: Annotated[int, Range(least=1)] = 1
    """Number of passes over all tokens."""
    batch: Annotated[int, Range(least=1)] = 1024
    """Tokens in a step."""
    buffer: Annotated[int, Range(least=1)] = 16
    """Blocks of --activation-batch examples whose tokens are in memory and shuffled together."""
    lr: Annotated[float | None, RATE] = None
    """Peak learning rate of Adam. The rate rises from 0 to the peak, then falls linearly to 0. By default 2e-4 /
    sqrt(LATENTS / 16384)."""
    warmup: Annotated[float, Range(least=0, below=1)] = 0.05
    """Share of the steps in which the learning rate rises."""
    clip: Annotated[float, Range(above=0)] = 1.0
    """Largest norm of the gradients of a dictionary."""
    aux_k: Annotated[int | None, Range(least=0)] = None
    """Number of dead latents that explain what the others leave over, so that they come back to life (AuxK). By default
    half of the width; 0 turns it off."""
    dead_after: Annotated[int, Range(least=1)] = 100_000
    """Number of tokens after which a latent that was never active counts as dead."""
    bandwidth: Annotated[float, Range(above=0)] = 0.05
    """With jumprelu: width of the window around a threshold in which activations move it."""

    def check_seeds(self) -> None:
        """Raises a UserError if seeds are missing or repeated."""
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            given = " ".join(map(str, self.seeds)) or "empty"
            raise UserError(f"--seeds is {given}: give at least one, and none twice")


@flax.struct.dataclass
class Members:
    """Dictionaries that are trained side by side, in activations scaled to a standard deviation of 1.

    place: which of the batch's layers each reads. scale: by what its activations are multiplied.
    """

    dictionary: Dictionary
    place: Int[ArrayLike, " members"]
    scale: Float[ArrayLike, " members"]


def member_label(path: str) -> str:
    """The rule for :class:`Members`: the dictionaries' arrays are trained."""
    return "dictionary" if path.startswith("dictionary.") else FREEZE


def unit_decoder(params: Members) -> Members:
    """The members with decoder rows of norm 1, and thresholds that are not negative."""
    dictionary = params.dictionary
    rows = dictionary.W_dec / jnp.maximum(jnp.linalg.norm(dictionary.W_dec, axis=-1, keepdims=True), 1e-8)
    threshold = None if dictionary.threshold is None else jnp.maximum(dictionary.threshold, 0)
    return params.replace(dictionary=dictionary.replace(W_dec=rows, threshold=threshold))


def with_unit_decoder(dictionary: Dictionary) -> Dictionary:
    """The dictionary with decoder rows of norm 1, their norms moved into the encoder. Reconstructions stay the same;
    only TopK may choose other latents."""
    norm = np.linalg.norm(dictionary.W_dec, axis=-1)
    norm = np.where(norm > 0, norm, 1)
    return dictionary.replace(
        W_enc=dictionary.W_enc * norm,
        b_enc=dictionary.b_enc * norm,
        W_dec=dictionary.W_dec / norm[:, None],
        threshold=None if dictionary.threshold is None else dictionary.threshold * norm,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def jump(before: Array, threshold: Array, bandwidth: float) -> Array:
    """JumpReLU, with the straight-through gradient of Rajamanoharan et al. 2024 for the threshold."""
    return jnp.where(before > threshold, before, 0)


def _near(before: Array, threshold: Array, bandwidth: float) -> Array:
    return (jnp.abs(before - threshold) < bandwidth / 2) / bandwidth


def _jump_bwd(bandwidth: float, kept: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    before, threshold = kept
    moved = -(threshold * _near(before, threshold, bandwidth) * grad).sum(0)
    return jnp.where(before > threshold, grad, 0), moved


jump.defvjp(lambda before, threshold, bandwidth: (jump(before, threshold, bandwidth), (before, threshold)), _jump_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def active(before: Array, threshold: Array, bandwidth: float) -> Array:
    """1 where a latent is active, with the same kind of gradient; for the sparsity loss."""
    return (before > threshold).astype(before.dtype)


def _active_bwd(bandwidth: float, kept: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    before, threshold = kept
    return jnp.zeros_like(before), -(_near(before, threshold, bandwidth) * grad).sum(0)


active.defvjp(lambda before, threshold, width: (active(before, threshold, width), (before, threshold)), _active_bwd)


@jax.custom_vjp
def decoded(
    values: Float[Array, "rows k"], index: Int[Array, "rows k"], W_dec: Float[Array, "latents width"]
) -> Float[Array, "rows width"]:
    """``sum_k values W_dec[index]``, the product of sparse codes with the decoder. It and the gradient for the values
    touch only the K active rows of the decoder for each token, not all of them."""
    return jax.lax.map(lambda row: row[0] @ W_dec[row[1]], (values, index), batch_size=_ROWS)


def _decoded_fwd(values: Array, index: Array, W_dec: Array) -> tuple[Array, tuple]:
    return decoded(values, index, W_dec), (values, index, W_dec)


def _decoded_bwd(kept: tuple, grad: Array) -> tuple:
    values, index, W_dec = kept
    of_values = jax.lax.map(lambda row: W_dec[row[0]] @ row[1], (index, grad), batch_size=_ROWS)
    of_decoder = scattered(values, index, len(W_dec)).T @ grad  # one dense product is faster than adding up rows
    return of_values, np.zeros(index.shape, jax.dtypes.float0), of_decoder


decoded.defvjp(_decoded_fwd, _decoded_bwd)


@dataclasses.dataclass(frozen=True)
class DictionaryLoss:
    """The loss of every member: FVU of its batch (P2), plus the auxiliary loss of dead latents, plus JumpReLU's
    sparsity loss ``(L0 / k - 1)^2``.

    Its counters are, for each member: ``idle (F,)``, the number of tokens since a latent was active; ``fired (F,)``,
    the share of all tokens so far on which it was active, and ``steps``, for that mean; and ``threshold``, BatchTopK's
    mean smallest active value.
    """

    activation: Activation
    k: int
    aux_k: int
    dead_after: int
    bandwidth: float

    def __call__(self, params: Members, batch: Mapping[str, Array], key: jax.Array, counters: Any):
        x = jnp.concatenate([batch[site] for site in sorted(batch.keys() - {_IMAGES})])

        def one(dictionary: Dictionary, place: Array, scale: Array, counters: dict):
            return self.of_member(dictionary, x[place] * scale, counters, batch.get(_IMAGES))

        return jax.vmap(one)(params.dictionary, params.place, params.scale, counters)

    def of_member(
        self,
        dictionary: Dictionary,
        x: Float[Array, "rows width"],
        counters: dict,
        images: Bool[Array, "rows"] | None = None,
    ):
        """The loss, metrics and new counters of one dictionary.

        Args:
            images: which rows are visual tokens. The metrics are then also given for these and for the others.
        """
        before, threshold = dictionary.pre_activations(x), counters["threshold"]
        sparsity = jnp.float32(0)
        if self.activation == "topk":
            values, index = _positive(top(before, self.k))
            reconstruction = decoded(values, index, dictionary.W_dec) + dictionary.b_dec
            fires = jnp.zeros(dictionary.latents).at[index].add(values > 0) / len(x)
            active_latents = (values > 0).sum(-1)
        else:
            if self.activation == "jumprelu":
                codes = jump(before, dictionary.threshold, self.bandwidth)
                count = active(before, dictionary.threshold, self.bandwidth).sum(-1).mean()
                sparsity = (count / self.k - 1) ** 2
            else:
                values, _ = top(jax.nn.relu(before).reshape(-1), self.k * len(x))
                codes = jnp.where(before >= jnp.maximum(values[-1], 1e-12), before, 0)
                threshold = threshold + _THRESHOLD_RATE * (jax.lax.stop_gradient(values[-1]) - threshold)
                threshold = jnp.where(counters["threshold"] == 0, values[-1], threshold)
            on = jnp.asarray(codes) > 0
            reconstruction, fires, active_latents = dictionary.decode(codes), on.mean(0), on.sum(-1)
        unexplained = fvu(x, reconstruction)
        idle = jnp.where(fires > 0, 0, counters["idle"] + len(x))
        dead, steps = idle > self.dead_after, counters["steps"] + 1
        fired = counters["fired"] + (fires - counters["fired"]) / steps
        aux = self._aux(dictionary, before, jax.lax.stop_gradient(x - reconstruction), dead)
        metrics = {"fvu": unexplained, "l0": fires.sum(), "dead": dead.mean()}
        for name, rows in {} if images is None else {"image": images, "text": ~images}.items():
            metrics[f"fvu_{name}"] = fvu(x, reconstruction, rows)
            metrics[f"l0_{name}"] = jnp.where(rows, active_latents, 0).sum() / rows.sum()
        counters = {"idle": idle, "fired": fired, "steps": steps, "threshold": jax.lax.stop_gradient(threshold)}
        return unexplained + sparsity + aux, metrics, counters

    def _aux(self, dictionary: Dictionary, before: Array, error: Array, dead: Array) -> Array:
        """AuxK (Gao et al. 2024): how well the dead latents explain the error, weighted; 0 if none is dead."""
        if not self.aux_k:
            return jnp.float32(0)
        values, index = top(jnp.where(dead, before, -jnp.inf), self.aux_k)
        # Rows with fewer dead latents than aux_k have -inf here, which becomes a code of 0.
        codes = scattered(*_positive((jnp.where(jnp.isfinite(values), values, 0), index)), dictionary.latents)
        left_over = fvu(error, codes @ dictionary.W_dec)
        return _AUX_WEIGHT * jnp.where(dead.any() & jnp.isfinite(left_over), left_over, 0)


def _positive(chosen: tuple[Array, Array]) -> tuple[Array, Array]:
    values, index = chosen
    return jax.nn.relu(values), index


class Outcome(NamedTuple):
    """Trained dictionaries in the activations' own units, and which of them were trained to the end."""

    dictionaries: dict[Place, Dictionary]
    alive: dict[Place, bool]
    sparsity: dict[Place, np.ndarray]
    """For each latent, log10 of the share of the training's tokens on which it was active."""


def train_dictionaries(
    read: Shuffled,
    places: Sequence[Place],
    options: DictionaryOptions,
    *,
    start: Mapping[Place, Dictionary] | None = None,
    folder: Path | None = None,
) -> Outcome:
    """Trains a dictionary for each place and seed, side by side.

    Args:
        read: the activations of a step. Its sites in alphabetic order, each with its layers, are the ``places``.
        start: place -> the dictionary with which its members begin; None begins with random ones.
        folder: the folder for the log and the checkpoints; None writes nothing.

    Raises:
        UserError: for sites of different widths, or dictionaries of other shapes to begin with.
    """
    first = read(0)
    widths = {site: values.shape[-1] for site, values in first.items()}
    if len(set(widths.values())) > 1:
        raise UserError(f"activations have the widths {widths}: train each width by itself, so that one program fits")
    x = np.concatenate([first[site] for site in sorted(first)])
    chosen = [
        place._replace(seed=seed if len(options.seeds) > 1 else None) for seed in options.seeds for place in places
    ]
    params, loss = begin(x, chosen, places, options, start)
    steps = read.steps(options.epochs)
    lr = options.lr if options.lr is not None else _LR / np.sqrt(params.dictionary.latents / _LATENTS)
    schedule = warmup_linear(float(lr), steps, int(options.warmup * steps))
    trained = fit(
        loss,
        params,
        functools.partial(_step_batch, read),
        {"dictionary": adamw(schedule)},
        member_label,
        steps=steps,
        seed=next(iter(options.seeds)),
        clip=options.clip,
        project=unit_decoder,
        counters=counters_of(params),
        members=len(chosen),
        name="dictionaries",
        folder=folder,
        options=options,
        about=About(rate=schedule, tokens=read.batch * len(chosen)),
    )
    assert trained.alive is not None, "a training with members reports which are alive"
    trained = fetch(trained)
    dictionary = trained.params.dictionary
    if options.activation == "batchtopk":
        threshold = np.broadcast_to(trained.counters["threshold"][:, None], dictionary.b_enc.shape)
        dictionary = dictionary.replace(architecture="jumprelu", threshold=threshold, k=None)
    dictionary = jax.tree.map(np.asarray, dictionary.scaled(1 / trained.params.scale))
    return Outcome(
        {place: dictionary.member(i) for i, place in enumerate(chosen)},
        {place: bool(trained.alive[i]) for i, place in enumerate(chosen)},
        {place: np.log10(trained.counters["fired"][i] + 1e-10) for i, place in enumerate(chosen)},
    )


def _step_batch(read: Shuffled, step: int) -> dict[str, np.ndarray]:
    return {site: values[None] for site, values in read(step).items()} | {_IMAGES: read.images(step)[None]}


class _Begun(NamedTuple):
    """Dictionaries before training, in the activations' own units, with a leading axis of members."""

    arrays: dict[str, np.ndarray]
    threshold: np.ndarray
    """For JumpReLU."""
    k: int


def counters_of(params: Members) -> dict[str, jax.Array]:
    """The counters of :class:`DictionaryLoss` before training."""
    members, latents = params.dictionary.b_enc.shape
    return {
        "idle": jnp.zeros((members, latents), jnp.int32),
        "fired": jnp.zeros((members, latents), jnp.float32),
        "steps": jnp.zeros(members, jnp.int32),
        "threshold": jnp.zeros(members, jnp.float32),
    }


def begin(
    x: Float[np.ndarray, "places rows width"],
    chosen: Sequence[Place],
    places: Sequence[Place],
    options: DictionaryOptions,
    start: Mapping[Place, Dictionary] | None,
) -> tuple[Members, DictionaryLoss]:
    """The members before training, and their loss. ``x`` are some activations of every place."""
    width = x.shape[-1]
    mean = x.mean(1, dtype=np.float64)
    scale = 1 / np.sqrt(np.maximum(((x - mean[:, None]) ** 2).mean((1, 2), dtype=np.float64), 1e-30))
    number = np.array([places.index(place._replace(seed=None)) for place in chosen])
    scales = scale[number].astype(np.float32)
    if start is None:
        begun = _random(mean[number].astype(np.float32), scales, number, chosen, options)
    else:
        begun = _adapted(chosen, width, options, start)
    latents, k = begun.arrays["b_enc"].shape[1], begun.k
    if k > latents:
        raise UserError(f"--k is {k}, but a dictionary has {latents} latents: give 1 to {latents}")
    jumps = options.activation == "jumprelu"
    threshold = begun.threshold if jumps else None
    dictionary = Dictionary(**begun.arrays, threshold=threshold, architecture="jumprelu" if jumps else "topk", k=k)
    members = Members(dictionary.scaled(scales), number.astype(np.int32), scales)
    aux_k = min(latents, width // 2 if options.aux_k is None else options.aux_k)
    loss = DictionaryLoss(options.activation, k, aux_k, options.dead_after, options.bandwidth)
    return jax.tree.map(jnp.asarray, members), loss


def _random(
    mean: Float[np.ndarray, "members width"],
    scales: Float[np.ndarray, " members"],
    number: Int[np.ndarray, " members"],
    chosen: Sequence[Place],
    options: DictionaryOptions,
) -> _Begun:
    """Random directions. A latent is active where the centred activation points in its direction."""
    width = mean.shape[1]
    latents = options.latents or 8 * width
    seeds = [options.seeds[0] if place.seed is None else place.seed for place in chosen]
    generators = [np.random.default_rng([seed, place]) for seed, place in zip(seeds, number.tolist(), strict=True)]
    decoder = np.stack([rng.standard_normal((latents, width), np.float32) for rng in generators])
    decoder /= np.linalg.norm(decoder, axis=-1, keepdims=True)
    arrays = {"W_enc": decoder.swapaxes(1, 2).copy(), "W_dec": decoder, "b_dec": mean}
    arrays["b_enc"] = -np.einsum("mw,mwl->ml", mean, arrays["W_enc"])
    threshold = np.full((len(chosen), latents), _FIRST_THRESHOLD, np.float32) / scales[:, None]
    return _Begun(arrays, threshold, options.k or 16)


def _adapted(
    chosen: Sequence[Place], width: int, options: DictionaryOptions, start: Mapping[Place, Dictionary]
) -> _Begun:
    """The dictionaries that are trained further.

    Raises:
        UserError: if one is missing, if they have other shapes than the options or the activations ask for, or if
            nothing says how many latents are active.
    """
    if missing := [place for place in chosen if place not in start]:
        raise UserError(f"there is no dictionary of {missing[0]} to begin with: its training broke off or was not done")
    members = [with_unit_decoder(start[place]) for place in chosen]
    shapes = {np.shape(member.W_dec) for member in members}
    if len(shapes) > 1:
        raise UserError(f"the dictionaries to begin with have the shapes {sorted(shapes)}: they must have one")
    ((latents, own_width),) = shapes
    if options.latents not in (None, latents):
        raise UserError(f"--latents is {options.latents}, but the dictionaries of --init have {latents}: drop it")
    if own_width != width:
        raise UserError(f"--init has dictionaries for a width of {own_width}, but the activations have {width}")
    k = options.k or members[0].k
    if k is None:
        raise UserError("the dictionaries of --init have thresholds and no number of active latents: give --k")
    arrays = {name: np.stack([getattr(m, name) for m in members]) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    zeros = np.zeros(latents, np.float32)
    return _Begun(arrays, np.stack([zeros if m.threshold is None else m.threshold for m in members]), k)
