"""The named sites of a forward pass, and the interventions and taps that act there.

A **site** is ``tower.name``. At every site the model passes the value to each intervention that names the site, in
order, and then to the taps. A site of the layers (or of the vision blocks) occurs once in each layer: an intervention
reads the traced layer index from its :class:`Context`, and the values of a tap get a leading axis of the layers.
"""

import abc
import dataclasses
import enum
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from vlm_jax.errors import UserError, nearest

#: Linear maps inside one decoder layer, by the module ("attn" or "mlp") that they are part of.
TEXT_LINEARS = {
    "attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
LAYER_SITES = frozenset(
    f"text.{name}"
    for name in (
        "resid_pre",
        *TEXT_LINEARS["attn"],
        *TEXT_LINEARS["mlp"],
        "attn_scores",
        "attn_probs",
        "head_out",
        "attn_out",
        "resid_mid",
        "mlp_out",
        "deepstack",
        "resid_post",
    )
)
TEXT_SITES = LAYER_SITES | {"text.embeddings", "text.norm"}
#: Linear maps inside one vision block, by tower. The names are Hugging Face's.
VISUAL_LINEARS = {
    "qwen3": ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2"),
    "qwen2_5": ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "vit": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"),
}
_BLOCK = ("resid_pre", "attn_scores", "attn_probs", "head_out", "attn_out", "mlp_out", "resid_post")
BLOCK_SITES = frozenset(f"visual.{name}" for names in (_BLOCK, *VISUAL_LINEARS.values()) for name in names)
#: Linear maps of the projectors of all towers.
PROJECTOR_LINEARS = (
    *(f"merger.{name}" for name in ("linear_1", "linear_2", "linear_fc1", "linear_fc2")),
    *(f"deepstack_merger_list.{name}" for name in ("linear_fc1", "linear_fc2")),
    *("mm_input_projection", "linear_1", "linear_2"),
)
#: Those of DeepStack's mergers. They occur once in each level of DeepStack, as a layer's sites do in each layer.
LEVEL_SITES = frozenset(f"projector.{name}" for name in PROJECTOR_LINEARS if name.startswith("deepstack"))
#: The sites of the projectors of all towers.
PROJECTOR_SITES = frozenset(
    f"projector.{name}" for name in ("merger", "deepstack_merger_list", "mm_soft_emb_norm", *PROJECTOR_LINEARS)
)
SITES = TEXT_SITES | BLOCK_SITES | PROJECTOR_SITES | {"visual.embeddings"}


def tower_sites(linears: str, *projector: str) -> frozenset[str]:
    """The sites of a tower with these block linears and these sites of its projector."""
    names = (f"visual.{name}" for name in ("embeddings", *_BLOCK, *VISUAL_LINEARS[linears]))
    return frozenset([*names, *(f"projector.{name}" for name in projector)])


class Stage(enum.Enum):
    """The part of a forward pass in which a site lies."""

    VISION = "in the vision tower or the projector"
    ENTRY = "before the layers"
    LAYERS = "in a layer"
    EXIT = "behind the layers"


def stage(site: str) -> Stage:
    """The stage of a site.

    Raises:
        UserError: for an unknown site.
    """
    if site not in SITES:
        raise UserError(f"unknown site {site!r}{nearest(site, SITES)}")
    if site in LAYER_SITES:
        return Stage.LAYERS
    return {"text.embeddings": Stage.ENTRY, "text.norm": Stage.EXIT}.get(site, Stage.VISION)


def token_axis(site: str) -> int:
    """The number of the token axis of the value at a site. Attention scores and probabilities have an axis of queries
    and one of keys; it is the axis of queries."""
    return 2 if site.endswith(("attn_scores", "attn_probs", "deepstack_merger_list")) else 1


def head_axis(site: str) -> int:
    """The number of the head axis of the value at a site.

    Raises:
        UserError: if the site has no heads.
    """
    axes = {"attn_scores": 1, "attn_probs": 1, "head_out": 2}
    name = site.partition(".")[2]
    if name not in axes:
        raise UserError(f"{site!r} has no heads: use one of {', '.join(axes)}")
    return axes[name]


@dataclasses.dataclass(frozen=True)
class Context:
    """Facts about the value that an intervention gets.

    ``layer``: the traced index of the layer, vision block or level of DeepStack; None at sites outside of them.
    ``input``: the input of the linear map, if the site is the output of one; else None.
    ``linear``: the linear map itself (:class:`vlm_jax.nn.layers.Linear`), in this layer, if the site is the output of
    one; else None.
    ``read``: at ``attn_probs``, a function from the probabilities ``(B, H, S, keys)`` to the heads' outputs with these
    probabilities ``(B, S, H, d)``; else None.
    ``donors``: in a sweep with a clean run, site -> the clean run's value in this layer; else None.
    ``start``: the position in the sequence of the value's first token. It is not 0 if a shared prefix comes before.
    ``decoding``: whether the value's tokens are generated ones, which have no entry in arrays ``(B, T)`` of the prompt.
    """

    layer: Any = None
    input: Any = None
    linear: Any = None
    read: Any = None
    donors: Any = None
    start: Any = 0
    decoding: bool = False

    def tokens(self, array: jax.Array, count: int, new: Any = 0, axis: int = 1) -> jax.Array:
        """The entries of ``array`` that belong to the ``count`` tokens of a value; ``new`` for generated tokens.
        ``axis`` is the array's axis of the prompt's T tokens."""
        if self.decoding:
            shape = (*array.shape[:axis], count, *array.shape[axis + 1 :])
            return jnp.full(shape, new, array.dtype)
        return jax.lax.dynamic_slice_in_dim(array, self.start, count, axis)

    def keys(self, array: jax.Array, count: int, new: Any = 0) -> jax.Array:
        """The entries of ``array (B, T)`` that belong to the ``count`` keys of attention, ``(B, count)``. Generated
        keys come last and get ``new``."""
        return jnp.pad(array[:, :count], [(0, 0), (0, max(0, count - array.shape[1]))], constant_values=new)


class Intervention(abc.ABC):
    """A pytree that maps the value at a site to a new value of the same shape.

    A kind of intervention defines ``__call__``, and ``sites``: the names of the sites that it changes, which are
    static. All other fields should be arrays. Then a change of an intervention's layers, tokens or strength does not
    compile the program again.

    The other members have defaults for a kind that acts in every layer and on every token. If a kind overrides
    ``active`` and ``tokens``, the library can refuse an intervention that acts nowhere, and a sweep can skip the layers
    and tokens before the first ones on which it acts.
    """

    sites: frozenset[str]
    #: The first token of the prompt on which it acts, if :meth:`tokens` returns None.
    start: int = 0
    #: Whether it changes attention scores and probabilities query by query, and looks up its arrays of tokens with
    #: ``ctx.tokens`` and ``ctx.keys``. It then gets the queries of a long prompt in blocks, which needs less memory;
    #: ``ctx.start`` is traced there. A class with a ``__call__`` of its own must state it anew.
    by_query: bool = False

    @abc.abstractmethod
    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        """The new value at ``site``."""

    def active(self) -> Mapping[str, jax.Array]:
        """Site -> in which layers it acts, ``(layers,)`` bool; a scalar for a site outside of the layers. If a site is
        not in the result, it acts in all layers of the site."""
        return {}

    def tokens(self) -> jax.Array | None:
        """The tokens of the prompt on which it acts, ``(B, T)`` bool; None for all tokens from :attr:`start` on.

        The new value of a token may depend on that token's value alone, at attention scores and probabilities on its
        query's row: a sweep carries only the tokens from the first one on which a variant acts.
        """
        return None

    def bound(self, labels: np.ndarray) -> "Intervention":
        """The intervention for one batch. A kind that names token groups looks up their tokens in ``labels (B, T)``,
        the group of each token (:func:`interventions.kinds.groups.label`)."""
        return self

    def sized(self, depths: Mapping[str, int]) -> "Intervention":
        """The intervention for a model with these depths: tower -> number of layers. A kind whose tables of layers wait
        for the depth (:class:`interventions.kinds.layers.Layers`) makes them here."""
        return self

    @property
    def missing(self) -> frozenset[str]:
        """The sites at which it needs the values of a clean run (``ctx.donors``). Only a sweep has them."""
        return frozenset()

    def filled(self, values: Mapping[str, jax.Array]) -> "Intervention":
        """The intervention with the clean run's values at the missing sites, each ``(L, B, T, ...)``."""
        return self

    @classmethod
    def restored(cls, fields: dict[str, Any]) -> "Intervention":
        """The intervention with the ``fields`` that were read from a file. A kind overrides this to convert or refuse
        the files of older versions."""
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class Tap:
    """The values to return from a site.

    layers: return only the values of these layers, which are kept in a buffer of their size; None for all layers.
    reduce: a function that is applied to each value. Only its result is kept, which saves memory.
    add: instead of ``reduce``, a function ``(value, ctx)`` of attention scores or probabilities that may get the
        queries of a long prompt in blocks, which saves more memory. The results of the blocks are added. ``ctx.tokens``
        looks up the block's entries in an array of tokens; ``ctx.start`` is the number of its first query.
    """

    layers: tuple[int, ...] | None = None
    reduce: Callable[[jax.Array], Any] | None = None
    add: Callable[[jax.Array, Context], Any] | None = None


NO_TAPS: Mapping[str, Tap] = MappingProxyType({})
#: The argument for taps: names of sites, or site -> the layers to keep, a :class:`Tap`, or None for all layers.
Taps = Iterable[str] | Mapping[str, Tap | Sequence[int] | None]


def splits_queries(interventions: Iterable[Intervention], *sites: str) -> bool:
    """Whether all interventions at these sites change attention query by query."""

    def states(intervention: Intervention) -> bool:
        owner = next(cls for cls in type(intervention).__mro__ if "__call__" in vars(cls))
        return "by_query" in vars(owner) and intervention.by_query

    return all(states(i) for i in interventions if not i.sites.isdisjoint(sites))


class Probe:
    """Applies interventions and collects taps in one part of a forward pass, such as one layer."""

    def __init__(self, interventions: Sequence[Intervention], taps: Mapping[str, Tap], ctx: Context):
        self.interventions, self.wanted, self.ctx = interventions, taps, ctx
        self.taps: dict[str, Any] = {}

    def meets(self, *sites: str) -> bool:
        """Whether an intervention or a tap needs one of the sites. If not, the model may compute the sites' part in a
        faster way."""
        return any(site in self.wanted or any(site in i.sites for i in self.interventions) for site in sites)

    def splits_queries(self, *sites: str) -> bool:
        """Whether attention may be computed for some queries at a time: the interventions at these sites change them
        query by query, and the taps there add up what they keep."""
        taps = [self.wanted[site] for site in sites if site in self.wanted]
        return splits_queries(self.interventions, *sites) and all(tap.add is not None for tap in taps)

    def behind(self, count: Any) -> "Probe":
        """A probe for values that lack the first ``count`` queries; it collects taps of its own."""
        return Probe(self.interventions, self.wanted, dataclasses.replace(self.ctx, start=self.ctx.start + count))

    def __call__(
        self, site: str, value: jax.Array, input: jax.Array | None = None, read=None, linear=None
    ) -> jax.Array:
        for intervention in self.interventions:
            if site in intervention.sites:
                ctx = dataclasses.replace(self.ctx, input=input, read=read, linear=linear)
                value = intervention(site, value, ctx).astype(value.dtype)
        value = checkpoint_name(value, site)  # so that training can store it for the backward pass
        if site in self.wanted:
            tap = self.wanted[site]
            if tap.add is not None:
                self.taps[site] = tap.add(value, self.ctx)
            else:
                self.taps[site] = value if tap.reduce is None else tap.reduce(value)
        return value

    def linear(self, site: str, module, x: jax.Array) -> jax.Array:
        """Applies a linear map. Its output is a site, and interventions there can read its input and the map."""
        return self(site, module(x), x, linear=module)


def scan_layers(
    body: Callable[[Any, Any, jax.Array], tuple[Any, Any, dict]],
    carry: Any,
    scanned: Any,
    index: jax.Array,
    taps: Mapping[str, Tap],
) -> tuple[Any, Any, dict[str, Any]]:
    """``lax.scan`` over stacked layers. If a tap names layers, only their values are kept, in a buffer of their size.

    Args:
        body: a function ``(carry, a layer's part of scanned, its index) -> (carry, out, tapped)``.
        scanned: a pytree of arrays with a leading axis of the layers.
        index: ``(layers,)``, the number of each layer.

    Returns:
        The carry, the outs stacked over the layers, and the taps with a leading axis of the layers.
    """
    chosen = {site: jnp.asarray(tap.layers) for site, tap in taps.items() if tap.layers is not None}

    def step(state, xs):
        carry, kept = state
        at, part = xs
        carry, out, tapped = body(carry, part, at)
        for site, layers in chosen.items():
            slot = jnp.where((layers == at).any(), jnp.argmax(layers == at), len(layers))
            write = functools.partial(lambda slot, k, v: k.at[slot].set(v, mode="drop"), slot)
            kept = {**kept, site: jax.tree.map(write, kept[site], tapped.pop(site))}
        return (carry, kept), (out, tapped)

    kept = {}
    if chosen:
        at, part = jax.tree.map(lambda a: a[0], (index, scanned))
        shapes = jax.eval_shape(lambda *args: body(*args)[2], carry, part, at)
        for site, layers in chosen.items():
            count = len(layers)
            kept[site] = jax.tree.map(lambda a, n=count: jnp.zeros((n, *a.shape), a.dtype), shapes[site])
    (carry, kept), (out, tapped) = jax.lax.scan(step, (carry, kept), (index, scanned))
    return carry, out, {**tapped, **kept}


def check_sites(
    interventions: Sequence[Intervention],
    taps: Taps,
    present: frozenset[str],
    depths: Mapping[str, int],
    shape: tuple[int, int],
) -> dict[str, Tap]:
    """Checks that every tap and every intervention is at a site of this pass, and that the interventions act there.
    Arrays that jit traces have no values yet, so only their shapes are checked.

    Args:
        present: the sites that this model has for these inputs (:meth:`vlm_jax.Model.sites`).
        depths: tower -> number of layers that are run; "deepstack" -> number of layers after which it adds features.
        shape: ``(B, T)`` of the inputs.

    Returns:
        Site -> tap.

    Raises:
        UserError: for an unknown site, a site or layer that this pass does not have, an intervention that acts nowhere,
            or one for another model or batch.
    """
    if not isinstance(taps, Mapping):
        taps = dict.fromkeys(taps)
    wanted = {
        site: tap if isinstance(tap, Tap) else Tap(None if tap is None else tuple(tap)) for site, tap in taps.items()
    }
    for name, tap in wanted.items():
        _check_tap(name, tap, present, depths)
    for intervention in interventions:
        kind = type(intervention).__name__
        if unknown := intervention.sites - SITES:
            name = sorted(unknown)[0]
            raise UserError(f"{kind} names an unknown site {name!r}{nearest(name, SITES)}")
        if absent := sorted(intervention.sites - present) or not intervention.sites:
            where = "no site" if absent is True else absent[0]
            raise UserError(f"{kind} touches nothing at {where}, which this forward pass does not have")
        _check_acts(intervention, kind, depths, shape)
    return wanted


def _check_tap(name: str, tap: Tap, present: frozenset[str], depths: Mapping[str, int]) -> None:
    """Raises a UserError for a tap of a site or layer that this pass does not have."""
    if name not in SITES:
        raise UserError(f"unknown tap {name!r}{nearest(name, SITES)}")
    if name not in present:
        raise UserError(
            f"tap {name!r} is no site of this pass, because the model lacks it, or because it needs an image and these "
            "inputs have none: give images or drop the tap"
        )
    if tap.add is not None and (tap.reduce is not None or not name.endswith(("attn_scores", "attn_probs"))):
        raise UserError(f"tap {name!r} has add, which is for attention scores and probabilities, without reduce")
    if tap.layers is None:
        return
    depth = depths[stack_of(name)] if layered(name) else 0
    once = len(set(tap.layers)) == len(tap.layers) > 0
    if not once or not set(tap.layers) <= set(range(depth)):
        raise UserError(f"tap {name!r} asks for layers {list(tap.layers)}: name some of its {depth} layers, each once")


def layered(site: str) -> bool:
    """Whether a site occurs once in each layer of the decoder, block of the vision tower or level of DeepStack."""
    return site in LAYER_SITES or site in BLOCK_SITES or site in LEVEL_SITES


def stack_of(site: str) -> str:
    """What a layered site's layers are layers of: "text", "visual" or "deepstack" (:attr:`vlm_jax.Model.depths`)."""
    return "deepstack" if site in LEVEL_SITES else site.partition(".")[0]


def _check_acts(intervention: Intervention, kind: str, depths: Mapping[str, int], shape: tuple[int, int]) -> None:
    """Raises a UserError for an intervention whose layer tables have another depth, or whose tokens are of another
    batch. If the arrays' values are known, also for one that acts in no layer or on no token."""
    tables, active = [], intervention.active()
    for site in sorted(intervention.sites & active.keys()):
        table = active[site]
        expected = (depths[stack_of(site)],) if layered(site) else ()
        if np.shape(table) != expected:
            has = f"{expected[0]} layers" if expected else "no layers"
            raise UserError(f"{kind} at {site!r} has a table of shape {np.shape(table)}, but the site has {has}")
        tables.append(table[: depths["deepstack"]] if site == "text.deepstack" else table)
    where = ", ".join(sorted(intervention.sites))
    everywhere = not intervention.sites <= active.keys()
    if not everywhere and not any(isinstance(table, jax.core.Tracer) or np.any(table) for table in tables):
        raise UserError(f"{kind} touches nothing: it acts in no layer or head of {where}")
    tokens = intervention.tokens()
    if tokens is None:
        return
    of_text = Stage.VISION not in map(stage, intervention.sites)
    if of_text and np.shape(tokens) not in (tuple(shape), (1, shape[1])):
        raise UserError(
            f"{kind} is for prompts of shape {np.shape(tokens)}, but these have {tuple(shape)}: bind it anew"
        )
    if not isinstance(tokens, jax.core.Tracer) and not np.any(tokens):
        raise UserError(f"{kind} touches nothing: no token is marked for it")


def null_slots(num_layers: int, slots: int) -> jnp.ndarray:
    """A slot table for layers that use no slot: ``(L,)`` int32, where every entry is the null slot ``slots``."""
    return jnp.full((num_layers,), slots, jnp.int32)
