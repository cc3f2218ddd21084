"""OV and QK of heads, against transformers' parameters, and against what its attention does with a single token."""

import numpy as np
import pytest
import torch
from hf_oracle import Recorder, text_layers
from kind_cases import CAUGHT, HEADS, LAYERS, TOLERANCE, WIDTH, error, one_sentence

from interventions.lens.circuits import ov, qk
from vlm_jax import UserError


def weights(observed, layer, head):
    """q, k, v ``(head_dim, D)`` and o ``(D, head_dim)`` of a head, and the first norm's gain."""
    name = f"model.language_model.layers.{layer}."
    groups = observed.case.model.config.text.num_key_value_heads
    assert 1 < groups < HEADS or observed.case.config.model_type == "llava"
    own = {one: observed.tensor(f"{name}self_attn.{one}_proj.weight") for one in "qkvo"}
    shared = head // (HEADS // groups)
    parts = [own["q"].reshape(HEADS, -1, WIDTH)[head]]
    parts += [own[one].reshape(groups, -1, WIDTH)[shared] for one in "kv"]
    return *parts, own["o"].reshape(WIDTH, HEADS, -1)[:, head], observed.gain(f"{name}input_layernorm.weight")


@pytest.mark.parametrize("layer, head", [(0, 0), (2, 3), (3, 1)])
def test_equal_to_transformers_parameters(observed, layer, head):
    model = observed.case.model
    q, k, v, o, gain = weights(observed, layer, head)
    assert error(np.asarray(ov(model, layer, head, fold=False)), (o @ v).T) < TOLERANCE
    assert error(np.asarray(qk(model, layer, head, fold=False)), q.T @ k) < TOLERANCE
    assert error(np.asarray(qk(model, layer, head)), (q * gain).T @ (k * gain)) < TOLERANCE
    behind = 1.0
    if observed.case.config.model_type == "gemma3":
        behind = observed.gain(f"model.language_model.layers.{layer}.post_attention_layernorm.weight")
    assert error(np.asarray(ov(model, layer, head)), (o @ (v * gain)).T * behind) < TOLERANCE
    # The controls: another head, and the other way round.
    assert error(np.asarray(ov(model, layer, (head + 2) % HEADS, fold=False)), (o @ v).T) > CAUGHT
    assert error(np.asarray(qk(model, layer, head, fold=False)), k.T @ q) > CAUGHT


def run_on_one_token(observed, layer):
    """transformers' attention of one token: the normed stream that it reads, and what o_proj gives."""
    own = text_layers(observed.case.oracle)[layer]
    with Recorder() as recorder, torch.no_grad():
        recorder.output("normed", own.input_layernorm)
        recorder.output("out", own.self_attn.o_proj)
        observed.case.oracle(input_ids=torch.tensor([[11]]), use_cache=False)
    return (recorder.one(name)[0, 0].double().numpy() for name in ("normed", "out"))


@pytest.mark.parametrize("layer", range(LAYERS))
def test_ov_is_what_a_token_that_sees_itself_writes(observed, layer):
    """All attention goes to the only token, so the heads' outputs add up to the module's."""
    normed, out = run_on_one_token(observed, layer)
    written = normed @ sum(np.asarray(ov(observed.case.model, layer, head, fold=False)) for head in range(HEADS))
    name = f"model.language_model.layers.{layer}.self_attn."
    if observed.case.config.model_type == "qwen2_5_vl":  # values have a bias, which OV leaves out
        groups = observed.case.model.config.text.num_key_value_heads
        bias = observed.tensor(f"{name}v_proj.bias").reshape(groups, -1).repeat(HEADS // groups, 0).reshape(-1)
        assert error(written, out) > CAUGHT
        written = written + observed.tensor(f"{name}o_proj.weight") @ bias
    assert error(written, out) < TOLERANCE


def test_qk_is_the_score_of_a_token_with_itself(observed_of):
    """At one position, rotary embeddings cancel. LLaVA has neither norms of queries and keys nor biases."""
    observed = observed_of("llava")
    model = observed.case.model
    scores = observed.sites["text.attn_scores"]  # (L, B, H, T, T)
    eps = observed.case.config.get_text_config().rms_norm_eps
    for layer, head in ((0, 0), (2, 3)):
        stream = np.asarray(observed.sites["text.resid_pre"][layer], np.float64)
        x = stream / np.sqrt((stream**2).mean(-1, keepdims=True) + eps)
        made = np.einsum("btd,de,bte->bt", x, np.asarray(qk(model, layer, head)), x)
        real = observed.case.real["left"]
        diagonal = np.diagonal(scores[layer, :, head], axis1=1, axis2=2)[real]
        factor = model.config.text.head_dim**-0.5
        assert error(factor * made[real], diagonal) < TOLERANCE
        assert error(made[real], diagonal) > CAUGHT


@pytest.mark.parametrize("layer, head, says", [(9, 0, "no layer 9"), (0, 9, "no head 9"), (-1, 0, "no layer -1")])
def test_refused(observed_of, layer, head, says):
    for circuit in (ov, qk):
        with pytest.raises(UserError, match=says) as raised:
            circuit(observed_of("llava").case.model, layer, head)
        assert one_sentence(raised.value)
