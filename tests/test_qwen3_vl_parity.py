"""Qwen3-VL against transformers: every tap and the logits, in float32, within 1e-4.

``compare`` is the one judge. The controls break the oracle in the ways a port is most likely to be wrong, and the
same ``compare`` must then object - at the site that was broken, and at none before it.
"""

import json

import numpy as np
import pytest
import torch
from hf_oracle import MERGE, make_batch, oracle_sites, tiny_config, tiny_model
from torch import nn
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl import modeling_qwen3_vl as hf

TOLERANCE = 1e-4

RAGGED = [
    [5, (4, 6), 3],  # an image in the middle; its grid recurs in the next row, so that the two can be swapped
    [2, (8, 4), 4, (4, 6), 6],
    [17],
    [(2, 10), 9],
]
BATCHES = {
    "left": make_batch(RAGGED, "left"),
    "right": make_batch(RAGGED, "right"),
    "long": make_batch([[300, (12, 18), 140], [3, (6, 14), 2]], "left", seed=1),
    "text": make_batch([[11], [19]], "left", seed=2),
}
# Other sizes for the tied model: three queries per key head, an uneven M-RoPE split, a second theta.
TIED = tiny_config(
    tied=True,
    text={
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 700.0,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    },
)
MODELS = {"untied": (tiny_config(tied=False), 0), "tied": (TIED, 1)}


def port(folder):
    """vlm_jax's answer to a batch: ``{site: array}`` for the sites asked for."""
    import vlm_jax

    model, _ = vlm_jax.load(folder)

    def answer(batch, sites):
        inputs = vlm_jax.Inputs.from_hf(model.config, **batch)
        out = model(inputs, taps=[site for site in sites if site != "logits"])
        return {"logits": out.logits, **out.taps}

    return answer


def compare(hf_model, ours, batch):
    """The largest absolute difference at each site."""
    want = oracle_sites(hf_model, batch)
    got = ours(batch, sorted(want))
    return {site: max_error(site, got[site], array) for site, array in want.items()}


def max_error(site, got, want):
    got = np.asarray(got)
    assert got.dtype == np.float32, f"{site} is {got.dtype}"
    assert got.shape == want.shape, f"{site} has shape {got.shape}, transformers has {want.shape}"
    promised = ~np.isnan(want)
    assert np.isfinite(got[promised]).all(), f"{site} is not finite"
    return float(np.abs(got - want)[promised].max())


@pytest.fixture(scope="module")
def oracles():
    return {name: tiny_model(config, seed) for name, (config, seed) in MODELS.items()}


@pytest.fixture(scope="module")
def folders(oracles, tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in oracles}
    for name, model in oracles.items():
        model.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def ports(folders):
    return {name: port(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("name", MODELS)
def test_oracle_is_a_hard_case(oracles, name):
    """Parity says little about a model whose attention is uniform, whose DeepStack is faint or whose rows agree."""
    sites = oracle_sites(oracles[name], BATCHES["left"])
    probs = sites["text.attn_probs"][:, :, :, -1]  # the last query of a left-padded row sees the whole row
    lengths = BATCHES["left"]["attention_mask"].sum(-1)
    entropy = -np.sum(probs * np.log(probs + 1e-30), -1).mean((0, 2))
    assert (entropy < 0.9 * np.log(lengths)).all() and (entropy > 0.3).all()
    scale = {site: np.nanstd(array) for site, array in sites.items() if site != "text.attn_probs"}
    assert all(0.1 < s < 10 for s in scale.values()), scale

    taps = len(oracles[name].config.vision_config.deepstack_visual_indexes)
    image_rows = sites["text.deepstack"][:, BATCHES["left"]["mm_token_type_ids"] == 1]
    assert np.abs(image_rows[:taps]).min(-1).max() > 0 and not image_rows[taps:].any()


@pytest.mark.parametrize(
    "name, batch", [("untied", "left"), ("untied", "right"), ("untied", "long"), ("untied", "text"), ("tied", "left")]
)
def test_every_site_matches(oracles, ports, name, batch):
    errors = compare(oracles[name], ports[name], BATCHES[batch])
    assert max(errors.values()) < TOLERANCE, far(errors)


def far(errors):
    return {site: error for site, error in errors.items() if error >= TOLERANCE}


# Controls. Each takes (monkeypatch, model) and breaks the oracle.


def deepstack_zeroed(patch, model):
    patch.setattr(hf.Qwen3VLTextModel, "_deepstack_process", lambda self, hidden, mask, features: hidden)


def deepstack_one_text_layer_late(patch, model):
    forward = hf.Qwen3VLTextModel.forward

    def late(self, *args, deepstack_visual_embeds, **kwargs):
        features = [torch.zeros_like(deepstack_visual_embeds[0]), *deepstack_visual_embeds]
        return forward(self, *args, deepstack_visual_embeds=features, **kwargs)

    patch.setattr(hf.Qwen3VLTextModel, "forward", late)


def deepstack_tapped_one_block_late(patch, model):
    visual = model.model.visual
    patch.setattr(visual, "deepstack_visual_indexes", [i + 1 for i in visual.deepstack_visual_indexes])


def merger_gelu_tanh(patch, model):
    visual = model.model.visual
    for merger in (visual.merger, *visual.deepstack_merger_list):
        patch.setattr(merger, "act_fn", nn.GELU(approximate="tanh"))


def vision_gelu_exact(patch, model):
    for block in model.model.visual.blocks:
        patch.setattr(block.mlp, "act_fn", nn.GELU())


def vision_attention_causal(patch, model):
    eager = hf.eager_attention_forward

    def causal(module, query, key, value, attention_mask, **kwargs):
        if isinstance(module, hf.Qwen3VLVisionAttention):
            attention_mask = torch.full((query.shape[2], key.shape[2]), -torch.inf).triu(1)
        return eager(module, query, key, value, attention_mask, **kwargs)

    patch.setattr(hf, "eager_attention_forward", causal)


def vision_attention_across_images(patch, model):
    def packed(grid_thw, config, kwargs):
        return torch.tensor([0, int(grid_thw.prod(-1).sum())]), None

    patch.setattr(hf, "get_vision_attention_seqlens", packed)


def vision_rope_swaps_h_and_w(patch, model):
    positions = hf.get_vision_position_ids
    patch.setattr(hf, "get_vision_position_ids", lambda *args, **kwargs: positions(*args, **kwargs).flip(-1))


def vision_rope_theta(patch, model):
    patch_theta(patch, model.model.visual.rotary_pos_emb)


def positions_nearest(patch, model):
    interpolation = hf.get_vision_interpolation_indices_and_weights

    def nearest(*args, **kwargs):
        indices, weights = interpolation(*args, **kwargs)
        return indices, nn.functional.one_hot(weights.argmax(-1), weights.shape[-1]).float()

    patch.setattr(hf, "get_vision_interpolation_indices_and_weights", nearest)


def positions_half_pixel(patch, model):
    patch.setattr(model.model.visual, "interpolation_align_corners", False)


def mrope_sections_in_blocks(patch, model):
    def blocks(self, freq):
        parts = freq.split(self.mrope_section, dim=-1)
        freq = torch.cat([part[axis] for axis, part in enumerate(parts)], -1)
        return torch.cat((freq, freq), -1)

    patch.setattr(hf.Qwen3VLTextRotaryEmbedding, "recomposition_frequencies", blocks)


def mrope_swaps_h_and_w(patch, model):
    positions = hf.Qwen3VLModel.get_vision_position_ids
    patch.setattr(
        hf.Qwen3VLModel,
        "get_vision_position_ids",
        lambda *args, **kwargs: positions(*args, **kwargs)[[0, 2, 1]],
    )


def text_rope_theta(patch, model):
    patch_theta(patch, model.model.language_model.rotary_emb)


def patch_theta(patch, rotary):
    # theta ** -x to a power is another theta's.
    patch.setattr(rotary, "inv_freq", rotary.inv_freq**1.1)


def query_norm_skipped(patch, model):
    for layer in model.model.language_model.layers:
        patch.setattr(layer.self_attn, "q_norm", nn.Identity())


def key_norm_skipped(patch, model):
    for layer in model.model.language_model.layers:
        patch.setattr(layer.self_attn, "k_norm", nn.Identity())


def rms_norm_epsilon(patch, model):
    for module in model.model.language_model.modules():
        if isinstance(module, hf.Qwen3VLTextRMSNorm):
            patch.setattr(module, "variance_epsilon", 1e-6)


def images_swapped_between_rows(patch, model):
    features = hf.Qwen3VLModel.get_image_features
    order = [2, 1, 0, 3]  # RAGGED's two images of one grid

    def swapped(self, *args, **kwargs):
        out = features(self, *args, **kwargs)
        out.pooler_output = [out.pooler_output[i] for i in order]
        out.deepstack_features = [[level[i] for i in order] for level in out.deepstack_features]
        return out

    patch.setattr(hf.Qwen3VLModel, "get_image_features", swapped)


# control -> (the sites that must be the first to differ, the last site upstream of them, which must not)
CONTROLS = {
    deepstack_zeroed: (["text.deepstack"], "projector.deepstack_merger_list"),
    deepstack_one_text_layer_late: (["text.deepstack"], "projector.deepstack_merger_list"),
    deepstack_tapped_one_block_late: (["projector.deepstack_merger_list"], "projector.merger"),
    merger_gelu_tanh: (["projector.merger", "projector.deepstack_merger_list"], "visual.resid_post"),
    vision_gelu_exact: (["visual.mlp_out"], "visual.embeddings"),
    vision_attention_causal: (["visual.attn_out"], "visual.embeddings"),
    vision_attention_across_images: (["visual.attn_out"], "visual.embeddings"),
    vision_rope_swaps_h_and_w: (["visual.attn_out"], "visual.embeddings"),
    vision_rope_theta: (["visual.attn_out"], "visual.embeddings"),
    positions_nearest: (["visual.embeddings"], None),
    positions_half_pixel: (["visual.embeddings"], None),
    mrope_sections_in_blocks: (["text.attn_probs"], "text.embeddings"),
    mrope_swaps_h_and_w: (["text.attn_probs"], "text.embeddings"),
    text_rope_theta: (["text.attn_probs"], "text.embeddings"),
    query_norm_skipped: (["text.attn_probs"], "text.embeddings"),
    key_norm_skipped: (["text.attn_probs"], "text.embeddings"),
    rms_norm_epsilon: (["text.self_attn.q_proj", "text.norm"], "text.embeddings"),
    images_swapped_between_rows: (["text.embeddings"], "projector.deepstack_merger_list"),
}


@pytest.fixture(scope="module")
def intact_oracle(oracles):
    """The unbroken oracle, standing where the port would."""
    sites = oracle_sites(oracles["untied"], BATCHES["left"])
    return lambda batch, names: sites


@pytest.fixture(scope="module")
def port_once(oracles, ports):
    """The port's answer to the controls' batch: they break the oracle, so it is the same for all of them."""
    sites = ports["untied"](BATCHES["left"], sorted(oracle_sites(oracles["untied"], BATCHES["left"])))
    return lambda batch, names: sites


def assert_caught(errors, control):
    first, upstream = CONTROLS[control]
    assert errors["logits"] > 1e-3, errors
    assert all(errors[site] > TOLERANCE for site in first), errors
    assert upstream is None or errors[upstream] < TOLERANCE, errors


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.__name__)
def test_control_changes_the_oracle(oracles, intact_oracle, monkeypatch, control):
    """A control that leaves the oracle as it was would prove nothing about ``compare``."""
    control(monkeypatch, oracles["untied"])
    assert_caught(compare(oracles["untied"], intact_oracle, BATCHES["left"]), control)


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.__name__)
def test_control_is_caught(oracles, port_once, monkeypatch, control):
    control(monkeypatch, oracles["untied"])
    assert_caught(compare(oracles["untied"], port_once, BATCHES["left"]), control)


def test_token_types_are_optional(ports):
    batch = BATCHES["left"]
    without = {name: array for name, array in batch.items() if name != "mm_token_type_ids"}
    want, got = (ports["untied"](arrays, ["logits"])["logits"] for arrays in (batch, without))
    np.testing.assert_array_equal(got, want)
