"""The named sites of a forward pass, and the protocol by which interventions and taps meet them.

A **site** is ``tower.name``. At every site the model hands the value to each intervention that names the
site, in order, and then to the taps. Sites of the layers (and of the vision blocks) occur once per layer:
an intervention finds the traced layer index in its :class:`Context`, a tap gets a leading layer axis.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError, nearest

#: Linear maps inside one decoder layer, by the module ("attn" or "mlp") whose output they shape.
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
#: Linear maps inside one vision block, by tower; every name is the Hugging Face one.
VISUAL_LINEARS = {
    "qwen3": ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2"),
    "qwen2_5": ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "vit": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"),
}
_BLOCK = ("resid_pre", "attn_scores", "attn_probs", "head_out", "attn_out", "mlp_out", "resid_post")
BLOCK_SITES = frozenset(f"visual.{name}" for names in (_BLOCK, *VISUAL_LINEARS.values()) for name in names)
#: What each tower's projector shows beside its blocks.
PROJECTOR_SITES = frozenset(
    f"projector.{name}"
    for name in (
        "merger",
        "deepstack_merger_list",
        "mm_soft_emb_norm",
        "mm_input_projection",
        "linear_1",
        "linear_2",
    )
)
SITES = TEXT_SITES | BLOCK_SITES | PROJECTOR_SITES | {"visual.embeddings"}


def tower_sites(linears: str, *projector: str) -> frozenset[str]:
    """The sites of a tower with these block linears and these sites of its projector."""
    names = (f"visual.{name}" for name in ("embeddings", *_BLOCK, *VISUAL_LINEARS[linears]))
    return frozenset([*names, *(f"projector.{name}" for name in projector)])


@dataclasses.dataclass(frozen=True)
class Context:
    """What an intervention may look at beside the value.

    ``layer``: traced index of the layer or vision block, ``None`` outside of them.
    ``input``: what the linear at this site read, ``None`` where the site is not a linear.
    ``start``: index in the sequence of the first token in ``value`` (not 0 after a shared prefix).
    ``decoding``: the tokens are generated ones, which no ``(B, T)`` array knows.
    """

    layer: Any = None
    input: Any = None
    start: int = 0
    decoding: bool = False

    def tokens(self, array: jax.Array, value: jax.Array, axis: int = 1) -> jax.Array:
        """The part of a whole-sequence ``array`` that lies beside ``value`` ``(B, S, ...)``."""
        return jax.lax.dynamic_slice_in_dim(array, self.start, value.shape[1], axis)


@runtime_checkable
class Intervention(Protocol):
    """A pytree that maps the value at a site to a new value of the same shape.

    ``sites`` is static; everything else in the pytree is arrays, so that changing what is done, where or how
    strongly never retraces.
    """

    sites: frozenset[str]

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array: ...


class Probe:
    """Applies interventions and collects taps while one piece of a forward pass is traced."""

    def __init__(self, interventions: Sequence[Intervention], taps: frozenset[str], ctx: Context):
        self.interventions, self.wanted, self.ctx = interventions, taps, ctx
        self.taps: dict[str, jax.Array] = {}

    def __call__(self, site: str, value: jax.Array, input: jax.Array | None = None) -> jax.Array:
        for intervention in self.interventions:
            if site in intervention.sites:
                value = intervention(site, value, dataclasses.replace(self.ctx, input=input)).astype(value.dtype)
        if site in self.wanted:
            self.taps[site] = value
        return value

    def linear(self, site: str, module, x: jax.Array) -> jax.Array:
        """A linear map whose output is a site and whose input the interventions may read."""
        return self(site, module(x), x)


def check(interventions: Sequence[Intervention], taps: Sequence[str], present: frozenset[str]) -> frozenset[str]:
    """The taps as a set, once it is sure that every tap and every intervention meets a site of this pass.

    Args:
        present: the sites that this model has for these inputs (:meth:`vlm_jax.Model.sites`).
    """
    for name in taps:
        if name not in SITES:
            raise UserError(f"unknown tap {name!r}{nearest(name, SITES)}")
        if name not in present:
            raise UserError(
                f"tap {name!r} is no site of this pass: this model lacks it, or it needs an image and these inputs "
                "have none: give images or drop the tap"
            )
    for intervention in interventions:
        kind = type(intervention).__name__
        if unknown := intervention.sites - SITES:
            name = sorted(unknown)[0]
            raise UserError(f"{kind} names an unknown site {name!r}{nearest(name, SITES)}")
        if not intervention.sites & present:
            where = ", ".join(sorted(intervention.sites)) or "no site"
            raise UserError(f"{kind} touches nothing: it acts at {where}, which this forward pass does not have")
    return frozenset(taps)


def null_slots(num_layers: int, slots: int) -> jnp.ndarray:
    """A slot table that uses nothing: ``(L,)`` int32, every entry the null slot ``slots``."""
    return jnp.full((num_layers,), slots, jnp.int32)
