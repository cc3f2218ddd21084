"""The compiled sweep: one scan over the layers that carries the clean run, the base run and every variant that has
begun to differ from the base run."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from interventions.engine.entry import behind_prefix, embedded, entered
from interventions.engine.read import ReadOut, Runs, reads_normed
from interventions.engine.variants import PerVariant, Variants, first_layers
from vlm_jax import Inputs, Model
from vlm_jax.model import Embedded
from vlm_jax.nn.decoder import Decoder, KeyValues, Layer, Window
from vlm_jax.sites import NO_TAPS, Context, Probe, Tap, token_axis
from vlm_jax.typing import Array, ArrayLike
from vlm_jax.vision.blocks import Features


class Fixed(NamedTuple):
    """The arguments of every layer's step. A prompt has T tokens: ``start`` in the shared prefix and S behind it. The N
    variants are ordered by the layers in which they first act, ``first_layer (N,)``.

    ``lead`` and ``base`` are the interventions of two runs. The lead run is the clean run if there is one, else the
    base run. It computes whole prompts, and so the prefix. ``lead_entry (B, T, D)``, ``base_entry (B, S, D)`` and
    ``variant_entry (N, B, S, D)`` are the inputs of layer 0; if the last is None, it equals ``base_entry``.
    """

    text: Decoder
    whole_window: Window
    window: Window
    lead: tuple
    base: tuple
    variants: Variants
    first_layer: Int[Array, "variants"]
    lead_entry: Embedded
    base_entry: Embedded
    variant_entry: Embedded | None
    start: int
    chunk: int


class States(NamedTuple):
    """The residual streams between two layers: of the lead run; of the base run, None if it is the lead run; and of the
    variants. A variant's state is not defined before its first layer."""

    lead: Float[Array, "batch length width"]
    base: Float[Array, "batch tokens width"] | None
    variants: Float[Array, "variants batch tokens width"]


@functools.partial(jax.jit, static_argnames=("start", "chunk", "mesh"))
def sweep_program(
    model: Model,
    inputs: Inputs,
    clean: tuple | None,
    base: tuple,
    variants: Variants,
    read: ReadOut,
    features: Features | None,
    *,
    start: int,
    chunk: int,
    mesh: jax.sharding.Mesh | None,
) -> Runs:
    """The read-outs of N variants, of the base run and of the clean run. The arguments are those of
    :func:`interventions.engine.sweep.sweep_runs`, with ``start`` and ``chunk`` given as numbers."""
    count, depth = len(variants), model.config.text.num_hidden_layers
    if features is None:
        features, _ = model.features(inputs)
    first = first_layers(variants, depth)
    devices = 1 if mesh is None else mesh.devices.shape[0]
    chunk = min(chunk, -(-count // devices))
    # In the order of first layers, the variants that are alive in a layer fill the first few chunks. Entries of -1 fill
    # up the last chunk.
    order = jnp.pad(jnp.argsort(first), (0, -count % (chunk * devices)), constant_values=-1)
    # The variants are dealt to the devices in turn, so that every device gets long and short runs.
    order = order.reshape(-1, devices).T.reshape(-1)
    run = functools.partial(_run, start=start, chunk=chunk)
    args = (model, inputs, clean, base, variants, read, features, first)
    if mesh is not None:
        split, same = PartitionSpec(mesh.axis_names[0]), PartitionSpec()
        run = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(split, *(same for _ in args)),
            out_specs=Runs(split, same, same),
            check_vma=False,
        )
    runs = run(order, *args)
    position = jnp.zeros(count, jnp.int32)
    position = position.at[jnp.where(order < 0, count, order)].set(jnp.arange(len(order)), mode="drop")
    return runs._replace(variants=jax.tree.map(lambda a: a[position], runs.variants))


def _run(order, model, inputs, clean, base, variants, read, features, first, *, start: int, chunk: int) -> Runs:
    """The read-outs. ``order`` holds the indices of the variants to run; entries of -1 are no variants."""
    text, depth = model.text, model.config.text.num_hidden_layers
    lead = base if clean is None else clean
    lead_entry = embedded(model, inputs, lead, features)
    base_entry = behind_prefix(lead_entry if clean is None else embedded(model, inputs, base, features), start)
    rows = jnp.maximum(order, 0)
    ordered = variants.take(rows)
    fixed = Fixed(
        text=text,
        whole_window=model.window(inputs),
        window=model.window(inputs, start),
        lead=lead,
        base=base,
        variants=ordered,
        first_layer=jnp.where(order < 0, depth + 1, first[rows]),  # an entry of -1 never begins
        lead_entry=lead_entry,
        base_entry=base_entry,
        variant_entry=entered(model, inputs, base, ordered, base_entry, features, start),
        start=start,
        chunk=chunk,
    )
    states = _through_layers(fixed, depth, has_clean=clean is not None)
    base_state = states.lead[:, start:] if states.base is None else states.base
    # A variant that acts only behind the layers has not begun yet, so it equals the base run.
    begun = (fixed.first_layer < depth)[:, None, None, None]
    variant_states = jnp.where(begun, states.variants, base_state)

    def read_out(x, interventions):
        if reads_normed(read):
            x = Probe(interventions, NO_TAPS, Context(start=start))("text.norm", text.norm(x))
        return read(model, x, start)

    def read_variant(number):
        return read_out(variant_states[number], (*base, *ordered.take(number).interventions))

    of_variants = jax.lax.map(read_variant, jnp.arange(len(order)), batch_size=chunk)
    of_lead = read_out(states.lead[:, start:], lead)
    if clean is None:
        return Runs(of_variants, of_lead, None)
    return Runs(of_variants, read_out(base_state, base), of_lead)


def _through_layers(fixed: Fixed, depth: int, has_clean: bool) -> States:
    """The states after the last layer."""
    base_x = fixed.base_entry.x
    if fixed.variant_entry is None:
        variants = jnp.zeros((len(fixed.first_layer), *base_x.shape), base_x.dtype)
    else:
        variants = fixed.variant_entry.x
    states = States(fixed.lead_entry.x, base_x if has_clean else None, variants)
    step = functools.partial(_through_layer, fixed)
    return jax.lax.scan(step, states, (fixed.text.layers, jnp.arange(depth)))[0]


def _through_layer(fixed: Fixed, states: States, scanned: tuple[Layer, jax.Array]) -> tuple[States, None]:
    """One layer of all runs."""
    layer, index = scanned
    before = states.lead[:, fixed.start :] if states.base is None else states.base
    lead, past, donors = _lead_step(fixed, layer, index, states.lead)
    base = None if states.base is None else _base_step(fixed, layer, index, states.base, past)
    window = _repeated(fixed.text.at(fixed.window, index), fixed.chunk)

    def chunk_step(number, variants):
        return _chunk_step(fixed, layer, index, number * fixed.chunk, variants, before, window, past, donors)

    alive = jnp.sum(fixed.first_layer <= index)
    variants = jax.lax.fori_loop(0, -(-alive // fixed.chunk), chunk_step, states.variants)
    return States(lead, base, variants), None


def _lead_step(
    fixed: Fixed, layer: Layer, index: Int[ArrayLike, ""], x: Float[ArrayLike, "batch length width"]
) -> tuple[Float[Array, "batch length width"], list[KeyValues], dict[str, Any]]:
    """The lead run's output; the prefix's keys and values, as segments of the other runs' past; and the values that
    patches without a donor take, site -> ``(B, S, ...)``."""
    probe = Probe(fixed.lead, dict.fromkeys(fixed.variants.missing, Tap()), Context(index))
    deepstack = fixed.text.deepstack_at(fixed.lead_entry.deepstack, index)
    x, (k, v) = layer(x, fixed.text.at(fixed.whole_window, index), (), deepstack, probe)
    start = fixed.start
    past = [(k[:, :start], v[:, :start])] if start else []
    donors = {
        site: jax.lax.slice_in_dim(value, start, None, axis=token_axis(site)) for site, value in probe.taps.items()
    }
    return x, past, donors


def _base_step(
    fixed: Fixed,
    layer: Layer,
    index: Int[ArrayLike, ""],
    x: Float[ArrayLike, "batch tokens width"],
    past: list[KeyValues],
) -> Float[Array, "batch tokens width"]:
    """The base run's output. It is needed only if the lead run is the clean run."""
    probe = Probe(fixed.base, NO_TAPS, Context(index, start=fixed.start))
    deepstack = fixed.text.deepstack_at(fixed.base_entry.deepstack, index)
    return layer(x, fixed.text.at(fixed.window, index), past, deepstack, probe)[0]


def _chunk_step(
    fixed: Fixed,
    layer: Layer,
    index: Int[ArrayLike, ""],
    at: Int[ArrayLike, ""],
    states: Float[ArrayLike, "variants batch tokens width"],
    before: Float[ArrayLike, "batch tokens width"],
    window: Window,
    past: list[KeyValues],
    donors: dict[str, Any],
) -> Float[Array, "variants batch tokens width"]:
    """The variants' states after one chunk of them, from index ``at`` on, went through the layer.

    ``before`` is the base run's state, which a variant has before its first layer. ``window`` is for the rows
    of a chunk.
    """
    chunk = fixed.chunk
    x = jax.lax.dynamic_slice_in_dim(states, at, chunk)
    begins = jax.lax.dynamic_slice_in_dim(fixed.first_layer, at, chunk) == index
    if fixed.variant_entry is not None:  # in layer 0, variants have embeddings that differ from the base run's
        begins = begins & (index > 0)
    x = jnp.where(begins[:, None, None, None], before, x)
    deepstack = _chunk_deepstack(fixed, index, at)
    # The base run's interventions and the chunk's act as one intervention on the chunk's rows.
    interventions = (*fixed.base, *fixed.variants.chunk(at, chunk))
    axes = ((None,) * len(fixed.base)) + fixed.variants.axes
    probe = Probe((PerVariant(interventions, axes, chunk),), NO_TAPS, Context(index, donors=donors, start=fixed.start))
    by_sample = x.swapaxes(0, 1)  # (B, chunk, S, D)
    rows = by_sample.reshape(-1, *x.shape[2:])  # (B * chunk, S, D)
    x = layer(rows, window, past, deepstack, probe)[0].reshape(by_sample.shape).swapaxes(0, 1)
    return jax.lax.dynamic_update_slice_in_dim(states, x, at, 0)


def _chunk_deepstack(fixed: Fixed, index: jax.Array, at: jax.Array) -> jax.Array | None:
    """The DeepStack tensor that is added to the rows of a chunk after this layer, ``(B * chunk, S, D)``."""
    if fixed.variant_entry is None or fixed.variant_entry.deepstack is None:
        deepstack = fixed.text.deepstack_at(fixed.base_entry.deepstack, index)
        return None if deepstack is None else jnp.repeat(deepstack, fixed.chunk, 0)
    of_chunk = jax.lax.dynamic_slice_in_dim(fixed.variant_entry.deepstack, at, fixed.chunk)
    by_sample = of_chunk.transpose(1, 2, 0, 3, 4)  # (K, B, chunk, S, D)
    rows = by_sample.reshape(len(by_sample), -1, *by_sample.shape[3:])
    return fixed.text.deepstack_at(rows, index)


def _repeated(window: Window, count: int) -> Window:
    """One layer's window for ``count`` variants of each sample; they share the past and its mask."""
    rope, mask = jax.tree.map(lambda a: jnp.repeat(a, count, 0), (window.rope, window.mask))
    return window._replace(rope=rope, mask=mask)
