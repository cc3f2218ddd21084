"""The compiled sweep: one scan over the layers that carries the clean run, the base run and every variant that has
begun to differ from the base run."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from interventions.engine.bundles import Bundle
from interventions.engine.entry import behind_prefix, embedded, entered
from interventions.engine.read import ReadOut, Runs, reads_normed
from interventions.engine.variants import PerVariant, Variants, first_layers
from vlm_jax import Inputs, Model
from vlm_jax.model import Embedded
from vlm_jax.nn.decoder import Decoder, KeyValues, Layer, Window
from vlm_jax.nn.stacks import layer_at
from vlm_jax.sites import NO_TAPS, Context, Probe, Tap, token_axis
from vlm_jax.typing import Array, ArrayLike
from vlm_jax.vision.blocks import Features


class Carried(NamedTuple):
    """A bundle as the layers see it: its N variants in the order of the layers in which they first act, ``first_layer
    (N,)``; the tokens from ``begin`` on, S' in number; and the inputs of layer 0, ``base_entry (B, S', D)`` of the base
    run and ``variant_entry (N, B, S', D)``; if the last is None, it equals ``base_entry``."""

    variants: Variants
    first_layer: Int[Array, "variants"]
    window: Window
    base_entry: Embedded
    variant_entry: Embedded | None
    begin: int
    chunk: int


class Fixed(NamedTuple):
    """The arguments of every layer's step. A prompt has T tokens: ``start`` in the shared prefix and S behind it.

    ``lead`` and ``base`` are the interventions of two runs. The lead run is the clean run if there is one, else the
    base run. It computes whole prompts, and so the prefix. ``lead_entry (B, T, D)`` and ``base_entry (B, S, D)`` are
    the inputs of layer 0. ``missing``: the sites at which patches take the lead run's values.
    """

    text: Decoder
    whole_window: Window
    window: Window
    lead: tuple
    base: tuple
    lead_entry: Embedded
    base_entry: Embedded
    bundles: tuple[Carried, ...]
    missing: frozenset[str]
    start: int


class States(NamedTuple):
    """The residual streams between two layers: of the lead run; of the base run, None if it is the lead run; and of
    every bundle's variants. A variant's state is not defined before its first layer."""

    lead: Float[Array, "batch length width"]
    base: Float[Array, "batch tokens width"] | None
    variants: tuple[Float[Array, "_variants batch _tokens width"], ...]


class Beside(NamedTuple):
    """What the variants need of the other runs in a layer: the base run's residual stream before it, from ``start`` on;
    keys and values of the lead run's whole prompt and, where the base run is another one, of its tokens from ``start``
    on; and the values that patches without a donor take, site -> ``(B, S, ...)``."""

    before: Float[Array, "batch tokens width"]
    lead: KeyValues
    base: KeyValues | None
    donors: dict[str, Any]

    def past(self, start: int, begin: int) -> list[KeyValues]:
        """The base run's keys and values before ``begin``, as segments. Its first ``start`` are the lead run's."""
        if not begin:
            return []
        if self.base is None or begin == start:
            k, v = self.lead
            return [(k[:, :begin], v[:, :begin])]
        k, v = (
            jnp.concatenate([lead[:, :start], base[:, : begin - start]], 1)
            for lead, base in zip(self.lead, self.base, strict=True)
        )
        return [(k, v)]


@functools.partial(jax.jit, static_argnames=("start", "mesh"))
def sweep_program(
    model: Model,
    inputs: Inputs,
    clean: tuple | None,
    base: tuple,
    bundles: tuple[Bundle, ...],
    read: ReadOut,
    features: Features | None,
    *,
    start: int,
    mesh: jax.sharding.Mesh | None,
) -> Runs:
    """The read-outs of the variants, bundle after bundle, of the base run and of the clean run. The arguments are those
    of :func:`interventions.engine.sweep.sweep_runs`."""
    if features is None:
        features, _ = model.features(inputs)
    devices = 1 if mesh is None else mesh.devices.shape[0]
    bundles = tuple(bundle.replace(chunk=min(bundle.chunk, -(-len(bundle.variants) // devices))) for bundle in bundles)
    firsts = tuple(first_layers(bundle.variants, model.config.text.num_hidden_layers) for bundle in bundles)
    dealt = itertools.accumulate(map(len, firsts), initial=0)
    orders = tuple(
        _order(first, bundle.chunk, devices, before)
        for first, bundle, before in zip(firsts, bundles, dealt, strict=False)
    )
    run = functools.partial(_run, start=start)
    args = (model, inputs, clean, base, bundles, read, features, firsts)
    if mesh is not None:
        split, same = PartitionSpec(mesh.axis_names[0]), PartitionSpec()
        run = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(split, *(same for _ in args)),
            out_specs=Runs(split, same, same),
            check_vma=False,
        )
    runs = run(orders, *args)
    in_place = []
    for order, first, of_variants in zip(orders, firsts, runs.variants, strict=True):
        count = len(first)
        position = jnp.zeros(count, jnp.int32)
        position = position.at[jnp.where(order < 0, count, order)].set(jnp.arange(len(order)), mode="drop")
        in_place.append(jax.tree.map(lambda a, position=position: a[position], of_variants))
    return runs._replace(variants=jax.tree.map(lambda *a: jnp.concatenate(a), *in_place))


def _order(first: Int[Array, "variants"], chunk: int, devices: int, dealt: int) -> Int[Array, "padded"]:
    """The order in which variants are run: by their first layers, so that those that are alive in a layer fill the
    first few chunks. Entries of -1 fill up the last chunk. The variants are dealt to the devices in turn, so that every
    device gets long and short runs.

    Args:
        dealt: how many variants of other bundles were dealt before. The next device in turn is the first one here.
    """
    order = jnp.pad(jnp.argsort(first), (0, -len(first) % (chunk * devices)), constant_values=-1)
    return jnp.roll(order.reshape(-1, devices), dealt, 1).T.reshape(-1)


def _run(orders, model, inputs, clean, base, bundles, read, features, firsts, *, start: int) -> Runs:
    """The read-outs, of the variants by bundle. ``orders`` holds the indices of each bundle's variants to run; entries
    of -1 are no variants."""
    text, depth = model.text, model.config.text.num_hidden_layers
    lead = base if clean is None else clean
    lead_entry = embedded(model, inputs, lead, features)
    base_entry = behind_prefix(lead_entry if clean is None else embedded(model, inputs, base, features), start)

    def carried(order, bundle, first):
        rows = jnp.maximum(order, 0)
        ordered = bundle.variants.take(rows)
        entry = behind_prefix(base_entry, bundle.begin - start)
        return Carried(
            variants=ordered,
            first_layer=jnp.where(order < 0, depth + 1, first[rows]),  # an entry of -1 never begins
            window=model.window(inputs, bundle.begin),
            base_entry=entry,
            variant_entry=entered(model, inputs, base, ordered, entry, features, bundle.begin),
            begin=bundle.begin,
            chunk=bundle.chunk,
        )

    fixed = Fixed(
        text=text,
        whole_window=model.window(inputs),
        window=model.window(inputs, start),
        lead=lead,
        base=base,
        lead_entry=lead_entry,
        base_entry=base_entry,
        bundles=tuple(map(carried, orders, bundles, firsts)),
        missing=frozenset().union(*(bundle.variants.missing for bundle in bundles)),
        start=start,
    )
    states = _through_layers(fixed, depth, has_clean=clean is not None)
    base_state = states.lead[:, start:] if states.base is None else states.base

    def read_out(x, interventions):
        if reads_normed(read):
            x = Probe(interventions, NO_TAPS, Context(start=start))("text.norm", text.norm(x))
        return read(model, x, start)

    def read_bundle(bundle: Carried, state):
        before, after = jnp.split(base_state, [bundle.begin - start], 1)

        def read_variant(number):
            # A variant that acts only behind the layers has not begun yet, so it equals the base run.
            x = jnp.where(bundle.first_layer[number] < depth, state[number], after)
            x = jnp.concatenate([before, x], 1)
            return read_out(x, (*base, *bundle.variants.take(number).interventions))

        return jax.lax.map(read_variant, jnp.arange(len(bundle.first_layer)), batch_size=bundle.chunk)

    of_variants = tuple(map(read_bundle, fixed.bundles, states.variants))
    of_lead = read_out(states.lead[:, start:], lead)
    if clean is None:
        return Runs(of_variants, of_lead, None)
    return Runs(of_variants, read_out(base_state, base), of_lead)


def _through_layers(fixed: Fixed, depth: int, has_clean: bool) -> States:
    """The states after the last layer."""
    variants = []
    for bundle in fixed.bundles:
        x = bundle.base_entry.x
        entry = bundle.variant_entry
        variants.append(jnp.zeros((len(bundle.first_layer), *x.shape), x.dtype) if entry is None else entry.x)
    states = States(fixed.lead_entry.x, fixed.base_entry.x if has_clean else None, tuple(variants))

    def step(states, index):
        return _through_layer(fixed, states, (layer_at(fixed.text.layers, index), index))

    return jax.lax.scan(step, states, jnp.arange(depth))[0]


def _through_layer(fixed: Fixed, states: States, scanned: tuple[Layer, jax.Array]) -> tuple[States, None]:
    """One layer of all runs."""
    layer, index = scanned
    before = states.lead[:, fixed.start :] if states.base is None else states.base
    lead, lead_kv, donors = _lead_step(fixed, layer, index, states.lead)
    base, base_kv = None, None
    if states.base is not None:
        base, base_kv = _base_step(fixed, layer, index, states.base, Beside(before, lead_kv, None, donors))
    beside = Beside(before, lead_kv, base_kv, donors)
    variants = tuple(
        _bundle_step(fixed, bundle, layer, index, state, beside)
        for bundle, state in zip(fixed.bundles, states.variants, strict=True)
    )
    return States(lead, base, variants), None


def _lead_step(
    fixed: Fixed, layer: Layer, index: Int[ArrayLike, ""], x: Float[ArrayLike, "batch length width"]
) -> tuple[Float[Array, "batch length width"], KeyValues, dict[str, Any]]:
    """The lead run's output, its keys and values, and the values that patches without a donor take."""
    probe = Probe(fixed.lead, dict.fromkeys(fixed.missing, Tap()), Context(index))
    deepstack = fixed.text.deepstack_at(fixed.lead_entry.deepstack, index)
    x, key_values = layer(x, fixed.text.at(fixed.whole_window, index), (), deepstack, probe)
    return x, key_values, _from(probe.taps, fixed.start)


def _from(donors: dict[str, Any], start: int) -> dict[str, Any]:
    """The values, site -> ``(B, S, ...)``, of the tokens from index ``start`` on."""
    return {site: jax.lax.slice_in_dim(value, start, None, axis=token_axis(site)) for site, value in donors.items()}


def _base_step(
    fixed: Fixed,
    layer: Layer,
    index: Int[ArrayLike, ""],
    x: Float[ArrayLike, "batch tokens width"],
    beside: Beside,
) -> tuple[Float[Array, "batch tokens width"], KeyValues]:
    """The base run's output, and its keys and values. It is needed only if the lead run is the clean run."""
    probe = Probe(fixed.base, NO_TAPS, Context(index, start=fixed.start))
    deepstack = fixed.text.deepstack_at(fixed.base_entry.deepstack, index)
    window, past = fixed.text.at(fixed.window, index), beside.past(fixed.start, fixed.start)
    return layer(x, window, past, deepstack, probe)


def _bundle_step(
    fixed: Fixed,
    bundle: Carried,
    layer: Layer,
    index: Int[ArrayLike, ""],
    states: Float[ArrayLike, "variants batch tokens width"],
    beside: Beside,
) -> Float[Array, "variants batch tokens width"]:
    """The states of a bundle's variants after a layer. Those that have not begun keep theirs, which nobody reads."""
    past = beside.past(fixed.start, bundle.begin)
    behind = bundle.begin - fixed.start
    before, donors = beside.before[:, behind:], _from(beside.donors, behind)
    window = _repeated(fixed.text.at(bundle.window, index), bundle.chunk)

    def chunk_step(number, states):
        return _chunk_step(fixed, bundle, layer, index, number * bundle.chunk, states, before, window, past, donors)

    alive = jnp.sum(bundle.first_layer <= index)
    return jax.lax.fori_loop(0, -(-alive // bundle.chunk), chunk_step, states)


def _chunk_step(
    fixed: Fixed,
    bundle: Carried,
    layer: Layer,
    index: Int[ArrayLike, ""],
    at: Int[ArrayLike, ""],
    states: Float[ArrayLike, "variants batch tokens width"],
    before: Float[ArrayLike, "batch tokens width"],
    window: Window,
    past: list[KeyValues],
    donors: dict[str, Any],
) -> Float[Array, "variants batch tokens width"]:
    """The states of a bundle's variants after one chunk of them, from index ``at`` on, went through the layer.

    ``before`` is the base run's state, which a variant has before its first layer. ``window`` is for the rows of a
    chunk. All begin with the bundle's first token.
    """
    chunk = bundle.chunk
    x = jax.lax.dynamic_slice_in_dim(states, at, chunk)
    begins = jax.lax.dynamic_slice_in_dim(bundle.first_layer, at, chunk) == index
    if bundle.variant_entry is not None:  # in layer 0, variants have embeddings that differ from the base run's
        begins = begins & (index > 0)
    x = jnp.where(begins[:, None, None, None], before, x)
    deepstack = _chunk_deepstack(fixed, bundle, index, at)
    # The base run's interventions and the chunk's act as one intervention on the chunk's rows.
    interventions = (*fixed.base, *bundle.variants.chunk(at, chunk))
    axes = ((None,) * len(fixed.base)) + bundle.variants.axes
    ctx = Context(index, donors=donors, start=bundle.begin)
    probe = Probe((PerVariant(interventions, axes, chunk),), NO_TAPS, ctx)
    by_sample = x.swapaxes(0, 1)  # (B, chunk, S', D)
    rows = by_sample.reshape(-1, *x.shape[2:])  # (B * chunk, S', D)
    x = layer(rows, window, past, deepstack, probe)[0].reshape(by_sample.shape).swapaxes(0, 1)
    return jax.lax.dynamic_update_slice_in_dim(states, x, at, 0)


def _chunk_deepstack(fixed: Fixed, bundle: Carried, index: jax.Array, at: jax.Array) -> jax.Array | None:
    """The DeepStack tensor that is added to the rows of a chunk after this layer, ``(B * chunk, S', D)``."""
    if bundle.variant_entry is None or bundle.variant_entry.deepstack is None:
        deepstack = fixed.text.deepstack_at(bundle.base_entry.deepstack, index)
        return None if deepstack is None else jnp.repeat(deepstack, bundle.chunk, 0)
    of_chunk = jax.lax.dynamic_slice_in_dim(bundle.variant_entry.deepstack, at, bundle.chunk)
    by_sample = of_chunk.transpose(1, 2, 0, 3, 4)  # (K, B, chunk, S', D)
    rows = by_sample.reshape(len(by_sample), -1, *by_sample.shape[3:])
    return fixed.text.deepstack_at(rows, index)


def _repeated(window: Window, count: int) -> Window:
    """One layer's window for ``count`` variants of each sample; they share the past and its mask."""
    rope, mask = jax.tree.map(lambda a: jnp.repeat(a, count, 0), (window.rope, window.mask))
    return window._replace(rope=rope, mask=mask)
