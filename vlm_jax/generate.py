"""Greedy and sampled generation with a key-value cache, one token a step, rows of different lengths."""

import functools

import jax
import jax.numpy as jnp

from vlm_jax.decoder import Window
from vlm_jax.errors import UserError
from vlm_jax.inputs import Inputs
from vlm_jax.model import Model
from vlm_jax.sites import Context, Probe, check


def generate(
    model: Model,
    inputs: Inputs,
    max_new_tokens: int,
    interventions=(),
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    eos_token_id: int | tuple[int, ...] | None = None,
    pad_token_id: int | None = None,
) -> jax.Array:
    """Continues every prompt.

    Args:
        inputs: prompts padded on either side.
        interventions: act on the prompt; those without token positions (such as LoRA) on every new token too.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it and sampled with ``key``.
        top_p: sample from the smallest set of tokens whose probability reaches this.
        eos_token_id: one or several ids that end a row; the config's where None.
        pad_token_id: what follows in an ended row; the config's where None.

    Returns:
        ``(B, max_new_tokens)`` int32, the end token included.
    """
    check(interventions, (), model.sites(inputs))
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}: ask for at least 1")
    if temperature and key is None:
        raise UserError("sampling needs a key: pass key=jax.random.key(seed)")
    eos = model.config.eos_token_ids if eos_token_id is None else eos_token_id
    eos = (eos,) if isinstance(eos, int) else tuple(eos)
    pad = model.config.pad_token_id if pad_token_id is None else pad_token_id
    key = jax.random.key(0) if key is None else key
    options = (jnp.float32(temperature), jnp.float32(top_p), key)
    return _generate(model, inputs, max_new_tokens, tuple(interventions), options, bool(temperature), eos, pad)


@functools.partial(jax.jit, static_argnames=("count", "sampled", "eos", "pad"))
def _generate(model: Model, inputs: Inputs, count, interventions, options, sampled, eos, pad):
    text = model.text
    batch, length = inputs.input_ids.shape
    embedded, _ = model.embed(inputs, interventions)
    window = model.window(inputs)
    x, (k, v), _ = text.scan(embedded.x, window, deepstack=embedded.deepstack, interventions=interventions)
    last = length - 1 - jnp.argmax(inputs.attention_mask[:, ::-1], 1)
    # The final norm is a site of the whole prompt, so it is taken before the last token is picked.
    normed = Probe(interventions, frozenset(), Context())("text.norm", text.norm(x))
    logits = text.logits(normed[jnp.arange(batch), last])
    # Room for the new tokens behind the prompt; a slot is visible once it is filled.
    room = [(0, 0), (0, 0), (0, count), (0, 0), (0, 0)]
    cache = jnp.pad(k, room), jnp.pad(v, room)
    position = 1 + jnp.max(jnp.where(inputs.attention_mask, inputs.position_ids.max(0), -1), 1)
    # Where each slot stands in its row's text, which sliding layers ask for.
    prompt_positions = jnp.where(inputs.attention_mask, inputs.position_ids[0], 0)
    slot_positions = jnp.concatenate([prompt_positions, position[:, None] + jnp.arange(count)], 1)
    prompt_visible = jnp.pad(inputs.attention_mask, [(0, 0), (0, count)])

    def choose(logits, step):
        if not sampled:
            return jnp.argmax(logits, -1).astype(jnp.int32)
        temperature, top_p, key = options
        return _sample(logits.astype(jnp.float32) / temperature, top_p, jax.random.fold_in(key, step))

    def is_end(token):
        return functools.reduce(jnp.logical_or, [token == e for e in eos], jnp.zeros_like(token, bool))

    def running(state):
        step, *_, done = state
        return (step < count) & ~done.all()

    def advance(state):
        step, out, (k, v), done = state
        token = out[:, step - 1]
        positions = jnp.broadcast_to((position + step - 1)[None, :, None], (3, batch, 1))
        slots = jnp.arange(length + count)
        visible = prompt_visible | ((slots >= length) & (slots < length + step - 1))[None]
        past = text.visible(visible[:, None], positions[0], slot_positions)
        own = jnp.ones((len(past), batch, 1, 1), bool)
        window = Window(text.rope(positions), own, past, length + step - 1, decoding=True)
        probe = Probe(interventions, frozenset(), Context(start=window.start, decoding=True))
        x = probe("text.embeddings", text.embed(token)[:, None])
        x, (new_k, new_v), _ = text.scan(x, window, past=(k, v), interventions=interventions)
        at = (0, 0, length + step - 1, 0, 0)
        cache = jax.lax.dynamic_update_slice(k, new_k, at), jax.lax.dynamic_update_slice(v, new_v, at)
        token = jnp.where(done, pad, choose(text.head(x, probe)[:, 0], step))
        return step + 1, out.at[:, step].set(token), cache, done | is_end(token)

    first = choose(logits, 0)
    out = jnp.full((batch, count), pad, jnp.int32).at[:, 0].set(first)
    return jax.lax.while_loop(running, advance, (1, out, cache, is_end(first)))[1]


def _sample(logits: jax.Array, top_p: jax.Array, key: jax.Array) -> jax.Array:
    """A token per row from the nucleus of mass ``top_p``; the likeliest token is always in it."""
    order = jnp.argsort(-logits, -1)
    ranked = jnp.take_along_axis(logits, order, -1)
    before = jnp.cumsum(jax.nn.softmax(ranked, -1), -1) - jax.nn.softmax(ranked, -1)
    choice = jax.random.categorical(key, jnp.where(before < top_p, ranked, -jnp.inf))
    return jnp.take_along_axis(order, choice[:, None], -1)[:, 0].astype(jnp.int32)
