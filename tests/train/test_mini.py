"""The embedded models keep what their READMEs promise, here and in transformers."""

import json

import jax
import numpy as np
import pytest
import torch
from hf_oracle import computing_in, exact
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from eval.evaluation import answer, score_answers
from interventions.trace.options import TraceOptions
from interventions.trace.tracing import trace_examples
from vlm_jax import load
from vlm_jax.checkpoints.sources import MINI, embedded_models
from vlm_jax.data import Example, load_task, pretraining
from vlm_jax.prompts import encode

#: Embedded model -> its ``model_type``.
MODELS = {"mini-qwen3-vl": "qwen3_vl", "mini-gemma3": "gemma3", "mini-llava": "llava"}
#: The stages that mini-llava went through before, kept to be compared with it.
STAGES = {"mini-llava-text": "llama", "mini-llava-align": "llava", "mini-llava-half": "llava"}
#: What zero-shot accuracy must reach.
FLOOR = {"mini-qwen3-vl": 0.30, "mini-gemma3": 0.45, "mini-llava": 0.30}
#: Share of correctly answered samples on which noise must hurt.
HURT = {"mini-qwen3-vl": 0.8, "mini-gemma3": 0.8, "mini-llava": 0.8}
FAMILIES = ("knowledge", "perception")


def transformers_model(auto, name):
    """An embedded model in transformers, in float64, because its own float32 rounding shows in logits of 45."""
    kwargs = {"attn_implementation": "eager", "dtype": torch.float64}
    return exact(lambda: auto.from_pretrained(MINI / name, **kwargs)).eval()


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def mini(name):
    return load(name)


def test_these_are_all():
    assert embedded_models() == sorted(MODELS | STAGES)


@pytest.mark.parametrize("name, model_type", (MODELS | STAGES).items())
def test_it_is_an_ordinary_folder_of_at_most_10_mb(name, model_type):
    folder = MINI / name
    assert (folder / "model.safetensors").stat().st_size <= 10_000_000
    assert json.loads((folder / "config.json").read_text())["model_type"] == model_type
    assert {file.suffix for file in folder.iterdir()} == {".json", ".jinja", ".md", ".safetensors"}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_answers_the_same(name, mini, family):
    """Loaded unmodified, transformers has the same logits and generates the same answers."""
    model, processor = mini
    oracle = transformers_model(AutoModelForImageTextToText, name)
    examples = load_task(family, split="test", limit=9)
    ours = answer(model, processor, examples, batch=9, max_new_tokens=4).texts
    forward = jax.jit(lambda model, inputs: model(inputs).logits)
    for example, text in zip(examples, ours, strict=True):
        batch = encode([example], processor, model.config, with_answer=False)
        inputs = batch.inputs
        length = int(inputs.attention_mask.sum())
        kinds = torch.tensor(batch.spans["image"][:, :length], dtype=torch.int)
        arrays = {"input_ids": torch.tensor(inputs.input_ids[:, :length], dtype=torch.long)}
        pixels = processor.image_processor(images=list(example.images), return_tensors="np")
        arrays |= {k: torch.tensor(pixels[k]) for k in ("pixel_values", "image_grid_thw") if k in pixels}
        if named := {"qwen3_vl": "mm_token_type_ids", "gemma3": "token_type_ids"}.get(MODELS[name]):
            arrays[named] = kinds
        with torch.no_grad(), computing_in(torch.float64):
            logits = oracle(**arrays).logits.numpy()
            tokens = oracle.generate(**arrays, max_new_tokens=4)[0, length:]
        np.testing.assert_allclose(np.asarray(forward(model, inputs))[:, :length], logits, atol=1e-4)
        assert processor.tokenizer.decode(tokens, skip_special_tokens=True).strip() == text


@pytest.mark.release
@pytest.mark.parametrize("family", FAMILIES)
def test_there_is_room_for_fine_tuning(name, mini, family):
    """Zero-shot accuracy leaves room above and shows that the model knows its world."""
    model, processor = mini
    examples = load_task(family, split="test", limit=300)
    results = score_answers(examples, answer(model, processor, examples).texts).results
    assert FLOOR[name] <= results["accuracy"] <= 0.75


@pytest.mark.release
@pytest.mark.parametrize("family", FAMILIES)
def test_noise_on_the_question_hurts_what_is_known(name, mini, family):
    """TE > 0 on most of the traced samples that the model answers correctly."""
    model, processor = mini
    examples = load_task(family, split="trace", limit=96)
    records = score_answers(examples, answer(model, processor, examples).texts).records
    correct = np.array([record["correct"] for record in records])
    te = trace_examples(model, processor, examples, TraceOptions(), family).te[:, 0]
    assert correct.sum() >= 20
    assert np.mean(te[correct] > 0) >= HURT[name]


def test_the_text_stage_knows_the_facts():
    """The decoder before it ever saw a picture: facts by name, here as in transformers."""
    model, processor = load("mini-llava-text")
    oracle = transformers_model(AutoModelForCausalLM, "mini-llava-text")
    turns = [turn for turn in map(pretraining.text_fact, range(40)) if turn.qa][:20]
    examples = [Example(str(i), (), turn.prompt, (turn.answer,)) for i, turn in enumerate(turns)]
    results = score_answers(examples, answer(model, processor, examples).texts).results
    assert results["accuracy"] >= 0.8
    inputs = encode(examples[:1], processor, model.config).inputs
    length = int(inputs.attention_mask.sum())
    with torch.no_grad(), computing_in(torch.float64):
        logits = oracle(torch.tensor(inputs.input_ids[:, :length], dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(np.asarray(model(inputs).logits)[:, :length], logits, atol=1e-4)


def test_the_stages_are_one_model_on_its_way():
    """Equal shapes, and every stage's decoder is nearer to the next stage's than to the last one's."""
    text, align, last = (load(name)[0].text for name in ("mini-llava-text", "mini-llava-align", "mini-llava"))

    def apart(a, b):
        return sum(float(((x - y) ** 2).sum()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)) ** 0.5

    assert 0 < apart(text, align) < apart(text, last)
    assert 0 < apart(align, last) < apart(text, last)
