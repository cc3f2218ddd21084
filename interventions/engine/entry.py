"""The inputs of layer 0: in a run, behind the shared prefix, and in every variant."""

import jax
import jax.numpy as jnp

from interventions.engine.variants import Variants
from vlm_jax import Inputs, Model
from vlm_jax.model import Embedded
from vlm_jax.sites import NO_TAPS, Context, Probe, Stage, stage
from vlm_jax.vision.blocks import Features


def embedded(model: Model, inputs: Inputs, interventions, features: Features | None) -> Embedded:
    """What enters layer 0 of a run: ``x (B, T, D)``, ``deepstack (K, B, T, D)``. The vision tower is run only if
    ``features`` is None or an intervention changes it."""
    in_tower = any(stage(site) is Stage.VISION for i in interventions for site in i.sites)
    return model.embed(inputs, interventions, features=None if in_tower else features)[0]


def behind_prefix(entire: Embedded, start: int) -> Embedded:
    """The part for the tokens from ``start`` on."""
    x, deepstack = entire
    return Embedded(x[:, start:], None if deepstack is None else deepstack[:, :, start:])


def entered(
    model: Model, inputs: Inputs, base, variants: Variants, base_entry: Embedded, features: Features | None, start: int
) -> Embedded | None:
    """What enters layer 0 in each variant, from token ``start`` on: ``x (N, B, S, D)``, and ``deepstack
    (N, K, B, S, D)`` if the variants change the vision tower. None if every variant enters as the base run does
    (``base_entry``)."""
    stages = {stage(site) for site in variants.sites}
    if Stage.VISION in stages:

        def embed_variant(number):
            interventions = (*base, *variants.take(number).interventions)
            return behind_prefix(embedded(model, inputs, interventions, features), start)

        return jax.lax.map(embed_variant, jnp.arange(len(variants)))
    if Stage.ENTRY not in stages:
        return None

    def enter(x, interventions):
        return Probe(interventions, NO_TAPS, Context(start=start))("text.embeddings", x)

    x = jax.vmap(enter, in_axes=(None, variants.axes), out_axes=0)(base_entry.x, variants.interventions)
    return Embedded(x, None)
