"""Against the real PEFT, in every family: DoRA, adapters of vision towers and projectors, whole modules, and several
adapters with weights."""

import copy
import json
import shutil
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_oracle import make_batch, positions, tensors, tiny_config, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

import vlm_jax
from interventions.kinds.lora import LoRA
from interventions.placement.adapted import load_adapted, merged, with_whole_modules
from interventions.placement.adapters import adapter_parameters, init_lora, init_lora_on, load_peft, merge, save_peft
from interventions.placement.combine import combine
from vlm_jax.checkpoints.save import save
from vlm_jax.errors import UserError

LOGITS, MATTERS = 1e-4, 1e-2
ROWS = {
    "qwen3_vl": [[5, (4, 6), 3], [2, (4, 4), 6]],
    "qwen2_5_vl": [[5, (4, 6), 3], [2, (4, 4), 6]],
    "gemma3": [[5, (8, 8), 3], [4]],
    "llava": [[5, (6, 6), 3], [4]],
}
#: Names of linears of the vision blocks, and of a projector's linear.
TOWER = {
    "qwen3_vl": ["attn.qkv", "mlp.linear_fc2"],
    "qwen2_5_vl": ["qkv", r"mlp.up_proj"],
    "gemma3": ["out_proj", "fc1"],
    "llava": ["vision_tower.encoder.layers.1.self_attn.q_proj", "fc2", "linear_1"],
}


def made(family, folder, **options):
    """A model of transformers', the same model here, and functions that compute the logits of its real tokens."""
    config = tiny_config(family, **options)
    oracle = tiny_model(config)
    oracle.save_pretrained(folder)
    model = vlm_jax.load(folder)[0]
    batch = make_batch(ROWS[family], "left", config=config)
    real, inputs = batch["attention_mask"] == 1, vlm_jax.Inputs.from_hf(model.config, **batch)
    run = jax.jit(lambda model, interventions: model(inputs, interventions).logits)

    def theirs(model):
        with torch.no_grad():
            logits = model(**tensors(batch), **positions(config, batch), use_cache=False).logits
        return logits[torch.from_numpy(real)].numpy()

    def ours(*interventions, model=model):
        return np.asarray(run(model, interventions))[real]

    return SimpleNamespace(oracle=oracle, model=model, theirs=theirs, ours=ours, batch=batch, inputs=inputs, real=real)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    kept = {}

    def case(family, **options):
        key = (family, *options.items())
        if key not in kept:
            kept[key] = made(family, tmp_path_factory.mktemp(family), **options)
        return kept[key]

    return case


def trained(oracle, folder, **options):
    """PEFT's model with an adapter that is not what it began as; also written to a folder."""
    model = get_peft_model(copy.deepcopy(oracle), LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))
    generator = torch.Generator().manual_seed(options.get("r", 1))
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.eval().save_pretrained(folder)
    return model


def far(got, want):
    assert got.shape == want.shape and np.isfinite(got).all()
    return float(np.abs(got - want).max())


def refusal(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# DoRA, and linears outside of the decoder


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ROWS)
def test_all_linears(cases, tmp_path, family, dora):
    """Every nn.Linear but the unembedding: as an intervention, merged, and saved for PEFT."""
    case = cases(family)
    theirs = trained(case.oracle, tmp_path / "one", target_modules="all-linear", use_dora=dora, use_rslora=True)
    lora, want = load_peft(case.model, tmp_path / "one"), case.theirs(theirs)
    assert {site.partition(".")[0] for site in lora.sites} == {"text", "visual", "projector"} - (
        {"projector"} if family == "gemma3" else set()
    )
    assert far(case.ours(lora), case.ours()) > 0.1
    assert far(case.ours(lora), want) < LOGITS
    assert far(case.ours(model=merge(case.model, lora)), want) < LOGITS
    save_peft(lora, case.model, tmp_path / "two")
    again = PeftModel.from_pretrained(copy.deepcopy(case.oracle), tmp_path / "two").eval()
    assert far(case.theirs(again), want) < LOGITS
    chex.assert_trees_all_equal(load_peft(case.model, tmp_path / "two"), lora)
    if not dora:
        return
    # The controls: without the magnitudes, with others, and without a part of the adapter.
    assert far(case.ours(lora.replace(magnitude=None)), want) > MATTERS
    louder = {site: 1.01 * value for site, value in lora.magnitude.items()}
    assert far(case.ours(lora.replace(magnitude=louder)), want) > MATTERS
    for part in ("text.", "visual.") if family == "gemma3" else ("text.", "visual.", "projector."):
        assert far(case.ours(without(lora, part)), want) > 1e-3, part


def without(lora: LoRA, part: str) -> LoRA:
    """The adapter without its sites in a part of the model."""
    return lora.replace(
        weights={site: pair for site, pair in lora.weights.items() if not site.startswith(part)},
        slot={site: table for site, table in lora.slot.items() if not site.startswith(part)},
        magnitude=lora.magnitude and {site: m for site, m in lora.magnitude.items() if not site.startswith(part)},
    )


@pytest.mark.parametrize("family", ROWS)
def test_some_linears_of_the_tower(cases, tmp_path, family):
    case = cases(family)
    options = {"target_modules": [*TOWER[family], "v_proj"], "alpha_pattern": {"v_proj": -3, "qkv": 2}}
    if family != "llava":  # where a whole path is named
        options |= {"layers_to_transform": [1, 3]}
    theirs = trained(case.oracle, tmp_path, **options, rank_pattern={"v_proj": 2}, use_dora=True)
    lora = load_peft(case.model, tmp_path)
    assert far(case.ours(lora), case.theirs(theirs)) < LOGITS
    assert far(case.ours(without(lora, "visual.")), case.theirs(theirs)) > 1e-3


def test_blocks_that_do_not_run(cases, tmp_path):
    """LLaVA reads the second last layer of CLIP: adapters of the last one change nothing."""
    case = cases("llava")
    theirs = trained(case.oracle, tmp_path / "one", target_modules=["vision_tower.encoder.layers.4.mlp.fc1", "q_proj"])
    assert far(case.ours(load_peft(case.model, tmp_path / "one")), case.theirs(theirs)) < LOGITS
    trained(case.oracle, tmp_path / "two", target_modules=["vision_tower.encoder.layers.4.mlp.fc1"])
    assert "only vision blocks that the model does not run" in refusal(lambda: load_peft(case.model, tmp_path / "two"))


def test_a_projector_that_is_no_linear_in_transformers(cases, tmp_path):
    case = cases("gemma3")
    lora = init_lora_on(case.model, ["projector.mm_input_projection"], r=2, alpha=3, key=jax.random.key(0))
    says = refusal(lambda: save_peft(lora, case.model, tmp_path / "adapter"))
    assert "projector.mm_input_projection, which is no nn.Linear in transformers" in says


def test_names_of_an_older_transformers(cases, tmp_path):
    """With the tower under another name than the decoder."""
    case = cases("llava")
    theirs = trained(case.oracle, tmp_path, target_modules=["fc1", "linear_2", "up_proj"])
    file = tmp_path / "adapter_model.safetensors"
    older = {
        "model.model.vision_tower.encoder": "model.vision_tower.vision_model.encoder",
        "model.model.multi_modal_projector": "model.multi_modal_projector",
        "model.model.language_model.layers": "model.language_model.model.layers",
    }
    values = load_file(file)
    for new, old in older.items():
        values = {name.replace(new, old): value for name, value in values.items()}
    save_file(values, file)
    assert far(case.ours(load_peft(case.model, tmp_path)), case.theirs(theirs)) < LOGITS
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    options["target_modules"].append("fc2")
    (tmp_path / "adapter_config.json").write_text(json.dumps(options))
    says = refusal(lambda: load_peft(case.model, tmp_path))
    assert "no tensors for vision_tower.vision_model.encoder.layers.0.mlp.fc2" in says


def test_a_magnitude_lacks(cases, tmp_path):
    case = cases("qwen3_vl")
    trained(case.oracle, tmp_path, target_modules=["q_proj"], use_dora=True)
    file = tmp_path / "adapter_model.safetensors"
    values = load_file(file)
    del values["base_model.model.model.language_model.layers.2.self_attn.q_proj.lora_magnitude_vector"]
    save_file(values, file)
    assert "are needed, some are missing (model.language_model.layers.2" in refusal(
        lambda: load_peft(case.model, tmp_path)
    )


def test_fresh_dora(cases):
    """It begins as the base model, up to rounding; the scale by the root of the rank; how many numbers are trained."""
    case = cases("qwen2_5_vl")
    names = ["L1-attn", "V2-mlp", "V0-attn", "L3-mlp"]
    make = {"r": 4, "alpha": 6.0, "dropout": 0.0, "key": jax.random.key(0)}
    fresh = init_lora(case.model, names, **make, use_dora=True, use_rslora=True)
    assert {site.partition(".")[0] for site in fresh.sites} == {"text", "visual"} and float(fresh.scale) == 3.0
    assert far(case.ours(fresh), case.ours()) < LOGITS
    doubled = {site: 2 * value for site, value in fresh.magnitude.items()}
    assert far(case.ours(fresh.replace(magnitude=doubled)), case.ours()) > 0.1
    trainable = jax.tree.leaves((fresh.weights, fresh.magnitude))
    assert sum(leaf.size for leaf in trainable) == adapter_parameters(case.model, names, 4, use_dora=True)


def test_dora_gradient_equals_pefts(cases, tmp_path):
    """Of A, B and magnitudes; the norm is a constant for the gradient."""
    case = cases("qwen3_vl")
    trained(case.oracle, tmp_path, target_modules=["q_proj", "fc1", "linear_fc2", "down_proj"], use_dora=True)
    lora = load_peft(case.model, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(case.oracle), tmp_path, is_trainable=True).eval()
    target = np.random.default_rng(0).integers(0, 320, case.real.sum())
    out = theirs(**tensors(case.batch), use_cache=False).logits[torch.from_numpy(case.real)]
    torch.nn.functional.cross_entropy(out, torch.from_numpy(target)).backward()
    wanted = {name: p.grad.numpy() for name, p in theirs.named_parameters() if "lora_" in name}

    @jax.jit
    @jax.grad
    def gradient(trainable):
        weights, magnitude = trainable
        logits = case.model(case.inputs, (lora.replace(weights=weights, magnitude=magnitude),)).logits
        logp = jax.nn.log_softmax(logits[np.nonzero(case.real)])
        return -logp[np.arange(len(target)), target].mean()

    weights, magnitude = gradient((lora.weights, lora.magnitude))
    got = lora.replace(weights=weights, magnitude=magnitude, scale=jnp.float32(1))
    save_peft(got, case.model, tmp_path / "gradients")
    compared = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    assert len(compared) == len(wanted) > 50
    for name, value in compared.items():
        ends = (".lora_magnitude_vector", ".lora_magnitude_vector.default.weight")
        long = name.replace(*ends) if name.endswith(ends[0]) else name.replace(".weight", ".default.weight")
        assert np.abs(wanted[long]).max() > 1e-5
        np.testing.assert_allclose(value, wanted[long], atol=1e-5, err_msg=name)


def test_dora_with_dropout():
    """As in PEFT, the input of the kernel is dropped too, but the base model's own output is not."""
    width, key = 200, jax.random.key(0)
    rng = np.random.default_rng(0)
    kernel, bias, x = (rng.standard_normal(shape, np.float32) for shape in ((width, 3), 3, (1, 50, width)))
    linear = vlm_jax.nn.layers.Linear(key, width, 3, bias=True)
    linear.kernel[...], linear.bias[...] = kernel, bias
    a, b = rng.standard_normal((1, width, 2), np.float32), rng.standard_normal((1, 2, 3), np.float32)
    magnitude = np.array([[1.0, 2.0, 3.0]], np.float32)
    site = "text.mlp.up_proj"
    lora = LoRA({site: (a, b)}, {site: jnp.array([0])}, jnp.float32(0.5), key, {site: magnitude}, dropout=0.25)
    ctx = vlm_jax.Context(layer=jnp.int32(0), input=x, linear=linear)
    got = np.asarray(lora(site, x @ kernel + bias, ctx))
    # The same dropout, seen through an adapter that hands its input on.
    eye = np.eye(width, dtype=np.float32)[None]
    plain = LoRA({site: (eye, eye)}, {site: jnp.array([0])}, jnp.float32(1), key, dropout=0.25)
    dropped = np.asarray(plain(site, np.zeros_like(x), ctx))
    assert 0.2 < (dropped == 0).mean() < 0.3
    factor = magnitude[0] / np.linalg.norm(kernel + 0.5 * a[0] @ b[0], axis=0)
    want = x @ kernel + bias + (factor - 1) * (dropped @ kernel) + factor * 0.5 * (dropped @ a[0] @ b[0])
    np.testing.assert_allclose(got, want, atol=1e-3)


# Whole modules

WHOLE = {
    "embeddings and unembedding": ("qwen3_vl", False, ["embed_tokens", "lm_head"]),
    "norms": ("qwen2_5_vl", False, ["norm"]),
    "projector": ("llava", False, ["multi_modal_projector"]),
    "another projector": ("gemma3", True, ["multi_modal_projector"]),
    "tower": ("qwen3_vl", False, ["visual"]),
    "tied unembedding": ("gemma3", True, ["lm_head"]),
    "tied embeddings": ("qwen3_vl", True, ["embed_tokens"]),
    "tied both": ("qwen2_5_vl", True, ["embed_tokens", "lm_head"]),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_modules(cases, tmp_path, name):
    """Beside an adapter; of a tied model, the unembedding may become another than the embeddings."""
    family, tied, modules = WHOLE[name]
    case = cases(family, tied=tied)
    theirs = trained(case.oracle, tmp_path / "one", target_modules=["q_proj", "v_proj"], modules_to_save=modules)
    want = case.theirs(theirs)
    model, lora = load_adapted(case.model, [tmp_path / "one"])
    assert far(case.ours(lora, model=model), want) < LOGITS
    assert far(case.ours(lora), want) > MATTERS  # the control: without the whole modules
    assert "modules_to_save" in refusal(lambda: load_peft(case.model, tmp_path / "one"))
    again = PeftModel.from_pretrained(copy.deepcopy(case.oracle), tmp_path / "one").eval()
    both = merged(case.model, [tmp_path / "one"])
    assert far(case.ours(model=both), case.theirs(again)) < LOGITS
    # The config knows of it: saved and loaded, it is the same function.
    save(both, tmp_path / "saved")
    assert far(case.ours(model=vlm_jax.load(tmp_path / "saved")[0]), want) < LOGITS


def test_tied_modules_stay_tied(cases, tmp_path):
    case = cases("qwen3_vl", tied=True)
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    theirs = trained(case.oracle, tmp_path, **options)
    model = merged(case.model, [tmp_path])
    assert model.config.text.tie_word_embeddings
    assert far(case.ours(model=model), case.theirs(theirs)) < LOGITS


def test_only_whole_modules(cases, tmp_path):
    """PEFT cannot make such a folder, but it can be cut out of one."""
    case = cases("llava")
    trained(case.oracle, tmp_path, target_modules=["q_proj"], modules_to_save=["linear_1"])
    file = tmp_path / "adapter_model.safetensors"
    values = {name: value for name, value in load_file(file).items() if "lora_" not in name}
    save_file(values, file)
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(options | {"target_modules": []}))
    model, lora = load_adapted(case.model, [tmp_path])
    assert lora is None and far(case.ours(model=model), case.ours()) > MATTERS
    whole = {name.removeprefix("base_model.model."): value for name, value in values.items()}
    chex.assert_trees_all_equal(jax.tree.leaves(with_whole_modules(case.model, whole)), jax.tree.leaves(model))


SPOILT = {
    "lacks": (lambda o, t: t.pop("base_model.model.lm_head.weight"), "no tensor lm_head.weight, which modules_to_save"),
    "unknown": (lambda o, t: o.update(modules_to_save=["score"]), "lm_head.weight, which is no lora_A.weight"),
    "shape": (
        lambda o, t: t.update({"base_model.model.lm_head.weight": np.zeros((3, 64), np.float32)}),
        "has the shape (3, 64), but the sizes of the model need (320, 64)",
    ),
    "none": (
        lambda o, t: (t.pop("base_model.model.lm_head.weight"), o.update(modules_to_save=["score"])),
        "modules_to_save = ['score'] names no module of this model",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_whole_modules(cases, tmp_path, name):
    case = cases("qwen3_vl")
    trained(case.oracle, tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    spoil, says = SPOILT[name]
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    values = load_file(tmp_path / "adapter_model.safetensors")
    spoil(options, values)
    (tmp_path / "adapter_config.json").write_text(json.dumps(options))
    save_file(values, tmp_path / "adapter_model.safetensors")
    assert says in refusal(lambda: load_adapted(case.model, [tmp_path]))


# Several adapters


@pytest.fixture(scope="module")
def pair(cases, tmp_path_factory):
    """Two adapters in PEFT's model, whose places overlap, and their folders."""
    case = cases("qwen3_vl")
    folders = [tmp_path_factory.mktemp("adapters") / name for name in ("one", "two")]
    trained(case.oracle, folders[0], target_modules=["q_proj", "qkv"], alpha_pattern={"q_proj": -3})
    names = ["layers.2.self_attn.q_proj", "layers.1.self_attn.q_proj", "down_proj", "linear_fc1"]
    trained(case.oracle, folders[1], target_modules=names, lora_alpha=9, use_rslora=True)
    theirs = PeftModel.from_pretrained(copy.deepcopy(case.oracle), folders[0], adapter_name="one")
    theirs.load_adapter(folders[1], adapter_name="two")
    return theirs.eval(), folders


@pytest.mark.parametrize("how", ["cat", "linear"])
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.5, -0.4)])
def test_weighted_adapters(cases, pair, how, weights):
    case, (theirs, folders) = cases("qwen3_vl"), pair
    name = f"{how} {weights}".replace(".", "_")
    theirs.add_weighted_adapter(["one", "two"], list(weights), name, combination_type=how)
    theirs.set_adapter(name)
    want = case.theirs(theirs)
    loras = [load_peft(case.model, folder) for folder in folders]
    assert far(case.ours(combine(loras, weights, how)), want) < LOGITS
    assert far(case.ours(combine(loras, weights[::-1], how)), want) > MATTERS
    if how == "cat":  # which is what commands do, and the same as one after the other
        assert far(case.ours(model=merged(case.model, folders, weights)), want) < LOGITS
        alone = [lora.replace(scale=lora.scale * weight) for lora, weight in zip(loras, weights, strict=True)]
        assert far(case.ours(*alone), want) < LOGITS
    else:
        assert far(case.ours(combine(loras, weights, "cat")), want) > MATTERS


def test_one_adapter_with_a_weight(cases, pair):
    case, (theirs, folders) = cases("qwen3_vl"), pair
    theirs.add_weighted_adapter(["one"], [0.5], "halved", combination_type="linear")
    theirs.set_adapter("halved")
    assert far(case.ours(model=merged(case.model, folders[:1], [0.5])), case.theirs(theirs)) < LOGITS


def test_adapters_that_cannot_be_combined(cases, pair, tmp_path):
    case, (_, folders) = cases("qwen3_vl"), pair
    model = case.model
    trained(case.oracle, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    trained(case.oracle, tmp_path / "whole", target_modules=["q_proj"], modules_to_save=["lm_head"])
    trained(case.oracle, tmp_path / "rank", target_modules=["q_proj"], r=2)
    assert "DoRA scales whole kernels" in refusal(lambda: load_adapted(model, [folders[0], tmp_path / "dora"]))
    assert "DoRA scales whole kernels" in refusal(lambda: load_adapted(model, [tmp_path / "dora"], [0.5]))
    assert "which have no weighted sum" in refusal(lambda: load_adapted(model, [folders[0], tmp_path / "whole"]))
    assert "2 adapters got 1 weights" in refusal(lambda: load_adapted(model, folders, [0.5]))
    loras = [load_peft(model, folder) for folder in (folders[0], tmp_path / "rank")]
    assert "ranks 4, 2" in refusal(lambda: combine(loras, [1, 1], "linear"))
    assert "0 adapters" in refusal(lambda: combine([], []))
    shutil.rmtree(tmp_path / "rank")
