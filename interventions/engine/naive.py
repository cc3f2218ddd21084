"""The naive sweep: the whole model for every variant. It is the oracle of the fast one."""

import jax
import jax.numpy as jnp

from interventions.engine.read import ReadOut, Runs, reads_normed
from interventions.engine.variants import Variants
from vlm_jax import Inputs, Model


@jax.jit
def naive_program(model: Model, inputs: Inputs, clean, base, variants: Variants, read: ReadOut) -> Runs:
    """The arguments are those of :func:`interventions.engine.program.sweep_program`."""

    def run(interventions, taps=()):
        normed, last = reads_normed(read), model.config.text.num_hidden_layers - 1
        tapped = model(inputs, interventions, {"text.norm": None} | dict.fromkeys(taps)).taps
        x = tapped.pop("text.norm")
        if not normed:
            (x,) = model(inputs, interventions, {"text.resid_post": (last,)}).taps["text.resid_post"]
        return read(model, x, 0), tapped

    clean_read, values = (None, {}) if clean is None else run(clean, variants.missing)

    def one_variant(number):
        interventions = tuple(i.filled(values) for i in variants.take(number).interventions)
        return run((*base, *interventions))[0]

    return Runs(jax.lax.map(one_variant, jnp.arange(len(variants))), run(base)[0], clean_read)
