"""FLOPs by formula against the matmuls of traced programs."""

import jax
import numpy as np
import pytest
from matmuls import matmul_flops

from train.plan import prompts
from vlm_jax.checkpoints.leaves import abstract
from vlm_jax.info import config_of
from vlm_jax.nn.flops import head_flops, layers_flops, vision_flops

BATCH, LENGTH = 2, 256


@pytest.fixture(scope="module", params=["mini-qwen3-vl", "mini-gemma3", "mini-llava"])
def case(request):
    model = abstract(config_of(request.param))
    return model, prompts(model.config, BATCH, LENGTH)[0]


def traced_flops(function, *args) -> int:
    return matmul_flops(jax.make_jaxpr(function)(*args).jaxpr)


def test_the_decoder_and_its_head(case):
    """The program computes every query's products with all keys, of which the formula counts those that it may see."""
    model, inputs = case
    text = model.config.text
    features = traced_flops(lambda model: model.features(inputs)[0], model)
    hidden = traced_flops(lambda model: model.hidden(inputs)[0], model) - features
    masked = LENGTH * LENGTH - LENGTH * (LENGTH + 1) / 2
    masked *= BATCH * 4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim
    assert hidden == pytest.approx(layers_flops(model, BATCH, LENGTH) + masked, rel=0.01)
    logits = traced_flops(lambda model: model(inputs).logits, model)
    assert logits - hidden - features == head_flops(model, BATCH * LENGTH)


def test_tokens_behind_others_cost_what_the_whole_costs_more():
    model = abstract(config_of("mini-qwen3-vl"))
    parts = layers_flops(model, 1, 100) + layers_flops(model, 1, 28, before=100)
    assert parts == pytest.approx(layers_flops(model, 1, 128))


def test_the_vision_tower(case):
    """The formula leaves attention out, and counts parameters that are no kernel."""
    model, inputs = case
    vision = model.config.vision
    patches = float(np.asarray(inputs.images.patch_mask).sum())
    per_image = np.asarray(inputs.images.patch_mask).shape[1]
    attention = 4 * model.depths["visual"] * vision.hidden_size * per_image * patches
    computed = traced_flops(lambda model: model.features(inputs)[0], model) - attention
    assert 0.5 * computed < vision_flops(model, inputs) < 2 * computed
    assert vision_flops(model, inputs.replace(images=None)) == 0
