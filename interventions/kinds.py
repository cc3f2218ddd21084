"""The kinds of intervention: small frozen pytrees on the protocol of :mod:`vlm_jax.sites`.

Three rules hold for all of them. *Which layers*: a table with one entry per layer, either a strength or an int32
**slot table** ``slot (L,)``: the slot that a layer uses, or the number of slots where it uses none. Slots are compact:
what is not placed has no array. Sites outside of the layers have a scalar in its place. *Which tokens of the prompt*:
``where (B, T)`` bool; or ``group``, the name of a token group that :func:`interventions.groups.bind` looks up in every
batch; or, without both, all. *Generated tokens*: acted on where all are, else only if ``new``.
"""

from collections.abc import Iterable
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from interventions.groups import GROUPS, members
from vlm_jax.errors import UserError
from vlm_jax.sites import TEXT_LINEARS, Context, head_axis, token_axis


def option(default: Any = None) -> Any:
    """A static field."""
    return flax.struct.field(pytree_node=False, default=default)


def table(depth: int, layers: Iterable[int] | None, on: float = 1.0, off: float = 0.0) -> np.ndarray:
    """``(depth,)`` float32: ``on`` at the layers (None: all), ``off`` elsewhere.

    Raises:
        UserError: for a layer that the model lacks, or for none at all.
    """
    layers = range(depth) if layers is None else list(layers)
    if not layers or not set(layers) <= set(range(depth)):
        raise UserError(f"layers {list(layers)} are not possible: name some of 0 to {depth - 1}")
    return np.where(np.isin(np.arange(depth), list(layers)), on, off).astype(np.float32)


def slots(depth: int, layers: Iterable[int] | None) -> np.ndarray:
    """The slot table ``(depth,)`` in which the layers (None: all), ascending, use slots 0, 1, ..."""
    used = table(depth, layers) > 0
    return np.where(used, np.cumsum(used) - 1, used.sum()).astype(np.int32)


def _slot(slot: jax.Array, count: int, ctx: Context) -> tuple[jax.Array, jax.Array]:
    """The slot that is used here, and whether any is."""
    slot = slot if ctx.layer is None else slot[ctx.layer]
    return jnp.minimum(slot, count - 1), slot < count


def _beside(tokens: jax.Array, site: str, ndim: int) -> jax.Array:
    """``(B, S)`` in the shape that broadcasts against a value at the site."""
    axis = token_axis(site)
    shape = [1] * ndim
    shape[axis - 1 if site.endswith("deepstack_merger_list") else 0], shape[axis] = tokens.shape
    return tokens.reshape(shape)


def _beside_heads(heads: jax.Array, site: str, ndim: int) -> jax.Array:
    shape = [1] * ndim
    shape[head_axis(site)] = -1
    return heads.reshape(shape)


@flax.struct.dataclass(kw_only=True)
class OnTokens:
    """What the kinds share that act on some of the tokens."""

    where: jax.Array | None = None
    group: str | None = option()
    new: bool = option(False)

    def tokens(self) -> jax.Array | None:
        return self.where

    def bound(self, labels: np.ndarray):
        """With ``where`` taken from the labels ``(B, T)`` of a batch."""
        if self.group is None:
            return self
        if other := sorted(site for site in self.sites if not site.startswith("text.")):
            raise UserError(f"{type(self).__name__} is on tokens of the prompt, which {other[0]!r} does not have")
        where = np.isin(labels, members(self.group))
        if not where.any():
            raise UserError(f"{type(self).__name__} is on the tokens {self.group!r}, of which this batch has none")
        return self.replace(where=where)

    def only(self, site: str, changed: jax.Array, value: jax.Array, ctx: Context) -> jax.Array:
        """``changed`` at the tokens that are meant, ``value`` elsewhere."""
        if self.where is None:
            if self.group is not None:
                raise UserError(f"{type(self).__name__} is on the tokens {self.group!r}: bind it to a batch first")
            return changed
        here = ctx.tokens(self.where, value.shape[token_axis(site)], self.new)
        return jnp.where(_beside(here, site, value.ndim), changed, value)


@flax.struct.dataclass
class Patch:
    """Replaces values by a donor's: causal patching (P0, section 2.2).

    ``donor[site] (K, B, T', ...)`` holds K slots of values of the tokens from ``start`` on; None is one slot that a
    sweep fills with its clean run's value of the same layer. ``heads (H,)`` bool keeps to some heads, at sites that
    have them. Generated tokens are left alone.
    """

    donor: dict[str, jax.Array | None]
    slot: dict[str, jax.Array]
    where: jax.Array | None = None
    heads: jax.Array | None = None
    start: int = option(0)

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(self.donor)

    @property
    def missing(self) -> frozenset[str]:
        """The sites whose donor is a sweep's clean run."""
        return frozenset(site for site, donor in self.donor.items() if donor is None)

    def filled(self, values: dict[str, jax.Array]) -> "Patch":
        """With the missing donors taken from the values of every layer ``(L, B, T, ...)``."""
        depth = {site: len(values[site]) for site in self.missing}
        slot = {site: jnp.where(self.slot[site] == 0, jnp.arange(n), n) for site, n in depth.items()}
        return self.replace(donor=self.donor | {site: values[site] for site in depth}, slot=self.slot | slot)

    def active(self) -> dict[str, jax.Array]:
        some = True if self.heads is None else self.heads.any()
        return {site: (slot < self._count(site)) & some for site, slot in self.slot.items()}

    def _count(self, site: str) -> int:
        return 1 if self.donor[site] is None else len(self.donor[site])

    def tokens(self) -> jax.Array | None:
        return self.where

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        if ctx.decoding:
            return value
        donor, axis = self.donor[site], token_axis(site)
        slot, used = _slot(self.slot[site], self._count(site), ctx)
        if donor is not None:
            begin, end = self.start, self.start + donor.shape[axis + 1]
            if ctx.start < begin or ctx.start + value.shape[axis] != end:
                raise UserError(
                    f"Patch holds a donor's tokens {begin} to {end} at {site!r}, but the run has "
                    f"{ctx.start} to {ctx.start + value.shape[axis]}: give values of a prompt of this shape"
                )
            here = jax.lax.dynamic_slice_in_dim(donor[slot], ctx.start - self.start, value.shape[axis], axis)
        elif ctx.donors is not None:
            here = ctx.donors[site]
        else:
            raise UserError(f"Patch has no donor at {site!r}: give its values, or sweep it beside a clean run")
        if self.where is not None:
            used = used & _beside(ctx.tokens(self.where, value.shape[axis]), site, value.ndim)
        if self.heads is not None:
            used = used & _beside_heads(self.heads, site, value.ndim)
        return jnp.where(used, here, value)


@flax.struct.dataclass
class Noise(OnTokens):
    """Adds Gaussian noise of standard deviation ``scale (B,)`` at a site outside of the layers (P0, equation 5).

    ``key (B, 2)`` uint32, :func:`jax.random.key_data` of one key per row: a row's noise does not depend on its batch.
    Needs the tokens; generated ones are left alone.
    """

    key: jax.Array
    scale: jax.Array
    site: str = option("text.embeddings")

    @property
    def sites(self) -> frozenset[str]:
        return frozenset({self.site})

    def active(self) -> dict[str, jax.Array]:
        return {self.site: (self.scale != 0).any()}

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        if ctx.decoding:
            return value
        if self.where is None:
            raise UserError("Noise must know its tokens: give where, or a group and bind it to a batch")
        shape = self.where.shape[1], value.shape[-1]
        noise = jax.vmap(lambda key: jax.random.normal(jax.random.wrap_key_data(key), shape))(self.key)
        noise = ctx.tokens(noise * self.scale[:, None, None], value.shape[1])
        return self.only(site, value + noise.astype(value.dtype), value, ctx)


@flax.struct.dataclass
class Gate(OnTokens):
    """Scales the values at sites by ``scale[site] (L,)``; 0 cuts (TaLo's cut, P3, is 0 at one layer's attn_out)."""

    scale: dict[str, jax.Array]

    @classmethod
    def cut(
        cls, depth: int, layers: Iterable[int], modules: Iterable[str] = ("attn",), scale: float = 0.0, **tokens
    ) -> "Gate":
        """Takes the attention and/or MLP of some layers out: modules "attn", "mlp". ``tokens``: where, group, new."""
        layers = list(layers)
        return cls({f"text.{module}_out": table(depth, layers, scale, 1.0) for module in modules}, **tokens)

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(self.scale)

    def active(self) -> dict[str, jax.Array]:
        return {site: scale != 1 for site, scale in self.scale.items()}

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        scale = self.scale[site] if ctx.layer is None else self.scale[site][ctx.layer]
        return self.only(site, value * scale, value, ctx)


@flax.struct.dataclass
class HeadGate(OnTokens):
    """Scales what attention heads read (``head_out``, before the output projection) by ``scale (L, H)``."""

    scale: jax.Array
    site: str = option("text.head_out")

    @classmethod
    def cut(cls, depth: int, count: int, heads: Iterable[tuple[int, int]], scale: float = 0.0) -> "HeadGate":
        """Takes out ``(layer, head)`` pairs of a model with ``count`` heads a layer."""
        scales = np.ones((depth, count), np.float32)
        for layer, head in heads:
            if not (0 <= layer < depth and 0 <= head < count):
                raise UserError(f"there is no head {head} in layer {layer}: {depth} layers have {count} heads each")
            scales[layer, head] = scale
        return cls(scales)

    @property
    def sites(self) -> frozenset[str]:
        return frozenset({self.site})

    def active(self) -> dict[str, jax.Array]:
        return {self.site: (self.scale != 1).any(-1)}

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        scale = self.scale[ctx.layer]
        if len(scale) != value.shape[head_axis(site)]:
            raise UserError(f"HeadGate is for {len(scale)} heads, but {site} has {value.shape[head_axis(site)]}")
        return self.only(site, value * _beside_heads(scale, site, value.ndim), value, ctx)


MODES = ("post_softmax", "pre_softmax", "value_norm", "random_mass")


@flax.struct.dataclass
class AttentionKnockout:
    """Takes the attention of some token groups to others away: ``keep (L, G, G)``, by query's and key's group, is what
    is left of it. ``groups (B, T)`` are the labels of :func:`interventions.groups.label`; generated tokens are ``new``.

    mode:
        post_softmax: the probabilities are multiplied by ``keep`` and do not sum to 1 any more (P1, equations 3, 4).
        pre_softmax: the keys are masked, so what is left sums to 1 (Geva et al. 2023). The same as post_softmax,
            renormalised.
        value_norm: control: every key is read, but the head's output is scaled to the norm that post_softmax would
            leave it. What this changes, less norm explains and missing information does not.
        random_mass: control: the same mass of attention is taken from other keys, in a random order (``key``), the
            last of them in part; from all the others where they hold less.
    """

    keep: jax.Array
    groups: jax.Array | None = None
    key: jax.Array | None = None
    mode: str = option("post_softmax")
    new: str = option("answer")

    @classmethod
    def between(
        cls,
        depth: int,
        query: str,
        key: str,
        layers: Iterable[int] | None = None,
        *,
        mode: Literal["post_softmax", "pre_softmax", "value_norm", "random_mass"] = "post_softmax",
        keep: float = 0.0,
        seed: int = 0,
    ) -> "AttentionKnockout":
        """From the group ``query`` to the group ``key``, such as "text" and "image", in some layers (None: all)."""
        if mode not in MODES:
            raise UserError(f"unknown mode {mode!r}: use one of {', '.join(MODES)}")
        block = np.zeros((len(GROUPS), len(GROUPS)), bool)
        block[np.ix_(members(query), members(key))] = True
        kept = np.where(table(depth, layers)[:, None, None] * block > 0, keep, 1).astype(np.float32)
        random = np.asarray(jax.random.key_data(jax.random.key(seed))) if mode == "random_mass" else None
        return cls(kept, key=random, mode=mode)

    @property
    def sites(self) -> frozenset[str]:
        if self.mode not in MODES:
            raise UserError(f"unknown mode {self.mode!r}: use one of {', '.join(MODES)}")
        return frozenset({"text.attn_scores" if self.mode == "pre_softmax" else "text.attn_probs"})

    def active(self) -> dict[str, jax.Array]:
        return dict.fromkeys(self.sites, (self.keep != 1).any((1, 2)))

    def tokens(self) -> jax.Array | None:
        if self.groups is None:
            return None
        groups, length = jnp.asarray(self.groups), self.groups.shape[1]
        member = groups[:, :, None] == jnp.arange(len(GROUPS))
        first = jnp.where(member.any(1), member.argmax(1), length)  # (B, G): where the first key of a group is
        cut = (jnp.asarray(self.keep) != 1).any(0)[groups]  # (B, T, G)
        return (cut & (first[:, None] <= jnp.arange(length)[:, None])).any(-1)  # no token sees a later one

    def bound(self, labels: np.ndarray) -> "AttentionKnockout":
        return self.replace(groups=labels)

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        if self.groups is None:
            raise UserError("AttentionKnockout must know the token groups: bind it to a batch first")
        groups, new = self.groups, GROUPS.index(self.new)
        queries = ctx.tokens(groups, value.shape[2], new)
        keys = ctx.keys(groups, value.shape[3], new)
        # (B, S, G) by one-hot rather than by gathering (B, S, keys) entries one by one.
        rows = self.keep[ctx.layer][queries]
        keep = jnp.einsum("bsg,bkg->bsk", rows, jax.nn.one_hot(keys, len(GROUPS), dtype=rows.dtype))[:, None]
        match self.mode:
            case "pre_softmax":
                lowest = jnp.finfo(value.dtype).min
                return jnp.where(keep > 0, value + jnp.log(jnp.maximum(keep, 1e-30)), lowest)
            case "post_softmax":
                return value * keep
            case "value_norm":
                norms = [jnp.linalg.norm(ctx.read(p), axis=-1) for p in (value * keep, value)]
                ratio = norms[0] / jnp.maximum(norms[1], jnp.finfo(value.dtype).tiny)
                return value * ratio.transpose(0, 2, 1)[..., None]
        return self._without_mass(value, keep, keys, ctx.layer)

    def _without_mass(self, value: jax.Array, keep: jax.Array, keys: jax.Array, layer) -> jax.Array:
        """The probabilities less the mass that ``keep`` would take, taken from other keys in a random order."""
        mass = (value * (1 - keep)).sum(-1, keepdims=True)
        # One order for all rows, heads and queries; by a key's number in its row, so that padding does not matter.
        random = jax.random.fold_in(jax.random.wrap_key_data(self.key), layer)
        draw = jax.vmap(lambda number: jax.random.uniform(jax.random.fold_in(random, number)))
        number = jnp.cumsum(keys != GROUPS.index("padding"), 1)
        order = jnp.argsort(draw(jnp.arange(value.shape[-1] + 1))[number], 1)
        others = jnp.where(keep == 1, value, 0)
        others = jnp.take_along_axis(others, order[:, None, None], -1)
        taken = jnp.clip(mass - (jnp.cumsum(others, -1) - others), 0, others)
        return value - jnp.take_along_axis(taken, jnp.argsort(order, 1)[:, None, None], -1)


@flax.struct.dataclass
class UniformAttention(OnTokens):
    """Makes attention uniform over the visible keys where ``strength (L,)`` is 1 (TaLo's other form, P3): the scores
    are scaled by ``1 - strength``, which is what zeroing q_proj does."""

    strength: jax.Array
    site: str = option("text.attn_scores")

    @property
    def sites(self) -> frozenset[str]:
        return frozenset({self.site})

    def active(self) -> dict[str, jax.Array]:
        return {self.site: self.strength != 0}

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        return self.only(site, value * (1 - self.strength[ctx.layer]), value, ctx)


@flax.struct.dataclass
class Add(OnTokens):
    """Adds ``value`` at one site: a vector on every token (steering) ``(..., D)``, or something for each token of the
    prompt ``(B, T, ..., D)``, then never to generated ones. In layers it has K slots in front and a ``slot (L,)``."""

    value: jax.Array
    site: str = option("text.embeddings")
    slot: jax.Array | None = None

    @property
    def sites(self) -> frozenset[str]:
        return frozenset({self.site})

    def active(self) -> dict[str, jax.Array]:
        return {self.site: jnp.asarray(True) if self.slot is None else self.slot < len(self.value)}

    def tokens(self) -> jax.Array | None:
        own = self.value if self.slot is None else self.value.any(0)
        if self.where is not None or own.ndim < 3:
            return self.where
        changed = (own != 0).any(tuple(set(range(1, own.ndim)) - {token_axis(self.site)}))
        return changed | ~changed.any()  # zeros are there to be differentiated: they stand for all tokens

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        added, used = self.value, True
        if self.slot is not None:
            slot, used = _slot(self.slot, len(added), ctx)
            added = added[slot]
        if added.ndim == value.ndim:
            if ctx.decoding:
                return value
            added = ctx.tokens(added, value.shape[token_axis(site)], axis=token_axis(site))
        return self.only(site, jnp.where(used, value + added, value), value, ctx)


@flax.struct.dataclass
class Replace(OnTokens):
    """Puts a vector ``value (..., D)`` in the place of values, such as a mean image embedding (P2). In layers it has K
    slots in front and a ``slot (L,)``."""

    value: jax.Array
    site: str = option("text.embeddings")
    slot: jax.Array | None = None

    @property
    def sites(self) -> frozenset[str]:
        return frozenset({self.site})

    def active(self) -> dict[str, jax.Array]:
        return {self.site: jnp.asarray(True) if self.slot is None else self.slot < len(self.value)}

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        put, used = self.value, True
        if self.slot is not None:
            slot, used = _slot(self.slot, len(put), ctx)
            put = put[slot]
        return self.only(site, jnp.where(used, put.astype(value.dtype), value), value, ctx)


@flax.struct.dataclass
class ProjectOut(OnTokens):
    """Removes directions: ``y - (y V^T) V`` with K slots of R orthonormal rows ``directions (K, R, D)`` (P2)."""

    directions: jax.Array
    slot: dict[str, jax.Array]

    @classmethod
    def of(cls, vectors: np.ndarray, slot: dict[str, jax.Array], **tokens) -> "ProjectOut":
        """From any vectors ``(K, R, D)``: their spans are taken out."""
        _, size, rows = np.linalg.svd(np.asarray(vectors, np.float64), full_matrices=False)
        rank = size > 1e-6 * size.max(-1, keepdims=True)
        if not rank.any(-1).all():
            raise UserError("ProjectOut has a slot whose vectors are all zero: they span no direction")
        return cls((rows * rank[..., None]).astype(np.float32), slot, **tokens)

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(self.slot)

    def active(self) -> dict[str, jax.Array]:
        return {site: slot < len(self.directions) for site, slot in self.slot.items()}

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        slot, used = _slot(self.slot[site], len(self.directions), ctx)
        v = self.directions[slot].astype(value.dtype)
        return self.only(site, jnp.where(used, value - (value @ v.T) @ v, value), value, ctx)


@flax.struct.dataclass
class LoReFT(OnTokens):
    """Low-rank linear representation editors: ``h + (W h + b - U h) U^T`` (Wu et al. 2024; P4, equation 1).

    ``weights[site] = (R (K, D, r), W (K, D, r), b (K, r))`` are the trainable arrays; U^T is the orthonormal factor of
    R, its signs fixed, so that U stays orthonormal through training.
    """

    weights: dict[str, tuple[jax.Array, jax.Array, jax.Array]]
    slot: dict[str, jax.Array]

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(self.weights)

    def active(self) -> dict[str, jax.Array]:
        return {site: slot < len(self.weights[site][0]) for site, slot in self.slot.items()}

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        r, w, b = self.weights[site]
        slot, used = _slot(self.slot[site], len(r), ctx)
        u, upper = jnp.linalg.qr(r[slot].astype(jnp.float32))
        u = (u * jnp.where(jnp.diagonal(upper) < 0, -1, 1)).astype(value.dtype)
        edited = value + (value @ w[slot] + b[slot] - value @ u) @ u.T
        return self.only(site, jnp.where(used, edited, value), value, ctx)


@flax.struct.dataclass
class LoRA:
    """Low-rank adapters: ``y + scale * dropout(x) @ A @ B`` at placed linears (Hu et al. 2022), on every token.

    ``weights[site] = (A (K, in, r), B (K, r, out))`` are the trainable arrays. Dropout (of the adapter's input, as
    PEFT does) happens only where a ``key`` is given.
    """

    weights: dict[str, tuple[jax.Array, jax.Array]]
    slot: dict[str, jax.Array]
    scale: jax.Array
    key: jax.Array | None = None
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(self.weights)

    def active(self) -> dict[str, jax.Array]:
        return {site: slot < len(self.weights[site][0]) for site, slot in self.slot.items()}

    def tokens(self) -> None:
        return None

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        a, b = self.weights[site]
        slot, used = _slot(self.slot[site], len(a), ctx)

        def delta(x):
            key = None if self.key is None else jax.random.fold_in(self.key, 0 if ctx.layer is None else ctx.layer)
            return low_rank(x, a[slot], b[slot], self.scale, site, key, self.dropout).astype(value.dtype)

        if len(a) == np.size(self.slot[site]):  # hardly a layer without one: skipping it costs more than it saves
            return value + jnp.where(used, delta(ctx.input), 0)
        return value + jax.lax.cond(used, delta, lambda x: jnp.zeros_like(value), ctx.input)


def low_rank(
    x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, site: str, key: jax.Array | None, rate: float
) -> jax.Array:
    """What LoRA adds at a linear: ``scale * dropout(x) @ a @ b``; ``x (B, T, in)``, ``a (in, r)``, ``b (r, out)``.
    Dropout is done where there is a ``key`` (of this layer; every linear draws its own from it)."""
    if key is not None and rate:
        x = _drop(x, rate, jax.random.fold_in(key, _LINEARS.index(site)))
    flat = x.reshape(-1, x.shape[-1])
    return ((flat @ a) @ b * scale).reshape(*x.shape[:-1], -1)


#: The linears that may have adapters, numbered whichever of them do.
_LINEARS = sorted(f"text.{name}" for names in TEXT_LINEARS.values() for name in names)


def _drop(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Dropout with one random byte per number, since random words cost more than a small model's layers: the rate is
    rounded to a multiple of 1 / 256 above 0 and below 1, and what is kept is scaled by the rounded rate."""
    words = jax.random.bits(key, (-(-x.size // 4),), jnp.uint32)
    noise = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: x.size].reshape(x.shape)
    dropped = min(max(round(rate * 256), 1), 255)
    return jnp.where(noise >= dropped, x * (256 / (256 - dropped)), 0)
