"""PEFT's options: those that are read give the logits of the real PEFT, and everything else is refused by its name."""

import copy
import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_oracle import make_batch, tensors, tiny_config, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

import vlm_jax
from interventions.placement import peft_config
from interventions.placement.adapters import init_lora, load_peft, save_peft
from vlm_jax.checkpoints.leaves import abstract
from vlm_jax.errors import UserError
from vlm_jax.families import BACKBONES, FAMILIES, backbone_config, read_config

LOGITS = 1e-4
BATCH = make_batch([[7], [4]], "left")
REAL = BATCH["attention_mask"] == 1
LAYERS = "model.language_model.layers"


@pytest.fixture(scope="module")
def oracle():
    return tiny_model(tiny_config())


@pytest.fixture(scope="module")
def base(oracle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    oracle.save_pretrained(folder)
    return vlm_jax.load(folder)[0]


@pytest.fixture(scope="module")
def logits(base):
    """The logits of real tokens with an adapter, or without one."""
    inputs = vlm_jax.Inputs.from_hf(base.config, **BATCH)
    run = jax.jit(lambda interventions: base(inputs, interventions).logits)
    return lambda *interventions: np.asarray(run(interventions))[REAL]


def peft_logits(model):
    with torch.no_grad():
        return model(**tensors(BATCH), use_cache=False).logits[torch.from_numpy(REAL)].numpy()


def reloaded(oracle, folder):
    return PeftModel.from_pretrained(copy.deepcopy(oracle), folder).eval()


def trained(oracle, **options):
    """PEFT's model with an adapter that is not what it began as."""
    model = get_peft_model(copy.deepcopy(oracle), LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name or "trainable_tokens" in name:
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def edit(folder: Path, config=None, tensors=None) -> None:
    """Rewrites the options and the tensors of a folder by functions that change them in place."""
    where, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if config is not None:
        options = json.loads(where.read_text())
        config(options)
        where.write_text(json.dumps(options))
    if tensors is not None:
        values = load_file(file)
        tensors(values)
        save_file(values, file)


def refusal(base, folder, **how) -> str:
    with pytest.raises(UserError) as error:
        load_peft(base, folder, **how)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


# Options that are read

READ = {
    "rank-stabilised": {"use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 2, r"layers\.[0-2]\.mlp\.down_proj": 7}},
    "alphas": {"alpha_pattern": {f"{LAYERS}.3.self_attn.q_proj": 20, "down_proj": 0.5}},
    "all of these": {
        "use_rslora": True,
        "rank_pattern": {"layers.1.*q_proj": 9},
        "alpha_pattern": {"down_proj": -2, "layers.1.self_attn.q_proj": 100, "q_proj": 3},  # PEFT sorts them
    },
    "some layers": {"layers_to_transform": [1, 4], "layers_pattern": "layers"},
    "one layer": {"layers_to_transform": 2},
    "excluded": {"exclude_modules": [f"{LAYERS}.0.self_attn.q_proj", "down_proj"]},
    "excluded by expression": {"exclude_modules": r".*layers\.[2-5].*"},
    "expression": {"target_modules": r".*language_model.*\.(self_attn\.(q|k|v|o)_proj|up_proj)"},
    "transposed": {"fan_in_fan_out": True},  # which PEFT takes back for a linear
    "uninitialised": {"init_lora_weights": False},
    **{f"initialised as {name}": {"init_lora_weights": name} for name in ("gaussian", "orthogonal", "eva", "mica")},
}


@pytest.mark.parametrize("name", READ)
def test_logits_equal_peft(oracle, base, logits, tmp_path, name):
    theirs = trained(oracle, **{"target_modules": ["q_proj", "down_proj"], **READ[name]})
    theirs.save_pretrained(tmp_path)
    got, want = logits(load_peft(base, tmp_path)), peft_logits(theirs)
    assert np.abs(want - logits()).max() > 0.1
    np.testing.assert_allclose(got, want, atol=LOGITS)
    np.testing.assert_allclose(got, peft_logits(reloaded(oracle, tmp_path)), atol=LOGITS)


def test_the_options_matter(oracle, base, logits, tmp_path):
    """The control: the same tensors without the option, or with another value, are another function or no adapter."""
    theirs = trained(oracle, target_modules=["q_proj", "down_proj"], **READ["all of these"])
    theirs.save_pretrained(tmp_path)
    want = peft_logits(theirs)

    def without(option, value):
        return lambda options: options.update({option: value})

    for option, value in [
        ("use_rslora", False),
        ("alpha_pattern", {}),
        ("alpha_pattern", {"q_proj": 3, "down_proj": -2}),
    ]:
        other = shutil.copytree(tmp_path, tmp_path / "other", dirs_exist_ok=True)
        edit(other, without(option, value))
        assert np.abs(logits(load_peft(base, other)) - want).max() > 1e-2, option
    edit(other, without("rank_pattern", {}))
    assert "has the shape (9, 64)" in refusal(base, other)


def test_a_loaded_adapter_is_saved_as_the_same_function(oracle, base, logits, tmp_path):
    trained(oracle, target_modules=["q_proj", "down_proj"], **READ["all of these"]).save_pretrained(tmp_path / "one")
    lora = load_peft(base, tmp_path / "one")
    save_peft(lora, base, tmp_path / "two")
    chex.assert_trees_all_equal(load_peft(base, tmp_path / "two"), lora)
    np.testing.assert_allclose(logits(lora), peft_logits(reloaded(oracle, tmp_path / "two")), atol=LOGITS)


def test_half_precision(oracle, base, logits, tmp_path):
    """PEFT computes in float32 with the rounded numbers."""
    theirs = trained(oracle, target_modules=["q_proj", "down_proj"]).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    lora = load_peft(base, tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(lora.weights)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(logits(lora), peft_logits(reloaded(oracle, tmp_path)), atol=LOGITS)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("stabilised", [False, True])
def test_initialisation_that_changes_the_base_weights(oracle, base, logits, tmp_path, init, stabilised):
    """Refused as it is, because PEFT changes the base weights again to load it; read if PEFT has converted it."""
    options = {"init_lora_weights": init, "target_modules": ["q_proj", "down_proj"], "use_rslora": stabilised}
    model = get_peft_model(copy.deepcopy(oracle), LoraConfig(r=4, lora_alpha=6, **options))
    initial = model.peft_config["default"].init_lora_weights
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = initial
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.eval().save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))

    says = refusal(base, tmp_path / "plain")
    assert f"init_lora_weights = '{init}'" in says and "path_initial_model_for_weight_conversion" in says
    want = peft_logits(reloaded(oracle, tmp_path / "plain"))
    edit(tmp_path / "plain", lambda options: options.update(init_lora_weights=True))
    assert np.abs(logits(load_peft(base, tmp_path / "plain")) - want).max() > 0.01  # the control
    np.testing.assert_allclose(logits(load_peft(base, tmp_path / "converted")), want, atol=LOGITS)


# Options that are refused


@pytest.fixture(scope="module")
def plain(oracle, tmp_path_factory):
    """A folder that PEFT wrote, with an adapter on some linears of every layer."""
    folder = tmp_path_factory.mktemp("adapters") / "plain"
    trained(oracle, target_modules=["q_proj", "down_proj"]).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(plain, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(plain, tmp_path / "copy")


#: What PEFT itself writes with these options, and what must be said.
WRITTEN = {
    "biases of the adapter": ({"lora_bias": True}, "lora_bias = True"),
    "biases of the model": ({"bias": "all"}, "bias = 'all'"),
    "tokens": ({"trainable_token_indices": [3, 5]}, "trainable_token_indices = [3, 5]"),
    "a convolution": ({"target_modules": ["q_proj", "proj"]}, "adapts model.visual.patch_embed.proj"),
    "the unembedding": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    "activated": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens = [1, 2]"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_peft_writes_is_named(oracle, base, tmp_path, name):
    options, says = WRITTEN[name]
    trained(oracle, **{"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}).save_pretrained(tmp_path)
    message = refusal(base, tmp_path)
    assert says in message and ("merge_and_unload" in message or "without this option" in message)


FORGOTTEN = {name: options for name, (options, _) in WRITTEN.items() if name.startswith(("biases", "tokens"))}
FORGOTTEN |= {"DoRA": {"use_dora": True}, "whole modules": {"modules_to_save": ["lm_head"]}}


@pytest.mark.parametrize("name", FORGOTTEN)
def test_tensors_tell_it_without_the_option(oracle, base, tmp_path, name):
    (option,) = FORGOTTEN[name]
    trained(oracle, target_modules=["q_proj"], **FORGOTTEN[name]).save_pretrained(tmp_path)
    edit(tmp_path, lambda options: options.pop(option))
    assert "no lora_A.weight or lora_B.weight of plain LoRA" in refusal(base, tmp_path)


OPTIONS = {
    "peft_type": "ADALORA",
    "task_type": "SEQ_CLS",
    "bias": "lora_only",
    "use_rslora": "yes",
    "use_dora": "yes",
    "modules_to_save": "lm_head",
    "ensure_weight_tying": "yes",
    "layer_replication": [[0, 4], [2, 6]],
    "target_parameters": ["experts.gate_up_proj"],
    "megatron_config": {"tensor_model_parallel_size": 2},
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1e-4},
    "velora_config": {"num_groups": 8},
    "monteclora_config": {"num_samples": 8},
    "an_option_of_a_later_peft": 3,
}


@pytest.mark.parametrize("option", OPTIONS)
def test_option_is_named(base, folder, option):
    edit(folder, lambda options: options.update({option: OPTIONS[option]}))
    assert f"adapter_config.json: {option} = " in refusal(base, folder)


@pytest.mark.parametrize("init", ["pissa_niter_16", "corda", "loftq", "lora_ga", "what a later PEFT has", None, 7])
def test_initialisation_is_named(base, folder, init):
    edit(folder, lambda options: options.update(init_lora_weights=init))
    assert f"init_lora_weights = {init!r}" in refusal(base, folder)


def test_options_that_say_nothing(base, folder, plain):
    """All that the installed PEFT writes, settings of options that are off, and later options that are off."""
    unchanged = load_peft(base, plain)
    options = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]).to_dict()
    options |= {"target_modules": ["q_proj", "down_proj"], "peft_type": "LORA", "task_type": "CAUSAL_LM"}
    options |= {"loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 2.0}, "qalora_group_size": 32}
    options |= {"a_later_option": None, "another": False, "a_list": [], "modules_to_save": []}
    (folder / "adapter_config.json").write_text(json.dumps(options))
    chex.assert_trees_all_equal(load_peft(base, folder), unchanged)


def test_only_a_pickle(base, folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    message = refusal(base, folder)
    assert "adapter_model.bin, a pickle" in message and "as safetensors" in message


NUMBERS = [
    *(("r", value) for value in (0, -4, 4.0, True, "4", None, 10**400)),
    *(("lora_alpha", value) for value in (float("nan"), float("inf"), -float("inf"), 10**400, "6", None, True)),
    *(("lora_dropout", value) for value in (float("nan"), -0.1, 1, "0", None)),
    *(("rank_pattern", {"q_proj": value}) for value in (0, -1, 2.5, None)),
    *(("alpha_pattern", {"q_proj": value}) for value in (float("nan"), "6", None)),
    *(("rank_pattern", value) for value in ([4], {"(": 4}, 4)),
    *(("target_modules", value) for value in (None, "(", [3], {"q_proj": 1}, 3)),
    ("exclude_modules", "("),
    ("layers_to_transform", "1"),
    ("layers_pattern", ["("]),
    ("base_model_name_or_path", ["a"]),
]


@pytest.mark.parametrize("option", ["target_modules", "rank_pattern", "alpha_pattern"])
def test_a_pattern_without_end(base, folder, monkeypatch, option):
    monkeypatch.setattr(peft_config, "_SECONDS", 0.2)
    pattern = "(([a-z_.0-9]+)+)+!"
    edit(folder, lambda options: options.update({option: pattern if option == "target_modules" else {pattern: 4}}))
    assert "a pattern of module names does not end on" in refusal(base, folder)


@pytest.mark.parametrize("option, value", NUMBERS)
def test_value_is_named(base, folder, option, value):
    edit(folder, lambda options: options.update({option: value}))
    message = refusal(base, folder)
    assert f"adapter_config.json: {option} = " in message or "has the shape" in message


# Tensors

NAME = f"base_model.model.{LAYERS}.2.self_attn.q_proj"


def set_to(value):
    def change(tensors):
        tensors[f"{NAME}.lora_A.weight"] = tensors[f"{NAME}.lora_A.weight"].copy()
        tensors[f"{NAME}.lora_A.weight"][1, 3] = value

    return change


def cast(dtype):
    return lambda tensors: tensors.update({f"{NAME}.lora_B.weight": tensors[f"{NAME}.lora_B.weight"].astype(dtype)})


def dropped(tensors):
    for letter in "AB":
        del tensors[f"{NAME}.lora_{letter}.weight"]


def copied(old, new):
    return lambda tensors: tensors.update({k.replace(old, new): v for k, v in tensors.items() if old in k})


def moved(old, new):
    def change(tensors):
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


#: What happens to the tensors, and what must be said.
TENSORS = {
    "NaN": (set_to(np.nan), f"{NAME}.lora_A.weight in .*adapter_model.safetensors holds NaN"),
    "infinite": (set_to(-np.inf), f"{NAME}.lora_A.weight in .* holds NaN or infinite"),
    "int8": (cast(np.int8), f"{NAME}.lora_B.weight in .* is stored as I8"),
    "int64": (cast(np.int64), "is stored as I64"),
    "bool": (cast(bool), "is stored as BOOL"),
    "double": (cast(np.float64), "is stored as F64.*save the adapter in float32"),
    "a module lacks": (dropped, rf"no tensors for {LAYERS}.2.self_attn.q_proj, which adapter_config.json names"),
    "a half lacks": (lambda t: t.pop(f"{NAME}.lora_B.weight"), rf"some are missing \({LAYERS}.2.self_attn.q_proj\)"),
    "a layer more": (copied(f"{LAYERS}.2.", f"{LAYERS}.6."), f"{LAYERS}.6.*the model does not have"),
    "digits of another script": (copied(f"{LAYERS}.2.", f"{LAYERS}.²."), "the model does not have"),
    "a number twice": (copied(f"{LAYERS}.2.", f"{LAYERS}.02."), "the model does not have"),
    "a layer for ever": (copied(f"{LAYERS}.2.", f"{LAYERS}.{'9' * 5000}."), "the model does not have"),
    "a name of its own": (moved("q_proj.lora", "q_proj_a.lora"), "q_proj_a, which the model does not have"),
    "without its prefix": (moved("base_model.model.model.l", "model.l"), "is no lora_A.weight or lora_B.weight"),
    "named after the adapter": (moved("lora_A.", "lora_A.default."), "no lora_A.weight or lora_B.weight"),
    "magnitudes": (moved("down_proj.lora_B", "down_proj.lora_magnitude_vector"), "no lora_A.weight or lora_B.weight"),
    "turned": (lambda t: t.update({f"{NAME}.lora_A.weight": t[f"{NAME}.lora_A.weight"].T.copy()}), "has the shape"),
    "nothing": (lambda tensors: tensors.clear(), "lora_A and lora_B of every module are needed"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensor_is_named(base, folder, name):
    change, says = TENSORS[name]
    edit(folder, tensors=change)
    with pytest.raises(UserError, match=says):
        load_peft(base, folder)


def test_tensors_that_are_no_targets(base, folder):
    """PEFT would leave them out without a word."""
    edit(folder, lambda options: options.update(exclude_modules=["2.self_attn.q_proj"]))
    says = refusal(base, folder)
    assert f"has tensors for {LAYERS}.2.self_attn.q_proj, which adapter_config.json does not name" in says


def test_targets_in_the_vision_tower_without_tensors(base, folder):
    """Part of the adapter is gone."""
    edit(folder, lambda options: options["target_modules"].append("attn.qkv"))
    assert "no tensors for model.visual.blocks.0.attn.qkv" in refusal(base, folder)


# Other names of modules


@pytest.mark.parametrize("family", BACKBONES)
def test_adapter_of_the_text_only_model(family, tmp_path):
    """It is for the same modules of the whole model, also if both spell the names alike."""
    whole = abstract(read_config(json.loads(tiny_config(family).to_json_string()), "config.json"))
    text = abstract(backbone_config(whole.config))
    lora = init_lora(text, ["L0-attn", "L3-mlp"], r=2, alpha=3, dropout=0, key=jax.random.key(0))
    save_peft(lora, text, tmp_path)
    assert all("model.layers." in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    edit(tmp_path, lambda options: options.update(target_modules=r".*(0\.self_attn|3\.mlp)\.\w+_proj"))
    chex.assert_trees_all_equal(load_peft(whole, tmp_path), lora)


@pytest.mark.parametrize("family, older", [("llava", "language_model.model.layers"), ("qwen2_5_vl", "model.layers")])
def test_names_of_an_older_transformers(family, older, tmp_path):
    model = abstract(read_config(json.loads(tiny_config(family).to_json_string()), "config.json"))
    lora = init_lora(model, ["L0-attn", "L3-mlp"], r=2, alpha=3, dropout=0, key=jax.random.key(0))
    save_peft(lora, model, tmp_path)
    edit(tmp_path, tensors=moved(FAMILIES[family].layers, older))
    assert "does not name" in refusal(model, tmp_path)  # target_modules has the new names
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    options["target_modules"] = [name.replace(FAMILIES[family].layers, older) for name in options["target_modules"]]
    (tmp_path / "adapter_config.json").write_text(json.dumps(options))
    chex.assert_trees_all_equal(load_peft(model, tmp_path), lora)


def test_logits_of_an_adapter_of_the_text_only_model(oracle, base, logits, tmp_path):
    """PEFT is given the names of the whole model, which it needs."""
    text = tiny_model(tiny_config("qwen3", text={"num_hidden_layers": 6}))
    trained(text, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path / "text")
    renamed = shutil.copytree(tmp_path / "text", tmp_path / "whole")
    edit(renamed, tensors=moved("base_model.model.model.layers", f"base_model.model.{LAYERS}"))
    want = peft_logits(reloaded(oracle, renamed))
    assert np.abs(want - logits()).max() > 0.1
    np.testing.assert_allclose(logits(load_peft(base, tmp_path / "text")), want, atol=LOGITS)


def test_two_spellings(base, folder):
    edit(folder, tensors=moved(f"{LAYERS}.2.", "model.layers.2."))
    assert "spells the names of modules in several ways" in refusal(base, folder)
    edit(folder, tensors=copied("model.layers.2.", f"{LAYERS}.2."))
    assert "twice" in refusal(base, folder)


# The base model


def warnings_of(recwarn):
    return [str(w.message) for w in recwarn if "was trained on" in str(w.message)]


def test_another_base_model(base, folder, recwarn):
    edit(folder, lambda options: options.update(base_model_name_or_path="Qwen/Qwen3-VL-4B-Instruct"))
    load_peft(base, folder)  # nobody tells what the model is called
    load_peft(base, folder, "models/qwen3-vl-4b-instruct/")
    assert warnings_of(recwarn) == []
    load_peft(base, folder, "models/Qwen3-VL-4B-Thinking")
    (says,) = warnings_of(recwarn)
    assert "trained on Qwen/Qwen3-VL-4B-Instruct, but the model is models/Qwen3-VL-4B-Thinking" in says


def test_another_class(base, folder, recwarn):
    """PEFT writes the class when no task is given."""
    load_peft(base, folder)
    edit(folder, lambda options: options["auto_mapping"].update(base_model_class="Qwen3ForCausalLM"))
    load_peft(base, folder)
    assert warnings_of(recwarn) == []
    edit(folder, lambda options: options["auto_mapping"].update(base_model_class="LlamaForCausalLM"))
    load_peft(base, folder)
    (says,) = warnings_of(recwarn)
    assert "trained on LlamaForCausalLM, but the model is Qwen3VLForConditionalGeneration" in says
