"""Attributions add up to transformers' logits, and each part is what its hooks' values give in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kind_cases import CAUGHT, HEADS, LAYERS, TOLERANCE, WIDTH, error, one_sentence, slot

import vlm_jax
from interventions import Add, Gate, HeadGate, LoRA, LoReFT
from interventions.lens.attribution import attribute
from vlm_jax import UserError
from vlm_jax.data import Example, load_task
from vlm_jax.prompts import encode
from vlm_jax.registers import Registers


def found(observed, foil=True, **options):
    case = observed.case
    args = observed.at, observed.word, observed.foil if foil else None
    return attribute(case.model, case.inputs["left"], *args, **options)


def rms(x, eps):
    return np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def parts(observed, frozen=True, sandwich=True):
    """The parts from the values that hooks saw, and transformers' parameters.

    Args:
        frozen: every part is divided by the last stream's root mean square; else by its own (a control).
        sandwich: heads go through the norm behind Gemma's attention; else around it (a control).
    """
    eps = observed.case.config.get_text_config().rms_norm_eps
    gain, last = observed.gain("model.language_model.norm.weight"), observed.seen("text.resid_post")[-1]
    towards = observed.direction * gain / rms(last, eps)

    def of(x):
        return (x * towards if frozen else x / rms(x, eps) * gain * observed.direction).sum(-1)

    out, heads, rest = observed.seen("text.attn_out"), [], []
    for layer in range(LAYERS):
        name = f"model.language_model.layers.{layer}."
        weight = observed.tensor(f"{name}self_attn.o_proj.weight").reshape(WIDTH, HEADS, -1)
        read = np.einsum("bhd,whd->bhw", observed.seen("text.head_out")[layer], weight)
        if observed.case.config.model_type == "gemma3" and sandwich:
            read /= rms(read.sum(1), eps)[:, None]
            read *= observed.gain(f"{name}post_attention_layernorm.weight")
        heads.append((read * towards[:, None]).sum(-1))
        rest.append(((out[layer] - read.sum(1)) * towards).sum(-1))
    made = {
        "embeddings": of(observed.seen("text.embeddings")),
        "attn": of(out).T,
        "mlp": of(observed.seen("text.mlp_out")).T,
        "heads": np.stack(heads, 1),
        "attn_rest": np.stack(rest, 1),
    }
    if "text.deepstack" in observed.sites:
        made["deepstack"] = of(observed.seen("text.deepstack")).T
    return made


def test_parts_equal_hooks(observed):
    got, want = found(observed), parts(observed)
    for name, value in want.items():
        assert error(np.asarray(getattr(got, name)), value) < TOLERANCE, name
    assert np.abs(want["heads"]).max() > 0.1 and np.abs(want["attn"] - want["mlp"]).max() > 0.1
    assert not np.asarray(got.edits).any()


@pytest.mark.parametrize("foil", [False, True])
def test_sum_is_the_logit_of_transformers(observed, foil):
    got = found(observed, foil)
    rows = np.arange(len(observed.at))
    logits = observed.sites["logits"][rows, observed.at]
    want = logits[rows, observed.word] - (logits[rows, observed.foil] if foil else 0)
    assert np.abs(want).max() > 0.5
    assert error(np.asarray(got.logit), want) < TOLERANCE
    assert error(np.asarray(got.total()), want) < TOLERANCE
    assert error(np.asarray(got.heads.sum(-1) + got.attn_rest), np.asarray(got.attn)) < TOLERANCE


def summed(made):
    return made["embeddings"] + sum(made[name].sum(1) for name in ("attn", "mlp", "deepstack") if name in made)


def test_unfrozen_norm_is_caught(observed):
    """The control: parts that are divided by their own norm do not add up to the logit."""
    logit = np.asarray(found(observed).logit)
    assert error(summed(parts(observed)), logit) < TOLERANCE
    assert error(summed(parts(observed, frozen=False)), logit) > CAUGHT


def test_missing_deepstack_is_caught(observed_of):
    """The control: at visual tokens the sum lacks it, at text tokens it is 0."""
    got = found(observed_of("qwen3_vl"))
    short = np.abs(np.asarray(got.total() - got.deepstack.sum(1) - got.logit))
    assert short[:2].min() > CAUGHT and short[2] < TOLERANCE  # the third row has no image
    assert not np.asarray(found(observed_of("gemma3")).deepstack).any()


def test_heads_without_the_sandwich_norm_are_caught(observed_of):
    """The control, in Gemma 3; the other families have no such norm."""
    observed = observed_of("gemma3")
    got, want = found(observed), parts(observed, sandwich=False)
    assert error(np.asarray(got.heads), want["heads"]) > CAUGHT
    assert error(np.asarray(got.attn), want["heads"].sum(-1)) > CAUGHT
    llava = observed_of("llava")
    assert error(np.asarray(found(llava).heads), parts(llava, sandwich=False)["heads"]) < TOLERANCE


def with_biases(model):
    """The model with random biases of the attention's linears, o_proj's included."""
    linears = ("q_proj", "k_proj", "v_proj", "o_proj")
    config = dataclasses.replace(model.config, text=dataclasses.replace(model.config.text, attention_bias=linears))
    own = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}
    shapes = jax.eval_shape(lambda: vlm_jax.Model(config, jax.random.key(0)))
    paths, structure = jax.tree_util.tree_flatten_with_path(shapes)
    rng = np.random.default_rng(0)
    leaves = [
        own.get(jax.tree_util.keystr(path), jnp.asarray(0.3 * rng.standard_normal(leaf.shape, np.float32)))
        for path, leaf in paths
    ]
    return jax.tree.unflatten(structure, leaves)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_bias_of_the_output_is_the_rest(observed_of, family):
    """No checkpoint of these families has one, so the model gets one here."""
    observed, rows = observed_of(family), np.arange(3)
    model, inputs = with_biases(observed.case.model), observed.case.inputs["left"]
    got = attribute(model, inputs, observed.at, observed.word)
    logits = np.asarray(model(inputs).logits)[rows, observed.at]
    assert error(np.asarray(got.total()), logits[rows, observed.word]) < TOLERANCE
    assert np.abs(np.asarray(got.attn_rest)).min() > 1e-5 and np.abs(np.asarray(got.attn_rest)).max() > CAUGHT
    assert error(np.asarray(got.heads.sum(-1) + got.attn_rest), np.asarray(got.attn)) < TOLERANCE


def interventions_of(case):
    rng = np.random.default_rng(1)
    width = case.model.config.text.num_attention_heads * case.model.config.text.head_dim
    weights = tuple(0.3 * rng.standard_normal(shape, np.float32) for shape in ((1, width, 2), (1, 2, WIDTH)))
    gates = np.ones((LAYERS, HEADS), np.float32)
    gates[1, 2] = 0
    return {
        "gate": Gate({"text.mlp_out": np.array([1, 0.5, 1, 1], np.float32)}),
        "head": HeadGate(gates),
        "add": Add(case.vectors, "text.resid_post", slot(1)),
        "mid": Add(case.vectors, "text.resid_mid", slot(2)),
        "embeddings": Add(case.vectors[0]),
        "editor": LoReFT({"text.resid_post": case.loreft}, {"text.resid_post": slot(2)}),
        "lora": LoRA({"text.self_attn.o_proj": weights}, {"text.self_attn.o_proj": slot(1)}, np.float32(1.0)),
        "attn": Add(case.vectors, "text.attn_out", slot(3)),
    }


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl"])
@pytest.mark.parametrize("name", ["gate", "head", "add", "mid", "embeddings", "editor", "lora", "attn"])
def test_sum_is_the_logit_under_interventions(observed_of, family, name):
    observed = observed_of(family)
    case, rows = observed.case, np.arange(3)
    acting = (interventions_of(case)[name],)
    got = found(observed, interventions=acting)
    logits = np.asarray(case.model(case.inputs["left"], acting).logits)[rows, observed.at]
    assert error(np.asarray(got.total()), logits[rows, observed.word] - logits[rows, observed.foil]) < TOLERANCE
    assert error(np.asarray(got.heads.sum(-1) + got.attn_rest), np.asarray(got.attn)) < TOLERANCE
    edited = np.abs(np.asarray(got.edits)).max(0) > CAUGHT
    layer = {"add": 1, "mid": 2, "editor": 2}.get(name)
    assert edited.tolist() == [number == layer for number in range(LAYERS)]
    behind = np.abs(np.asarray(got.attn_rest)).max(0) > CAUGHT
    assert behind.tolist() == [number == {"lora": 1, "attn": 3}.get(name) for number in range(LAYERS)]
    if name == "head":
        assert not np.asarray(got.heads)[:, 1, 2].any() and np.asarray(got.heads)[:, 1, 1].any()


def test_final_norm_is_refused(observed_of):
    observed = observed_of("llava")
    with pytest.raises(UserError, match=r"Add acts on text\.norm") as raised:
        found(observed, interventions=(Add(observed.case.vectors[0], "text.norm"),))
    assert one_sentence(raised.value)


def test_text_only_models_and_registers():
    model, processor = vlm_jax.load("mini-qwen3-vl")
    text = [Example("a", (), "Who lives in the swamp?", ("moss",)), Example("b", (), "Where?", ("island",))]
    end = processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")
    registered = model.with_registers(Registers(4, end, "register"))
    for own, examples in ((model.backbone(), text), (registered, load_task("mini-okvqa", split="trace", limit=2))):
        batch = encode(examples, processor, own.config, with_answer=False)
        at = np.asarray(batch.inputs.attention_mask).sum(1) - 1
        got = attribute(own, batch.inputs, at, np.array([40, 50]))
        logits = np.asarray(own(batch.inputs).logits)[np.arange(2), at]
        assert error(np.asarray(got.total()), logits[np.arange(2), [40, 50]]) < 5e-4 * np.abs(logits).max()
