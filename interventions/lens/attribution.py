"""Direct logit attribution: what each module and head writes towards a word (Elhage et al. 2021).

The last residual stream is the sum of what the embeddings and all modules wrote. The final norm divides that sum by its
root mean square. If this number is kept as it is in the run (the scale is "frozen"), the norm and the unembedding are
linear, so the logit is the sum of what each part contributes. The same holds for the norm that Gemma has behind its
attention, through which the heads write.

A logit is taken before the softcap, if the model has one. Attributions are direct: that a part makes another one write
something is counted for the other one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from interventions.lens.lens import check_unembeds
from vlm_jax import Inputs, Model, Tap
from vlm_jax.acting import acting
from vlm_jax.nn.products import product
from vlm_jax.nn.stacks import layer_at
from vlm_jax.sites import Intervention
from vlm_jax.typing import Array, ArrayLike

#: The parts whose sum is the logit. Heads and ``attn_rest`` are parts of ``attn``.
PARTS = ("embeddings", "attn", "mlp", "deepstack", "edits")


class Attribution(NamedTuple):
    """The logit of a word, or the difference of the logits of two words, and the parts that it is the sum of."""

    logit: Float[Array, "batch"]
    """It comes from the unembedding, not from the parts."""
    embeddings: Float[Array, "batch"]
    """What enters layer 0: the token's embedding, or the picture's."""
    attn: Float[Array, "batch layers"]
    heads: Float[Array, "batch layers heads"]
    """What each head contributes to ``attn``."""
    attn_rest: Float[Array, "batch layers"]
    """``attn`` without its heads: the output's bias, and what interventions add behind the heads, such as LoRA on
    ``o_proj``. 0 in models without such a bias."""
    mlp: Float[Array, "batch layers"]
    deepstack: Float[Array, "batch layers"]
    """The visual features that DeepStack adds. 0 at tokens of text, and in models without DeepStack."""
    edits: Float[Array, "batch layers"]
    """What interventions change in the residual stream itself, such as an editor at ``resid_post``."""

    def total(self) -> Float[Array, "batch"]:
        """The sum of the parts; it equals ``logit`` up to rounding."""
        return self.embeddings + sum(getattr(self, part).sum(1) for part in PARTS[1:])


def attribute(
    model: Model,
    inputs: Inputs,
    at: Int[ArrayLike, "batch"],
    word: Int[ArrayLike, "batch"],
    foil: Int[ArrayLike, "batch"] | None = None,
    *,
    interventions: Any = (),
) -> Attribution:
    """Divides the logit of one word at one token of each row among the parts of the model.

    Args:
        at: the position of the token in each row.
        word: the id of the word.
        foil: another word; the difference ``logit(word) - logit(foil)`` is then divided.
        interventions: those that act on the model, bound to the batch.

    Raises:
        UserError: if an intervention acts on the final norm.
    """
    interventions = acting(interventions, model.depths)
    check_unembeds(interventions)
    foil = None if foil is None else jnp.asarray(foil)
    return _attribute(model, inputs, jnp.asarray(at), jnp.asarray(word), foil, interventions)


@jax.jit
def _attribute(
    model: Model,
    inputs: Inputs,
    at: Int[ArrayLike, "batch"],
    word: Int[ArrayLike, "batch"],
    foil: Int[ArrayLike, "batch"] | None,
    interventions: tuple[Intervention, ...],
) -> Attribution:
    text, written = model.text, _written(model, inputs, at, interventions)
    last = written["text.resid_post"][-1]
    direction = text.unembedding(word).astype(jnp.float32)
    if foil is not None:
        direction = direction - text.unembedding(foil).astype(jnp.float32)
    logit = (text.norm(last) * direction).sum(-1)
    towards = direction * text.norm.factor(last)  # (B, D), what a vector of the stream is multiplied by

    def part(x: jax.Array) -> jax.Array:
        return jnp.moveaxis((x * towards).sum(-1), 0, -1)

    attn, mlp = part(written["text.attn_out"]), part(written["text.mlp_out"])
    deepstack = part(written["text.deepstack"]) if "text.deepstack" in written else jnp.zeros_like(mlp)
    edits = part(_edits(written)) if _touch(interventions, *_STREAM) else jnp.zeros_like(mlp)
    heads, rest = _heads(model, written, towards)
    if _touch(interventions, "text.self_attn.o_proj", "text.attn_out"):
        rest = attn - heads.sum(-1)
    embeddings = (written["text.embeddings"] * towards).sum(-1)
    return Attribution(logit, embeddings, attn, heads, rest, mlp, deepstack, edits)


#: The residual stream on its way through a layer.
_STREAM = ("text.resid_pre", "text.resid_mid", "text.resid_post")


def _touch(interventions: Sequence[Intervention], *sites: str) -> bool:
    return any(not intervention.sites.isdisjoint(sites) for intervention in interventions)


def _written(
    model: Model, inputs: Inputs, at: jax.Array, interventions: tuple[Intervention, ...]
) -> dict[str, jax.Array]:
    """The values of one token of each row: site -> ``(layers, B, ...)``, ``(B, D)`` for the embeddings; float32."""
    sites = ["embeddings", "head_out", "self_attn.o_proj", "attn_out", "mlp_out", "deepstack", "resid_post"]
    if _touch(interventions, *_STREAM):
        sites += ["resid_pre", "resid_mid"]
    rows = jnp.arange(len(at))
    present = model.sites(inputs)
    tap = Tap(reduce=lambda value: value[rows, at].astype(jnp.float32))
    return model(inputs, interventions, {f"text.{s}": tap for s in sites if f"text.{s}" in present}).taps


def _edits(written: dict[str, jax.Array]) -> Float[Array, "layers batch width"]:
    """What each layer's stream has more than what was written to it."""
    pre, mid, post = (written[site] for site in _STREAM)
    before = jnp.concatenate([written["text.embeddings"][None], post[:-1]])
    behind = written["text.mlp_out"] + written.get("text.deepstack", 0)
    return (pre - before) + (mid - pre - written["text.attn_out"]) + (post - mid - behind)


def _heads(
    model: Model, written: dict[str, jax.Array], towards: Float[ArrayLike, "batch width"]
) -> tuple[Float[Array, "batch layers heads"], Float[Array, "batch layers"]]:
    """What the heads and the bias of ``o_proj`` contribute."""
    config = model.config.text

    def of_layer(scanned: tuple) -> tuple[jax.Array, jax.Array]:
        index, head_out, out = scanned  # out: the sum of the heads, before the norm behind the attention
        layer = layer_at(model.text.layers, index)
        back = towards if not config.sandwich_norm else towards * layer.post_attention_layernorm.factor(out)
        o_proj = layer.self_attn.o_proj
        read = product("bw,iw->bi", back, o_proj.kernel[...], jnp.float32).reshape(head_out.shape)
        bias = jnp.zeros(len(out)) if o_proj.bias is None else (back * o_proj.bias[...]).sum(-1)
        return (read * head_out).sum(-1), bias

    outs = written["text.head_out"], written["text.self_attn.o_proj"]
    heads, bias = jax.lax.map(of_layer, (jnp.arange(config.num_hidden_layers), *outs))
    return jnp.moveaxis(heads, 0, 1), bias.T
