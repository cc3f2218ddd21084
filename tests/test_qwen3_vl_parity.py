"""Qwen3-VL against transformers: every tap and the logits, in float32, within 1e-4; and its checkpoints.

``compare`` is the one judge. The controls break the oracle in the ways a port is most likely to be wrong, and the
same ``compare`` must then object - at the site that was broken, and at none before it.
"""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from hf_oracle import make_batch, oracle_sites, tiny_config, tiny_model
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl import modeling_qwen3_vl as hf

import vlm_jax
from vlm_jax.errors import UserError

TOLERANCE = 1e-4

RAGGED = [
    [5, (4, 6), 3],  # an image in the middle; its grid recurs in the next row, so that the two can be swapped
    [2, (8, 4), 4, (4, 6), 6],
    [17],
    [(2, 10), 9],
]
LONG = [[300, (12, 18), 140], [3, (6, 14), 2]]  # 496 tokens, and far more padding than text beside them
BATCHES = {
    "left": make_batch(RAGGED, "left"),
    "right": make_batch(RAGGED, "right"),
    "long": make_batch(LONG, "left", seed=1),
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
    return {site: max_error(site, got[site], want[site]) for site in want}


def max_error(site, got, want):
    got = np.asarray(got)
    if site.startswith(("visual.", "projector.")):
        got = got[..., : want.shape[-2], :]  # ours are padded on, to a bucket of patches
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
    """Parity says little about a model whose attention is uniform, whose sites are faint or whose DeepStack is zero."""
    sites = oracle_sites(oracles[name], BATCHES["left"])
    probs = sites["text.attn_probs"][:, :, :, -1]  # the last query of a left-padded row sees the whole row
    lengths = BATCHES["left"]["attention_mask"].sum(-1)
    entropy = -np.sum(probs * np.log(probs + 1e-30), -1).mean((0, 2))
    assert (entropy < 0.9 * np.log(lengths)).all() and (entropy > 0.3).all()
    scale = {site: np.nanstd(array) for site, array in sites.items() if site != "text.attn_probs"}
    assert all(0.1 < s < 10 for s in scale.values()), scale

    taps = len(oracles[name].config.vision_config.deepstack_visual_indexes)
    image_rows = sites["text.deepstack"][:, BATCHES["left"]["mm_token_type_ids"] == 1]
    assert image_rows[:taps].any(-1).all() and not image_rows[taps:].any()


@pytest.mark.parametrize("name", MODELS)
def test_oracle_is_well_conditioned(oracles, name):
    """If rounding alone moved the oracle by the tolerance, correct ports would fail and the margin mean nothing."""
    double = copy.deepcopy(oracles[name]).double()
    batch = make_batch(LONG[:1], seed=1)  # unpadded: transformers' eager mask overflows in float64
    exact = oracle_sites(double, batch | {"pixel_values": batch["pixel_values"].astype(np.float64)})
    rounding = compare(oracles[name], lambda *_: {site: x.astype(np.float32) for site, x in exact.items()}, batch)
    assert max(rounding.values()) < TOLERANCE / 3, rounding


@pytest.mark.parametrize(
    "name, batch", [("untied", "left"), ("untied", "right"), ("untied", "long"), ("tied", "left"), ("tied", "right")]
)
def test_every_site_matches(oracles, ports, name, batch):
    errors = compare(oracles[name], ports[name], BATCHES[batch])
    assert max(errors.values()) < TOLERANCE, far(errors)


def test_every_site_matches_without_images(oracles, ports):
    want = oracle_sites(oracles["untied"], BATCHES["text"])
    del want["text.deepstack"]  # see the next test
    got = ports["untied"](BATCHES["text"], sorted(want))
    errors = {site: max_error(site, got[site], array) for site, array in want.items()}
    assert max(errors.values()) < TOLERANCE, far(errors)


def test_deepstack_without_images_is_refused(ports):
    """A site that a pass does not have is an error for a tap, as it is for an intervention."""
    with pytest.raises(UserError, match=r"text\.deepstack.*image"):
        ports["untied"](BATCHES["text"], ["text.deepstack"])


def far(errors):
    return {site: error for site, error in errors.items() if error >= TOLERANCE}


# Controls. Each breaks the oracle: the copy of the model it is given, and through ``patch`` transformers itself.


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
    visual.deepstack_visual_indexes = [i + 1 for i in visual.deepstack_visual_indexes]


def merger_gelu_tanh(patch, model):
    visual = model.model.visual
    for merger in (visual.merger, *visual.deepstack_merger_list):
        merger.act_fn = nn.GELU(approximate="tanh")


def vision_gelu_exact(patch, model):
    for block in model.model.visual.blocks:
        block.mlp.act_fn = nn.GELU()


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
    other_theta(model.model.visual.rotary_pos_emb)


def positions_nearest(patch, model):
    interpolation = hf.get_vision_interpolation_indices_and_weights

    def nearest(*args, **kwargs):
        indices, weights = interpolation(*args, **kwargs)
        return indices, nn.functional.one_hot(weights.argmax(-1), weights.shape[-1]).float()

    patch.setattr(hf, "get_vision_interpolation_indices_and_weights", nearest)


def positions_half_pixel(patch, model):
    model.model.visual.interpolation_align_corners = False


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
    other_theta(model.model.language_model.rotary_emb)


def other_theta(rotary):
    rotary.inv_freq = rotary.inv_freq**1.1  # the frequencies of theta**1.1


def query_norm_skipped(patch, model):
    for layer in model.model.language_model.layers:
        layer.self_attn.q_norm = nn.Identity()


def key_norm_skipped(patch, model):
    for layer in model.model.language_model.layers:
        layer.self_attn.k_norm = nn.Identity()


def rms_norm_epsilon(patch, model):
    for module in model.model.language_model.modules():
        if isinstance(module, hf.Qwen3VLTextRMSNorm):
            module.variance_epsilon = 1e-6


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


@pytest.fixture(params=CONTROLS, ids=lambda control: control.__name__)
def broken(request, oracles, monkeypatch):
    model = copy.deepcopy(oracles["untied"])
    request.param(monkeypatch, model)
    return model, *CONTROLS[request.param]


def assert_caught(broken, ours):
    model, first, upstream = broken
    errors = compare(model, ours, BATCHES["left"])
    assert errors["logits"] > 1e-3, errors
    assert all(errors[site] > TOLERANCE for site in first), errors
    assert upstream is None or errors[upstream] < TOLERANCE, errors


def test_control_changes_the_oracle(broken, intact_oracle):
    """A control that leaves the oracle as it was would prove nothing about ``compare``."""
    assert_caught(broken, intact_oracle)


def test_control_is_caught(broken, port_once):
    assert_caught(broken, port_once)


def test_token_types_are_optional(ports):
    batch = BATCHES["left"]
    without = {name: array for name, array in batch.items() if name != "mm_token_type_ids"}
    want, got = (ports["untied"](arrays, ["logits"])["logits"] for arrays in (batch, without))
    np.testing.assert_array_equal(got, want)


# Checkpoints


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_equal(folders, tmp_path, name):
    model, processor = vlm_jax.load(folders[name])
    assert processor is None  # the folder has no tokeniser
    vlm_jax.save(model, tmp_path)
    want, got = (load_file(folder / "model.safetensors") for folder in (folders[name], tmp_path))
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].dtype == want[key].dtype and got[key].tobytes() == want[key].tobytes(), key


def test_transformers_reads_what_is_saved(oracles, folders, tmp_path):
    vlm_jax.save(vlm_jax.load(folders["tied"])[0], tmp_path)
    model, loading = Qwen3VLForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), loading
    want, got = (oracle_sites(m, BATCHES["left"])["logits"] for m in (oracles["tied"], model.eval()))
    np.testing.assert_array_equal(got, want)


@pytest.fixture
def folder(folders, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(folders["untied"], tmp_path / "copy")


def edit(path, change):
    """Rewrites a JSON file by ``change``, which alters the parsed value in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_config_as_released(ports, folder):
    """The published config.json predates ``rope_parameters`` and calls the vision tower by the whole model's name."""

    def as_released(config):
        rope = config["text_config"].pop("rope_parameters")
        config["text_config"]["rope_theta"] = rope.pop("rope_theta")
        config["text_config"]["rope_scaling"] = rope
        config["vision_config"].pop("rope_parameters")
        config["vision_config"]["model_type"] = "qwen3_vl"

    edit(folder / "config.json", as_released)
    want, got = (answer(BATCHES["left"], ["logits"])["logits"] for answer in (ports["untied"], port(folder)))
    np.testing.assert_array_equal(got, want)


def test_sharded_checkpoint(oracles, ports, tmp_path):
    oracles["untied"].save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    want, got = (answer(BATCHES["left"], ["logits"])["logits"] for answer in (ports["untied"], port(tmp_path)))
    np.testing.assert_array_equal(got, want)


def test_every_wrong_tensor_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    missing = ["model.visual.merger.norm.weight", "model.language_model.layers.3.self_attn.k_norm.weight"]
    extra = ["model.language_model.layers.6.mlp.up_proj.weight", "model.visual.deepstack_merger_list.3.norm.bias"]
    misshapen = ["model.language_model.layers.0.mlp.down_proj.weight", "model.visual.pos_embed.weight"]
    for key in missing:
        del tensors[key]
    for key in extra:
        tensors[key] = np.zeros(3, np.float32)
    for key in misshapen:  # the right number of elements, so that only a look at the shape can tell
        tensors[key] = np.ascontiguousarray(tensors[key].T)
    save_file(tensors, folder / "model.safetensors")
    message = load_error(folder)
    assert [key for key in missing + extra + misshapen if key not in message] == []


@pytest.mark.parametrize("keep", [0.5, 0.001], ids=["data", "header"])
def test_truncated_checkpoint(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    assert "model.safetensors" in load_error(folder)


def test_unsupported_architecture(folder):
    def llama(config):
        config.update(architectures=["LlamaForCausalLM"], model_type="llama")

    edit(folder / "config.json", llama)
    assert "llama" in load_error(folder).lower()


def load_error(folder):
    with pytest.raises(UserError) as error:
        vlm_jax.load(folder)
    return str(error.value)
