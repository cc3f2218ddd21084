"""LoRA adapters against the ``peft`` library on transformers' own model: logits, gradients, counts, folders."""

import copy
import functools
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from full_disk import no_file_larger_than
from hf_oracle import make_batch, tensors, tiny_config, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

import vlm_jax
from interventions import LoRA
from interventions.modules import check_k, check_names, module_names
from interventions.placement.adapters import adapter_parameters, init_lora, load_peft, lowest_layer, merge, save_peft
from interventions.placement.rules import random_k, read_names
from vlm_jax.checkpoints.leaves import abstract
from vlm_jax.errors import UserError
from vlm_jax.families import read_config
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.folder import Run

LOGITS, GRADIENT = 1e-4, 1e-5  # tolerances
RANK, ALPHA = 3, 16  # alpha / r is no short binary fraction
SCATTERED = ["L1-attn", "L0-mlp", "L4-mlp"]
PLACEMENTS = {
    "scattered": SCATTERED,
    "elsewhere": ["L5-attn", "L2-mlp", "L3-mlp"],  # of the same size, in none of the same places
    "all": module_names(6),
}
BATCH = make_batch([[5, (4, 6), 3], [9]], "left")
REAL = BATCH["attention_mask"] == 1


@pytest.fixture(scope="module")
def oracle():
    return tiny_model(tiny_config())


@pytest.fixture(scope="module")
def base(oracle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    oracle.save_pretrained(folder)
    return vlm_jax.load(folder)[0]


@pytest.fixture(scope="module")
def inputs(base):
    return vlm_jax.Inputs.from_hf(base.config, **BATCH)


@pytest.fixture(scope="module")
def logits(base, inputs):
    """Logits (real tokens, V) with an adapter, or without one; ``logits.traced`` counts the programs that it took."""

    @jax.jit
    def run(interventions):
        logits.traced += 1
        return base(inputs, interventions).logits

    def logits(*interventions):
        return np.asarray(run(interventions))[REAL]

    logits.traced = 0
    return logits


def random_lora(model, names, seed=0):
    """An adapter whose B is not zero, loud enough to matter at every module."""
    lora = init_lora(model, names, r=RANK, alpha=ALPHA, dropout=0.05, key=jax.random.key(seed))
    rng = np.random.default_rng(seed)
    weights = {
        site: (a, jnp.asarray(0.1 * rng.standard_normal(b.shape, np.float32))) for site, (a, b) in lora.weights.items()
    }
    return lora.replace(weights=weights)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Placement's name -> the adapter and its PEFT folder."""
    made = {}
    for seed, (name, placement) in enumerate(PLACEMENTS.items()):
        lora, folder = random_lora(base, placement, seed), tmp_path_factory.mktemp("adapters") / name
        save_peft(lora, base, folder)
        made[name] = lora, folder
    return made


def peft(oracle, folder, **how):
    return PeftModel.from_pretrained(copy.deepcopy(oracle), folder, **how).eval()


def peft_logits(model):
    with torch.no_grad():
        return model(**tensors(BATCH), use_cache=False).logits[torch.from_numpy(REAL)].numpy()


def lora_layers(model):
    """Full names of the modules that PEFT has wrapped."""
    return sorted(name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A"))


# What is made


def test_arrays_only_where_placed(base, adapters):
    lora = adapters["scattered"][0]
    slots = {site: len(a) for site, (a, _) in lora.weights.items()}
    attn = dict.fromkeys([f"text.self_attn.{part}_proj" for part in "qkvo"], 1)
    assert slots == attn | dict.fromkeys([f"text.mlp.{part}_proj" for part in ("gate", "up", "down")], 2)
    for site, slot in lora.slot.items():
        assert np.flatnonzero(slot < slots[site]).tolist() == ([1] if "attn" in site else [0, 4])
    for name, placement in PLACEMENTS.items():
        arrays = jax.tree.leaves(adapters[name][0].weights)
        assert sum(array.size for array in arrays) == adapter_parameters(base, placement, RANK)
    assert [lowest_layer(adapters[name][0]) for name in ("scattered", "elsewhere")] == [0, 2]


def test_a_is_initialised_as_peft_does(adapters):
    """Kaiming-uniform with a = sqrt(5), which is U(-1/sqrt(in), 1/sqrt(in)); each module its own draw."""
    lora = adapters["all"][0]
    assert float(lora.scale) == pytest.approx(ALPHA / RANK)
    for a, _ in lora.weights.values():
        bound = 1 / np.sqrt(a.shape[1])
        assert 0.99 * bound < np.abs(a).max() <= bound and np.std(a) == pytest.approx(bound / np.sqrt(3), rel=0.05)
    drawn = [float(layer[0, 0]) for a, _ in lora.weights.values() for layer in a]
    assert len(set(drawn)) == len(drawn) == 7 * 6


def test_fresh_adapter_changes_no_bit(base, logits):
    fresh = init_lora(base, SCATTERED, r=RANK, alpha=ALPHA, dropout=0.05, key=jax.random.key(0))
    assert not any(b.any() for _, b in fresh.weights.values())
    np.testing.assert_array_equal(logits(fresh), logits())


@pytest.fixture(scope="module")
def released():
    """Qwen3-VL-4B-Instruct's shapes, without arrays."""
    text = {
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "rope_theta": 5000000,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": 2560,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [5, 11, 17],
        "hidden_act": "gelu_pytorch_tanh",
    }
    config = {
        "model_type": "qwen3_vl",
        "text_config": text,
        "vision_config": vision,
        "image_token_id": 151655,
        "vision_end_token_id": 151653,
    }
    return abstract(read_config(config, "config.json"))


def test_published_parameter_counts(released):
    """P0's LLM-all; its modules; and the mean of its random-10, which it prints as "about 18 M"."""
    every = module_names(36)
    assert adapter_parameters(released, every, 64) == 132_120_576
    assert (
        adapter_parameters(released, ["L24-attn"], 64) == 1_310_720
        and adapter_parameters(released, ["L0-mlp"], 64) == 2_359_296
    )
    make = functools.partial(init_lora, released, every, r=64, alpha=16, dropout=0.05, key=jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(jax.eval_shape(make).weights)) == 132_120_576
    counts = [adapter_parameters(released, random_k(36, 10, seed), 64) for seed in range(200)]
    assert np.mean(counts) == pytest.approx(18.35e6, rel=0.02)


# PEFT


@pytest.mark.parametrize("name", ["scattered", "all"])
def test_logits_equal_peft(oracle, logits, adapters, name):
    lora, folder = adapters[name]
    got, want = logits(lora), peft_logits(peft(oracle, folder))
    assert np.abs(got - logits()).max() > 0.1  # the adapter matters
    np.testing.assert_allclose(got, want, atol=LOGITS)


@pytest.mark.parametrize("name", ["scattered", "all"])
def test_merged_adapter_is_the_same_function(logits, adapters, base, inputs, name):
    lora, _ = adapters[name]
    merged = np.asarray(merge(base, lora)(inputs).logits)[REAL]
    assert np.abs(merged - logits()).max() > 0.1
    np.testing.assert_allclose(merged, logits(lora), atol=LOGITS)


def test_another_placement_is_not_the_same(oracle, logits, adapters):
    """The control: equal arrays in other layers, and the folder of another placement."""
    lora, _ = adapters["scattered"]
    elsewhere, folder = adapters["elsewhere"]
    want = peft_logits(peft(oracle, folder))
    for wrong in (lora, lora.replace(slot=elsewhere.slot), elsewhere.replace(scale=elsewhere.scale * 1.01)):
        assert np.abs(logits(wrong) - want).max() > 1e-3
    np.testing.assert_allclose(logits(elsewhere), want, atol=LOGITS)


def test_peft_adapts_only_the_placed_modules(oracle, adapters):
    linears = {
        "attn": [f"self_attn.{x}_proj" for x in "qkvo"],
        "mlp": [f"mlp.{x}_proj" for x in ("gate", "up", "down")],
    }
    for name, placement in PLACEMENTS.items():
        expected = [
            f"model.language_model.layers.{module[1]}.{linear}"
            for module in placement
            for linear in linears[module.partition("-")[2]]
        ]
        assert lora_layers(peft(oracle, adapters[name][1])) == sorted(expected)


def test_round_trip_is_bit_equal(base, adapters):
    for lora, folder in adapters.values():
        chex.assert_trees_all_equal(load_peft(base, folder), lora)  # the dropout is part of the structure
        assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_saving_replaces_the_folder(base, adapters, tmp_path):
    shutil.copytree(adapters["all"][1], tmp_path / "adapter")
    (tmp_path / "adapter" / "stale").touch()
    save_peft(adapters["scattered"][0], base, tmp_path / "adapter")
    chex.assert_trees_all_equal(load_peft(base, tmp_path / "adapter"), adapters["scattered"][0])
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert not (tmp_path / "adapter" / "stale").exists()


def test_no_room(base, adapters, tmp_path):
    """A run folder makes a sentence of it, and keeps nothing of the adapter."""
    run = Run.open(tmp_path / "run", {})
    with no_file_larger_than(2000), pytest.raises(UserError, match=r"adapter \(File too large\): free the disk"):
        run.write("adapter", lambda path: save_peft(adapters["all"][0], base, path), Artifact("adapter", ""))
    assert not (tmp_path / "run" / "adapter").exists()


def test_reads_what_peft_writes(oracle, base, logits, tmp_path):
    """Short target names, so that PEFT's own choice of modules is not ours: single linears in every layer."""
    config = LoraConfig(r=RANK, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    theirs = get_peft_model(copy.deepcopy(oracle), config).eval()
    theirs.save_pretrained(tmp_path)
    np.testing.assert_allclose(logits(load_peft(base, tmp_path)), peft_logits(theirs), atol=LOGITS)


# Gradients and compilation


def test_gradient_equals_pefts(oracle, base, adapters):
    """Through the scan: the placed layers' gradients are those of PEFT's unrolled layers, an unused slot's is zero."""
    lora, folder = adapters["scattered"]
    batch = make_batch([[9], [14]], "left", seed=1)
    inputs, real = vlm_jax.Inputs.from_hf(base.config, **batch), batch["attention_mask"] == 1
    target = np.random.default_rng(0).integers(0, 320, real.sum())
    # An idle third slot of the mlp's arrays: no layer's table names it.
    weights = {
        site: tuple(jnp.concatenate([x, x[:1]]) if "mlp" in site else x for x in pair)
        for site, pair in lora.weights.items()
    }
    slot = {
        site: jnp.where(table == len(lora.weights[site][0]), len(weights[site][0]), table)
        for site, table in lora.slot.items()
    }

    @jax.jit
    @jax.grad
    def gradient(weights):
        logits = base(inputs, (lora.replace(weights=weights, slot=slot),)).logits
        logp = jax.nn.log_softmax(logits[np.nonzero(real)])
        return -logp[np.arange(len(target)), target].mean()

    theirs = peft(oracle, folder, is_trainable=True)
    out = theirs(**tensors(batch), use_cache=False).logits[torch.from_numpy(real)]
    torch.nn.functional.cross_entropy(out, torch.from_numpy(target)).backward()
    wanted = {name: p.grad.numpy().T for name, p in theirs.named_parameters() if "lora_" in name}
    compared = 0
    for site, pair in gradient(weights).items():
        for half, got in zip(("lora_A", "lora_B"), pair, strict=True):
            for layer in np.flatnonzero(lora.slot[site] < len(lora.weights[site][0])):
                path = f"base_model.model.model.language_model.layers.{layer}.{site.removeprefix('text.')}"
                want = wanted[f"{path}.{half}.default.weight"]
                assert np.abs(want).max() > 1e-3
                np.testing.assert_allclose(got[slot[site][layer]], want, atol=GRADIENT)
                compared += 1
            assert not np.asarray(got[2:]).any()  # the idle slot
    assert compared == len(wanted) == 2 * (4 + 3 + 3)


def test_another_placement_runs_the_same_program(logits, adapters):
    (one, _), (other, _) = adapters["scattered"], adapters["elsewhere"]
    first, traced = logits(one), logits.traced
    for changed in (other, one.replace(slot=other.slot), one.replace(scale=one.scale * 2)):
        assert np.abs(logits(changed) - first).max() > 0.01
    assert logits.traced == traced > 0


def test_dropout():
    """Only with a key, which decides; of the adapter's input alone, where the rest grows by 1 / (1 - p), as in PEFT."""
    site, eye = "text.mlp.up_proj", jnp.eye(200)[None]
    x, value = jnp.ones((1, 50, 200)), jnp.full((1, 50, 200), 2.0)
    ctx = vlm_jax.Context(layer=jnp.int32(0), input=x)

    def added(key):
        key = None if key is None else jax.random.key(key)
        lora = LoRA({site: (eye, eye)}, {site: jnp.array([0])}, jnp.float32(1), key, dropout=0.25)
        return np.asarray(lora(site, value, ctx) - value)

    np.testing.assert_array_equal(added(None), 1)
    first = added(0)
    np.testing.assert_allclose(first[first != 0], 1 / 0.75, rtol=1e-6)
    assert (first == 0).mean() == pytest.approx(0.25, abs=0.02)
    np.testing.assert_array_equal(added(0), first)
    assert (added(1) != first).mean() == pytest.approx(2 * 0.25 * 0.75, abs=0.02)


# Refusals


UNKNOWN = [("L99-attn", "L99-attn.*'L.-attn'"), ("L2-atn", "L2-atn.*'L2-attn'")]


@pytest.mark.parametrize("name, message", UNKNOWN)
def test_unknown_module(tmp_path, name, message):
    path = tmp_path / "placement.json"
    path.write_text(json.dumps(["L1-mlp", name]))
    for call in (lambda: read_names(path, 6), lambda: check_names(["L1-mlp", name], 6)):
        with pytest.raises(UserError, match=message):
            call()


@pytest.mark.parametrize("name, message", UNKNOWN)
def test_adapter_on_an_unknown_module(base, name, message):
    """Or it would be trained and evaluated while it touches nothing."""
    with pytest.raises(UserError, match=message):
        init_lora(base, ["L1-mlp", name], r=1, alpha=1, dropout=0, key=jax.random.key(0))


@pytest.mark.parametrize(
    "text, message",
    [
        ('["L2-attn"', "JSON"),
        ('{"L2-attn": 1}', "list of module names"),
        ("[]", "list of module names"),
        ("[2, 7]", "list of module names"),
        ('["L2-attn", "L2-attn"]', "twice"),
        (None, "placement.json"),
    ],
    ids=["cut short", "no list", "empty", "numbers", "twice", "absent"],
)
def test_malformed_placement(tmp_path, text, message):
    path = tmp_path / "placement.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_names(path, 6)


@pytest.mark.parametrize("k", [0, -1, 13])
def test_k_out_of_range(k):
    with pytest.raises(UserError, match="1 to 12"):
        check_k(k, 6)
    assert check_k(12, 6) == 12 and check_k(1, 6) == 1


def shallower(config):
    config["text_config"]["num_hidden_layers"] = 4


def narrower(config):
    config["text_config"]["intermediate_size"] = 80


@pytest.mark.parametrize("change, message", [(shallower, r"layers\.4\.mlp"), (narrower, "shape")])
def test_adapter_of_another_model(base, adapters, change, message):
    config = json.loads(base.config.hf)
    change(config)
    other = abstract(read_config(config, "config.json"))
    with pytest.raises(UserError, match=message):
        load_peft(other, adapters["scattered"][1])


# spoiling -> (what it does to adapter_config.json and to the tensors, what the error must say)
SPOILT = {
    "not LoRA": (lambda config, tensors: config.update(peft_type="IA3"), "LoRA"),
    "rank missing": (lambda config, tensors: config.pop("r"), "r"),
    "half missing": (lambda config, tensors: tensors.pop(min(tensors)), "lora_A and lora_B"),
    "nothing": (lambda config, tensors: tensors.clear(), "lora_A and lora_B"),
    "magnitudes of DoRA": (lambda config, tensors: tensors.update(renamed(tensors)), "no lora_A.weight"),
}


def renamed(tensors):
    return {min(tensors).replace("lora_A", "lora_magnitude_vector"): np.ones(64, np.float32)}


@pytest.fixture
def folder(adapters, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(adapters["scattered"][1], tmp_path / "copy")


@pytest.mark.parametrize("spoiling", SPOILT)
def test_unsuitable_folder(base, folder, spoiling):
    spoil, message = SPOILT[spoiling]
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    spoil(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message):
        load_peft(base, folder)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_unreadable_folder(base, folder, file):
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="copy"):
        load_peft(base, folder)
    (folder / file).unlink()
    with pytest.raises(UserError, match="copy"):
        load_peft(base, folder)
