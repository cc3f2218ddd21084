"""Tiny random models of every family."""

import math

import torch

from hf_oracle.family import Family
from hf_oracle.float64 import exact
from hf_oracle.gemma3 import GEMMA3, GEMMA3_TEXT_ONLY
from hf_oracle.llava import LLAMA, LLAVA
from hf_oracle.qwen2_5_vl import QWEN2, QWEN2_5_VL
from hf_oracle.qwen3_vl import QWEN3, QWEN3_VL

#: ``model_type`` -> its family.
FAMILIES: dict[str, Family] = {
    "qwen3_vl": QWEN3_VL,
    "qwen2_5_vl": QWEN2_5_VL,
    "gemma3": GEMMA3,
    "llava": LLAVA,
    "qwen3": QWEN3,
    "qwen2": QWEN2,
    "gemma3_text": GEMMA3_TEXT_ONLY,
    "llama": LLAMA,
}


def family_of(config):
    return FAMILIES[config.model_type]


def tiny_config(family="qwen3_vl", tied=False, text=None, vision=None, top=None):
    """The family's tiny config, with ``text``, ``vision`` and ``top`` overriding some of its fields."""
    family = FAMILIES[family]
    text = family.text | {"tie_word_embeddings": tied} | (text or {})
    if family.vision is None:
        return family.config(**text)
    return family.config(
        text_config=text,
        vision_config=family.vision | (vision or {}),
        tie_word_embeddings=tied,
        **family.top | (top or {}),
    )


def exact_model(config, seed=0):
    """The float64 twin of :func:`tiny_model`: equal parameters, no rounding to float32 (see :func:`exact`)."""
    return exact(lambda: tiny_model(config, seed, torch.float64))


def tiny_model(config, seed=0, dtype=torch.float32):
    """A model whose every parameter is a random float32 number, at a scale where each of them matters."""
    family = family_of(config)
    model = family.model._from_config(config, attn_implementation="eager", dtype=dtype)
    family.adjust(model)
    generator = torch.Generator().manual_seed(seed)
    rms_norms = {f"{name}.weight" for name, module in model.named_modules() if "RMSNorm" in type(module).__name__}
    embedding_scale = family.embedding_scale(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, std = scale(name, parameter.shape)
            mean -= family.norm_offset if name in rms_norms else 0
            std /= embedding_scale if "embed_tokens" in name else 1
            parameter.copy_(torch.empty(parameter.shape, dtype=torch.float32).normal_(mean, std, generator=generator))
    return model.eval()


# The linears that write to a residual stream. Loud ones would have each layer amplify the last one's rounding, until
# two correct float32 programs differ by more than the tolerance.
WRITERS = tuple(f"{name}.weight" for name in ("o_proj", "out_proj", "down_proj", "attn.proj", "mlp.linear_fc2", "fc2"))


def scale(name, shape):
    """(mean, std) of a parameter: activations of order one, attention and gates away from their linear regime."""
    if name.endswith("bias"):
        return 0.0, 0.1
    if "q_norm" in name:  # twice the score, or attention over a short row is nearly uniform
        return 2.0, 0.4
    if "class_embedding" in name:
        return 0.0, 0.3
    if len(shape) == 1:  # norm weights
        return 1.0, 0.2
    if "mm_input_projection" in name:  # a parameter that is multiplied from the right
        return 0.0, 1.5 / math.sqrt(shape[0])
    if "embed" in name and "patch" not in name:
        return 0.0, 0.3
    gain = 0.5 if name.endswith(WRITERS) else 1.5
    return 0.0, gain / math.sqrt(math.prod(shape[1:]))
