"""Greedy and sampled generation with a key-value cache, one token a step, rows of different lengths."""

import functools
import itertools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError
from vlm_jax.inputs import Inputs
from vlm_jax.model import Embedded, Model
from vlm_jax.nn.decoder import Window
from vlm_jax.sites import NO_TAPS, Context, Probe, check


def generate(
    model: Model,
    inputs: Inputs,
    max_new_tokens: int,
    interventions=(),
    *,
    steps: Literal["all", "prefill"] = "all",
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    eos_token_id: int | tuple[int, ...] | None = None,
    pad_token_id: int | None = None,
) -> jax.Array:
    """Continues every prompt.

    Args:
        inputs: prompts padded on either side.
        interventions: act on the prompt and, as far as their tokens reach there, on every new token.
        steps: "prefill" keeps the interventions to the prompt: new tokens read what they left, and are untouched.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it and sampled with ``key``.
        top_p: sample from the smallest set of tokens whose probability reaches this.
        eos_token_id: one or several ids that end a row; the config's where None.
        pad_token_id: what follows in an ended row; the config's where None.

    Returns:
        ``(B, max_new_tokens)`` int32, the end token included.
    """
    check(interventions, (), model.sites(inputs), model.depths, inputs.input_ids.shape)
    how = decoding(model, max_new_tokens, steps, bool(temperature), eos_token_id, pad_token_id)
    if temperature and key is None:
        raise UserError("sampling needs a key: pass key=jax.random.key(seed)")
    sampling = (jnp.float32(temperature), jnp.float32(top_p), key) if temperature else None
    return generation_program(model, inputs, tuple(interventions), how, sampling)


class Decoding(NamedTuple):
    """How to generate: what is static of it."""

    count: int
    steps: str
    sampled: bool
    eos: tuple[int, ...]
    pad: int


def decoding(
    model: Model, count: int, steps: str = "all", sampled=False, eos_token_id=None, pad_token_id=None
) -> Decoding:
    """The options of :func:`generate`, checked, with the config's tokens where none are given."""
    if count < 1:
        raise UserError(f"max_new_tokens is {count}: ask for at least 1")
    if steps not in ("all", "prefill"):
        raise UserError(f"unknown steps {steps!r}: use 'all' or 'prefill'")
    eos = model.config.eos_token_ids if eos_token_id is None else eos_token_id
    eos = (eos,) if isinstance(eos, int) else tuple(eos)
    pad = model.config.pad_token_id if pad_token_id is None else pad_token_id
    return Decoding(count, steps, sampled, eos, pad)


@functools.partial(jax.jit, static_argnames="how")
def generation_program(model: Model, inputs: Inputs, interventions, how: Decoding, sampling) -> jax.Array:
    embedded, _ = model.embed(inputs, interventions)
    return continued(model, inputs, embedded, model.window(inputs), (), interventions, how, sampling)


def continued(
    model: Model,
    inputs: Inputs,
    embedded: Embedded,
    window: Window,
    past: tuple,
    interventions,
    how: Decoding,
    sampling: tuple | None = None,
) -> jax.Array:
    """Prefills the tokens of ``window`` and generates the next ones.

    Args:
        embedded: of the window's tokens; past: the segments before it, ``(L, B, P, G, head_dim)`` twice each, which
            stay as they are, so that ``vmap`` over interventions keeps one copy of them.
        sampling: temperature, top_p and key, where ``how.sampled``.

    Returns:
        ``(B, how.count)`` int32.
    """
    text, count = model.text, how.count
    start, (batch, length, _) = window.start, embedded.x.shape
    x, (k, v), _ = text.scan(embedded.x, window, past=past, deepstack=embedded.deepstack, interventions=interventions)
    last = length - 1 - jnp.argmax(inputs.attention_mask[:, start:][:, ::-1], 1)
    # The final norm is a site of the whole prompt, so it is taken before the last token is picked.
    normed = Probe(interventions, NO_TAPS, Context(start=start))("text.norm", text.norm(x))
    logits = text.logits(normed[jnp.arange(batch), last])
    interventions = interventions if how.steps == "all" else ()
    # Room for the new tokens behind the prompt; a slot is visible once it is filled.
    room = [(0, 0), (0, 0), (0, count), (0, 0), (0, 0)]
    cache = jnp.pad(k, room), jnp.pad(v, room)
    position = 1 + jnp.max(jnp.where(inputs.attention_mask, inputs.position_ids.max(0), -1), 1)
    # Where each key stands in its row's text, which sliding layers ask for.
    prompt_positions = jnp.where(inputs.attention_mask, inputs.position_ids[0], 0)
    key_positions = jnp.concatenate([prompt_positions, position[:, None] + jnp.arange(count)], 1)
    prompt_visible = jnp.pad(inputs.attention_mask, [(0, 0), (0, count)])
    bounds = [0, *([start] if past else []), start + length + count]

    def choose(logits, step):
        if not how.sampled:
            return jnp.argmax(logits, -1).astype(jnp.int32)
        temperature, top_p, key = sampling
        return _sample(logits.astype(jnp.float32) / temperature, top_p, jax.random.fold_in(key, step))

    def is_end(token):
        return functools.reduce(jnp.logical_or, [token == e for e in how.eos], jnp.zeros_like(token, bool))

    def running(state):
        step, *_, done = state
        return (step < count) & ~done.all()

    def advance(state):
        step, out, (k, v), done = state
        token = out[:, step - 1]
        positions = jnp.broadcast_to((position + step - 1)[None, :, None], (3, batch, 1))
        slots, filled = jnp.arange(start + length + count), start + length
        visible = prompt_visible | ((slots >= filled) & (slots < filled + step - 1))[None]
        seen = text.visible(visible[:, None], positions[0], key_positions)
        own = jnp.ones((len(seen), batch, 1, 1), bool)
        masks = tuple(seen[..., low:high] for low, high in itertools.pairwise(bounds))
        here = Window(text.rope(positions), own, masks, start=filled + step - 1, decoding=True)
        probe = Probe(interventions, NO_TAPS, Context(start=here.start, decoding=True))
        x = probe("text.embeddings", text.embed(token)[:, None])
        x, (new_k, new_v), _ = text.scan(x, here, past=(*past, (k, v)), interventions=interventions)
        at = (0, 0, length + step - 1, 0, 0)
        cache = jax.lax.dynamic_update_slice(k, new_k, at), jax.lax.dynamic_update_slice(v, new_v, at)
        token = jnp.where(done, how.pad, choose(text.head(x, probe)[:, 0], step))
        return step + 1, out.at[:, step].set(token), cache, done | is_end(token)

    first = choose(logits, 0)
    out = jnp.full((batch, count), how.pad, jnp.int32).at[:, 0].set(first)
    return jax.lax.while_loop(running, advance, (1, out, cache, is_end(first)))[1]


def _sample(logits: jax.Array, top_p: jax.Array, key: jax.Array) -> jax.Array:
    """A token per row from the nucleus of mass ``top_p``; the likeliest token is always in it."""
    order = jnp.argsort(-logits, -1)
    ranked = jnp.take_along_axis(logits, order, -1)
    before = jnp.cumsum(jax.nn.softmax(ranked, -1), -1) - jax.nn.softmax(ranked, -1)
    choice = jax.random.categorical(key, jnp.where(before < top_p, ranked, -jnp.inf))
    return jnp.take_along_axis(order, choice[:, None], -1)[:, 0].astype(jnp.int32)
