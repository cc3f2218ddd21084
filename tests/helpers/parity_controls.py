"""Negative controls: each breaks the oracle in a way that a port is likely to be wrong.

A control takes pytest's monkeypatch, to alter transformers itself, and a copy of the model, to alter in place.
``CONTROLS`` holds them by the model of ``test_parity.py`` that they break, each with the sites that must be the first
to differ and a site upstream of them that must not.
"""

import sys

import torch
from torch import nn
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3


def decoder(model):
    return getattr(model.model, "language_model", model.model)


# Any decoder


def rms_norm_epsilon(patch, model):
    for module in decoder(model).modules():
        if "RMSNorm" in type(module).__name__:
            name = "eps" if hasattr(module, "eps") else "variance_epsilon"
            setattr(module, name, 1e-6)


def text_rope_theta(patch, model):
    other_theta(decoder(model).rotary_emb)


def other_theta(rotary):
    rotary.inv_freq = rotary.inv_freq**1.1  # the frequencies of theta**1.1


def query_norm_skipped(patch, model):
    for layer in decoder(model).layers:
        layer.self_attn.q_norm = nn.Identity()


def key_norm_skipped(patch, model):
    for layer in decoder(model).layers:
        layer.self_attn.k_norm = nn.Identity()


def qkv_bias_dropped(patch, model):
    for layer in decoder(model).layers:
        drop_bias(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)


def attention_output_bias_dropped(patch, model):
    for layer in decoder(model).layers:
        drop_bias(layer.self_attn.o_proj)


def mlp_bias_dropped(patch, model):
    for layer in decoder(model).layers:
        drop_bias(layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)


def drop_bias(*linears):
    for linear in linears:
        nn.init.zeros_(linear.bias)


def llama3_scaling_dropped(patch, model):
    rotary = model.model.rotary_emb
    rotary.inv_freq, _ = rotary.compute_default_rope_parameters(model.config)


# Qwen3-VL


def deepstack_zeroed(patch, model):
    patch.setattr(qwen3.Qwen3VLTextModel, "_deepstack_process", lambda self, hidden, mask, features: hidden)


def deepstack_one_text_layer_late(patch, model):
    forward = qwen3.Qwen3VLTextModel.forward

    def late(self, *args, deepstack_visual_embeds, **kwargs):
        features = [torch.zeros_like(deepstack_visual_embeds[0]), *deepstack_visual_embeds]
        return forward(self, *args, deepstack_visual_embeds=features, **kwargs)

    patch.setattr(qwen3.Qwen3VLTextModel, "forward", late)


def deepstack_tapped_one_block_late(patch, model):
    visual = model.model.visual
    visual.deepstack_visual_indexes = [i + 1 for i in visual.deepstack_visual_indexes]


def qwen3_merger_gelu_tanh(patch, model):
    visual = model.model.visual
    for merger in (visual.merger, *visual.deepstack_merger_list):
        merger.act_fn = nn.GELU(approximate="tanh")


def qwen3_vision_gelu_exact(patch, model):
    for block in model.model.visual.blocks:
        block.mlp.act_fn = nn.GELU()


def positions_nearest(patch, model):
    interpolation = qwen3.get_vision_interpolation_indices_and_weights

    def nearest(*args, **kwargs):
        indices, weights = interpolation(*args, **kwargs)
        return indices, nn.functional.one_hot(weights.argmax(-1), weights.shape[-1]).float()

    patch.setattr(qwen3, "get_vision_interpolation_indices_and_weights", nearest)


def positions_half_pixel(patch, model):
    model.model.visual.interpolation_align_corners = False


def mrope_sections_in_blocks(patch, model):
    def blocks(self, freq):
        parts = freq.split(self.mrope_section, dim=-1)
        freq = torch.cat([part[axis] for axis, part in enumerate(parts)], -1)
        return torch.cat((freq, freq), -1)

    patch.setattr(qwen3.Qwen3VLTextRotaryEmbedding, "recomposition_frequencies", blocks)


def images_swapped_between_rows(patch, model):
    features = qwen3.Qwen3VLModel.get_image_features
    order = [2, 1, 0, 3]  # the batch's two images of one grid

    def swapped(self, *args, **kwargs):
        out = features(self, *args, **kwargs)
        out.pooler_output = [out.pooler_output[i] for i in order]
        out.deepstack_features = [[level[i] for i in order] for level in out.deepstack_features]
        return out

    patch.setattr(qwen3.Qwen3VLModel, "get_image_features", swapped)


# Both Qwen families; ``source`` is transformers' file of the model.


def source(model):
    return sys.modules[type(model).__module__]


def vision_attention_causal(patch, model):
    file = source(model)
    eager = file.eager_attention_forward

    def causal(module, query, key, value, attention_mask, **kwargs):
        if "VisionAttention" in type(module).__name__:
            attention_mask = torch.full((query.shape[2], key.shape[2]), -torch.inf).triu(1)
        return eager(module, query, key, value, attention_mask, **kwargs)

    patch.setattr(file, "eager_attention_forward", causal)


def vision_attention_across_images(patch, model):
    def packed(grid_thw, config, kwargs):
        return torch.tensor([0, int(grid_thw.prod(-1).sum())]), None

    patch.setattr(source(model), "get_vision_attention_seqlens", packed)


def vision_rope_swaps_h_and_w(patch, model):
    file = source(model)
    positions = file.get_vision_position_ids
    patch.setattr(file, "get_vision_position_ids", lambda *args, **kwargs: positions(*args, **kwargs).flip(-1))


def vision_rope_theta(patch, model):
    other_theta(model.model.visual.rotary_pos_emb)


def mrope_swaps_h_and_w(patch, model):
    cls = type(model.model)
    positions = cls.get_vision_position_ids
    patch.setattr(cls, "get_vision_position_ids", lambda *args, **kwargs: positions(*args, **kwargs)[[0, 2, 1]])


# Qwen2.5-VL


def window_order_not_undone(patch, model):
    patch.setattr(qwen2_5.torch, "argsort", lambda index: torch.arange(len(index)))


def windows_dropped(patch, model):
    visual = model.model.visual
    visual.fullatt_block_indexes = range(len(visual.blocks))


def full_attention_in_wrong_blocks(patch, model):
    visual = model.model.visual
    visual.fullatt_block_indexes = [i - 1 for i in visual.fullatt_block_indexes]


def mrope_sections_interleaved(patch, model):
    def interleaved(self, freq):
        mixed = freq[0].clone()
        for axis in (1, 2):
            where = slice(axis, 3 * self.mrope_section[axis], 3)
            mixed[..., where] = freq[axis, ..., where]
        return torch.cat((mixed, mixed), -1)

    patch.setattr(qwen2_5.Qwen2_5_VLRotaryEmbedding, "recomposition_frequencies", interleaved)


def qwen2_5_merger_gelu_tanh(patch, model):
    model.model.visual.merger.mlp[1] = nn.GELU(approximate="tanh")


# Gemma3


def local_rope_base(patch, model):
    """The local layers turn as fast as the global ones would without scaling."""
    rotary = decoder(model).rotary_emb
    factor = rotary.config.rope_parameters["full_attention"]["factor"]
    rotary.sliding_attention_inv_freq = rotary.full_attention_inv_freq * factor


def linear_scaling_dropped(patch, model):
    rotary = decoder(model).rotary_emb
    rotary.full_attention_inv_freq = (
        rotary.full_attention_inv_freq * rotary.config.rope_parameters["full_attention"]["factor"]
    )


def image_blocks(patch, change):
    """Alters the number of the image that each token belongs to in the bidirectional mask; -1 is none."""
    blocks = gemma3.get_block_sequence_ids_for_mask
    patch.setattr(gemma3, "get_block_sequence_ids_for_mask", lambda *args, **kwargs: change(blocks(*args, **kwargs)))


def image_block_causal(patch, model):
    image_blocks(patch, lambda ids: torch.full_like(ids, -1))


def images_see_each_other(patch, model):
    image_blocks(patch, lambda ids: ids.clamp(max=0))


def sliding_window_off(patch, model):
    decoder(model).config.sliding_window = 10_000


def sliding_window_off_by_one(patch, model):
    decoder(model).config.sliding_window += 1


def norm_without_offset(patch, model):
    patch.setattr(gemma3.Gemma3RMSNorm, "forward", lambda self, x: self._norm(x) * self.weight)


def embedding_scale_dropped(patch, model):
    decoder(model).embed_tokens.embed_scale = torch.tensor(1.0)


def query_pre_attn_scalar_ignored(patch, model):
    for layer in decoder(model).layers:
        layer.self_attn.scaling = layer.self_attn.head_dim**-0.5


def norm_after_attention_dropped(patch, model):
    for layer in decoder(model).layers:
        layer.post_attention_layernorm = nn.Identity()


def norm_after_mlp_dropped(patch, model):
    for layer in decoder(model).layers:
        layer.post_feedforward_layernorm = nn.Identity()


def first_patch_for_average(patch, model):
    projector = model.model.multi_modal_projector
    step = projector.kernel_size
    patch.setattr(projector.avg_pool, "forward", lambda x: x[..., ::step, ::step])


def pooling_transposed(patch, model):
    pool = model.model.multi_modal_projector.avg_pool
    forward = pool.forward
    patch.setattr(pool, "forward", lambda x: forward(x).mT)


def tower_gelu_exact(patch, model):
    for block in model.model.vision_tower.encoder.layers:
        block.mlp.activation_fn = nn.GELU()


def text_gelu_exact(patch, model):
    for layer in decoder(model).layers:
        layer.mlp.act_fn = nn.GELU()


def logit_softcap_ignored(patch, model):
    model.config.final_logit_softcapping = None


# LLaVA


def change_features(model, change):
    """Alters the tower's hidden states between the tower and the projector."""

    def hook(_, __, out):
        out.hidden_states = tuple(None if hidden is None else change(hidden) for hidden in out.hidden_states)
        return out

    model.model.vision_tower.register_forward_hook(hook)


def cls_kept(patch, model):
    """The class token goes to the projector, and the last patch in its stead is lost."""
    change_features(model, lambda hidden: hidden.roll(1, 1))


def feature_layer_early(patch, model):
    use_feature_layer(patch, model, -3)


def feature_layer_late(patch, model):
    use_feature_layer(patch, model, -1)


def use_feature_layer(patch, model, layer):
    forward = model.forward
    patch.setattr(model, "forward", lambda **kwargs: forward(**kwargs, vision_feature_layer=layer))


def feature_layers_reversed(patch, model):
    use_feature_layer(patch, model, model.config.vision_feature_layer[::-1])


def projector_gelu_tanh(patch, model):
    model.model.multi_modal_projector.act = nn.GELU(approximate="tanh")


def post_layernorm_applied(patch, model):
    change_features(model, model.model.vision_tower.post_layernorm)


ATTENTION = (["text.attn_scores", "text.attn_probs"], "text.embeddings")
QUERIES = (["text.self_attn.q_proj", "text.self_attn.k_proj", "text.self_attn.v_proj"], "text.embeddings")
VISUAL_ATTENTION = (["visual.attn_probs", "visual.attn_out"], "visual.embeddings")
VISUAL_MLP = (["visual.mlp_out"], "visual.embeddings")
NORM = (["text.self_attn.q_proj", "text.norm"], "text.embeddings")

QWEN_VL = {
    vision_attention_causal: VISUAL_ATTENTION,
    vision_attention_across_images: VISUAL_ATTENTION,
    vision_rope_swaps_h_and_w: VISUAL_ATTENTION,
    vision_rope_theta: VISUAL_ATTENTION,
    mrope_swaps_h_and_w: ATTENTION,
    text_rope_theta: ATTENTION,
    rms_norm_epsilon: NORM,
}
GEMMA3_TEXT = {
    local_rope_base: ATTENTION,
    linear_scaling_dropped: ATTENTION,
    sliding_window_off: ATTENTION,
    sliding_window_off_by_one: ATTENTION,
    query_pre_attn_scalar_ignored: ATTENTION,
    query_norm_skipped: ATTENTION,
    key_norm_skipped: ATTENTION,
    norm_after_attention_dropped: (["text.attn_out"], "text.embeddings"),
    norm_after_mlp_dropped: (["text.mlp_out"], "text.embeddings"),
    text_gelu_exact: (["text.mlp.down_proj"], "text.embeddings"),
    rms_norm_epsilon: NORM,
}
CONTROLS = {
    "qwen3_vl": QWEN_VL
    | {
        deepstack_zeroed: (["text.deepstack"], "projector.deepstack_merger_list"),
        deepstack_one_text_layer_late: (["text.deepstack"], "projector.deepstack_merger_list"),
        deepstack_tapped_one_block_late: (["projector.deepstack_merger_list"], "projector.merger"),
        qwen3_merger_gelu_tanh: (["projector.merger", "projector.deepstack_merger_list"], "visual.resid_post"),
        qwen3_vision_gelu_exact: VISUAL_MLP,
        positions_nearest: (["visual.embeddings"], None),
        positions_half_pixel: (["visual.embeddings"], None),
        mrope_sections_in_blocks: ATTENTION,
        query_norm_skipped: ATTENTION,
        key_norm_skipped: ATTENTION,
        images_swapped_between_rows: (["text.embeddings"], "projector.deepstack_merger_list"),
    },
    "qwen2_5_vl": QWEN_VL
    | {
        window_order_not_undone: (["projector.merger"], "visual.resid_post"),
        windows_dropped: VISUAL_ATTENTION,
        full_attention_in_wrong_blocks: VISUAL_ATTENTION,
        qwen2_5_merger_gelu_tanh: (["projector.merger"], "visual.resid_post"),
        mrope_sections_interleaved: ATTENTION,
        qkv_bias_dropped: QUERIES,
    },
    "gemma3": GEMMA3_TEXT
    | {
        image_block_causal: ATTENTION,
        images_see_each_other: ATTENTION,
        norm_without_offset: (["projector.mm_soft_emb_norm", "text.self_attn.q_proj"], "visual.resid_post"),
        embedding_scale_dropped: (["text.embeddings"], "projector.mm_input_projection"),
        first_patch_for_average: (["projector.mm_soft_emb_norm"], "visual.resid_post"),
        pooling_transposed: (["projector.mm_soft_emb_norm"], "visual.resid_post"),
        tower_gelu_exact: VISUAL_MLP,
    },
    "llava": {
        cls_kept: (["projector.linear_1"], "visual.resid_post"),
        feature_layer_early: (["projector.linear_1"], "visual.resid_post"),
        feature_layer_late: (["projector.linear_1"], "visual.resid_post"),
        tower_gelu_exact: VISUAL_MLP,
        projector_gelu_tanh: (["projector.linear_2"], "projector.linear_1"),
        post_layernorm_applied: (["projector.linear_1"], "visual.resid_post"),
        text_rope_theta: ATTENTION,
        rms_norm_epsilon: NORM,
    },
    "qwen3": {
        query_norm_skipped: ATTENTION,
        key_norm_skipped: ATTENTION,
        text_rope_theta: ATTENTION,
        rms_norm_epsilon: NORM,
    },
    "qwen2": {qkv_bias_dropped: QUERIES, text_rope_theta: ATTENTION, rms_norm_epsilon: NORM},
    "gemma3_text": GEMMA3_TEXT
    | {
        norm_without_offset: NORM,
        embedding_scale_dropped: (["text.embeddings"], None),
    },
    "gemma3_text-softcap": {logit_softcap_ignored: (["logits"], "text.norm")},
    "llava-layers": {feature_layers_reversed: (["projector.linear_1"], "visual.resid_post")},
    "llama": {
        llama3_scaling_dropped: ATTENTION,
        qkv_bias_dropped: QUERIES,
        attention_output_bias_dropped: (["text.self_attn.o_proj"], "text.embeddings"),
        mlp_bias_dropped: (["text.mlp.gate_proj", "text.mlp.up_proj", "text.mlp.down_proj"], "text.embeddings"),
        rms_norm_epsilon: NORM,
    },
}
