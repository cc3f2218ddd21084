"""The effect of restoring one token in one module, for the result page to lay over the picture and the text."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from interventions.engine.grids import each_token, patch_grid
from interventions.engine.prefix import PREFIX_BUCKET
from interventions.engine.read import Gold
from interventions.engine.sweep import sweep_runs
from interventions.engine.variants import first_token, stack
from interventions.kinds.groups import bind
from interventions.modules import MODULE_SITES
from interventions.trace.corruption import Corrupter, survey
from interventions.trace.options import TraceOptions
from interventions.trace.tracing import traced
from vlm_jax import Model
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.processor import Processor
from vlm_jax.prompts import Batch, batches, encode
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.folder import Run
from vlm_jax.runs.processes import fetch, progress
from vlm_jax.runs.token_maps import TOKEN_MAPS, TokenMap, write_token_maps
from vlm_jax.seen import read_prompt
from vlm_jax.sites import Intervention

#: The names of the maps, in the order of MODULE_SITES.
SERIES = ("attn", "mlp")


def token_effects(
    corrupt: Corrupter, row: int, batch: Batch, interventions: Sequence[Intervention] = ()
) -> Float[np.ndarray, "layers modules tokens"]:
    """The indirect effect of every token, P0's equation 3 with a patch of one token: p(gold) with the token's clean
    output of one module in the corrupted run, minus p(gold) of the corrupted run.

    It is 0 for tokens before the first corrupted one, where the two runs agree, and from the last gold token on, which
    nobody reads.

    Args:
        row: the number of the example that ``batch`` holds, with its answer.
        interventions: those that act in every run.
    """
    model, options, length = corrupt.model, corrupt.options, batch.inputs.input_ids.shape[1]
    acting = bind(interventions, batch)
    base = *corrupt([row], batch), *acting
    start = min(first_token(stack([one]), length) for one in base)
    gold = Gold.of(batch.inputs, batch.spans["answer"])
    # Some tokens outside are patched too, without an effect, so that prompts of nearly the same shape share a program.
    first, end = start // PREFIX_BUCKET, -(-int(gold.index[gold.valid].max()) // PREFIX_BUCKET)
    patched = np.zeros((1, length), bool)
    patched[:, first * PREFIX_BUCKET : end * PREFIX_BUCKET] = True
    depth = model.config.text.num_hidden_layers
    variants, shape = patch_grid(MODULE_SITES, depth, window=options.window, tokens=each_token(patched))
    runs = sweep_runs(model, batch.inputs, variants, gold, base=base, clean=acting)
    effects = fetch(runs.variants.probability)[:, 0] - fetch(runs.base.probability)[0]
    found = np.zeros((depth, len(MODULE_SITES), length), np.float32)
    found[..., patched[0]] = effects.reshape(shape).swapaxes(0, 1)
    return found


def token_maps(
    model: Model,
    processor: Processor,
    examples: Sequence[Example],
    options: TraceOptions,
    count: int,
    interventions: Sequence[Intervention] = (),
) -> list[TokenMap]:
    """:func:`token_effects` of the prompts of the first ``count`` examples. Their corruption is that of a trace of all
    examples, in its first replicate.

    Raises:
        UserError: if the model's outputs are not finite.
    """
    examples = traced(model, processor, examples, options, interventions)
    groups = batches(examples, processor, model.config, options.batch, align=PREFIX_BUCKET)
    corrupt = Corrupter(model, processor, examples, survey(model, groups), options)
    found = []
    for row, example in enumerate(progress(examples[:count], desc="tokens", unit="sample")):
        batch = encode([example], processor, model.config)
        is_prompt = np.asarray(batch.inputs.attention_mask)[0] & ~(batch.spans["answer"] | batch.spans["end"])[0]
        prompt = read_prompt(batch.inputs, is_prompt, model.config, processor)
        values = token_effects(corrupt, row, batch, interventions)[..., is_prompt]
        if not np.isfinite(values).all():
            raise UserError(f"example {example.id!r}: the model's outputs are not finite numbers: check its weights")
        found.append(TokenMap(example.id, example.task, prompt, values))
    return found


def save_token_maps(
    run: Run,
    model: Model,
    processor: Processor,
    examples: Sequence[Example],
    options: TraceOptions,
    count: int,
    interventions: Sequence[Intervention] = (),
) -> None:
    """Writes :func:`token_maps` into ``token_maps`` of a run, unless an earlier session did."""
    value = "indirect effect (IE)"
    if options.replicates > 1:
        value += f" under the first of {options.replicates} corruptions"
    if options.window > 1:
        value += f" of windows of {options.window} layers"
    run.once(
        "token_maps",
        lambda: token_maps(model, processor, examples, options, count, interventions),
        Artifact("token_maps", "Effect of restoring every token", TOKEN_MAPS),
        write=lambda path, maps: write_token_maps(path, maps, value=value, series=SERIES),
        read=lambda path: None,
    )
