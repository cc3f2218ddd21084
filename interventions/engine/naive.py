"""The naive sweep: the whole model for every variant. It is the oracle of the fast one."""

import jax
import jax.numpy as jnp

from interventions.engine.read import ReadOut, Runs
from interventions.engine.variants import Variants
from vlm_jax import Inputs, Model


@jax.jit
def naive_program(model: Model, inputs: Inputs, clean, base, variants: Variants, read: ReadOut) -> Runs:
    """The arguments are those of :func:`interventions.engine.program.sweep_program`."""

    def run(interventions, taps=()):
        tapped = model(inputs, interventions, ("text.norm", *taps)).taps
        return read(model, tapped.pop("text.norm"), 0), tapped

    clean_read, values = (None, {}) if clean is None else run(clean, variants.missing)

    def one_variant(number):
        interventions = tuple(i.filled(values) for i in variants.take(number).interventions)
        return run((*base, *interventions))[0]

    return Runs(jax.lax.map(one_variant, jnp.arange(len(variants))), run(base)[0], clean_read)
