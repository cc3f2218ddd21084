"""Kinds that edit values by vectors, Add, Replace, ProjectOut, LoReFT and Noise, against PyTorch hooks and autograd."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_oracle import (
    edited,
    reader,
    tensors,
    writer,
)
from kind_cases import (
    CAUGHT,
    HEADS,
    LAYERS,
    TOLERANCE,
    WIDTH,
    error,
    mixed,
    slot,
)

import vlm_jax
from interventions import (
    Add,
    Noise,
)

pytestmark = pytest.mark.usefixtures("quick_programs")


def projected_out(vectors, x):
    basis, _ = torch.linalg.qr(torch.from_numpy(vectors).double().T)
    return x - (x.double() @ basis @ basis.T).float()


def reft(case, number, x):
    """P4, equation 1: ``h + R^T (W h + b - R h)`` with orthonormal rows R, spelt out by Gram-Schmidt."""
    r, w, b = (torch.from_numpy(weight[number]).double() for weight in case.loreft)
    rows = []
    for column in r.T:
        for row in rows:
            column = column - (column @ row) * row
        rows.append(column / column.norm())
    rotation, x = torch.stack(rows), x.double()
    return (x + (x @ w + b - x @ rotation.T) @ rotation).float()


RESIDUAL = {
    "add": lambda case, x: x + torch.from_numpy(case.vectors[1]),
    "replace": lambda case, x: torch.from_numpy(case.vectors[1]).expand_as(x),
    "project": lambda case, x: projected_out(case.directions[1], x),
    "loreft": lambda case, x: reft(case, 1, x),
}


@pytest.mark.parametrize("kind", RESIDUAL)
def test_edit_of_the_residual_stream_equals_hook(case, kind):
    """The second of two slots, in one layer, on some tokens."""

    def wanted(layer, where):
        function = RESIDUAL[kind]
        return case.wanted((reader(case.oracle, layer), "input", lambda x: mixed(where, function(case, x), x)))

    layer = LAYERS - 2
    table = slot(layer, 1)
    if kind in ("project", "loreft"):
        table = {"text.resid_post": table}
    got = case.logits(**{kind: case.neutral[kind].replace(slot=table, where=case.some)})
    assert error(got, wanted(layer, case.some)) < TOLERANCE
    assert error(got, wanted(layer + 1, case.some)) > CAUGHT and error(got, wanted(layer, ~case.some)) > CAUGHT


def test_noise_is_drawn_by_row(qwen):
    """Standard deviation, and what is not meant is left alone; a row's noise is the same in any batch."""
    real = qwen.real["left"]
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(0), len(real))))
    scale = np.array([0.5, 1, 2], np.float32)

    def drawn(rows):
        noise = Noise(keys[rows], scale[rows], where=real[rows])
        zeros = jnp.zeros((len(rows), real.shape[1], 512))
        return np.asarray(noise("text.embeddings", zeros, vlm_jax.sites.Context()))

    whole, part = drawn([0, 1, 2]), drawn([2, 0])
    np.testing.assert_array_equal(part, whole[[2, 0]])
    assert not whole[~real].any()
    for row in range(3):
        np.testing.assert_allclose(whole[row][real[row]].std(), scale[row], rtol=0.05)


GRADIENT_SITES = {"text.attn_out": 1, "text.head_out": 2, "text.resid_post": 0}


def test_gradients_equal_autograd(qwen):
    """Of a random linear function of the logits, with respect to zeros that are added in one layer."""
    real = qwen.real["left"]
    shape = (1, *real.shape, WIDTH)
    zeros = {site: np.zeros(shape, np.float32) for site in GRADIENT_SITES}
    head_dim = qwen.model.config.text.head_dim
    zeros["text.head_out"] = np.zeros((1, *real.shape, HEADS, head_dim), np.float32)
    weight = np.random.default_rng(1).standard_normal((*real.shape, 320)).astype(np.float32) * real[..., None]

    @jax.jit
    @jax.grad
    def gradient(zeros, model):
        adds = [Add(value, site, jnp.asarray(slot(GRADIENT_SITES[site]))) for site, value in zeros.items()]
        return (model(qwen.inputs["left"], adds).logits * weight).sum()

    got = gradient(zeros, qwen.model)
    added = {site: torch.from_numpy(zero[0]).requires_grad_() for site, zero in zeros.items()}
    layers = {site: qwen.layers[layer] for site, layer in GRADIENT_SITES.items()}
    heads = added["text.head_out"]
    with edited(
        (writer(layers["text.attn_out"], "attn"), "output", lambda x: x + added["text.attn_out"]),
        (layers["text.head_out"].self_attn.o_proj, "input", lambda x: x + heads.flatten(-2)),
        (reader(qwen.oracle, 0), "input", lambda x: x + added["text.resid_post"]),
    ):
        logits = qwen.oracle(**tensors(qwen.batches["left"]), use_cache=False).logits
        (logits * torch.from_numpy(weight)).sum().backward()
    for site, tensor in added.items():
        want = tensor.grad.numpy()
        assert np.abs(want[real]).max() > 1
        np.testing.assert_allclose(got[site][0][real], want[real], atol=1e-4 * np.abs(want).max(), err_msg=site)
