"""The sweep engine: N variants of one base run, exactly, at a fraction of the cost of N runs.

Three facts make it cheap. Attention is causal, so the tokens before the first one that any variant changes are computed
once and only attended to (shared prefix). A variant that first acts in layer l equals the base run below l, so it
starts there from the base run's residual (shared depth). And only what the read-out looks at is unembedded.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from interventions.kinds.patch import Patch
from vlm_jax import Inputs, Model, UserError
from vlm_jax.generate import continued, decoding
from vlm_jax.mesh.sharding import shards
from vlm_jax.model import Embedded
from vlm_jax.nn.decoder import Window
from vlm_jax.runs.processes import fetch
from vlm_jax.sites import LAYER_SITES, NO_TAPS, Context, Probe, Tap, check, layered, token_axis
from vlm_jax.vision.blocks import Features

#: Tokens of the variants that are worked on together: enough rows for a full matmul, few enough that hardly any
#: variant is carried along before its first layer. An accelerator wants more rows.
CHUNK_TOKENS = {"cpu": 192}
_ACCELERATOR_TOKENS = 8192
#: What the states of the variants that are swept at once may take.
LIVE_BYTES = 2**30
#: The shared prefix ends at a multiple of this, so that prompts of nearly the same shape share a program.
PREFIX_BUCKET = 8

#: ``(model, x (B, S, D) after the final norm, first token of x) -> any pytree``.
Read = Callable[[Model, jax.Array, int], Any]


@flax.struct.dataclass
class Variants:
    """N variants: a tuple of interventions whose ``mapped`` leaves have a leading axis of N; the others are shared."""

    interventions: tuple
    mapped: tuple[bool, ...] = flax.struct.field(pytree_node=False)

    def __len__(self) -> int:
        sizes = {len(leaf) for leaf, own in zip(jax.tree.leaves(self.interventions), self.mapped, strict=True) if own}
        if len(sizes) != 1:
            raise UserError(
                f"the variants' arrays have {sorted(sizes) or 'no'} leading sizes: stack at least one variant"
            )
        return sizes.pop()

    @property
    def axes(self) -> tuple:
        """For ``jax.vmap``."""
        return jax.tree.structure(self.interventions).unflatten([0 if own else None for own in self.mapped])

    def take(self, rows) -> "Variants":
        """Those of ``rows``, an index or an array of them."""
        leaves, structure = jax.tree.flatten(self.interventions)
        leaves = [leaf[rows] if own else leaf for leaf, own in zip(leaves, self.mapped, strict=True)]
        return Variants(structure.unflatten(leaves), self.mapped)

    @property
    def sites(self) -> frozenset[str]:
        return frozenset().union(*(i.sites for i in self.interventions))


def stack(variants: Sequence[Any]) -> Variants:
    """Variants, each an intervention or a tuple of them, as one batch. Arrays that are one and the same object in all
    of them (a donor) stay shared.

    Raises:
        UserError: if the variants differ in more than their arrays' values.
    """
    tuples = [v if isinstance(v, tuple) else (v,) for v in variants]
    if not tuples:
        raise UserError("there is no variant to stack: give at least one")
    leaves, structures = zip(*(jax.tree.flatten(v) for v in tuples), strict=True)
    shapes = [[(np.shape(a), jnp.result_type(a)) for a in own] for own in leaves]
    odd = [i for i in range(len(tuples)) if structures[i] != structures[0] or shapes[i] != shapes[0]]
    if odd:
        raise UserError(
            f"variant {odd[0]} differs from variant 0 in more than values (kind, site, option, shape): sweep them apart"
        )
    mapped = tuple(any(a is not column[0] for a in column) for column in zip(*leaves, strict=True))
    if not any(mapped) and mapped:
        mapped = (True, *mapped[1:])
    stacked = [
        jnp.stack(column) if own else column[0] for own, column in zip(mapped, zip(*leaves, strict=True), strict=True)
    ]
    return Variants(structures[0].unflatten(stacked), mapped)


@dataclasses.dataclass(frozen=True)
class PerVariant:
    """N interventions as one, on values whose batch holds all variants' rows, sample by sample ``(B * N, ...)``: on a
    mesh that splits the samples, all variants of one are on one device."""

    interventions: tuple
    axes: tuple
    count: int

    @property
    def sites(self) -> frozenset[str]:
        return frozenset().union(*(i.sites for i in self.interventions))

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        def apart(x):
            return x.reshape(-1, self.count, *x.shape[1:])

        def one(interventions, value, input, own):
            read = None if own is None else ctx.read.replace(own=own)
            return Probe(interventions, NO_TAPS, ctx)(site, value, input, read)

        input = None if ctx.input is None else apart(ctx.input)
        own = None if ctx.read is None else apart(ctx.read.own)
        axes = (self.axes, 1, None if input is None else 1, None if own is None else 1)
        values = jax.vmap(one, in_axes=axes, out_axes=1)(self.interventions, apart(value), input, own)
        return values.reshape(value.shape)


class Runs(NamedTuple):
    """The read-outs of a sweep: of the variants, with a leading axis of N; of the base run; and of the clean run (None
    where there is none)."""

    variants: Any
    base: Any
    clean: Any


def _tiled(window: Window, count: int) -> Window:
    """The window of one layer for ``count`` variants, which share their past and its mask."""
    rope, mask = jax.tree.map(lambda a: jnp.repeat(a, count, 0), (window.rope, window.mask))
    return window._replace(rope=rope, mask=mask)


def first_layers(variants: Variants, depth: int) -> jax.Array:
    """The layer in which each variant first acts ``(N,)``: 0 where it changes what enters the layers, ``depth`` where
    it acts behind them."""

    def first(interventions):
        lowest = jnp.int32(depth)
        for i in interventions:
            active = i.active() if hasattr(i, "active") else {}
            for site in i.sites:
                if not layered(site) or site.startswith("visual."):
                    here = depth if site == "text.norm" else 0
                elif site in active:
                    table = jnp.asarray(active[site])
                    here = jnp.where(table.any(), jnp.argmax(table), depth)
                else:
                    here = 0
                lowest = jnp.minimum(lowest, here)
        return lowest

    return jax.vmap(first, in_axes=(variants.axes,))(variants.interventions)


def first_token(variants: Variants, length: int) -> int:
    """The first token of the prompt that any variant changes (concrete arrays only)."""
    seen = []
    for number, i in enumerate(variants.interventions):
        if isinstance(i, Patch) and i.missing == i.sites:
            continue  # the clean run's values differ from the base run's only where those two differ
        if not hasattr(i, "tokens") or any(s.startswith(("visual.", "projector.")) for s in i.sites):
            return 0
        axes = variants.axes[number]
        where = jax.vmap(lambda i: i.tokens(), in_axes=(axes,), out_axes=0)(i) if jax.tree.leaves(axes) else i.tokens()
        if where is None:
            seen.append(getattr(i, "start", 0))
            continue
        marked = fetch(where).reshape(-1, length).any(0)
        seen.append(int(marked.argmax()) if marked.any() else length)
    return min(seen, default=length)


def _check_acts(variants: Variants) -> None:
    """Refuses variants of which a part acts nowhere."""

    def acts(interventions):
        found = []
        for i in (i for i in interventions if hasattr(i, "active")):
            tokens = i.tokens() if hasattr(i, "tokens") else None
            active = functools.reduce(jnp.logical_or, [jnp.any(table) for table in i.active().values()], False)
            found.append(active if tokens is None else active & jnp.any(tokens))
        return jnp.array(found)

    for number, found in enumerate(fetch(jax.vmap(acts, in_axes=(variants.axes,))(variants.interventions))):
        if not found.all():
            kind = type(variants.interventions[int(found.argmin())]).__name__
            raise UserError(f"variant {number} touches nothing: its {kind} acts in no layer or head, or on no token")


def outside_images(is_image: np.ndarray, start: int) -> int:
    """The nearest place at or before ``start`` that is not inside an image, whose tokens see each other."""
    while start and (is_image[:, start - 1] & is_image[:, start]).any():
        start -= 1
    return start


def prefix(model: Model, inputs: Inputs, start: int) -> int:
    """How many tokens can be shared if no run changes any before ``start``."""
    start = start // PREFIX_BUCKET * PREFIX_BUCKET
    if model.config.text.bidirectional_images and inputs.is_image is not None:
        start = outside_images(np.asarray(inputs.is_image), start)
    return start


def sweep(model: Model, inputs: Inputs, variants: "Variants | Sequence[Any]", read: Read, **how: Any) -> Any:
    """What ``read`` makes of every variant of a base run, with a leading axis of N: :func:`sweep_runs` without the
    read-outs of the other runs."""
    return sweep_runs(model, inputs, variants, read, **how).variants


def sweep_runs(
    model: Model,
    inputs: Inputs,
    variants: Variants | Sequence[Any],
    read: Read,
    *,
    base: Sequence[Any] = (),
    clean: Sequence[Any] | None = None,
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
        read: see :mod:`interventions.engine.read`; its field ``first`` is the first token it looks at (0 without).
        base: interventions of every variant, applied before its own.
        clean: interventions of a clean run, () for none: it supplies the values of patches without a donor. Causal
            tracing has the noise in ``base`` ("denoise"); with the noise in ``clean`` instead, patches spread it.
        engine: "sweep", or "naive": the whole model for every variant (the oracle).
        start: share at most so many tokens; as many as can be where None.
        chunk: variants that are worked on together.
        features: ``model.features(inputs)[0]``, to run the vision tower once for several sweeps of the same images.
        mesh: shards the variants over the first axis of a mesh, each device with a whole model. To shard samples, shard
            ``inputs``.

    Raises:
        UserError: a variant that acts nowhere, or variants that differ in more than values.
    """
    variants = variants if isinstance(variants, Variants) else stack(variants)
    base, clean = tuple(base), None if clean is None else tuple(clean)
    if engine not in ("sweep", "naive"):
        raise UserError(f"unknown engine {engine!r}: use 'sweep' or 'naive'")
    own = variants.take(0).interventions
    check((*base, *own, *(clean or ())), (), model.sites(inputs), model.depths, inputs.input_ids.shape)
    _check_acts(variants)
    missing = _missing(variants)
    if missing and clean is None:
        raise UserError(
            f"Patch has no donor at {sorted(missing)[0]!r}: give its values, or clean=() to take the clean run's"
        )
    if not missing <= LAYER_SITES:
        raise UserError(f"a clean run supplies no {sorted(missing - LAYER_SITES)[0]!r}: give the donor's values")
    most = shared_prefix(model, inputs, variants, read, base, clean)
    start = most if start is None else prefix(model, inputs, min(start, most))
    if hasattr(read, "first"):  # said what it had to, and programs must not differ for it
        read = read.replace(first=0)
    if engine == "naive":
        return _naive(model, inputs, clean, base, variants, read)
    chunk = chunk_of(inputs, start) if chunk is None else chunk
    count, block, parts = len(variants), block_of(model, inputs, start, len(variants), chunk), []
    for at in range(0, count, block):
        part = variants.take(np.minimum(np.arange(at, at + block), count - 1))
        parts.append(
            sweep_program(model, inputs, clean, base, part, read, features, start=start, chunk=chunk, mesh=mesh)
        )
    if len(parts) == 1:
        return parts[0]
    joined = jax.tree.map(lambda *a: jnp.concatenate(a)[:count], *(runs.variants for runs in parts))
    return parts[0]._replace(variants=joined)


def chunk_of(inputs: Inputs, start: int, backend: str | None = None) -> int:
    """How many variants of the tokens from ``start`` on to work on together, on this machine or another kind."""
    batch, length = inputs.input_ids.shape
    tokens = CHUNK_TOKENS.get(backend or jax.default_backend(), _ACCELERATOR_TOKENS) * shards("batch", batch)
    return max(1, tokens // (batch * (length - start)))


def block_of(model: Model, inputs: Inputs, start: int, count: int, chunk: int) -> int:
    """How many of ``count`` variants are swept at once: as many as their states fill the budget. The other runs are
    repeated for the rest."""
    batch, length = inputs.input_ids.shape
    state = batch * (length - start) * model.config.text.hidden_size * 4
    return min(count, max(chunk, LIVE_BYTES * shards("batch", batch) // state))


def shared_prefix(model: Model, inputs: Inputs, variants: Variants, read: Read, base=(), clean=None) -> int:
    """How many tokens the runs of a sweep share."""
    length = inputs.input_ids.shape[1]
    runs = [variants] if clean is None else [variants, *(stack([i]) for i in (*base, *clean))]
    return prefix(model, inputs, min(getattr(read, "first", 0), *(first_token(run, length) for run in runs)))


def _missing(variants: Variants) -> frozenset[str]:
    """The sites of patches that take the clean run's values."""
    return frozenset().union(*(i.missing for i in variants.interventions if isinstance(i, Patch)))


@jax.jit
def _naive(model: Model, inputs: Inputs, clean, base, variants: Variants, read: Read) -> Runs:
    missing = _missing(variants)

    def run(interventions, taps=()):
        tapped = model(inputs, interventions, ("text.norm", *taps)).taps
        return read(model, tapped.pop("text.norm"), 0), tapped

    clean_read, values = (None, {}) if clean is None else run(clean, missing)

    def one(number):
        own = variants.take(number).interventions
        return run((*base, *(i.filled(values) if isinstance(i, Patch) else i for i in own)))[0]

    return Runs(jax.lax.map(one, jnp.arange(len(variants))), run(base)[0], clean_read)


def _embed(model: Model, inputs: Inputs, interventions, features) -> Embedded:
    """What enters layer 0; the vision tower is run only where an intervention reaches into it."""
    inside = any(site.startswith(("visual.", "projector.")) for i in interventions for site in i.sites)
    return model.embed(inputs, interventions, features=None if inside else features)[0]


def _from(embedded: Embedded, start: int) -> Embedded:
    x, deepstack = embedded
    return Embedded(x[:, start:], None if deepstack is None else deepstack[:, :, start:])


@functools.partial(jax.jit, static_argnames=("start", "chunk", "mesh"))
def sweep_program(
    model: Model, inputs: Inputs, clean, base, variants: Variants, read: Read, features, *, start, chunk, mesh
) -> Runs:
    """One scan over the layers carries the clean run, the base run and every variant that is alive."""
    count, depth = len(variants), model.config.text.num_hidden_layers
    if features is None:
        features, _ = model.features(inputs)
    first = first_layers(variants, depth)
    # The variants of higher first layers come behind, so that those alive in a layer are the first few chunks.
    order = jnp.argsort(first)
    devices = 1 if mesh is None else mesh.devices.shape[0]
    chunk = min(chunk, -(-count // devices))
    padded = jnp.pad(order, (0, -count % (chunk * devices)), constant_values=-1)
    # Devices take turns in the order of the first layers, so each has its share of the long and the short runs.
    places = padded.reshape(-1, devices).T.reshape(-1)
    work = functools.partial(_work, start=start, chunk=chunk)
    args = (model, inputs, clean, base, variants, read, features, first)
    if mesh is not None:
        mine, same = PartitionSpec(mesh.axis_names[0]), PartitionSpec()
        work = jax.shard_map(
            work,
            mesh=mesh,
            in_specs=(mine, *(same for _ in args)),
            out_specs=Runs(mine, same, same),
            check_vma=False,
        )
    runs = work(places, *args)
    back = (
        jnp.zeros(count, jnp.int32).at[jnp.where(places < 0, count, places)].set(jnp.arange(len(places)), mode="drop")
    )
    return runs._replace(variants=jax.tree.map(lambda a: a[back], runs.variants))


def _work(places, model, inputs, clean, base, variants, read, features, first, *, start: int, chunk: int) -> Runs:
    """The variants at ``places`` (-1: none, to fill a chunk up), those of lower first layers first."""
    text, depth, total = model.text, model.config.text.num_hidden_layers, len(places)
    whole, window = model.window(inputs), model.window(inputs, start)
    # Whole prompts: the clean run, or without one the base run.
    lead = base if clean is None else clean
    entire = _embed(model, inputs, lead, features)
    own = _from(entire if clean is None else _embed(model, inputs, base, features), start)

    mine = jnp.maximum(places, 0)
    held = variants.take(mine)
    # What fills a chunk up never comes alive: its first layer lies behind the last.
    starts = jnp.where(places < 0, depth + 1, first[mine])
    leaves, structure = jax.tree.flatten(held.interventions)
    missing = _missing(variants)

    def slice_of(array, at):
        return jax.lax.dynamic_slice_in_dim(array, at, chunk)

    def interventions_at(at):
        """Those of the base run and of one chunk of variants, as one intervention on the chunk's rows."""
        parts = [slice_of(leaf, at) if moves else leaf for leaf, moves in zip(leaves, held.mapped, strict=True)]
        return PerVariant((*base, *structure.unflatten(parts)), ((None,) * len(base)) + held.axes, chunk)

    entered = _enter(model, inputs, base, held, own, features, start)

    def through_layer(carry, scanned):
        lead_x, own_x, live = carry
        layer, index = scanned
        here = text.at(window, index)
        probe = Probe(lead, dict.fromkeys(missing, Tap()), Context(index))
        before = own_x if clean is not None else lead_x[:, start:]
        lead_x, (k, v) = layer(lead_x, text.at(whole, index), (), text.deepstack_at(entire.deepstack, index), probe)
        past = [(k[:, :start], v[:, :start])] if start else []
        donors = {
            site: jax.lax.slice_in_dim(value, start, None, axis=token_axis(site)) for site, value in probe.taps.items()
        }
        if clean is not None:
            probe = Probe(base, NO_TAPS, Context(index, start=start))
            own_x, _ = layer(own_x, here, past, text.deepstack_at(own.deepstack, index), probe)
        here = _tiled(here, chunk)

        def step(i, live):
            at = i * chunk
            x = slice_of(live, at)
            begins = slice_of(starts, at) == index
            if entered is not None:  # layer 0 reads what the variants made of the embeddings
                begins = begins & (index > 0)
            x = jnp.where(begins[:, None, None, None], before, x)
            if own.deepstack is None:
                added = None
            elif entered is not None and entered.deepstack is not None:
                added = slice_of(entered.deepstack, at).transpose(1, 2, 0, 3, 4)
                added = added.reshape(len(own.deepstack), -1, *x.shape[2:])
                added = text.deepstack_at(added, index)
            else:
                added = jnp.repeat(text.deepstack_at(own.deepstack, index), chunk, 0)
            probe = Probe((interventions_at(at),), NO_TAPS, Context(index, donors=donors, start=start))
            rows = x.swapaxes(0, 1)
            x = layer(rows.reshape(-1, *x.shape[2:]), here, past, added, probe)[0].reshape(rows.shape)
            return jax.lax.dynamic_update_slice_in_dim(live, x.swapaxes(0, 1), at, 0)

        alive = jnp.sum(starts <= index)
        live = jax.lax.fori_loop(0, -(-alive // chunk), step, live)
        return (lead_x, own_x, live), None

    live = jnp.zeros((total, *own.x.shape), own.x.dtype) if entered is None else entered.x
    carry = (entire.x, own.x if clean is not None else None, live)
    (lead_x, own_x, live), _ = jax.lax.scan(through_layer, carry, (text.layers, jnp.arange(depth)))
    # What acts behind the layers never came alive in them.
    last = lead_x[:, start:] if clean is None else own_x
    live = jnp.where((starts >= depth)[:, None, None, None], last, live)

    def finish(x, interventions):
        x = Probe(interventions, NO_TAPS, Context(start=start))("text.norm", text.norm(x))
        return read(model, x, start)

    out = jax.lax.map(
        lambda n: finish(live[n], (*base, *held.take(n).interventions)), jnp.arange(total), batch_size=chunk
    )
    lead_read = finish(lead_x[:, start:], lead)
    return Runs(out, lead_read, None) if clean is None else Runs(out, finish(own_x, base), lead_read)


def _enter(model: Model, inputs: Inputs, base, held: Variants, own: Embedded, features, start: int) -> Embedded | None:
    """What enters layer 0 in each variant, ``x (N, B, S, D)``, with ``deepstack (N, K, B, S, D)`` where the variants
    reach into the vision tower; None where all enter as the base run does."""
    sites = [site for site in held.sites if not layered(site) or site.startswith("visual.")]
    if any(site.startswith(("visual.", "projector.")) for site in sites):

        def one(number):
            return _from(_embed(model, inputs, (*base, *held.take(number).interventions), features), start)

        size = next(len(a) for a, moves in zip(jax.tree.leaves(held.interventions), held.mapped, strict=True) if moves)
        return jax.lax.map(one, jnp.arange(size))
    if "text.embeddings" not in sites:
        return None

    def enter(x, interventions):
        return Probe(interventions, NO_TAPS, Context(start=start))("text.embeddings", x)

    return Embedded(jax.vmap(enter, in_axes=(None, held.axes), out_axes=0)(own.x, held.interventions), None)


def generate_variants(
    model: Model,
    inputs: Inputs,
    variants: Variants | Sequence[Any],
    max_new_tokens: int,
    *,
    base: Sequence[Any] = (),
    steps: Literal["all", "prefill"] = "all",
    chunk: int | None = None,
) -> jax.Array:
    """Greedy answers of every variant, ``(N, B, max_new_tokens)``: :func:`vlm_jax.generate` for N variants whose keys
    and values of the shared prefix are one copy.

    Args:
        chunk: variants that generate together.
    """
    variants = variants if isinstance(variants, Variants) else stack(variants)
    own = variants.take(0).interventions
    check((*base, *own), (), model.sites(inputs), model.depths, inputs.input_ids.shape)
    _check_acts(variants)
    how = decoding(model, max_new_tokens, steps)
    # The last token of every prompt must lie in the window.
    last = int(np.asarray(inputs.attention_mask)[:, ::-1].argmax(1).max())
    length = inputs.input_ids.shape[1]
    start = prefix(model, inputs, min(first_token(variants, length), length - 1 - last))
    chunk = chunk_of(inputs, start) if chunk is None else chunk
    return _generate_variants(model, inputs, tuple(base), variants, start=start, chunk=chunk, how=how)


@functools.partial(jax.jit, static_argnames=("start", "chunk", "how"))
def _generate_variants(model: Model, inputs: Inputs, base, variants: Variants, *, start, chunk, how):
    text = model.text
    features, _ = model.features(inputs)
    entire = _embed(model, inputs, base, features)
    past = ()
    if start:
        is_image = None if inputs.is_image is None else inputs.is_image[:, :start]
        head = text.window(inputs.attention_mask[:, :start], inputs.position_ids[:, :, :start], is_image=is_image)
        added = None if entire.deepstack is None else entire.deepstack[:, :, :start]
        past = (text.scan(entire.x[:, :start], head, deepstack=added, interventions=base)[1],)
    entered = _enter(model, inputs, base, variants, _from(entire, start), features, start)
    window = model.window(inputs, start)

    def one(number):
        own = _from(entire, start)
        if entered is not None:
            own = own._replace(x=entered.x[number])
            own = own if entered.deepstack is None else own._replace(deepstack=entered.deepstack[number])
        interventions = (*base, *variants.take(number).interventions)
        return continued(model, inputs, own, window, past, interventions, how)

    return jax.lax.map(one, jnp.arange(len(variants)), batch_size=chunk)
