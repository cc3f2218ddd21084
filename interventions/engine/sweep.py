"""The sweep engine: N variants of one base run, exactly, at a fraction of the cost of N runs.

Three facts make it cheap. Attention is causal, so the tokens before the first one that a variant changes are computed
once and only attended to (shared prefix). A variant that first acts in layer l equals the base run below l, so it
starts there from the base run's residual (shared depth). And only what the read-out looks at is unembedded.

The files of this room: :mod:`.variants` (what is swept), :mod:`.read` (what is kept of a run), :mod:`.grids` (common
sets of variants), :mod:`.prefix`, :mod:`.bundles` and :mod:`.chunks` (what is shared, how much is done at once),
:mod:`.entry` and :mod:`.program` (the computation), :mod:`.naive` (its oracle), :mod:`.generation` and :mod:`.cost`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from interventions.engine.bundles import bundled
from interventions.engine.naive import naive_program
from interventions.engine.prefix import possible_prefix, shared_prefix
from interventions.engine.program import sweep_program
from interventions.engine.read import ReadOut, Runs
from interventions.engine.variants import Variants, check_acts, sized_variants
from vlm_jax import Inputs, Model, UserError
from vlm_jax.acting import acting
from vlm_jax.sites import Stage, check_sites, stage
from vlm_jax.vision.blocks import Features


def sweep(model: Model, inputs: Inputs, variants: Variants | Sequence[Any], read: ReadOut, **options: Any) -> Any:
    """The read-outs of N variants of a base run, with a leading axis of N: :func:`sweep_runs` without the read-outs of
    the other runs."""
    return sweep_runs(model, inputs, variants, read, **options).variants


def sweep_runs(
    model: Model,
    inputs: Inputs,
    variants: Variants | Sequence[Any],
    read: ReadOut,
    *,
    base: Any = (),
    clean: Any = None,
    engine: Literal["sweep", "naive"] = "sweep",
    start: int | None = None,
    chunk: int | None = None,
    features: Features | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Runs:
    """The read-outs of every variant of a base run, in the order of ``variants``, and those of the base run and the
    clean run themselves.

    Args:
        variants: :class:`Variants`, or a list to be stacked. They may differ in layers, heads, tokens and strengths.
        read: see :mod:`interventions.engine.read`.
        base: interventions of every variant, applied before the variant's own.
        clean: interventions of a clean run, which supplies the values of patches without a donor; () for a clean run
            without interventions, None for no clean run. Causal tracing has the noise in ``base``, and patches remove
            it ("denoise"). With the noise in ``clean``, patches bring it into a base run without noise.
        engine: "sweep", or "naive": the whole model for every variant (the oracle).
        start: share at most this many tokens; None: as many as possible.
        chunk: how many variants are worked on together.
        features: ``model.features(inputs)[0]``, to run the vision tower once for several sweeps of the same images.
        mesh: shards the variants over the first axis of a mesh, each device with a whole model. To shard samples, shard
            ``inputs``.

    Raises:
        UserError: for a variant that acts nowhere, or for variants that differ in more than values.
    """
    variants = sized_variants(variants, model.depths)
    base, clean = acting(base, model.depths), None if clean is None else acting(clean, model.depths)
    _check(model, inputs, variants, base, clean, engine)
    longest = shared_prefix(model, inputs, variants, read, base, clean)
    start = longest if start is None else possible_prefix(model, inputs, min(start, longest))
    read = dataclasses.replace(read, first=0)  # a static field: another value would compile another program
    if engine == "naive":
        return naive_program(model, inputs, clean, base, variants, read)
    sweeps = bundled(model, inputs, variants, start, chunk)
    parts = [
        sweep_program(model, inputs, clean, base, bundles, read, features, start=start, mesh=mesh) for bundles in sweeps
    ]
    if len(parts) == len(sweeps.numbers) == 1:
        return parts[0]
    joined = jax.tree.map(lambda *a: jnp.concatenate(a)[sweeps.position], *(runs.variants for runs in parts))
    return parts[0]._replace(variants=joined)


def _check(model: Model, inputs: Inputs, variants: Variants, base: tuple, clean: tuple | None, engine: str) -> None:
    """Refuses an unknown engine, interventions that act nowhere, and patches that have no donor."""
    if engine not in ("sweep", "naive"):
        raise UserError(f"unknown engine {engine!r}: use 'sweep' or 'naive'")
    interventions = (*base, *variants.take(0).interventions, *(clean or ()))
    check_sites(interventions, (), model.sites(inputs), model.depths, inputs.input_ids.shape)
    check_acts(variants)
    missing = sorted(variants.missing)
    if missing and clean is None:
        raise UserError(f"Patch has no donor at {missing[0]!r}: give its values, or clean=() to take the clean run's")
    if outside := [site for site in missing if stage(site) is not Stage.LAYERS]:
        raise UserError(f"a clean run has no values at {outside[0]!r}: give the donor's values")
