"""Answers and their probabilities under attention knock-outs (P1, section 3.1, equations 3 and 4)."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from interventions.engine.cost import Announced, estimate
from interventions.engine.generation import generate_variants
from interventions.engine.grids import layer_windows
from interventions.engine.read import Gold
from interventions.engine.sweep import sweep_runs
from interventions.engine.variants import stack
from interventions.flow.shares import encoded
from interventions.kinds.attention import MODES, AttentionKnockout
from interventions.kinds.groups import GROUPS, bind, check_group, label
from vlm_jax import Model, generate
from vlm_jax.data import Example
from vlm_jax.data.metrics import exact_match, normalise
from vlm_jax.errors import UserError
from vlm_jax.processor import Processor, Tokenizer
from vlm_jax.prompts import batches
from vlm_jax.runs.processes import fetch, progress
from vlm_jax.sites import Intervention

#: The default edges (queries:keys) to cut. P1 cuts the first two. With the third, no text reads the image.
EDGES = ("text:image", "text:image_end", "text:image+image_end")
#: The default edges to cut in windows of layers.
WINDOW_EDGES = ("text:image", "question:image", "writers:image", "text:question")
#: Prompts are padded to multiples of this, because compiling generation for another shape takes longer than padding.
_LENGTH_STEP = 64
#: Why an output is not a possible answer. The model ends at once; it writes no readable text; or its text is not one of
#: the question's choices or, without choices, does not have the form (:func:`form`) of any gold answer of the task.
FAILURES = ("end token only", "empty", "no possible answer")


def edge(name: str) -> tuple[str, str]:
    """The token groups of the queries and of the keys in a name such as "text:image".

    Raises:
        UserError: if the name has no colon or names an unknown group.
    """
    groups = re.split(r"(?<!\d):", name)  # not at the colon of a part such as first4:question
    if len(groups) != 2:
        raise UserError(f"{name!r} is not a pair of token groups: write queries:keys, such as text:image")
    query, key = groups
    for group in groups:
        check_group(group)
    return query, key


def knockouts(depth: int, edges: Iterable[str], layers: Iterable[Sequence[int] | None], **options) -> list:
    """A knock-out of every edge in every set of layers (None: all layers).

    Args:
        depth: the model's number of layers.
        options: as for :meth:`AttentionKnockout.between`.
    """
    pairs = [edge(name) for name in edges]
    cuts = [AttentionKnockout.between(depth, *pair, where, **options) for pair in pairs for where in layers]
    parts = sorted({part for cut in cuts for part in cut.parts})
    return [cut.in_order_of((*GROUPS, *parts)) for cut in cuts]  # one table for all, so that a sweep can stack them


def window_layers(depth: int, width: int) -> list[list[int]]:
    """The numbers of the layers in every window of :func:`interventions.engine.grids.layer_windows`."""
    return [np.flatnonzero(row).tolist() for row in layer_windows(depth, width)]


def knocked_out_answers(
    model: Model,
    processor: Processor,
    examples: list[Example],
    edges: Sequence[str] = EDGES,
    *,
    interventions: Sequence[Intervention] = (),
    modes: Sequence[str] = MODES,
    layers: Sequence[Sequence[int] | None] = (None,),
    size: int = 16,
    max_new_tokens: int = 12,
    seed: int = 0,
    name: str = "",
) -> list[dict]:
    """Greedy answers of the unchanged model and under every knock-out.

    The knock-outs of one mode run in one compiled call per batch. They also apply to the generated tokens.

    Args:
        edges: pairs of token groups, "queries:keys".
        interventions: those that act in all these runs; token groups are bound to every batch.
        layers: sets of layers in which each edge is cut; None for all layers.
        size: rows of a batch.
        seed: of the mode "random_mass".
        name: label of the progress bar.

    Returns:
        A record for each sample and condition: ``id``, ``edge``, ``layers``, ``mode`` and the keys of :func:`judged`.
        Edge, layers and mode are None for the unchanged model.
    """
    depth, conditions = model.config.text.num_hidden_layers, [(e, where) for e in edges for where in layers]
    forms, records = {form(example.answers[0]) for example in examples}, {}
    options = {"with_answer": False, "step": _LENGTH_STEP}
    for rows, batch in encoded(model, processor, examples, size, f"answers {name}", **options):
        labels, base = label(batch), bind(interventions, batch)
        outputs = [((None, None, None), fetch(generate(model, batch.inputs, max_new_tokens, base)))]
        for mode in modes:
            cuts = [cut.bound(labels) for cut in knockouts(depth, edges, layers, mode=mode, seed=seed)]
            tokens = fetch(generate_variants(model, batch.inputs, cuts, max_new_tokens, base=base))
            outputs += [((*condition, mode), part) for condition, part in zip(conditions, tokens, strict=True)]
        for i, row in enumerate(rows):
            records[row] = [
                {"id": examples[row].id, "edge": cut, "layers": where, "mode": mode}
                | judged(examples[row], tokens[i], processor.tokenizer, model.config.eos_token_ids, forms)
                for (cut, where, mode), tokens in outputs
            ]
    return [record for row in range(len(examples)) for record in records[row]]


def judged(
    example: Example,
    tokens: Int[np.ndarray, "tokens"],
    tokenizer: Tokenizer,
    ends: Iterable[int],
    forms: set[str],
) -> dict:
    """A generated answer: its text (``output``; ``raw`` with special tokens), whether it is ``correct``, and its
    ``failure``, one of :data:`FAILURES` or None.

    Args:
        tokens: the generated tokens.
        ends: the tokens that end an answer.
        forms: the forms of the task's gold answers.
    """
    ended = np.isin(tokens, list(ends))
    written = tokens[: ended.argmax() + 1] if ended.any() else tokens
    text = tokenizer.decode(written, skip_special_tokens=True).strip()
    choices = (*example.choices, *example.answers) if example.choices else ()
    possible = exact_match(text, choices) if choices else form(text) in forms
    failure = "end token only" if ended[0] else "empty" if not text else None if possible else "no possible answer"
    return {
        "answers": list(example.answers),
        "output": text,
        "raw": tokenizer.decode(written, skip_special_tokens=False),
        "correct": exact_match(text, example.answers),
        "failure": failure,
    }


def form(text: str) -> str:
    """The form of an answer: numbers become 9 and words become a. A possible answer has the form of a gold answer."""
    return re.sub(r"\d+", "9", re.sub(r"[^\W\d_]+", "a", normalise(text)))


class Effect(NamedTuple):
    """p(gold) (P0, equation 1) of each sample."""

    base: Float[np.ndarray, "samples"]
    """With the unchanged model."""
    window: Float[np.ndarray, "samples edges layers"]
    """With each edge cut in the window of layers around each layer."""
    whole: Float[np.ndarray, "samples edges"]
    """With each edge cut in all layers."""


def window_effects(
    model: Model,
    processor: Processor,
    examples: list[Example],
    edges: Sequence[str],
    width: int = 1,
    *,
    interventions: Sequence[Intervention] = (),
    mode: str = "post_softmax",
    size: int = 16,
    seed: int = 0,
    name: str = "",
) -> Effect:
    """The gold answer's probability with each edge cut in a window of layers (as in Geva et al. 2023).

    Args:
        width: layers of a window.
        interventions: those that act in all these runs; token groups are bound to every batch.
        size: rows of a batch.
    """
    depth = model.config.text.num_hidden_layers
    cuts = knockouts(depth, edges, [*window_layers(depth, width), None], mode=mode, seed=seed)
    work = []
    for rows, batch in batches(examples, processor, model.config, size):
        labels = label(batch)
        bound = stack([cut.bound(labels) for cut in cuts])
        sweep = batch.inputs, bound, Gold.of(batch.inputs, batch.spans["answer"])
        work.append((rows, sweep, bind(interventions, batch)))
    costs = [estimate(model, *sweep, base=base) for _, sweep, base in work]
    effects: dict[int, tuple] = {}
    bar = progress(total=len(examples), desc=f"windows {name}".strip(), unit="sample", leave=False)
    with Announced(sum(costs[1:], costs[0])), bar:
        for rows, sweep, base in work:
            runs = sweep_runs(model, *sweep, base=base)
            p = fetch(runs.variants.probability).T.reshape(-1, len(edges), depth + 1)
            uncut = fetch(runs.base.probability)
            effects |= zip(rows, zip(uncut, p[..., :depth], p[..., depth], strict=True), strict=False)
            bar.update(len(rows))
    return Effect(*map(np.stack, zip(*(effects[row] for row in range(len(examples))), strict=True)))
