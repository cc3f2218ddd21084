"""The sweep engine: N variants of one base run, exactly, at a fraction of the cost of N runs.

Three facts make it cheap. Attention is causal, so the tokens before the first one that any variant changes are computed
once and only attended to (shared prefix). A variant that first acts in layer l equals the base run below l, so it
starts there from the base run's residual (shared depth). And only what the read-out looks at is unembedded.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from vlm_jax import Inputs, Model, UserError
from vlm_jax.decoder import Window
from vlm_jax.generate import continued, decoding
from vlm_jax.model import Embedded
from vlm_jax.sites import NO_TAPS, Context, Probe, Tap, check, layered

#: Tokens of the variants that are worked on together: enough rows for a full matmul, few enough that hardly any
#: variant is carried along before its first layer. An accelerator wants more rows.
CHUNK_TOKENS = {"cpu": 256}
_ACCELERATOR_TOKENS = 8192
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


class Shared(NamedTuple):
    """What all runs share: the embedded tokens of the window ``(B, S, D)``, who sees whom, and the keys and values of
    the tokens before it."""

    embedded: Embedded
    window: Window
    past: tuple


def share(model: Model, inputs: Inputs, start: int, interventions=()) -> Shared:
    """Runs the tokens before ``start`` once."""
    text = model.text
    embedded, _ = model.embed(inputs, interventions)
    x, deepstack = embedded
    window, past = model.window(inputs, start), ()
    if start:
        is_image = None if inputs.is_image is None else inputs.is_image[:, :start]
        head = text.window(inputs.attention_mask[:, :start], inputs.position_ids[:, :, :start], is_image=is_image)
        added = None if deepstack is None else deepstack[:, :, :start]
        _, kv, _ = text.scan(x[:, :start], head, deepstack=added, interventions=interventions)
        past = (kv,)
    return Shared(Embedded(x[:, start:], None if deepstack is None else deepstack[:, :, start:]), window, past)


def run(model: Model, shared: Shared, interventions=(), taps=NO_TAPS) -> tuple[jax.Array, dict]:
    """The window's tokens once: ``x (B, S, D)`` after the final norm, and taps."""
    (x, deepstack), window, past = shared
    x, _, tapped = model.text.scan(x, window, past=past, deepstack=deepstack, interventions=interventions, taps=taps)
    return _normed(model, x, window, interventions), tapped


def _normed(model: Model, x: jax.Array, window: Window, interventions) -> jax.Array:
    return Probe(interventions, NO_TAPS, Context(start=window.start))("text.norm", model.text.norm(x))


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
        if not hasattr(i, "tokens") or any(s.startswith(("visual.", "projector.")) for s in i.sites):
            return 0
        axes = variants.axes[number]
        where = jax.vmap(lambda i: i.tokens(), in_axes=(axes,), out_axes=0)(i) if jax.tree.leaves(axes) else i.tokens()
        if where is None:
            return 0
        marked = np.asarray(where).reshape(-1, length).any(0)
        seen.append(int(marked.argmax()) if marked.any() else length)
    return min(seen, default=0)


def _check_acts(variants: Variants) -> None:
    """Refuses variants of which a part acts nowhere."""

    def acts(interventions):
        found = []
        for i in (i for i in interventions if hasattr(i, "active")):
            tokens = i.tokens()
            active = functools.reduce(jnp.logical_or, [jnp.any(table) for table in i.active().values()], False)
            found.append(active if tokens is None else active & jnp.any(tokens))
        return jnp.array(found)

    for number, found in enumerate(np.asarray(jax.vmap(acts, in_axes=(variants.axes,))(variants.interventions))):
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


def sweep(
    model: Model,
    inputs: Inputs,
    variants: Variants | Sequence[Any],
    read: Read,
    *,
    base: Sequence[Any] = (),
    engine: Literal["sweep", "naive"] = "sweep",
    start: int | None = None,
    chunk: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Any:
    """What ``read`` makes of every variant of a base run.

    Args:
        variants: :class:`Variants`, or a list to be stacked. They may differ in layers, heads, tokens and strengths.
        read: see :mod:`interventions.read`; its ``first`` is the first token it looks at.
        base: interventions of every run, applied before the variant's own.
        engine: "sweep", or "naive": the whole model for every variant (the oracle).
        start: tokens before this are shared. Found from ``variants`` and ``read`` where None.
        chunk: variants that are worked on together.
        mesh: shards the variants over the first axis of a mesh. To shard samples, shard ``inputs``.

    Returns:
        The read-outs with a leading axis of N, in the order of ``variants``.

    Raises:
        UserError: a variant that acts nowhere, or variants that differ in more than values.
    """
    variants = variants if isinstance(variants, Variants) else stack(variants)
    base = tuple(base)
    if engine not in ("sweep", "naive"):
        raise UserError(f"unknown engine {engine!r}: use 'sweep' or 'naive'")
    present, depths = model.sites(inputs), model.depths
    check((*base, *variants.take(0).interventions), (), present, depths)
    _check_acts(variants)
    if engine == "naive":
        return _naive(model, inputs, base, variants, read)
    if start is None:
        start = min(first_token(variants, inputs.input_ids.shape[1]), read.first)
    start = prefix(model, inputs, start)
    return _sweep(model, inputs, base, variants, read, start=start, chunk=chunk, mesh=mesh)


@functools.partial(jax.jit, static_argnames=("start", "chunk", "mesh"))
def _sweep(model: Model, inputs: Inputs, base, variants: Variants, read: Read, *, start, chunk, mesh):
    shared = share(model, inputs, start, base)
    _, tapped = run(model, shared, base, {"text.resid_pre": Tap()})
    embedded = None
    if any(site.startswith(("visual.", "projector.")) for site in variants.sites):
        embedded = _embed_variants(model, inputs, base, variants, start)
    return sweep_window(
        model, shared, tapped["text.resid_pre"], variants, read, base=base, embedded=embedded, chunk=chunk, mesh=mesh
    )


@jax.jit
def _naive(model: Model, inputs: Inputs, base, variants: Variants, read: Read):
    def one(number):
        interventions = (*base, *variants.take(number).interventions)
        return read(model, model(inputs, interventions, ["text.norm"]).taps["text.norm"], 0)

    return jax.lax.map(one, jnp.arange(len(variants)))


def _embed_variants(model: Model, inputs: Inputs, base, variants: Variants, start: int) -> Embedded:
    """What enters layer 0 in each variant, ``x (N, B, S, D)``, ``deepstack (N, K, B, S, D)``: the vision tower is run
    for every variant."""

    def one(number):
        (x, deepstack), _ = model.embed(inputs, (*base, *variants.take(number).interventions))
        return Embedded(x[:, start:], None if deepstack is None else deepstack[:, :, start:])

    return jax.lax.map(one, jnp.arange(len(variants)))


def sweep_window(
    model: Model,
    shared: Shared,
    resid: jax.Array,
    variants: Variants,
    read: Read,
    *,
    base=(),
    embedded: Embedded | None = None,
    chunk: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Any:
    """The engine itself, on the tokens of a window; for use inside ``jit``.

    Args:
        resid: ``(L, B, S, D)``, the base run's ``resid_pre`` of every layer.
        embedded: what enters layer 0 in each variant, where that differs in more than ``text.embeddings``.
    """
    own, window, past = shared
    depth, batch, length, _ = resid.shape
    # Python numbers, which must not be traced.
    fixed = {"start": window.start, "causal": window.causal, "decoding": window.decoding}
    if chunk is None:
        tokens = CHUNK_TOKENS.get(jax.default_backend(), _ACCELERATOR_TOKENS)
        chunk = max(1, tokens // (batch * length))
    first = first_layers(variants, depth)
    # The variants of higher first layers come behind, so that those alive in a layer are the first few chunks.
    order = jnp.argsort(first)
    devices = 1 if mesh is None else mesh.devices.shape[0]
    chunk = min(chunk, -(-len(variants) // devices))
    step = chunk * devices
    padded = jnp.pad(order, (0, -len(variants) % step), constant_values=-1)
    # Devices take turns in the order of the first layers, so each has its share of the long and the short runs.
    places = padded.reshape(-1, devices).T.reshape(-1)

    def work(places, model, own, window, past, resid, variants, read, base, first, embedded):
        text, count, window = model.text, len(places), window._replace(**fixed)
        mine = jnp.maximum(places, 0)
        # A variant that only fills a chunk up never comes alive: its first layer lies behind the last.
        starts = jnp.where(places < 0, depth + 1, first[mine])
        held = variants.take(mine)
        leaves, structure = jax.tree.flatten(held.interventions)
        at_entry = any(not layered(site) and site != "text.norm" for site in held.sites)
        deepstack = None if embedded is None or embedded.deepstack is None else embedded.deepstack[mine]

        def slice_of(array, at):
            return jax.lax.dynamic_slice_in_dim(array, at, chunk)

        def interventions_of(at):
            parts = [slice_of(leaf, at) if own else leaf for leaf, own in zip(leaves, held.mapped, strict=True)]
            return structure.unflatten(parts)

        def through_layer(live, scanned):
            layer, index, past, before = scanned
            here = text.at(window, index)

            def one(x, interventions, added):
                added = text.deepstack_at(own.deepstack if added is None else added, index)
                probe = Probe((*base, *interventions), NO_TAPS, Context(index, start=window.start))
                return layer(x, here, past, added, probe)[0]

            def step(i, live):
                at = i * chunk
                begins = slice_of(starts, at) == index
                x = slice_of(live, at)
                if at_entry:  # layer 0 reads what the variants made of the embeddings
                    begins = begins & (index > 0)
                x = jnp.where(begins[:, None, None, None], before, x)
                added = None if deepstack is None else slice_of(deepstack, at)
                axes = (0, held.axes, None if added is None else 0)
                x = jax.vmap(one, in_axes=axes)(x, interventions_of(at), added)
                return jax.lax.dynamic_update_slice_in_dim(live, x, at, 0)

            alive = jnp.sum(starts <= index)
            return jax.lax.fori_loop(0, -(-alive // chunk), step, live), None

        if at_entry:

            def enter(x, interventions):
                return Probe(interventions, NO_TAPS, Context(start=window.start))("text.embeddings", x)

            if embedded is None:
                live = jax.vmap(enter, in_axes=(None, held.axes))(own.x, held.interventions)
                live = jnp.broadcast_to(live, (count, *own.x.shape))
            else:  # already through the embeddings' site
                live = embedded.x[mine]
        else:
            live = jnp.zeros((count, *own.x.shape), own.x.dtype)
        live, _ = jax.lax.scan(through_layer, live, (text.layers, jnp.arange(depth), past, resid))

        def finish(number):
            interventions = (*base, *held.take(number).interventions)
            return read(model, _normed(model, live[number], window, interventions), window.start)

        return jax.lax.map(finish, jnp.arange(count), batch_size=chunk)

    args = (model, own, window, past, resid, variants, read, base, first, embedded)
    if mesh is None:
        out = work(places, *args)
    else:
        by_variant = PartitionSpec(mesh.axis_names[0])
        specs = (by_variant, *(PartitionSpec() for _ in args))
        out = jax.shard_map(work, mesh=mesh, in_specs=specs, out_specs=by_variant, check_vma=False)(places, *args)
    back = (
        jnp.zeros(len(variants), jnp.int32)
        .at[jnp.where(places < 0, len(variants), places)]
        .set(jnp.arange(len(places)), mode="drop")
    )
    return jax.tree.map(lambda a: a[back], out)


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
    check((*base, *variants.take(0).interventions), (), model.sites(inputs), model.depths)
    _check_acts(variants)
    how = decoding(model, max_new_tokens, steps)
    # The last token of every prompt must lie in the window.
    last = int(np.asarray(inputs.attention_mask)[:, ::-1].argmax(1).max())
    length = inputs.input_ids.shape[1]
    start = prefix(model, inputs, min(first_token(variants, length), length - 1 - last))
    if chunk is None:
        tokens = CHUNK_TOKENS.get(jax.default_backend(), _ACCELERATOR_TOKENS)
        chunk = max(1, tokens // (len(inputs.input_ids) * (length - start)))
    return _generate_variants(model, inputs, tuple(base), variants, start=start, chunk=chunk, how=how)


@functools.partial(jax.jit, static_argnames=("start", "chunk", "how"))
def _generate_variants(model: Model, inputs: Inputs, base, variants: Variants, *, start, chunk, how):
    shared = share(model, inputs, start, base)
    vision = any(site.startswith(("visual.", "projector.")) for site in variants.sites)

    def one(number):
        interventions = (*base, *variants.take(number).interventions)
        if vision:
            own, _ = model.embed(inputs, interventions)
        else:
            own = shared.embedded
            probe = Probe(variants.take(number).interventions, NO_TAPS, Context(start=start))
            own = own._replace(x=probe("text.embeddings", own.x))
        return continued(model, inputs, own, shared.window, shared.past, interventions, how, jax.random.key(0))

    return jax.lax.map(one, jnp.arange(len(variants)), batch_size=chunk)
