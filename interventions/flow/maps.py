"""What single tokens attend to, for the result page to lay over the picture (beside P1's sums over them)."""

from collections.abc import Sequence

import numpy as np

from interventions.kinds.groups import bind
from vlm_jax import Model
from vlm_jax.data import Example
from vlm_jax.processor import Processor
from vlm_jax.prompts import encode
from vlm_jax.runs.processes import fetch
from vlm_jax.runs.token_maps import TokenMap
from vlm_jax.seen import read_prompt
from vlm_jax.sites import Intervention

#: Numbers of a sample. With more, the maps of the heads are left out, and only their mean is kept.
_MOST = 4_000_000


def series_of(model: Model, length: int) -> list[str]:
    """The names of the maps that are kept of a prompt of ``length`` tokens: the mean of the heads, and each head."""
    text = model.config.text
    heads = [f"head {head}" for head in range(text.num_attention_heads)]
    fits = (len(heads) + 1) * text.num_hidden_layers * length**2 <= _MOST
    return ["mean of heads", *(heads if fits else [])]


def attention_maps(
    model: Model, processor: Processor, examples: Sequence[Example], interventions: Sequence[Intervention] = ()
) -> tuple[list[TokenMap], list[str]]:
    """The attention probabilities of every token behind the first image (all tokens of a prompt without one), in every
    layer, and the names of the maps: the mean of the heads and, in prompts that are not too long, each head.

    Args:
        interventions: those that act on the model. Those that name token groups are bound to every prompt.
    """
    encoded = [encode([example], processor, model.config, with_answer=False) for example in examples]
    names = series_of(model, max(batch.inputs.input_ids.shape[1] for batch in encoded))
    found = []
    for example, batch in zip(examples, encoded, strict=True):
        output = model(batch.inputs, bind(interventions, batch), taps=("text.attn_probs",))
        probs = fetch(output.taps["text.attn_probs"])[:, 0]
        mask = np.asarray(batch.inputs.attention_mask)[0]
        prompt = read_prompt(batch.inputs, mask, model.config, processor)
        is_visual = np.asarray(batch.spans["image"])[0][mask]
        first = int(is_visual.argmax())  # 0 in a prompt without an image
        queries = [token for token in range(first, len(prompt.tokens)) if not is_visual[token]]
        kept = probs[:, :, mask][..., mask][:, :, queries]  # (layers, heads, queries, tokens)
        values = np.concatenate([kept.mean(1, keepdims=True), kept], 1)[:, : len(names)]
        found.append(TokenMap(example.id, example.task, prompt, values, queries))
    return found, names
