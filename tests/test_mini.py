"""The embedded models keep what their READMEs promise, here and in transformers."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from eval.accuracy import answer, score
from interventions.trace import TraceOptions, trace_examples
from vlm_jax import load
from vlm_jax.checkpoint import MINI, embedded_models
from vlm_jax.data import load_task
from vlm_jax.prompts import encode

#: Embedded model -> its ``model_type``.
MODELS = {"mini-qwen3-vl": "qwen3_vl", "mini-gemma3": "gemma3"}
#: What zero-shot accuracy must reach; mini-gemma3 reads charts but hardly words.
FLOOR = {"mini-qwen3-vl": 0.30, "mini-gemma3": 0.20}
#: Share of correctly answered samples on which noise must hurt.
HURT = {"mini-qwen3-vl": 0.8, "mini-gemma3": 0.6}
FAMILIES = ("knowledge", "perception")


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def mini(name):
    return load(name)


def test_these_are_all():
    assert embedded_models() == sorted(MODELS)


def test_it_is_an_ordinary_folder_of_at_most_10_mb(name):
    folder = MINI / name
    assert (folder / "model.safetensors").stat().st_size <= 10_000_000
    assert json.loads((folder / "config.json").read_text())["model_type"] == MODELS[name]
    assert {file.suffix for file in folder.iterdir()} == {".json", ".jinja", ".md", ".safetensors"}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_answers_the_same(name, mini, family):
    """Loaded unmodified, transformers has the same logits and generates the same answers."""
    model, processor = mini
    oracle = AutoModelForImageTextToText.from_pretrained(MINI / name, attn_implementation="eager").eval()
    examples = load_task(family, split="test", limit=9)
    ours = answer(model, processor, examples, batch=9, max_new_tokens=4).texts
    for example, text in zip(examples, ours, strict=True):
        batch = encode([example], processor, model.config, with_answer=False)
        inputs = batch.inputs
        length = int(inputs.attention_mask.sum())
        kinds = torch.tensor(batch.spans["image"][:, :length], dtype=torch.int)
        arrays = {"input_ids": torch.tensor(inputs.input_ids[:, :length], dtype=torch.long)}
        pixels = processor.image_processor(images=list(example.images), return_tensors="np")
        arrays |= {k: torch.tensor(pixels[k]) for k in ("pixel_values", "image_grid_thw") if k in pixels}
        arrays["mm_token_type_ids" if "image_grid_thw" in pixels else "token_type_ids"] = kinds
        with torch.no_grad():
            logits = oracle(**arrays).logits.numpy()
            tokens = oracle.generate(**arrays, max_new_tokens=4)[0, length:]
        np.testing.assert_allclose(np.asarray(model(inputs).logits)[:, :length], logits, atol=1e-4)
        assert processor.tokenizer.decode(tokens, skip_special_tokens=True).strip() == text


@pytest.mark.parametrize("family", FAMILIES)
def test_there_is_room_for_fine_tuning(name, mini, family):
    """Zero-shot accuracy leaves room above and shows that the model knows its world."""
    model, processor = mini
    examples = load_task(family, split="test", limit=300)
    results, _ = score(examples, answer(model, processor, examples).texts)
    assert FLOOR[name] <= results["accuracy"] <= 0.75


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_on_the_question_hurts_what_is_known(name, mini, family):
    """TE > 0 on most of the traced samples that the model answers correctly."""
    model, processor = mini
    examples = load_task(family, split="trace", limit=96)
    _, records = score(examples, answer(model, processor, examples).texts)
    correct = np.array([record["correct"] for record in records])
    te = trace_examples(model, processor, examples, TraceOptions(), family).trace.te
    assert correct.sum() >= 20
    assert np.mean(te[correct] > 0) >= HURT[name]
