"""Greedy and sampled generation with a key-value cache, one token a step, rows of different lengths."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32, PRNGKeyArray

from vlm_jax.acting import acting
from vlm_jax.errors import UserError
from vlm_jax.inputs import Inputs, bucket
from vlm_jax.model import Embedded, Model
from vlm_jax.nn.decoder import StackedKeyValues, Window
from vlm_jax.nn.visibility import visible_to_new
from vlm_jax.runs.processes import fetch
from vlm_jax.sites import NO_TAPS, Context, Probe, check_sites
from vlm_jax.typing import Array

#: Stands for a token where the scores of the next token are not finite. The row ends there.
NOT_FINITE = -1
#: Temperature, top_p and key of a generation that samples.
Sampling = tuple[Float[Array, ""], Float[Array, ""], PRNGKeyArray]


def generate(
    model: Model,
    inputs: Inputs,
    max_new_tokens: int,
    interventions: Any = (),
    *,
    steps: Literal["all", "prefill"] = "all",
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: PRNGKeyArray | None = None,
    drop_images: bool = False,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    names: Sequence[str] = (),
) -> Int32[Array, "batch {max_new_tokens}"]:
    """Continues every prompt.

    Args:
        inputs: prompts padded on either side.
        interventions: one or several; they act on the prompt and on every new token, unless their tokens are restricted
            to the prompt.
        steps: "prefill" applies the interventions only to the prompt. New tokens then read the keys and values that
            the interventions changed, but are not changed themselves.
        temperature: 0 takes the most likely token; otherwise logits are divided by it and sampled with ``key``.
        top_p: sample from the smallest set of tokens whose total probability is at least this.
        drop_images: after the prompt, the cache keeps only the keys and values that new tokens may see: those of the
            images are gone. It needs a model whose registers hide the images from the text
            (:class:`vlm_jax.registers.Registers`). The new tokens are the same.
        eos_token_id: one or several ids that end a row; None stands for the config's.
        pad_token_id: fills a row after its end; None stands for the config's.
        names: the examples of the first rows, for errors.

    Returns:
        The new tokens, the end token included.

    Raises:
        UserError: for prompts with their answers, options that are not possible, an intervention that touches nothing,
            or a model whose scores of the next token are not finite.
    """
    check_unanswered(inputs)
    interventions = acting(interventions, model.depths)
    check_sites(interventions, (), model.sites(inputs), model.depths, inputs.input_ids.shape)
    held = held_tokens(model, inputs, interventions if steps == "all" else ()) if drop_images else None
    options = decoding(model, max_new_tokens, steps, eos_token_id, pad_token_id, held)
    if not (0 <= temperature < float("inf") and 0 < top_p <= 1):
        raise UserError(f"temperature {temperature} with top_p {top_p} is not possible: use 0 or more, and 0 to 1")
    if temperature and key is None:
        raise UserError("sampling needs a key: pass key=jax.random.key(seed)")
    sampling = (jnp.float32(temperature), jnp.float32(top_p), key) if temperature else None
    tokens = generation_program(model, inputs, interventions, options, sampling)
    check_finite(tokens, names)
    return tokens


def check_unanswered(inputs: Inputs) -> None:
    """Raises a UserError for prompts that gold answers follow."""
    if inputs.answered:
        raise UserError("the prompts hold their gold answers already: encode them with with_answer=False to generate")


def check_finite(tokens: Int32[Array, "*variants batch count"], names: Sequence[str] = ()) -> None:
    """Refuses generated tokens of a row whose scores were not finite. All processes must call it together.

    Args:
        names: the examples of the first rows.

    Raises:
        UserError: with the first such row's name or number.
    """
    broken = np.flatnonzero((fetch(tokens) == NOT_FINITE).any(-1).reshape(-1, tokens.shape[-2]).any(0))
    if len(broken):
        row = int(broken[0])
        who = f"example {names[row]!r}" if row < len(names) else f"row {row} of the batch"
        raise UserError(
            f"the model's scores of the next token are NaN or infinite for {who}: check its weights and the "
            "interventions, or use float32 or bfloat16 instead of float16"
        )


class Decoding(NamedTuple):
    """The static options of a generation: changing them compiles another program.

    count: the number of new tokens. eos: the ids that end a row. held: how many of the prompt's tokens the cache keeps;
    None: all.
    """

    count: int
    steps: str
    eos: tuple[int, ...]
    pad: int
    held: int | None = None


def decoding(
    model: Model,
    count: int,
    steps: str = "all",
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    held: int | None = None,
) -> Decoding:
    """The options of :func:`generate`, checked, with the config's tokens where they are None."""
    if count < 1:
        raise UserError(f"max_new_tokens is {count}: ask for at least 1")
    longest = model.config.text.max_position_embeddings
    if longest and count >= longest:
        raise UserError(f"max_new_tokens is {count}, but prompt and answer can have {longest} tokens: ask for fewer")
    if steps not in ("all", "prefill"):
        raise UserError(f"unknown steps {steps!r}: use 'all' or 'prefill'")
    eos = model.config.eos_token_ids if eos_token_id is None else eos_token_id
    eos = tuple(eos) if isinstance(eos, Sequence) else (eos,)
    pad = model.config.pad_token_id if pad_token_id is None else pad_token_id
    return Decoding(count, steps, eos, pad, held)


def held_tokens(model: Model, inputs: Inputs, interventions: Sequence[Any] = ()) -> int:
    """How many tokens of a prompt the cache must keep for the new ones, rounded up: those that they may see.

    Raises:
        UserError: if they may see the images, or if an intervention needs the keys of the whole prompt.
    """
    registers = model.config.text.registers
    if registers is None or not registers.hides_images:
        why = "it has no registers" if registers is None else f"the mask of its registers is {registers.mask!r}"
        raise UserError(f"the text of this model reads its images ({why}): leave drop_images out")
    for intervention in interventions:
        if on := sorted(intervention.sites & {"text.attn_scores", "text.attn_probs"}):
            raise UserError(
                f"{type(intervention).__name__} acts on the attention ({on[0]}) to the whole prompt: leave drop_images "
                "out"
            )
    return min(bucket(int(visible_to_new(inputs.tokens, registers).sum(1).max())), inputs.input_ids.shape[1])


@functools.partial(jax.jit, static_argnames="options")
def generation_program(
    model: Model, inputs: Inputs, interventions: Sequence[Any], options: Decoding, sampling: Sampling | None
) -> Int32[Array, "batch count"]:
    """The compiled program of :func:`generate`."""
    embedded, _ = model.embed(inputs, interventions)
    return continued(model, inputs, embedded, model.window(inputs), (), interventions, options, sampling)


def continued(
    model: Model,
    inputs: Inputs,
    embedded: Embedded,
    window: Window,
    past: Sequence[StackedKeyValues],
    interventions: Sequence[Any],
    options: Decoding,
    sampling: Sampling | None = None,
) -> Int32[Array, "batch count"]:
    """Prefills the tokens of ``window`` and generates ``options.count`` tokens after them.

    Args:
        embedded: the window's tokens.
        past: keys and values of the segments before the window. They are not copied into the cache, so that ``vmap``
            over interventions keeps one copy of them.
        sampling: None takes the most likely token.
    """
    text, count = model.text, options.count
    start, (batch, length, _) = window.start, embedded.x.shape
    x, (k, v), _ = text.scan(embedded.x, window, past=past, deepstack=embedded.deepstack, interventions=interventions)
    # Of each row, the last token that is not padding.
    last = length - 1 - jnp.argmax(inputs.attention_mask[:, start:][:, ::-1], 1)
    # The final norm is a site of the whole prompt, so it comes before the last token is picked.
    normed = Probe(interventions, NO_TAPS, Context(start=start))("text.norm", text.norm(x))
    logits = text.logits(normed[jnp.arange(batch), last])
    interventions = interventions if options.steps == "all" else ()
    # The cache has free slots for the new tokens after the prompt. A slot becomes visible when it is filled.
    room = [(0, 0), (0, 0), (0, count), (0, 0), (0, 0)]
    position = 1 + jnp.max(jnp.where(inputs.attention_mask, inputs.position_ids.max(0), -1), 1)
    # The position of each key in its row's text: sliding layers compare it with the query's.
    prompt_positions = jnp.where(inputs.attention_mask, inputs.position_ids[0], 0)
    prompt_visible, held = visible_to_new(inputs.tokens, model.config.text.registers), length
    if options.held is not None:
        assert not past, "a shared prefix keeps all of its tokens"
        held = options.held
        # The tokens that stay, in their order; rows with fewer of them are filled up with others, which stay invisible.
        kept = jnp.argsort(~prompt_visible, axis=1, stable=True)[:, :held]
        k, v = (jnp.take_along_axis(array, kept[None, :, :, None, None], 2) for array in (k, v))
        prompt_positions, prompt_visible = (
            jnp.take_along_axis(array, kept, 1) for array in (prompt_positions, prompt_visible)
        )
    cache = jnp.pad(k, room), jnp.pad(v, room)
    key_positions = jnp.concatenate([prompt_positions, position[:, None] + jnp.arange(count)], 1)
    prompt_visible = jnp.pad(prompt_visible, [(0, 0), (0, count)])
    bounds = [0, *([start] if past else []), start + held + count]

    def choose(logits, step):
        if sampling is None:
            token = jnp.argmax(logits, -1).astype(jnp.int32)
        else:
            temperature, top_p, key = sampling
            token = _sample(logits.astype(jnp.float32) / temperature, top_p, jax.random.fold_in(key, step))
        return jnp.where(jnp.isfinite(logits).all(-1), token, NOT_FINITE)

    def is_end(token):
        return functools.reduce(jnp.logical_or, [token == e for e in options.eos], token == NOT_FINITE)

    def running(state):
        step, *_, done = state
        return (step < count) & ~done.all()

    def advance(state):
        step, out, (k, v), done = state
        token = out[:, step - 1]
        positions = jnp.broadcast_to((position + step - 1)[None, :, None], (3, batch, 1))
        slots, filled = jnp.arange(start + held + count), start + held
        visible = prompt_visible | ((slots >= filled) & (slots < filled + step - 1))[None]
        past_mask = text.visible(visible[:, None], positions[0], key_positions)
        own_mask = jnp.ones((len(past_mask), batch, 1, 1), bool)
        masks = tuple(past_mask[..., low:high] for low, high in itertools.pairwise(bounds))
        window = Window(text.rope(positions), own_mask, masks, start=start + length + step - 1, decoding=True)
        probe = Probe(interventions, NO_TAPS, Context(start=window.start, decoding=True))
        x = probe("text.embeddings", text.embed(token)[:, None])
        x, (new_k, new_v), _ = text.scan(x, window, past=(*past, (k, v)), interventions=interventions)
        slot = (0, 0, held + step - 1, 0, 0)
        cache = jax.lax.dynamic_update_slice(k, new_k, slot), jax.lax.dynamic_update_slice(v, new_v, slot)
        token = jnp.where(done, options.pad, choose(text.head(x, probe)[:, 0], step))
        return step + 1, out.at[:, step].set(token), cache, done | is_end(token)

    first = choose(logits, 0)
    out = jnp.full((batch, count), options.pad, jnp.int32).at[:, 0].set(first)
    return jax.lax.while_loop(running, advance, (1, out, cache, is_end(first)))[1]


def _sample(logits: Float[Array, "batch vocab"], top_p: Float[Array, ""], key: PRNGKeyArray) -> Int32[Array, " batch"]:
    """A token per row, sampled from the smallest set of tokens whose total probability is at least ``top_p``.

    The most likely token is always in the set.
    """
    order = jnp.argsort(-logits, -1)
    ranked = jnp.take_along_axis(logits, order, -1)
    likelier = jnp.cumsum(jax.nn.softmax(ranked, -1), -1) - jax.nn.softmax(ranked, -1)
    choice = jax.random.categorical(key, jnp.where(likelier < top_p, ranked, -jnp.inf))
    return jnp.take_along_axis(order, choice[:, None], -1)[:, 0].astype(jnp.int32)
