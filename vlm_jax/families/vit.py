"""What Gemma 3 and LLaVA share: the fields and the tensor names of a SigLIP or CLIP tower."""

from typing import Any

from vlm_jax.families.base import above_zero, positive, supported, whole_heads
from vlm_jax.families.key_table import CONV, KEEP, Row, linear, norm
from vlm_jax.nn.layers import ACTIVATIONS

#: Prefixes of tensor names, in files that transformers 5 writes and in older ones on the hub (``Family.spellings``).
SPELLINGS = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.", "model.vision_tower."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("model.vision_tower.vision_model.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)


def read_tower(vision: Any, where: str) -> dict[str, Any]:
    """The fields of :class:`vlm_jax.vision.vit.ViTVision` except ``out_hidden_size``."""
    sizes = positive(
        where,
        vision,
        "num_hidden_layers",
        "num_attention_heads",
        "num_channels",
        "hidden_size",
        "intermediate_size",
        "patch_size",
        "image_size",
    )
    whole_heads(where, sizes["hidden_size"], sizes["num_attention_heads"])
    return {
        "depth": sizes.pop("num_hidden_layers"),
        "num_heads": sizes.pop("num_attention_heads"),
        "in_channels": sizes.pop("num_channels"),
        "hidden_act": supported(where, "hidden_act", vision.hidden_act, tuple(ACTIVATIONS)),
        "layer_norm_eps": above_zero(where, "layer_norm_eps", vision.layer_norm_eps),
        **sizes,
    }


def encoder_rows(tower: str) -> tuple[Row, ...]:
    """The rows of the tower that transformers calls ``tower``. SigLIP and CLIP each have only some of the tensors."""
    layer = f"{tower}.encoder.layers.{{}}"
    linears = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    return (
        Row(f"{tower}.embeddings.class_embedding", "visual.class_embedding", KEEP),
        Row(f"{tower}.embeddings.patch_embedding.weight", "visual.patch_embedding.kernel", CONV),
        Row(f"{tower}.embeddings.patch_embedding.bias", "visual.patch_embedding.bias", KEEP),
        Row(f"{tower}.embeddings.position_embedding.weight", "visual.position_embedding.weight", KEEP),
        *norm(f"{tower}.pre_layrnorm", "visual.pre_layrnorm"),
        *(row for name in linears for row in linear(f"{layer}.{name}", f"visual.layers.{name}")),
        *(row for n in ("layer_norm1", "layer_norm2") for row in norm(f"{layer}.{n}", f"visual.layers.{n}")),
        *norm(f"{tower}.post_layernorm", "visual.post_layernorm"),
    )
