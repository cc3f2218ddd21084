"""FLOPs of a model's matmuls: a multiplication and an addition are two. Norms, softmax and the like are left out."""

import jax
import numpy as np

from vlm_jax.inputs import Inputs
from vlm_jax.model import Model


def layers_flops(model: Model, batch: int, tokens: int, before: int = 0) -> float:
    """Forward pass of all layers of the decoder on ``tokens`` causal tokens of each of ``batch`` samples, which come
    after ``before`` others."""
    config = model.config.text
    kernels = sum(leaf.size for leaf in jax.tree.leaves(model.text.layers) if leaf.ndim == 3)
    keys = tokens * (before + (tokens + 1) / 2)
    return batch * (
        2 * kernels * tokens + 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * keys
    )


def head_flops(model: Model, tokens: int) -> float:
    """Logits of this many tokens."""
    return 2 * tokens * model.config.text.hidden_size * model.config.text.vocab_size


def vision_flops(model: Model, inputs: Inputs) -> float:
    """Forward pass of the vision tower and the projector on the inputs' images: two FLOPs for each parameter and patch.
    Attention is left out."""
    if inputs.images is None:
        return 0.0
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.visual))
    return 2.0 * parameters * float(np.asarray(inputs.images.patch_mask).sum())


def lora_step_flops(model: Model, lowest: int, batch: int, length: int, answer: int, adapters: int) -> float:
    """A step that trains ``adapters`` parameters of LoRA above a frozen model, from layer ``lowest`` on.

    Frozen kernels take 4 FLOPs for each parameter and token: the forward pass, and the gradients of the layers' inputs.
    Adapters take 6, as they have gradients too. What is computed again in the backward pass is left out.

    Args:
        batch: samples of a step, of ``length`` tokens each, ``answer`` of which are unembedded.
    """
    depth = model.config.text.num_hidden_layers
    layers = (depth - lowest) / depth * layers_flops(model, batch, length)
    return 2 * (layers + head_flops(model, batch * answer)) + 6.0 * adapters * batch * length
