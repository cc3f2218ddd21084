"""What features do and what drives them: ablation and heads on an embedded model, against runs without shortcuts."""

import jax
import numpy as np
import pytest
from kind_cases import one_sentence

import vlm_jax
from interventions import Gate, ProjectOut, Replace, bind, sweep_runs
from interventions.diff.ablation import SITES, answer_tokens, answer_under, with_directions, without_directions
from interventions.diff.heads import agreement, head_scores, mean_image_embedding
from interventions.diff.place import Place
from interventions.engine.grids import patch_grid
from interventions.engine.read import Projections
from interventions.kinds.add import Add
from interventions.kinds.groups import label, members
from vlm_jax import UserError
from vlm_jax.data import load_task
from vlm_jax.prompts import encode

LAYER = 3
DIRECTIONS = np.random.default_rng(0).standard_normal((3, 128)).astype(np.float32)


@pytest.fixture(scope="module")
def mini():
    return vlm_jax.load("mini-qwen3-vl")


@pytest.fixture(scope="module")
def examples():
    return load_task("mini-vsr", split="test", limit=3)


@pytest.fixture(scope="module")
def encoded(mini, examples):
    return encode(examples, mini[1], mini[0].config, with_answer=False)


def test_up_to_a_layer(mini, encoded):
    """The last residual stream is that layer's; another layer's is not."""
    model, _ = mini
    x, _ = model.up_to(LAYER + 1).hidden(encoded.inputs)
    taps = model(encoded.inputs, taps=["text.resid_post"]).taps["text.resid_post"]
    np.testing.assert_allclose(x, taps[LAYER], atol=1e-4)
    assert np.abs(np.asarray(x - taps[LAYER + 1])).max() > 0.1
    with pytest.raises(UserError, match="has 8 layers, not 9"):
        model.up_to(9)


def test_projections_read_the_residual_stream(mini, encoded):
    """In the sweep and in its naive twin."""
    short = mini[0].up_to(LAYER + 1)
    where = np.isin(label(encoded), members("text"))
    read = Projections.of(DIRECTIONS, where)
    variants = [Add(np.full((1, 128), size, np.float32), "text.resid_pre", slot) for size, slot in _places()]
    runs = {engine: sweep_runs(short, encoded.inputs, variants, read, engine=engine) for engine in ("sweep", "naive")}
    np.testing.assert_allclose(runs["sweep"].variants, runs["naive"].variants, rtol=1e-3, atol=1e-2)
    stream = np.asarray(mini[0](encoded.inputs, taps={"text.resid_post": (LAYER,)}).taps["text.resid_post"][0])
    want = np.einsum("btd,bt,nd->bn", stream, where, DIRECTIONS)
    np.testing.assert_allclose(runs["sweep"].base, want, rtol=1e-3, atol=1e-2)
    assert np.abs(np.asarray(runs["sweep"].variants) - want).min() > 1e-3
    with pytest.raises(UserError, match="no token is marked"):
        Projections.of(DIRECTIONS, np.zeros_like(where))


def _places():
    for number, size in enumerate((0.5, 1.0, -2.0)):
        yield size, np.where(np.arange(LAYER + 1) == number, 0, 1).astype(np.int32)


def odds_of(mini, encoded, acting):
    """Log-odds of yes against no from all logits of one run."""
    model, processor = mini
    yes, no = answer_tokens(processor, model.config)
    last = np.asarray(encoded.inputs.attention_mask).sum(1) - 1
    logits = np.asarray(model(encoded.inputs, acting).logits)[np.arange(len(last)), last]
    return np.asarray(jax.nn.logsumexp(logits[:, yes], -1) - jax.nn.logsumexp(logits[:, no], -1))


def test_answers_under_steering(mini, examples, encoded):
    """As a run to whose residual stream the vector is added, on the text behind the picture in its own layer."""
    places = [Place("text.resid_post", layer) for layer in (1, LAYER, 5)]
    found = answer_under(*mini, examples, with_directions(8, places, DIRECTIONS, 20.0), batch=2)
    text = np.isin(label(encoded), members("text")) & np.asarray(encoded.inputs.attention_mask)
    for number, (place, vector) in enumerate(zip(places, DIRECTIONS, strict=True)):
        added = 20 * vector / np.linalg.norm(vector) * text[..., None]
        own = np.where(np.arange(8) == place.layer, 0, 1).astype(np.int32)
        want = odds_of(mini, encoded, (Add(added[None].astype(np.float32), "text.resid_post", own),))
        np.testing.assert_allclose(found.without[number], want, atol=2e-3)
        assert np.abs(want - found.odds).max() > 0.05
    less = answer_under(*mini, examples, with_directions(8, places, DIRECTIONS, -20.0), batch=2)
    assert np.abs(less.without - found.without).max() > 0.05


def test_answers_without_directions(mini, examples, encoded):
    """Log-odds from all logits of single runs in which the direction is removed everywhere."""
    model, processor = mini
    found = answer_under(model, processor, examples, without_directions(8, DIRECTIONS), batch=2)
    slot = {site: np.zeros(8, np.int32) for site in SITES}

    def odds(acting):
        return odds_of(mini, encoded, acting)

    np.testing.assert_allclose(found.odds, odds(()), atol=1e-3)
    for number, vector in enumerate(DIRECTIONS):
        removal = bind((ProjectOut.of(vector[None, None], slot, group="text"),), encoded)
        np.testing.assert_allclose(found.without[number], odds(removal), atol=2e-3)
    assert np.abs(found.without - found.odds).max() > 0.05
    np.testing.assert_array_equal(found.truth, [example.answers[0] == "yes" for example in examples])
    np.testing.assert_array_equal(found.correct, (found.odds > 0) == found.truth)


@pytest.mark.parametrize("name", ["mini-qwen3-vl", "mini-gemma3", "mini-llava"])
def test_answer_tokens(name):
    """They begin the answers as the model is taught them, and none begins both."""
    model, processor = vlm_jax.load(name)
    yes, no = (set(tokens.tolist()) for tokens in answer_tokens(processor, model.config))
    assert not yes & no
    for task in ("mini-vsr", "mini-vqa"):
        for example in load_task(task, split="test", limit=2):
            batch = encode([example], processor, model.config)
            first = int(np.asarray(batch.inputs.input_ids)[0, batch.spans["answer"][0].argmax()])
            assert first in (yes if example.answers[0] == "yes" else no)


def test_questions_without_yes_or_no(mini):
    with pytest.raises(UserError, match="ablations need questions with yes or no") as caught:
        answer_under(*mini, load_task("mini-okvqa", split="test", limit=1), without_directions(8, DIRECTIONS))
    assert one_sentence(str(caught.value))


@pytest.fixture(scope="module")
def mean_image(mini, examples):
    return mean_image_embedding(*mini, examples)


def test_mean_image_embedding(mini, examples, encoded, mean_image):
    embeddings = np.asarray(mini[0].embed(encoded.inputs)[0].x)
    np.testing.assert_allclose(mean_image, embeddings[encoded.spans["image"]].mean(0), atol=1e-5)
    with pytest.raises(UserError, match="no example has an image"):
        import dataclasses

        mean_image_embedding(*mini, [dataclasses.replace(examples[0], images=())])


@pytest.fixture(scope="module")
def scores(mini, examples, mean_image):
    return head_scores(*mini, examples, DIRECTIONS, LAYER, mean_image, batch=2)


def test_exact_head_scores_are_single_patches(mini, encoded, mean_image, scores):
    """The change when one head's output over the text is that of the run with the mean image."""
    short = mini[0].up_to(LAYER + 1)
    text, image = (np.isin(label(encoded), members(group)) for group in ("text", "image"))
    corrupt = Replace(mean_image, "text.embeddings", where=image)
    grid, _ = patch_grid(["text.head_out"], LAYER + 1, heads=4, tokens=[text])
    read = Projections.of(DIRECTIONS, text)
    runs = sweep_runs(short, encoded.inputs, grid, read, clean=(corrupt,), engine="naive")
    want = np.asarray(runs.base - runs.variants).mean(1).T.reshape(3, LAYER + 1, 4)
    np.testing.assert_allclose(scores.exact, want, rtol=1e-2, atol=1e-2 * np.abs(want).max())
    assert np.ptp(want) > 0.01


def test_attribution_is_the_derivative(mini, encoded, mean_image, scores):
    """Against finite differences: a small part of the way from the clean head's output to the corrupt one's."""
    short = mini[0].up_to(LAYER + 1)
    text, image = (np.isin(label(encoded), members(group)) for group in ("text", "image"))
    corrupt = Replace(mean_image, "text.embeddings", where=image)
    taps = {"text.head_out": None}
    clean_z, corrupt_z = (short(encoded.inputs, acting, taps).taps["text.head_out"] for acting in ((), (corrupt,)))
    away = np.asarray(corrupt_z - clean_z) * text[None, :, :, None, None]

    def read(add):
        x, _ = short.hidden(encoded.inputs, (Add(add, "text.head_out", np.arange(LAYER + 1)),))
        return np.einsum("btd,bt,nd->n", np.asarray(x), text, DIRECTIONS)

    for layer, head in ((0, 1), (2, 3), (LAYER, 0)):
        one = np.zeros_like(away)
        one[layer, :, :, head] = away[layer, :, :, head]
        step = 0.02
        slope = (read(-step * one) - read(step * one)) / (2 * step) / len(text)
        np.testing.assert_allclose(
            scores.signed[:, layer, head], slope, rtol=0.05, atol=0.02 * np.abs(scores.signed).max()
        )
    assert (scores.absolute >= 0).all() and np.abs(scores.signed).max() > 0.01


def test_directions_and_integrated_gradients_differ(mini, examples, mean_image, scores):
    options = {"batch": 2}
    other = head_scores(*mini, examples, DIRECTIONS, LAYER, mean_image, at="B", **options)
    between = head_scores(*mini, examples, DIRECTIONS, LAYER, mean_image, steps=4, **options)
    np.testing.assert_allclose(other.exact, scores.exact, atol=1e-3)
    size = np.abs(scores.signed).max()
    assert np.abs(other.signed - scores.signed).max() > 1e-3 * size
    assert np.abs(between.signed - scores.signed).max() > 1e-3 * size


def test_agreement(scores):
    found = agreement(scores)
    assert len(found) == 3
    same = agreement(scores._replace(signed=scores.exact, absolute=np.abs(scores.exact)))
    assert all(one.rank == pytest.approx(1) and one.first_five == 1 for one in same)
    turned = agreement(scores._replace(signed=-scores.exact))
    assert all(one.rank == pytest.approx(-1) for one in turned)
    (constant, *_) = agreement(scores._replace(signed=np.zeros_like(scores.signed)))
    assert np.isnan(constant.rank)


def test_heads_under_an_intervention(mini, examples, mean_image, scores):
    """Half of an attention output is a model with half an output matrix. What acts behind the features' layer does not
    matter; the control is the scores without an intervention."""
    model, processor = mini
    scales = np.ones(8, np.float32)
    scales[[1, 6]] = 0.5
    base = (Gate({"text.attn_out": scales}),)
    found = head_scores(*mini, examples, DIRECTIONS, LAYER, mean_image, batch=2, base=base)
    halved = jax.tree.map(lambda leaf: leaf, model)
    kernel = halved.text.layers.self_attn.o_proj.kernel
    kernel[...] = kernel[...].at[1].multiply(0.5)
    want = head_scores(halved, processor, examples, DIRECTIONS, LAYER, mean_image, batch=2)
    for name in ("exact", "signed"):
        one, other, plain = (np.asarray(getattr(s, name)) for s in (found, want, scores))
        np.testing.assert_allclose(one, other, atol=2e-3 * np.abs(other).max())
        assert np.abs(plain - other).max() > 2e-2 * np.abs(other).max()


def test_answers_under_an_intervention(mini, examples):
    """The cut that acts throughout is in every run."""
    cut = Gate.cut(8, [2])
    removed = without_directions(8, DIRECTIONS)
    found = answer_under(*mini, examples, removed, batch=2, base=(cut,))
    pairs = answer_under(*mini, examples, [cut], batch=2)
    np.testing.assert_allclose(found.odds, pairs.without[0], atol=1e-3)
    assert np.abs(found.odds - pairs.odds).max() > 1e-2
