"""Every kind of representation editor against a transcription of its published formula in PyTorch: values, gradients,
and what stays orthonormal in training."""

import jax
import numpy as np
import optax
import pytest
import torch
from hf_oracle import edited, positions, reader, tensors
from kind_cases import CAUGHT, LAYERS, TOLERANCE, WIDTH, error, mixed, one_sentence, slot

import vlm_jax
from interventions.kinds.reft import EDITOR_KINDS
from train.loop import fit

SITE, RANK = "text.resid_post", 3
#: Kind -> the layer of its editor. All act at once, two of them in layer 0.
PLACES = dict(zip(EDITOR_KINDS, (0, 1, 2, 0, 1, 2), strict=True))
ORTHONORMAL = {"LoReFT", "DiReFT", "ConsReFT", "LobiReFT"}


def rows(projection):
    """R of the released code: the orthonormal factor of a QR decomposition, its signs fixed."""
    q, upper = torch.linalg.qr(projection)
    return (q * torch.where(torch.diagonal(upper) < 0, -1.0, 1.0)).T


#: The formulas as in the docstrings of pyreft's ``interventions.py``, with R or W2 as rows.
PUBLISHED = {
    "LoReFT": lambda h, p, w, b: h + (h @ w + b - h @ rows(p).T) @ rows(p),
    "NoReFT": lambda h, p, w, b: h + (h @ w + b - h @ p) @ p.T,
    "DiReFT": lambda h, p, w, b: h + (h @ w + b) @ rows(p),
    "NodiReFT": lambda h, p, w, b: h + (h @ w + b) @ p.T,
    "ConsReFT": lambda h, p, b: h + (b - h @ rows(p).T) @ rows(p),
    "LobiReFT": lambda h, p, b: h + b @ rows(p),
}


def arrays(name, rng):
    shapes = {"W": (1, WIDTH, RANK), "b": (1, RANK)}
    projection = 0.5 * rng.standard_normal((1, WIDTH, RANK))
    parts = [projection, *(0.3 * rng.standard_normal(shapes[source]) for source in EDITOR_KINDS[name].sources)]
    return tuple(part.astype(np.float32) for part in parts)


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(3)
    return {name: arrays(name, rng) for name in EDITOR_KINDS}


def oracle(case, tensors_of, formulas=PUBLISHED):
    """transformers' logits with every editor as a hook on its layer's output."""
    hooks = [
        (reader(case.oracle, layer), "input", lambda x, name=name: mixed(
            case.some, formulas[name](x, *(part[0] for part in tensors_of[name])), x))
        for name, layer in PLACES.items()
    ]  # fmt: skip
    batch = case.batches["left"]
    with edited(*hooks):
        return case.oracle(**tensors(batch), **positions(case.config, batch), use_cache=False).logits


def editors(case, weights):
    return tuple(
        EDITOR_KINDS[name]({SITE: weights[name]}, {SITE: slot(layer)}, where=case.some)
        for name, layer in PLACES.items()
    )


def test_values_and_gradients_equal_the_published_formulas(case, weights):
    """Of all editors together; the gradient is that of a random linear function of the logits."""
    real = case.real["left"]
    probe = np.random.default_rng(1).standard_normal((*real.shape, 320)).astype(np.float32) * real[..., None]

    @jax.jit
    def program(weights, model, inputs):
        logits = model(inputs, editors(case, weights)).logits
        return (logits * probe[..., : logits.shape[-1]]).sum(), logits

    (_, got), gradients = jax.value_and_grad(program, has_aux=True)(weights, case.model, case.inputs["left"])
    parts = {name: [torch.from_numpy(a).requires_grad_() for a in own] for name, own in weights.items()}
    want = oracle(case, parts)
    (want * torch.from_numpy(probe[..., : want.shape[-1]])).sum().backward()
    want = want.detach()
    assert error(np.asarray(got)[real], want.numpy()[real]) < TOLERANCE
    for name, own in parts.items():
        for i, part in enumerate(own):
            wanted = part.grad.numpy()
            assert np.abs(wanted).max() > 0.1
            np.testing.assert_allclose(
                gradients[name][i], wanted, atol=TOLERANCE * np.abs(wanted).max(), err_msg=f"{name} {i}"
            )
    plain = {name: [part.detach() for part in own] for name, own in parts.items()}
    for one, other in (("LoReFT", "DiReFT"), ("NoReFT", "NodiReFT"), ("ConsReFT", "LobiReFT"), ("LoReFT", "NoReFT")):
        for name, formula in ((one, other), (other, one)):  # the control: each formula is told from its neighbour
            with torch.no_grad():
                swapped = oracle(case, plain, PUBLISHED | {name: PUBLISHED[formula]})
            assert error(np.asarray(got)[real], swapped.numpy()[real]) > CAUGHT, (name, formula)


def used_projection(name, projection):
    """U^T as the kind uses it: what it adds along unit vectors if its linear map reads nothing and b is a unit."""
    zero, columns = np.zeros((1, WIDTH, RANK), np.float32), []
    for unit in np.eye(RANK, dtype=np.float32):
        sources = {"W": zero, "b": unit[None]}
        made = EDITOR_KINDS[name](
            {SITE: (projection, *(sources[s] for s in EDITOR_KINDS[name].sources))}, {SITE: slot(0)}
        )
        columns.append(made(SITE, np.zeros((1, 1, WIDTH), np.float32), vlm_jax.sites.Context(layer=np.int32(0)))[0, 0])
    return np.stack(columns, 1)


@pytest.mark.parametrize("name", EDITOR_KINDS)
def test_what_stays_orthonormal_in_training(name, weights):
    """Fifty steps of Adam towards a random target, from a projection that is orthonormal."""
    rng = np.random.default_rng(5)
    begun = np.linalg.qr(rng.standard_normal((WIDTH, RANK)))[0][None].astype(np.float32)
    h, target = (rng.standard_normal((1, 9, WIDTH)).astype(np.float32) for _ in range(2))

    def loss(weights, batch, key):
        made = EDITOR_KINDS[name]({SITE: weights}, {SITE: slot(0)})
        return ((made(SITE, batch, vlm_jax.sites.Context(layer=0)) - target) ** 2).mean()

    start = (begun, *weights[name][1:])
    adam = {"train": optax.adam(0.02)}
    trained = fit(loss, start, lambda step: h[None], adam, lambda path: "train", steps=50).params
    assert np.abs(np.asarray(trained[0]) - begun).max() > 0.1
    used = used_projection(name, np.asarray(trained[0]))
    off = np.abs(used.T @ used - np.eye(RANK)).max()
    assert off < 1e-5 if name in ORTHONORMAL else off > 0.05


def test_an_editor_of_another_width_is_refused(qwen, weights):
    narrow = tuple(part[:, : WIDTH // 2] if part.ndim == 3 else part for part in weights["LoReFT"])
    editor = EDITOR_KINDS["LoReFT"]({SITE: narrow}, {SITE: slot(0)})
    with pytest.raises(vlm_jax.UserError, match="is for a width of 32, but this model's is 64") as error:
        qwen.model(qwen.inputs["left"], (editor,))
    assert one_sentence(error.value) and len(slot(0)) == LAYERS
