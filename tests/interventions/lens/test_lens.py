"""The logit lens, against the final norm and the unembedding of transformers on the streams that its hooks see."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from kind_cases import CAUGHT, TOLERANCE, error, one_sentence

import interventions.lens.lens as lens_module
import vlm_jax
from interventions import Add
from interventions.lens.lens import logit_lens
from vlm_jax import UserError

K = 4


def capped(model, cap):
    """The model with a softcap on its logits."""
    text = dataclasses.replace(model.config.text, final_logit_softcapping=cap)
    config = dataclasses.replace(model.config, text=text)
    shapes = jax.eval_shape(lambda: vlm_jax.Model(config, jax.random.key(0)))
    return jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(model))


def streams(observed):
    """The embeddings and the stream after every layer ``(P, B, T, D)``; zeros at padding."""
    layers = np.nan_to_num(observed.sites["text.resid_post"])
    return np.concatenate([np.nan_to_num(observed.sites["text.embeddings"])[None], layers])


def unembedded(observed, x):
    """transformers' final norm and unembedding."""
    with torch.no_grad():
        return observed.case.oracle.lm_head(observed.decoder.norm(torch.from_numpy(x))).numpy()


def read(observed, **options):
    """The lens at every token, ``(P, B, T, ...)``."""
    case = observed.case
    batch, length = case.real["left"].shape
    at = np.broadcast_to(np.arange(length), (batch, length))
    found = logit_lens(case.model, case.inputs["left"], at, observed.word, k=K, **options)
    return jax.tree.map(lambda a: np.moveaxis(np.asarray(a), 0, 1), found)


def test_unembed_is_the_norm_and_the_head(observed):
    x = streams(observed)
    found = np.asarray(observed.case.model.unembed(x))
    assert error(found, unembedded(observed, x)) < TOLERANCE
    assert error(np.asarray(observed.case.model.text.logits(x)), unembedded(observed, x)) > CAUGHT  # without the norm
    logits = np.asarray(observed.case.model(observed.case.inputs["left"]).logits)
    real = observed.case.real["left"]
    assert error(found[-1][real], logits[real]) < TOLERANCE


def test_lens_equals_transformers(observed):
    found, real = read(observed), observed.case.real["left"]
    logits = unembedded(observed, streams(observed))[:, real]
    probs = torch.from_numpy(logits).double().softmax(-1).numpy()

    def at(values):
        return values[:, real]

    best = -np.sort(-probs, -1)[..., :K]
    assert error(at(found.probability), best) < TOLERANCE
    assert error(np.take_along_axis(probs, at(found.words), -1), best) < TOLERANCE
    word = np.broadcast_to(observed.word[:, None], real.shape)[real]
    tokens = np.arange(len(word))
    gold = logits[:, tokens, word]
    assert error(at(found.gold), probs[:, tokens, word]) < 1e-5
    low, high = (1 + (logits > gold[..., None] + shift).sum(-1) for shift in (1e-4, -1e-4))
    assert ((low <= at(found.rank)) & (at(found.rank) <= high - 1)).all()
    assert len(np.unique(at(found.rank))) > 10
    # The control: the stream of the layer before is another one.
    assert error(at(found.probability)[1:], best[:-1]) > CAUGHT


def test_deepstack_is_part_of_the_stream(observed_of):
    """The control: without what DeepStack adds, the lens of visual tokens says something else."""
    observed = observed_of("qwen3_vl")
    image = observed.case.masks["left"]["image"]
    without = np.nan_to_num(observed.sites["text.resid_post"] - observed.sites["text.deepstack"])
    probs = torch.from_numpy(unembedded(observed, without[0])).softmax(-1).numpy()
    difference = np.abs(np.sort(probs, -1)[..., : -K - 1 : -1] - read(observed).probability[1])
    assert difference[image].max() > CAUGHT
    assert difference[observed.case.real["left"] & ~image].max() < TOLERANCE


@pytest.mark.parametrize("most", [1, 700, 5000])
def test_chunks_change_nothing(observed_of, monkeypatch, most):
    observed = observed_of("gemma3")
    whole = read(observed)
    monkeypatch.setattr(lens_module, "_MOST", most)
    jax.clear_caches()
    sizes, unembed = [], vlm_jax.Model.unembed

    def counted(model, x):
        sizes.append(len(x))
        return unembed(model, x)

    monkeypatch.setattr(vlm_jax.Model, "unembed", counted)
    parts = read(observed)
    jax.clear_caches()
    vocab = observed.case.model.config.text.vocab_size
    assert sizes and max(sizes) <= max(1, most // vocab)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_softcap(observed_of):
    """The lens applies it, as a model that has one does to its own logits."""
    observed = observed_of("gemma3")
    case = observed.case
    model = capped(case.model, 3.0)
    inputs, last = case.inputs["left"], np.full((3, 1), case.real["left"].shape[1] - 1)
    logits = observed.sites["logits"][:, -1].astype(np.float64)
    probs = torch.from_numpy(3 * np.tanh(logits / 3)).softmax(-1).numpy()
    found = logit_lens(model, inputs, last, observed.word, k=3)
    assert error(np.asarray(found.probability)[:, -1, 0], -np.sort(-probs)[:, :3]) < TOLERANCE
    plain = logit_lens(case.model, inputs, last, observed.word, k=3)
    assert error(np.asarray(plain.probability)[:, -1, 0], -np.sort(-probs)[:, :3]) > CAUGHT


def test_interventions_act(observed_of):
    case = observed_of("llava").case
    vector = Add(case.vectors, "text.resid_post", np.array([9, 9, 0, 9], np.int32))
    plain, changed = read(observed_of("llava")), read(observed_of("llava"), interventions=(vector,))
    same = [np.abs(a - b).max() < 1e-6 for a, b in zip(plain.gold, changed.gold, strict=True)]
    assert same == [True, True, True, False, False]  # the embeddings, layers 0 and 1; layers 2 and 3


def test_refused(observed_of):
    observed = observed_of("llava")
    case = observed.case
    args = case.model, case.inputs["left"], observed.at[:, None], observed.word
    with pytest.raises(UserError, match="keep 0 words of"):
        logit_lens(*args, k=0)
    with pytest.raises(UserError, match=r"Add acts on text\.norm") as raised:
        logit_lens(*args, interventions=(Add(case.vectors[0], "text.norm"),))
    assert one_sentence(raised.value)
