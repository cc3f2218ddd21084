"""A model that starts from trained ones: whose arrays it gets, and what happens to tokens that they lack."""

import functools

import jax
import numpy as np
import pytest

from train import mini
from train.inherit import inherited
from vlm_jax import Model, load
from vlm_jax.checkpoints.leaves import named_leaves
from vlm_jax.checkpoints.sources import read_config
from vlm_jax.errors import UserError

EMBEDDINGS = "text.embed_tokens.weight"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """mini-llava with random weights, and a tokeniser that did not learn the words about arrangements."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("untrained")
    mini.write_llava(folder, spatial=False)
    model = jax.jit(functools.partial(Model, read_config(folder)))(jax.random.key(0))
    return model, AutoTokenizer.from_pretrained(folder)


def test_each_part_comes_from_its_model(fresh):
    model, tokenizer = fresh
    found = named_leaves(inherited(model, tokenizer, "mini-llava-text", "mini-llava"))
    decoder, tower = (named_leaves(load(name)[0]) for name in ("mini-llava-text", "mini-llava"))
    assert found.keys() == named_leaves(model).keys()
    for name, leaf in found.items():
        if name != EMBEDDINGS:
            np.testing.assert_array_equal(leaf, (decoder if name.startswith("text.") else tower)[name])


def test_nothing_is_inherited_without_a_model(fresh):
    model, tokenizer = fresh
    for ours, theirs in zip(*map(jax.tree.leaves, (inherited(model, tokenizer, None, None), model)), strict=True):
        assert ours is theirs


def test_tokens_keep_their_embeddings_and_new_ones_get_the_mean_of_their_pieces(fresh):
    model, tokenizer = fresh
    _, old = load("mini-llava-text")
    rows = np.asarray(named_leaves(load("mini-llava-text")[0])[EMBEDDINGS])
    found = np.asarray(named_leaves(inherited(model, tokenizer, "mini-llava-text", None))[EMBEDDINGS])
    known, new = old.tokenizer.get_vocab(), tokenizer.get_vocab()
    for token in ("</s>", "\u2581star", "a", "<0x41>"):
        np.testing.assert_array_equal(found[new[token]], rows[known[token]])
    words = [t for t in new if t not in known and t[0] == "\u2581" and t[1:].isalpha()]
    assert len(words) > 5
    for word in words:
        pieces = old.tokenizer(word[1:], add_special_tokens=False).input_ids  # it begins with the space
        np.testing.assert_allclose(found[new[word]], rows[pieces].mean(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "decoder, tower, sentence",
    [
        (None, "mini-llava-text", "mini-llava-text has no vision tower"),
        (None, "mini-qwen3-vl", "name one of this shape"),
        ("mini-nothing", None, "unknown model 'mini-nothing'"),
    ],
)
def test_models_that_do_not_fit_are_refused(fresh, decoder, tower, sentence):
    with pytest.raises(UserError, match=sentence):
        inherited(*fresh, decoder, tower)
